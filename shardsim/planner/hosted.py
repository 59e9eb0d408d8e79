"""What a search tries where no plan fits: optimizer state, then parameters too, in the host's
memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shardsim.machine import Machine
from shardsim.plan.plan import WHOLE
from shardsim.planner.fixed import Fixed

if TYPE_CHECKING:
    from shardsim.planner.found import SearchResult
    from shardsim.planner.rank import Ranking

KEYS = ("offload_optimizer", "offload_parameters")


class Search(Protocol):
    """A search with choices that are held."""

    def __call__(self, fix: Mapping[str, Any]) -> SearchResult: ...


def decided(fix: Mapping[str, Any]) -> dict[str, Any]:
    """Return choices that a part of a search holds: whether it uses the host is not for it."""
    return {KEYS[0]: False, **fix}


def where_none_fits(
    found: SearchResult, search: Search, fix: Mapping[str, Any], fixed: Fixed
) -> SearchResult:
    """Return what was found, or where nothing fits, what fits with the host's memory.

    Whoever holds one of `KEYS` has decided.
    """
    for keys in () if any(key in fix for key in KEYS) else _more(fixed):
        if found.predictions or not found.complete:
            return found
        more = search(fix={**fix, **keys})
        found = replace(
            more,
            searched=found.searched + more.searched,
            seconds=found.seconds + more.seconds,
            smallest_peak_bytes=min(found.smallest_peak_bytes, more.smallest_peak_bytes),
            slices=tuple(
                replace(
                    two,
                    searched=one.searched + two.searched,
                    smallest_peak_bytes=min(one.smallest_peak_bytes, two.smallest_peak_bytes),
                )
                for one, two in zip(found.slices, more.slices, strict=False)
            ),
        )
    return found


def with_leanest(found: SearchResult, seen: Iterable[tuple[Machine, Ranking]]) -> SearchResult:
    """Return what was found, with the least HBM that a plan needs on slices where none fits, of all
    that was `seen` there."""
    if not found.complete or all(one.fit for one in found.slices):
        return found
    started = time.perf_counter()
    least: dict[int, float] = {}
    none = {id(one.machine) for one in found.slices if not one.fit}
    for machine, ranking in seen:
        if id(machine) in none:
            known = least.get(id(machine), np.inf)
            least[id(machine)] = min(known, ranking.smallest_peak_bytes)
    slices = tuple(
        replace(one, smallest_peak_bytes=least.get(id(one.machine), one.smallest_peak_bytes))
        for one in found.slices
    )
    return replace(
        found,
        slices=slices,
        smallest_peak_bytes=min(one.smallest_peak_bytes for one in slices),
        seconds=found.seconds + time.perf_counter() - started,
    )


def _more(fixed: Fixed) -> Iterator[dict[str, bool]]:
    state = {} if fixed.forward_only else {KEYS[0]: True}
    if state:
        yield state
    if fixed.accumulation not in WHOLE:
        yield {**state, KEYS[1]: True}
