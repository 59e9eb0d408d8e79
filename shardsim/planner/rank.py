"""Ranking plans: memory first, then a bound for all plans of a form, then the price of few.

What depends on the sizes of roles alone is computed once for all meshes of a form: whether plans
fit in HBM, and how good they can be at best (`planner/bounds.py`). Plans are priced, best bound
first, until no other can be among the best; all that fit and are not priced are pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import hbm_use, least_state_bytes
from shardsim.cost.price import least_step_s, step_time_s
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.planner.beyond import Beyond
from shardsim.planner.bounds import BestLines, FormLines
from shardsim.planner.meshes import Array
from shardsim.planner.space import Part, legal_cells
from shardsim.program.holds import held_by
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.schedule import Schedule
from shardsim.program.shapes import Workload

OBJECTIVES = ("mfu", "step-time", "cost", "chips")

# Plans priced at once: their arrays stay in the processor's cache.
CELLS_AT_ONCE = 300000
# Scores are compared in so many bits of their fraction: what differs in the last few is rounding.
ROUNDED_BITS = 12
# So much a bound may be above the score of a plan that it is meant to be below, from rounding.
SLACK = 1e-9

Cell = tuple[int, int, int]  # pair, remat policy, option
Score = tuple[float, float]  # of two plans that with the smaller one is better
Key = tuple[int, ...]  # machine and sizes of roles


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan of the space and its score."""

    score: Score
    simplicity: tuple[int, ...]  # of equal scores the plan that comes first in the space is better
    machine: Machine
    part: Part  # of one pair
    cell: Cell
    prefetch: bool

    @property
    def rank(self) -> tuple[Score, tuple[int, ...]]:
        """What plans are sorted by."""
        return self.score, self.simplicity


@dataclass(frozen=True, kw_only=True)
class _Fitting:
    """What fits of a part of the space: one pair for all meshes of a form."""

    number: int  # of the part
    machine: Machine
    part: Part
    fits: Array  # of the part's shape
    prefetch: Array  # of the part's shape: whether HBM has room for weights gathered ahead
    full: bool  # whether all of it fills HBM so far that the compiler may hide nothing
    least: Array  # [pairs]: no plan of the form has a better score
    priced: Array  # [pairs]: whether all plans of the form are priced

    def key(self, pair: int) -> Key:
        """Return the machine and the sizes of roles of a pair."""
        return self.key_of(self.part.mesh[pair])

    def key_of(self, mesh: int) -> Key:
        """Return the machine and the sizes of roles of a mesh."""
        sizes = self.part.meshes.sizes[mesh].tolist()
        return (self.machine.chips, self.machine.slices, *self.machine.shape, *sizes)


@dataclass(kw_only=True)
class Ranking:
    """The best plan of each combination of role sizes, of all parts that were looked at."""

    work: Workload
    costs: str
    objective: str  # of OBJECTIVES
    top: int  # how many plans are wanted
    by_layer: bool  # whether layers of one plan may keep different things: only the bound tells
    searched: int = 0  # legal plans looked at
    fit: int = 0  # of those, fitting in HBM
    priced: int = 0  # of those, priced
    bound_s: float = np.inf  # no plan that fits is faster
    smallest_counted_bytes: float = np.inf  # the least peak of those whose layers were counted
    _beyond: Beyond | None = None
    _found: dict[Key, Found] = field(default_factory=dict)
    _fitting: list[_Fitting] = field(default_factory=list)
    _parts: int = 0

    def best(self, limit: float = np.inf) -> list[Found]:
        """Return the best plans, best first; after the first none whose score is above `limit`."""
        best = sorted(self._found.values(), key=lambda found: found.rank)[: self.top]
        return best[:1] + [found for found in best[1:] if found.score[1] <= limit]

    @property
    def promise(self) -> Score:
        """No plan that fits has a better score, but for rounding."""
        if not self._fitting:
            return np.inf, np.inf
        return min(self._score(it.machine, float(it.least.min())) for it in self._fitting)

    # Looking: memory and bounds.

    @property
    def smallest_peak_bytes(self) -> float:
        """The least HBM that any plan needs on a device; where none fits, all are counted first."""
        known = self.smallest_counted_bytes
        return known if self.fit or self._beyond is None else self._beyond.smallest(known)

    @staticmethod
    def look(
        rankings: Sequence[Ranking], machines: Sequence[Machine], lines: BestLines, part: Part
    ) -> None:
        """Note in the ranking of each machine what fits of a part, and how good it can be.

        The rankings are of the same question, the machines `alike`.
        """
        one, chip = rankings[0], machines[0].chip
        layout, many, number = part.layout(), part.many, part.machine
        legal, ways = one._legal(part, layout)
        searched = (legal * ways).sum(axis=(1, 2)) * many
        capacity_bytes = chip.hbm_usable_bytes_per_device
        state = one._state(machines[0], part, layout, legal)
        for index, (ranking, machine) in enumerate(zip(rankings, machines, strict=True)):
            own = number == index
            ranking._count(int(searched[own].sum()))
            own &= np.isfinite(state) & (state > capacity_bytes)
            ranking._rule_out(machine, part.take(own), state[own])
        lean = np.flatnonzero(state <= capacity_bytes)
        if not len(lean):
            return
        part, legal = part.take(lean), legal[lean]
        many, number = many[lean], number[lean]
        least, most, room, hides = one._memory(machines[0], part)
        smallest = _least(least, legal & room)
        # Without prefetching there is room for more; with it no plan is slower.
        fits: Array = legal & room & (least <= capacity_bytes)
        some = np.flatnonzero(fits.any(axis=(1, 2)))
        for index, ranking in enumerate(rankings):
            own = number == index
            ranking.fit += int((fits[own].sum(axis=(1, 2)) * many[own]).sum())
            known = ranking.smallest_counted_bytes
            ranking.smallest_counted_bytes = float(np.min(smallest[own], initial=known))
        if not len(some):
            return
        part, fits, prefetch = part.take(some), fits[some], (most <= capacity_bytes)[some]
        roomy = fits & hides[0][some]
        # Layers may keep what not all of them can: then there may be room to prefetch, too.
        mixed: Array = fits
        ahead: Array = prefetch
        if one.by_layer:
            mixed = np.asarray(fits.any(axis=1, keepdims=True))
            ahead = np.broadcast_to(prefetch.any(axis=1, keepdims=True), part.shape)
        devices = np.array([machine.devices_per_slice for machine in machines])
        schedule, _ = one._schedule(machines[0], part, ahead, devices[part.machine][:, None, None])
        costs = costs_of(one.costs, chip)
        bounds_s = least_step_s(FormLines(lines, part.form), schedule, costs)
        bounds_s = np.broadcast_to(bounds_s, part.shape)
        hidden = hides[1][some]
        for index, (ranking, machine) in enumerate(zip(rankings, machines, strict=True)):
            own = np.flatnonzero(part.machine == index)
            if not len(own):
                continue
            full = not roomy[own].any()
            ranking._note(
                machine,
                part.take(own),
                fits[own] if full else roomy[own],
                prefetch[own] & (hidden[own] | full),
                bounds_s[own],
                mixed[own],
                full,
            )

    def _count(self, searched: int) -> None:
        """Count the plans of a part."""
        self._parts += 1
        self.searched += searched

    def _rule_out(self, machine: Machine, part: Part, state: Array) -> None:
        """Note pairs that do not fit, as weights, optimizer state and gradients alone do not."""
        if self._beyond is None:

            def peaks(part: Part) -> Array:
                legal, _ = self._legal(part, part.layout())
                least, _, room, _ = self._memory(machine, part)
                return _least(least, legal & room)

            self._beyond = Beyond(peaks)
        self._beyond.add(part, state)

    def _legal(self, part: Part, layout: Layout) -> tuple[Array, Array]:
        return legal_cells(part, layout, self.work.model, self.work.batch, self.work.sequence)

    def _state(self, machine: Machine, part: Part, layout: Layout, legal: Array) -> Array:
        """Return the least state of each pair, of its legal plans: [pairs], in bytes."""
        holds = held_by(USUAL[self.costs], machine.chip).least
        state = least_state_bytes(machine, self.work, layout, holds)
        return _least(np.broadcast_to(state, part.shape), legal)

    def _note(
        self,
        machine: Machine,
        part: Part,
        wanted: Array,
        prefetch: Array,
        bounds_s: Array,
        mixed: Array,
        full: bool,
    ) -> None:
        """Note what fits of a part, and how good it can be; all arrays are of the part's shape.

        `wanted` are the plans to price, `mixed` those that fit if layers keep different things.
        """
        least_s = np.where(wanted, bounds_s, np.inf).min(axis=(1, 2))
        bound_s = float(np.where(mixed, bounds_s, np.inf).min())
        self.bound_s = min(self.bound_s, bound_s)
        self._fitting.append(
            _Fitting(
                number=self._parts,
                machine=machine,
                part=part,
                fits=wanted,
                prefetch=prefetch,
                full=full,
                priced=np.zeros(part.pairs, dtype=bool),
                least=least_s * (1.0 - SLACK) * _weight(machine, self.objective),
            )
        )

    def _memory(self, machine: Machine, part: Part) -> tuple[Array, Array, Array, Array]:
        """Return the least HBM of a part's plans, without and with prefetching, whether hosts have
        room for the rest, and whether layers leave the compiler's scheduler room to hide anything,
        without and with prefetching: arrays of the part's shape."""
        prefetch = np.array([False, True]).reshape(2, 1, 1, 1)
        holds = held_by(USUAL[self.costs], machine.chip).least
        layout = part.layout().reshaped(weights_overlap=prefetch)
        use = hbm_use(machine, self.work, layout, holds)
        least, most = np.broadcast_to(use.thrifty_bytes, (2, *part.shape))
        return (
            least,
            most,
            np.broadcast_to(use.host_fits, (1, *part.shape))[0],
            np.broadcast_to(use.hides, (2, *part.shape)),
        )

    def _schedule(
        self, machine: Machine, part: Part, prefetch: Array, devices: Array | None = None
    ) -> tuple[Schedule, Layout]:
        layout = part.layout().reshaped(weights_overlap=prefetch)
        program = partition(self.work, layout)
        program = implemented(program, USUAL[self.costs], machine, layout, devices)
        return overlap(program, layout), layout

    # Settling: prices.

    def settle(self) -> None:
        """Price plans until the best of all that were looked at are known.

        Those that fill HBM so far that the compiler may hide nothing count only among themselves.
        """
        if not all(fitting.full for fitting in self._fitting):
            self._fitting = [fitting for fitting in self._fitting if not fitting.full]
        # The most promising sizes set the bar for all others.
        for fitting, pairs in self._promising():
            self._price(fitting, pairs)
        for fitting in sorted(self._fitting, key=lambda fitting: float(fitting.least.min())):
            self._price(fitting, self._contenders(fitting))

    def _promising(self) -> Iterator[tuple[_Fitting, list[int]]]:
        """Yield the best pair by its bound of each of the `top` best sizes of roles."""
        place = [
            (number, n) for number, it in enumerate(self._fitting) for n in range(it.part.pairs)
        ]
        if not place:
            return
        first = [np.full(it.part.pairs, self._score(it.machine, 0.0)[0]) for it in self._fitting]
        least = [it.least for it in self._fitting]
        chosen: dict[Key, tuple[int, int]] = {}
        for at in np.lexsort((np.concatenate(least), np.concatenate(first))):
            number, pair = place[at]
            chosen.setdefault(self._fitting[number].key(pair), place[at])
            if len(chosen) == self.top:
                break
        for number in dict.fromkeys(number for number, _ in chosen.values()):
            yield (
                self._fitting[number],
                sorted(n for other, n in chosen.values() if other == number),
            )

    def _contenders(self, fitting: _Fitting) -> list[int]:
        """Return the pairs that are not priced and by their bounds could be among the best."""
        bar = self._bar()
        pairs = np.flatnonzero(~fitting.priced & (fitting.least <= bar[1])).tolist()

        def could(pair: int) -> bool:
            known = self._found.get(fitting.key(pair))
            score = self._score(fitting.machine, float(fitting.least[pair]))
            return score <= (bar if known is None else min(bar, known.score))

        return [pair for pair in pairs if could(pair)]

    def _bar(self) -> Score:
        """Return the score that a plan must not exceed to be among the best."""
        return bar_of([found.score for found in self._found.values()], self.top)

    def _price(self, fitting: _Fitting, pairs: list[int]) -> None:
        """Price all plans of some pairs, on all meshes of their forms."""
        if not pairs:
            return
        fitting.priced[pairs] = True
        part, place = fitting.part.take(pairs).spread()
        step = max(1, CELLS_AT_ONCE // (part.shape[1] * part.shape[2]))
        for start in range(0, part.pairs, step):
            some = slice(start, start + step)
            origin = np.asarray(pairs)[place[some]]
            self._add(fitting, part.take(some), fitting.fits[origin], fitting.prefetch[origin])

    def _add(self, fitting: _Fitting, part: Part, fits: Array, prefetch: Array) -> None:
        """Price plans and keep the best."""
        machine = fitting.machine
        schedule, layout = self._schedule(machine, part, prefetch)
        step_s = step_time_s(machine, layout, schedule, costs_of(self.costs, machine.chip))
        self.priced += int(fits.sum())
        scores = np.where(fits, _rounded(step_s * _weight(machine, self.objective)), np.inf)
        flat = scores.reshape(part.pairs, -1)
        cells = flat.argmin(axis=1)
        scores = flat[np.arange(part.pairs), cells]
        bar = self._bar()
        for pair in np.argsort(scores, kind="stable").tolist():
            score = self._score(machine, float(scores[pair]))
            if np.isinf(scores[pair]) or score > bar:
                break
            one = part.take(slice(pair, pair + 1))
            remat, option = divmod(int(cells[pair]), part.shape[2])
            found = Found(
                score=score,
                simplicity=(fitting.number, int(one.mesh[0]), int(one.microbatches[0])),
                machine=machine,
                part=one,
                cell=(0, remat, option),
                prefetch=bool(prefetch[pair, remat, option]),
            )
            key = fitting.key_of(one.mesh[0])
            if key not in self._found or found.rank < self._found[key].rank:
                self._found[key] = found

    def _score(self, machine: Machine, value: float) -> Score:
        return _first(machine, self.objective), value


def alike(machine: Machine) -> tuple[object, ...]:
    """Return what is the same of machines that may be looked at together: all but their sizes."""
    return id(machine.chip), machine.slices, machine.permutes_wait


def score_of(machine: Machine, objective: str, step_s: float, price: float = 1.0) -> Score:
    """Return the score of a plan that takes so long; `price` is that of a chip-hour."""
    weight = _weight(machine, objective) * (price if objective == "cost" else 1.0)
    value = _rounded(np.array([step_s * weight]))
    return _first(machine, objective), float(value[0])


def bar_of(scores: Sequence[Score], top: int) -> Score:
    """Return the worst of the `top` best scores: what plans must reach to be among them."""
    return sorted(scores)[top - 1] if len(scores) >= top else (np.inf, np.inf)


def limit_on(machine: Machine, objective: str, bar: Score, price: float = 1.0) -> float:
    """Return how large the second part of a `Score` without prices may be on a machine, for plans
    that are no worse than `bar`, a score with them."""
    first = _first(machine, objective)
    if first != bar[0]:
        return np.inf if first < bar[0] else 0.0
    return bar[1] / (price if objective == "cost" else 1.0) * (1.0 + SLACK)


def _first(machine: Machine, objective: str) -> float:
    """Return what counts before the step time: of "chips" their number."""
    return float(machine.chips) if objective == "chips" else 0.0


def _weight(machine: Machine, objective: str) -> float:
    """Return what a second of step time counts on a machine.

    mfu: seconds times the peak of all chips; cost: times chips; step-time and chips: itself.
    """
    if objective == "mfu":
        return machine.chips * machine.chip.peak("bf16")
    if objective == "cost":
        return float(machine.chips)
    return 1.0


def _least(values: Array, where: Array) -> Array:
    """Return the least value of each pair of a part: [pairs]."""
    least: Array = np.min(values, axis=(1, 2), initial=np.inf, where=where)
    return least


def _rounded(values: Array) -> Array:
    """Return numbers without the last few bits of their fractions, rounded."""
    bits = np.ascontiguousarray(values, dtype=np.float64).view(np.int64)
    rounded: Array = (bits + 2 ** (ROUNDED_BITS - 1)) & -(2**ROUNDED_BITS)
    return rounded.view(np.float64)
