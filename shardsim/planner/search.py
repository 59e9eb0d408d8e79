"""Searching the space: memory first, then the price of every plan that could fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import step_time_s
from shardsim.errors import PlanError, nearest
from shardsim.machine import Machine, parse_machine
from shardsim.model import Model, load_model
from shardsim.plan.layout import ROLES, AxisLayout, Layout
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import (
    ATTENTION,
    MATMUL_OVERLAP,
    OP_COSTS,
    Overlap,
    Plan,
    Precision,
    best_op_costs,
)
from shardsim.plan.resolve import mesh_of, rules_of
from shardsim.planner.space import Array, Part, legal_cells, parts
from shardsim.program.holds import HOLDS, Passes
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.shapes import Workload

Cell = tuple[int, int, int]  # pair, remat policy, option

OBJECTIVES = ("mfu", "step-time", "cost", "chips")

# Pairs priced at once: a few ten thousand plans, whose arrays stay in the processor's cache.
CELLS_AT_ONCE = 300000
FREED_BYTES = 31 * 2**20


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best plans, best first, and how many were looked at."""

    predictions: tuple[Prediction, ...]
    searched: int  # legal plans considered
    priced: int  # of those, priced in full: step time and HBM
    fit: int  # of those, fitting in HBM
    seconds: float
    smallest_peak_bytes: float  # the least HBM that any considered plan needs on a device
    complete: bool = True

    @property
    def best(self) -> Prediction:
        """The best plan's prediction."""
        if not self.predictions:
            raise PlanError("no plan fits in HBM")
        return self.predictions[0]

    def frame(self) -> Any:
        """Return the plans as a pandas frame (needs pandas), best first."""
        # Reports stand above the planner and need more: looked up only when asked.
        return import_module("shardsim.report").plans_frame(self)

    def _repr_html_(self) -> str:
        # Views stand above: looked up only when a notebook asks.
        return str(import_module("shardsim.views.notebook").shown(self))

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim plan`."""
        from shardsim.plan.io import plan_to_data

        return {
            "plans": [
                {**item.to_data(), "plan": plan_to_data(item.plan)} for item in self.predictions
            ],
            "searched": self.searched,
            "priced": self.priced,
            "fit": self.fit,
            "seconds": self.seconds,
            "smallest_peak_bytes": self.smallest_peak_bytes,
            "complete": self.complete,
        }


@dataclass(kw_only=True)
class _Best:
    """The best plan of each combination of role sizes so far."""

    score: dict[tuple[int, ...], float] = field(default_factory=dict)
    found: dict[tuple[int, ...], tuple[Machine, Part, Cell, bool]] = field(default_factory=dict)

    def worst_of(self, top: int) -> float:
        """Return the score that a plan must not exceed to be among the `top` best."""
        scores = sorted(self.score.values())
        return scores[top - 1] if len(scores) >= top else np.inf

    def add(
        self,
        key: tuple[int, ...],
        score: float,
        machine: Machine,
        part: Part,
        cell: Cell,
        prefetch: bool,
    ) -> None:
        """Keep a plan if no better one with the same role sizes is known."""
        if score < self.score.get(key, np.inf):
            self.score[key] = score
            one = part.take(slice(cell[0], cell[0] + 1))
            self.found[key] = (machine, one, (0, cell[1], cell[2]), prefetch)


def search(
    model: Model | str,
    machines: Machine | str | Sequence[Machine | str],
    batch: int,
    *,
    sequence: int | None = None,
    top: int = 10,
    objective: str = "mfu",
    optimizer: str = "adamw",
    attention: str | None = None,
    precision: Precision | None = None,
    max_axes: int = 3,
    costs: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Return the `top` best plans of `model` on `machines` at `batch` sequences per step.

    >>> search("vit-b-16", "v5e:2x4", 1024).best.plan.machine.name
    'v5e:2x4'

    Of plans with the same role sizes only the best is returned, so that the runners-up differ in
    kind. All are priced alike: with `costs`, as the implementation that goes with them; "auto" is
    "compiler" if the files of all chips say what their compilers estimate. The plans that are
    found keep that as their `op_costs`. `progress(done, total)` is called between chunks;
    interrupting it (Ctrl-C) ends the search with what was found so far, and `complete` is false.
    """
    started = time.perf_counter()
    model = load_model(model) if isinstance(model, str) else model
    given = [machines] if isinstance(machines, (Machine, str)) else list(machines)
    slices = [parse_machine(item) if isinstance(item, str) else item for item in given]
    if costs == "auto":
        costs = best_op_costs(*(machine.chip for machine in slices))
    sequence = sequence or model.sequence
    for value, choices, what in (
        (objective, OBJECTIVES, "objective"),
        (optimizer, OPTIMIZERS, "optimizer"),
        (attention or "flash", ATTENTION, "attention"),
        (costs, OP_COSTS, "op_costs"),
    ):
        if value not in choices:
            raise PlanError(f"{what}: '{value}' is not possible{nearest(value, choices)}")
    if batch < 1 or sequence < 1:
        raise PlanError("batch and sequence must be positive")
    if model.family == "vit" and sequence != model.sequence:
        raise PlanError(
            f"sequence: {model.name} makes {model.sequence} tokens of an image; change the image "
            "size in the model instead"
        )
    _keep_freed_memory()
    work = Workload(
        model=model,
        batch=batch,
        sequence=sequence,
        precision=precision or Precision(),
        optimizer=optimizer,
        attention=attention or default_attention(model, sequence),
    )
    best = _Best()
    counts = {"searched": 0, "priced": 0, "fit": 0}
    smallest = np.inf
    complete = True
    todo = [
        (machine, part)
        for machine in slices
        for part in parts(model, machine, batch, sequence, max_axes)
    ]
    total = sum(part.pairs for _, part in todo)
    done = 0
    try:
        for machine, part in todo:
            cells = part.shape[1] * part.shape[2]
            step = max(1, CELLS_AT_ONCE // cells)
            peaks = _Peaks.of(work, machine, part, HOLDS[USUAL[costs]].least)
            for start in range(0, part.pairs, step):
                some = slice(start, start + step)
                chunk, needs = part.take(some), peaks.take(some)
                found = _chunk(work, machine, chunk, needs, costs, objective, best, top, counts)
                smallest = min(smallest, found)
                done += chunk.pairs
                if progress is not None:
                    progress(done, total)
    except KeyboardInterrupt:
        complete = False
    chosen = sorted(best.score, key=lambda key: best.score[key])[:top]
    predictions = []
    for key in chosen:
        predictions.append(predict(plan_at(work, costs, *best.found[key])))
    return SearchResult(
        predictions=tuple(predictions),
        seconds=time.perf_counter() - started,
        smallest_peak_bytes=float(smallest),
        complete=complete,
        **counts,
    )


def _keep_freed_memory() -> None:
    """Let arrays reuse memory instead of handing it back to the system after each operation.

    glibc's allocator keeps free blocks as large as the largest one that was freed so far, up to
    32 MiB (its "dynamic mmap threshold", mallopt(3)). Without one such block a search spends a
    fifth of its time on page faults. Elsewhere this does nothing.
    """
    np.empty(FREED_BYTES, dtype=np.uint8)


def default_attention(model: Model, sequence: int) -> str:
    """Return the attention that a new run would use: fused, but for short images.

    At a few hundred tokens the scores are small and a fused kernel gains nothing.
    """
    return "unfused" if model.family == "vit" and sequence <= 1024 else "flash"


def _chunk(
    work: Workload,
    machine: Machine,
    part: Part,
    peaks: _Peaks,
    costs: str,
    objective: str,
    best: _Best,
    top: int,
    counts: dict[str, int],
) -> float:
    """Price a chunk of the space; return the least peak HBM in it."""
    layout = part.layout()
    legal, ways = legal_cells(part, layout, work.model, work.batch, work.sequence)
    counts["searched"] += int((legal * ways).sum())
    # Without prefetching there is room for more; with it no plan is slower.
    capacity_bytes = machine.chip.hbm_usable_bytes / machine.chip.devices_per_chip
    least, most = peaks.least[peaks.place], peaks.most[peaks.place]
    smallest = float(np.min(np.where(legal, least, np.inf)))
    prefetch = most <= capacity_bytes
    fits = legal & (least <= capacity_bytes)
    keep = fits.any(axis=(1, 2))
    if not keep.any():
        return smallest
    if not keep.all():
        index = np.flatnonzero(keep)
        part, legal, fits, prefetch = part.take(index), legal[index], fits[index], prefetch[index]
        layout = part.layout()
    layout = layout.reshaped(weights_overlap=prefetch)
    program = implemented(partition(work, layout), USUAL[costs], machine, layout)
    schedule = overlap(program, layout)
    counts["priced"] += int(legal.sum())
    counts["fit"] += int(fits.sum())
    took_s = step_time_s(machine, layout, schedule, costs_of(costs, machine.chip))
    step_s = np.broadcast_to(took_s, fits.shape)
    score = np.where(fits, step_s * _weight(machine, objective), np.inf)
    flat = score.reshape(part.pairs, -1)
    cells = flat.argmin(axis=1)
    scores = flat[np.arange(part.pairs), cells]
    sizes = np.stack(
        [part.factors[role].prod(axis=1) * part.slices[role] for role in ROLES], axis=1
    )
    if objective == "chips":
        scores = scores + machine.chips * 1e6
    # Of equal scores the simplest: fewer microbatches, which come first in the space.
    worst = best.worst_of(top)
    for row in np.argsort(scores, kind="stable"):
        if np.isinf(scores[row]) or scores[row] > worst:
            break
        remat, option = divmod(int(cells[row]), fits.shape[2])
        key = (machine.chips, machine.slices, *machine.shape, *(int(n) for n in sizes[row]))
        on = bool(prefetch[row, remat, option])
        best.add(key, float(scores[row]), machine, part, (int(row), remat, option), on)
    return smallest


@dataclass(frozen=True, kw_only=True)
class _Peaks:
    """Peak HBM of the plans of a part, in bytes, without and with prefetching.

    It depends on the sizes of roles alone, not on where they lie: each combination is there once,
    as [combinations, policies, options].
    """

    least: Array
    most: Array
    place: Array  # [pairs]: the combination of each

    @classmethod
    def of(cls, work: Workload, machine: Machine, part: Part, holds: Passes) -> _Peaks:
        """Return the peaks of a part where an implementation `holds` so much."""
        sizes = [part.factors[role].prod(axis=1) * part.slices[role] for role in ROLES]
        sizes.append(part.microbatches)
        key = np.ravel_multi_index(sizes, [int(size.max()) + 1 for size in sizes])
        _, first, place = np.unique(key, return_index=True, return_inverse=True)
        some = part.take(first)
        prefetch = np.array([False, True]).reshape(2, 1, 1, 1)
        layout = some.layout().reshaped(weights_overlap=prefetch)
        peaks = hbm_use(machine, work, layout, holds).peak_bytes
        least, most = np.broadcast_to(peaks, (2, *some.shape))
        return cls(least=least, most=most, place=place)

    def take(self, index: slice) -> _Peaks:
        """Return those of some pairs."""
        return replace(self, place=self.place[index])


def _weight(machine: Machine, objective: str) -> float:
    """Return what a second of step time counts on a machine.

    mfu: seconds times the peak of all chips; cost: times chips; step-time and chips: itself.
    """
    if objective == "mfu":
        return machine.chips * machine.chip.peak("bf16")
    if objective == "cost":
        return float(machine.chips)
    return 1.0


def plan_at(
    work: Workload, costs: str, machine: Machine, part: Part, cell: Cell, prefetch: bool
) -> Plan:
    """Return one plan of a part of the space as a `Plan`."""
    pair, remat, option = cell
    one = part.take(slice(pair, pair + 1))
    layout = one.layout()

    def scalar(value: Any) -> Any:
        array = np.broadcast_to(value, one.shape)
        return array[0, remat, option].item()

    axes: dict[str, Any] = {
        role: AxisLayout(
            factors=tuple(scalar(item) for item in layout.role(role).factors),
            strides=tuple(scalar(item) for item in layout.role(role).strides),
            slices=scalar(layout.role(role).slices),
        )
        for role in ROLES
    }
    numbers = Layout(
        **axes,
        residual=part.choices.residual,
        optimizer_over_data=scalar(layout.optimizer_over_data),
        context_shards_parameters=part.choices.context_shards_parameters,
    )
    mesh = mesh_of(numbers, machine)
    parameters, activations, optimizer = rules_of(numbers, mesh)
    sizes = "-".join(f"{axis.name}{axis.size}" for axis in mesh)
    return Plan(
        name=f"{work.model.name}-{machine.name.replace(':', '-').replace('*', 'x')}-{sizes}",
        model=work.model,
        machine=machine,
        batch=work.batch,
        sequence=work.sequence,
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        optimizer_rules=optimizer,
        remat=one.remats[remat],
        microbatches=scalar(layout.microbatches),
        overlap=Overlap(
            matmul=MATMUL_OVERLAP[scalar(layout.matmul_overlap)],
            weights=prefetch,
            gradients=bool(scalar(layout.gradients_overlap)),
        ),
        precision=work.precision,
        optimizer=work.optimizer,
        attention=work.attention,
        fused_projections=work.fused_projections,
        op_costs=costs,
    )
