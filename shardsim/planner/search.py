"""Searching the space of plans for the best ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError, expect, nearest
from shardsim.executors import outcomes
from shardsim.machine import Machine, parse_machine
from shardsim.memory import keep_freed_memory, no_collections
from shardsim.model import Model, load_model
from shardsim.plan.lengths import row_tokens
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import ATTENTION, OP_COSTS
from shardsim.plan.precision import Precision, check_multiplied
from shardsim.planner.attention import default_attention, may_gain, other_attention
from shardsim.planner.bounds import BestLines
from shardsim.planner.fixed import FLAGS, ROOM, Fixed, fixed_of
from shardsim.planner.found import Bound, OfSlice, SearchResult, plan_at
from shardsim.planner.hosted import decided, where_none_fits
from shardsim.planner.layers import filled
from shardsim.planner.prices import Prices, price_of
from shardsim.planner.rank import OBJECTIVES, Ranking, Score, alike, limit_on, score_of
from shardsim.planner.space import Part, parts
from shardsim.program.shapes import Workload

WHY = "the best plan that fits, with every role on the best links that any mesh of its sizes has"
WHY_BY_LAYER = f"{WHY}, and layers that keep whatever is fastest"
STEPS = 1000  # of progress on one of several slices
CANDIDATES = 10  # so many plans at least are given their free HBM before they are ranked again


Progress = Callable[[int, int], None]
Look = tuple[Ranking, bool]  # of one slice; whether no interrupt ended it
LookAt = Callable[[Sequence[Machine], str, Progress | None], list[Look]]  # with an attention
Looked = Mapping[tuple[int, str], Look]  # by identities of machines, and attention


@no_collections()
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
    costs: str = "calibrated",
    by_layer: bool = False,
    fix: Mapping[str, Any] | None = None,
    prices: Prices | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    looked: Looked | None = None,
    limit: float = np.inf,
) -> SearchResult:
    """Return the `top` best plans of `model` on `machines` at `batch` sequences per step.

    >>> search("vit-b-16", "v5e:2x4", 1024).best.plan.machine.name
    'v5e:2x4'

    Of plans with the same role sizes only the best is returned, so that the runners-up differ in
    kind. All are priced alike: with `costs`, as the implementation that goes with them. The plans
    that are found keep that as their `op_costs`. `by_layer` gives the HBM that they leave free to
    layers that keep more (`planner.layers`). `fix` holds choices: keys of a plan file with their
    values (`planner.fixed`). Without an `attention`, plans attend as is usual, and the other way
    too where that makes the best of them faster (`planner.attention`). `prices` are those of a
    chip-hour by the chip's name, for the objective "cost". `progress(done, total)` is called
    between chunks; interrupting it (Ctrl-C) ends the search with what was found so far, and
    `complete` is false. Each of several slices is searched for itself, with an `executor` in a call
    of its own; without one, slices of one chip are looked at together, and `looked` is what was.
    Of one slice, plans whose score is above `limit` are left out, but for the best one.
    """
    model = load_model(model) if isinstance(model, str) else model
    given: list[Any] = [*machines] if isinstance(machines, (list, tuple)) else [machines]
    for one in given:
        expect(one, Machine | str, "machines: expected a slice, or a list of them")
    slices = [parse_machine(item) if isinstance(item, str) else item for item in given]
    sequence = sequence or model.sequence
    fixed = fixed_of(fix or {}, model.patch)
    optimizer, attention = fixed.optimizer or optimizer, fixed.attention or attention
    for chip in {item.chip.name for item in slices} if prices else ():
        price_of(prices or {}, chip)
    precise = fixed.precise(precision or Precision())
    for machine in slices:
        check_multiplied(machine, precise.compute)
    precise.check()
    for value, choices, what in (
        (objective, OBJECTIVES, "objective"),
        (optimizer, OPTIMIZERS, "optimizer"),
        (attention or "flash", ATTENTION, "attention"),
        (costs, OP_COSTS, "op_costs"),
    ):
        if value not in choices:
            raise PlanError(f"{what}: '{value}' is not possible{nearest(value, choices)}")
    for count, what in ((batch, "batch"), (sequence, "sequence"), (top, "top")):
        expect(count, int | np.integer, f"{what}: expected a whole number")
    if top < 1 or not slices:
        raise PlanError("search: ask for at least one plan, on at least one slice")
    _check(model, fixed, batch, sequence)
    held = decided(fix or {})
    options: dict[str, Any] = {
        **{"sequence": sequence, "top": top, "objective": objective, "optimizer": optimizer},
        **{"attention": attention, "precision": precision, "max_axes": max_axes},
        **{"costs": costs, "by_layer": by_layer, "fix": held},
        **{"looked": looked, "limit": limit},
    }
    run = partial(search, **options)
    first = attention or default_attention(model, sequence)

    def look(machines: Sequence[Machine], attention: str, progress: Progress | None) -> list[Look]:
        work = Workload(
            model=model,
            batch=batch,
            sequence=row_tokens(fixed.lengths, sequence),
            lengths=fixed.lengths,
            longest=sequence,
            precision=precise,
            optimizer=optimizer,
            attention=attention,
            pipeline_interleave=fixed.pipeline_interleave,
            imbalance=fixed.imbalance or 1.0,
            padding=fixed.padding or ROOM,
            **{name: getattr(fixed, name) for name in FLAGS},
        )
        ranking = partial(
            Ranking,
            work=work,
            costs=costs,
            objective=objective,
            top=max(top, CANDIDATES) if by_layer else top,
            by_layer=by_layer,
        )
        space = parts(model, machines, batch, sequence, max_axes, fixed, attention)
        return _look([ranking() for _ in machines], machines, [*space], progress)

    if len(slices) > 1:
        found = _side_by_side(executor, run, look, first, model, slices, batch, prices, progress)
    elif attention is None:
        found = _either_way(run, model, slices[0], batch, first, progress)
    else:
        started = time.perf_counter()
        key = id(slices[0]), attention
        known = looked[key] if looked and key in looked else look(slices, attention, progress)[0]
        found = _settled(*known, slices[0], top, started, np.inf if by_layer else limit)
    again = partial(run, model, slices, batch, prices=prices, executor=executor)
    return where_none_fits(found, again, fix or {}, fixed)


def _look(
    rankings: Sequence[Ranking],
    machines: Sequence[Machine],
    space: Sequence[Part],
    progress: Progress | None,
) -> list[Look]:
    """Look at a space of slices that are `alike`; an interrupt ends it."""
    keep_freed_memory()
    total = sum(int(part.many.sum()) for part in space)
    done = 0
    complete, lines = True, None
    try:
        for part in space:
            lines = lines or BestLines(machines, part.meshes)
            Ranking.look(rankings, machines, lines, part)
            done += int(part.many.sum())
            if progress is not None:
                progress(done, total)
    except KeyboardInterrupt:
        complete = False
    return [(ranking, complete) for ranking in rankings]


def _settled(
    ranking: Ranking, complete: bool, machine: Machine, top: int, started: float, limit: float
) -> SearchResult:
    """Return the best plans of a slice that was looked at."""
    try:
        ranking.settle()
    except KeyboardInterrupt:
        complete = False
    scored: list[tuple[Score, Prediction]] = []
    for item in ranking.best(limit):
        plan = plan_at(
            ranking.work, ranking.costs, item.machine, item.part, item.cell, item.prefetch
        )
        one = predict(plan)
        better = filled(one) if ranking.by_layer else one
        score = item.score
        if better is not one:
            score = score_of(item.machine, ranking.objective, better.step_time_s)
        scored.append((score, better))
    predictions = [better for _, better in sorted(scored, key=itemgetter(0))][:top]
    why = WHY_BY_LAYER if ranking.by_layer else WHY
    # The best plan may reach the bound, but for rounding.
    bound_s = min([ranking.bound_s, *(item.step_time_s for item in predictions)])
    of = OfSlice(
        machine=machine,
        best=predictions[0] if predictions else None,
        searched=ranking.searched,
        fit=ranking.fit,
        smallest_peak_bytes=ranking.smallest_peak_bytes,
    )
    return SearchResult(
        predictions=tuple(predictions),
        searched=ranking.searched,
        fit=ranking.fit,
        priced=ranking.priced,
        bound=Bound(step_time_s=bound_s, why=why) if complete and predictions else None,
        seconds=time.perf_counter() - started,
        smallest_peak_bytes=ranking.smallest_peak_bytes,
        complete=complete,
        slices=(of,),
    )


def _either_way(
    run: partial[SearchResult],
    model: Model,
    machine: Machine,
    batch: int,
    attention: str,
    progress: Progress | None,
) -> SearchResult:
    """Return the best plans with one attention, and with the other where that may gain."""
    total = 0

    def tell(done: int, of: int) -> None:
        nonlocal total
        total = of
        if progress is not None:
            progress(done, of)

    def tell_more(done: int, of: int) -> None:
        if progress is not None:
            progress(total + done, total + of)

    first = run(model, machine, batch, attention=attention, progress=tell)
    best = first.predictions[0] if first.predictions else None
    other = other_attention(attention)
    if not first.complete or not may_gain(model, best, other):
        return first
    objective, top = run.keywords["objective"], run.keywords["top"]

    def score(item: Prediction) -> Score:
        return score_of(machine, objective, item.step_time_s)

    bar = _last([score(item) for item in first.predictions], top)
    limit = min(run.keywords["limit"], limit_on(machine, objective, bar))
    try:
        second = run(model, machine, batch, attention=other, progress=tell_more, limit=limit)
    except PlanError:  # the keys that are held want the first one
        return first
    found = sorted([*first.predictions, *second.predictions], key=score)
    kinds = {tuple((axis.name, axis.size) for axis in one.plan.mesh): one for one in found[::-1]}
    kept = [item for item in found if any(item is one for one in kinds.values())]
    bounds = [one.bound for one in (first, second) if one.bound is not None]
    whole = replace(
        first,
        predictions=tuple(kept[:top]),
        searched=first.searched + second.searched,
        fit=first.fit + second.fit,
        priced=first.priced + second.priced,
        seconds=first.seconds + second.seconds,
        smallest_peak_bytes=min(first.smallest_peak_bytes, second.smallest_peak_bytes),
        bound=min(bounds, key=attrgetter("step_time_s")) if second.complete and bounds else None,
        complete=second.complete,
    )
    (of,) = first.slices
    best = whole.predictions[0] if whole.predictions else None
    numbers = {key: getattr(whole, key) for key in ("searched", "fit", "smallest_peak_bytes")}
    return replace(whole, slices=(replace(of, best=best, **numbers),))


def _last(scores: Sequence[Score], top: int) -> Score:
    """Return the worst of the `top` best scores: what plans must reach to be among them."""
    return sorted(scores)[top - 1] if len(scores) >= top else (np.inf, np.inf)


def _side_by_side(
    executor: Executor | None,
    run: partial[SearchResult],
    look: LookAt,
    attention: str,
    model: Model,
    slices: Sequence[Machine],
    batch: int,
    prices: Prices | None,
    progress: Progress | None,
) -> SearchResult:
    """Return the best plans of slices that are each searched for itself, but for what one look
    shows of all that are alike."""
    started = time.perf_counter()
    found: dict[int, SearchResult] = {}
    calls = [(model, machine, batch) for machine in slices]
    interrupted = False
    objective, top = run.keywords["objective"], run.keywords["top"]

    def price(machine: Machine) -> float:
        return price_of(prices, machine.chip.name) if prices else 1.0

    def score(item: Prediction) -> Score:
        machine = item.plan.machine
        return score_of(machine, objective, item.step_time_s, price(machine))

    def limit(machine: Machine) -> float:
        every = [score(item) for result in found.values() for item in result.predictions]
        return limit_on(machine, objective, _last(every, top), price(machine))

    try:
        if executor is None:
            looked = _together(look, attention, slices, _share(progress, 0, 3))
            other = other_attention(attention)
            whole = all(complete for _, complete in looked.values())
            if whole and run.keywords["attention"] is None and may_gain(model, None, other):
                # `_either_way` asks for it where nothing fits so.
                none = [one for one in slices if _none_fits(looked.get((id(one), attention)))]
                looked = {**looked, **_together(look, other, none, _share(progress, 1, 3))}
            interrupted = not all(complete for _, complete in looked.values())
            order = _by_promise(looked, attention, slices)
            if interrupted:  # what nobody looked at yet stays so
                order = [one for one in order if (id(slices[one]), attention) in looked]
            every: Iterable[tuple[int, SearchResult]] = _in_turn(
                partial(run, looked=looked), calls, order, limit, _share(progress, 2, 3)
            )
        else:
            every = outcomes(executor, run, calls)
        for index, result in every:
            found[index] = result
            if executor is not None and progress is not None:
                progress(len(found), len(slices))
            if not (result.complete or interrupted):
                break
    except KeyboardInterrupt:
        pass
    results = [found[index] for index in sorted(found)]
    predictions = sorted((item for result in results for item in result.predictions), key=score)
    complete = len(found) == len(slices) and all(result.complete for result in results)
    bounds = [result.bound for result in results if result.bound is not None]
    return SearchResult(
        predictions=tuple(predictions[:top]),
        searched=sum(result.searched for result in results),
        fit=sum(result.fit for result in results),
        priced=sum(result.priced for result in results),
        bound=min(bounds, key=attrgetter("step_time_s")) if complete and bounds else None,
        seconds=time.perf_counter() - started,
        smallest_peak_bytes=min((one.smallest_peak_bytes for one in results), default=np.inf),
        complete=complete,
        slices=tuple(of for result in results for of in result.slices),
    )


def _share(progress: Progress | None, begun: int, of: int) -> Progress | None:
    """Return what is told of one of so many shares of a whole."""
    if progress is None:
        return None
    return lambda done, total: progress((begun * total + done) * STEPS // (of * total), STEPS)


def _together(
    look: LookAt,
    attention: str,
    slices: Sequence[Machine],
    progress: Progress | None,
) -> Looked:
    """Return what one look shows of several slices each; of others nothing."""
    groups: dict[object, list[Machine]] = {}
    for machine in slices:
        groups.setdefault(alike(machine), []).append(machine)
    several = [group for group in groups.values() if len(group) > 1]
    found: dict[tuple[int, str], Look] = {}
    for number, group in enumerate(several):
        every = look(group, attention, _share(progress, number, len(several)))
        found |= {(id(one), attention): it for one, it in zip(group, every, strict=True)}
        if not all(complete for _, complete in every):
            break
    return found


def _none_fits(known: Look | None) -> bool:
    """Return whether a look at a slice, if there was one, found that no plan fits."""
    return known is not None and not known[0].fit


def _by_promise(looked: Looked, attention: str, slices: Sequence[Machine]) -> list[int]:
    """Return the numbers of slices, those first whose plans may be the best: they set the bar."""

    def promise(number: int) -> Score:
        known = looked.get((id(slices[number]), attention))
        return known[0].promise if known else (np.inf, np.inf)

    return sorted(range(len(slices)), key=promise)


def _in_turn(
    run: Callable[..., SearchResult],
    calls: Sequence[tuple[Model, Machine, int]],
    order: Sequence[int],
    limit: Callable[[Machine], float],
    progress: Progress | None,
) -> Iterator[tuple[int, SearchResult]]:
    """Search one slice after the other, for plans within its `limit`, and tell how far it is."""
    for done, index in enumerate(order):
        call, share = calls[index], _share(progress, done, len(calls))
        yield index, run(*call, limit=limit(call[1]), progress=share)
        if progress is not None:
            progress(done + 1, len(calls))


def _check(model: Model, fixed: Fixed, batch: int, sequence: int) -> None:
    """Refuse numbers and held choices that no plan of a model can have."""
    if batch < 1 or sequence < 1:
        raise PlanError("batch and sequence must be positive")
    if model.family == "vit" and sequence != model.sequence and fixed.lengths is None:
        raise PlanError(
            f"sequence: {model.name} makes {model.sequence} tokens of an image; change the image "
            "size in the model instead"
        )
    if fixed.keys == "dsp" and "time" not in model.attends:
        raise PlanError(
            f"fix: context.keys: layers of {model.name} see all tokens, and none to switch for; "
            "use ulysses"
        )
    uneven = fixed.imbalance is not None or fixed.padding is not None
    if model.experts is None and (uneven or fixed.exchange is not None):
        raise PlanError(f"fix: experts: {model.name} has none; leave the key out")
    if uneven and model.experts and not model.experts.dropless:
        raise PlanError(
            f"fix: experts: those of {model.name} have as many places as their capacity or slots "
            "say; leave imbalance and padding out"
        )
