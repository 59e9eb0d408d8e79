"""Rows whose remat is not stated, as they may have run: so that they fit."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from typing import Any

from shardsim.cost.predict import hbm_of
from shardsim.plan.resolve import AXIS_NAMES
from shardsim.validate.libraries import FULL, TRAINER, Library
from shardsim.validate.rows import Run, read_run


def that_fits(
    run: Run, data: Mapping[str, Any], library: Library, where: str, notes: list[str]
) -> Run:
    """Return a run whose remat is not stated and whose library's own does not fit, as it may have
    run: with what the library offloads, or with the least recomputation that fits.

    A library that computes layers again one by one has as few of them as must be. Over stages, of
    which each has other ones, and where its recipes compute small parts of layers instead, it is
    taken to keep what it does by itself.
    """
    if library.by_block:
        return _by_block(run, data, library, where, notes)
    if library.offloads:
        other = read_run({**data, "remat": library.offloads}, where)
        how = (
            "whole layers again do not fit: what layers start from and queries, keys and values "
            "wait in the host's memory"
        )
    else:
        other = read_run({key: value for key, value in data.items() if key != "remat"}, where)
        how = "what its library keeps does not fit: the least recomputation that fits"
    if not fits(other):
        return run
    notes.append(f"remat: not stated, and {how}")
    return other


def _by_block(
    run: Run, data: Mapping[str, Any], library: Library, where: str, notes: list[str]
) -> Run:
    """Return a run that computes as few whole layers again as must be."""
    plan = run.plans[0]
    if any(axis.name == AXIS_NAMES["pipeline"] for axis in plan.mesh):
        notes.append("remat: not stated; what its library keeps does not fit as predicted")
        return run

    def again(few: int) -> Run:
        groups = [{"layers": few, **FULL}, {"layers": plan.model.layers - few, **library.remat}]
        kept = FULL if few == plan.model.layers else groups
        return read_run({**data, "remat": kept}, where)

    if not fits(again(plan.model.layers)):
        return run
    choices = range(plan.model.round_layers, plan.model.layers, plan.model.round_layers)
    place = bisect(choices, False, key=lambda few: fits(again(few)))
    few = choices[place] if place < len(choices) else plan.model.layers
    notes.append(f"remat: not stated; {few} whole layers again, as few as let it fit")
    return again(few)


def fits(run: Run) -> bool:
    return any(hbm_of(plan, TRAINER).fits for plan in run.plans)
