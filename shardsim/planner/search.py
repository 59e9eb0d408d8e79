"""Searching the space of plans for the best ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError, expect
from shardsim.machine import Machine, parse_machine
from shardsim.memory import no_collections
from shardsim.model import Model, load_model
from shardsim.plan.precision import Precision
from shardsim.planner.attention import default_attention, may_gain, other_attention
from shardsim.planner.fixed import fixed_of
from shardsim.planner.found import Bound, OfSlice, SearchResult, joined, plan_at
from shardsim.planner.hosted import decided, where_none_fits, with_leanest
from shardsim.planner.layers import filled
from shardsim.planner.prices import Prices, price_of
from shardsim.planner.question import Looked, Progress, Question
from shardsim.planner.rank import Ranking, Score, bar_of, limit_on, score_of
from shardsim.planner.several import side_by_side

WHY = "the best plan that fits, with every role on the best links that any mesh of its sizes has"
WHY_BY_LAYER = f"{WHY}, and layers that keep whatever is fastest"


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
    leanest: bool = True,
    seen: list[tuple[Machine, Ranking]] | None = None,
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
    Of one slice, plans whose score is above `limit` are left out, but for the best one. Where none
    fits, the HBM that the `leanest` plan needs is found too, which may take as long again; without
    that, what was looked at is noted in `seen`, if that is given.
    """
    model = load_model(model) if isinstance(model, str) else model
    slices = _slices(machines)
    fixed = fixed_of(fix or {}, model.patch)
    attention = fixed.attention or attention
    for chip in {item.chip.name for item in slices} if prices else ():
        price_of(prices or {}, chip)
    question = Question(
        model=model,
        batch=batch,
        sequence=model.sequence if sequence is None else sequence,
        top=top,
        objective=objective,
        optimizer=fixed.optimizer or optimizer,
        precision=fixed.precise(precision or Precision()),
        max_axes=max_axes,
        costs=costs,
        by_layer=by_layer,
        fixed=fixed,
    )
    question.check(slices, attention)
    seen = [] if leanest else seen
    run = partial(
        search,
        sequence=question.sequence,
        top=top,
        objective=objective,
        optimizer=question.optimizer,
        attention=attention,
        precision=precision,
        max_axes=max_axes,
        costs=costs,
        by_layer=by_layer,
        fix=decided(fix or {}),
        looked=looked,
        limit=limit,
        leanest=False,
        seen=seen,
    )
    first = attention or default_attention(model, question.sequence)
    if len(slices) > 1:
        found = side_by_side(question, run, first, slices, prices, progress, executor)
    elif attention is None:
        found = _either_way(run, model, slices[0], batch, first, progress)
    else:
        found = _on_one(question, slices[0], attention, looked or {}, limit, progress, seen)
    again = partial(run, model, slices, batch, prices=prices, executor=executor)
    found = where_none_fits(found, again, fix or {}, fixed)
    return with_leanest(found, seen or ()) if leanest else found


def _slices(machines: Machine | str | Sequence[Machine | str]) -> list[Machine]:
    """Return the machines of a search as a list."""
    given: list[Any] = [*machines] if isinstance(machines, (list, tuple)) else [machines]
    for one in given:
        expect(one, Machine | str, "machines: expected a slice, or a list of them")
    return [parse_machine(item) if isinstance(item, str) else item for item in given]


def _on_one(
    question: Question,
    machine: Machine,
    attention: str,
    looked: Looked,
    limit: float,
    progress: Progress | None,
    seen: list[tuple[Machine, Ranking]] | None,
) -> SearchResult:
    """Return the best plans of one slice with one attention."""
    started = time.perf_counter()
    known = looked.get((id(machine), attention))
    ranking, complete = known or question.look([machine], attention, progress)[0]
    if seen is not None:
        seen.append((machine, ranking))
    limit = np.inf if question.by_layer else limit
    return _settled(ranking, complete, machine, question.top, started, limit)


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
        smallest_peak_bytes=ranking.smallest_counted_bytes,
    )
    return SearchResult(
        predictions=tuple(predictions),
        searched=ranking.searched,
        fit=ranking.fit,
        priced=ranking.priced,
        bound=Bound(step_time_s=bound_s, why=why) if complete and predictions else None,
        seconds=time.perf_counter() - started,
        smallest_peak_bytes=ranking.smallest_counted_bytes,
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

    bar = bar_of([score(item) for item in first.predictions], top)
    limit = min(run.keywords["limit"], limit_on(machine, objective, bar))
    try:
        second = run(model, machine, batch, attention=other, progress=tell_more, limit=limit)
    except PlanError:  # the keys that are held want the first one
        return first
    found = sorted([*first.predictions, *second.predictions], key=score)
    kinds = {tuple((axis.name, axis.size) for axis in one.plan.mesh): one for one in found[::-1]}
    kept = [item for item in found if any(item is one for one in kinds.values())]
    seconds = first.seconds + second.seconds
    whole = joined((first, second), kept[:top], second.complete, seconds)
    (of,) = first.slices
    best = whole.predictions[0] if whole.predictions else None
    numbers = {key: getattr(whole, key) for key in ("searched", "fit", "smallest_peak_bytes")}
    return replace(whole, slices=(replace(of, best=best, **numbers),))
