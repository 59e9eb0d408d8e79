"""Searching several slices: each for itself, but for what one look shows of all that are alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from shardsim.cost.predict import Prediction
from shardsim.executors import outcomes
from shardsim.machine import Machine
from shardsim.planner.attention import may_gain, other_attention
from shardsim.planner.found import SearchResult, joined
from shardsim.planner.prices import Prices, price_of
from shardsim.planner.question import Look, Looked, Progress, Question
from shardsim.planner.rank import Score, alike, bar_of, limit_on, score_of

STEPS = 1000  # of progress on one of several slices


def side_by_side(
    question: Question,
    run: partial[SearchResult],
    attention: str,
    slices: Sequence[Machine],
    prices: Prices | None,
    progress: Progress | None,
    executor: Executor | None,
) -> SearchResult:
    """Return the best plans of all slices; `run` searches one, `attention` is tried first."""
    started = time.perf_counter()
    found: dict[int, SearchResult] = {}
    calls = [(question.model, machine, question.batch) for machine in slices]
    interrupted = False

    def price(machine: Machine) -> float:
        return price_of(prices, machine.chip.name) if prices else 1.0

    def score(item: Prediction) -> Score:
        machine = item.plan.machine
        return score_of(machine, question.objective, item.step_time_s, price(machine))

    def limit(machine: Machine) -> float:
        every = [score(item) for result in found.values() for item in result.predictions]
        bar = bar_of(every, question.top)
        return limit_on(machine, question.objective, bar, price(machine))

    try:
        if executor is None:
            other = run.keywords["attention"] is None
            looked = _looked(question, attention, other, slices, progress)
            interrupted = not all(complete for _, complete in looked.values())
            order = _by_promise(looked, attention, slices)
            if interrupted:  # what nobody looked at yet stays so
                order = [one for one in order if (id(slices[one]), attention) in looked]
            every: Iterable[tuple[int, SearchResult]] = _in_turn(
                partial(run, looked=looked), calls, order, limit, _share(progress, 2, 3)
            )
        else:
            every = outcomes(executor, partial(run, leanest=True, seen=None), calls)
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
    seconds = time.perf_counter() - started
    return joined(results, predictions[: question.top], complete, seconds)


def _looked(
    question: Question,
    attention: str,
    other: bool,
    slices: Sequence[Machine],
    progress: Progress | None,
) -> Looked:
    """Return what looks at slices together show, with the `other` attention where none fits."""
    looked = _together(question, attention, slices, _share(progress, 0, 3))
    second = other_attention(attention)
    whole = all(complete for _, complete in looked.values())
    if whole and other and may_gain(question.model, None, second):
        # Its search asks for it where nothing fits so.
        none = [one for one in slices if _none_fits(looked.get((id(one), attention)))]
        looked = {**looked, **_together(question, second, none, _share(progress, 1, 3))}
    return looked


def _share(progress: Progress | None, begun: int, of: int) -> Progress | None:
    """Return what is told of one of so many shares of a whole."""
    if progress is None:
        return None
    return lambda done, total: progress((begun * total + done) * STEPS // (of * total), STEPS)


def _together(
    question: Question,
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
        every = question.look(group, attention, _share(progress, number, len(several)))
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
    calls: Sequence[tuple[object, Machine, int]],
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
