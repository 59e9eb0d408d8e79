"""What several tests look at and none changes: shipped plans, searches and published runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from shardsim.plan import plan_names
from shardsim.planner.search import SearchResult, search
from shardsim.validate.runs import Validation, validate
from shardsim.xla.tpu.agreement import Pair, pairs, trainers

# Of shipped plans the fast tier takes these: every family of chips, several slices, each kind of
# mesh. The others differ in size.
SAMPLE = (
    "llama2-70b-published-v6e-1x256",
    "llama3-70b-published-tpu7x-1x64",
    "maxtext-16b-published-v5e-8x256",
    "maxtext-32b-published-v5p-1x64",
    "palm-540b-published-two-pods",
    "vit-22b-published-tp2",
    "vit-22b-published-tp8",
    "vit-e-data-parallel",
)


def shipped() -> list[Any]:
    """Return the names of all shipped plans as parameters of a test."""
    assert set(SAMPLE) <= set(plan_names())
    return [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)
        for name in plan_names()
    ]


@cache
def searched(model: str, machine: str, batch: int, **options: Any) -> SearchResult:
    """Return what a search finds."""
    return search(model, machine, batch, **options)


@cache
def validated(costs: str = "calibrated") -> Validation:
    """Return the published runs beside their predictions."""
    return validate(op_costs=costs)


@cache
def compiled_plans() -> list[Pair]:
    """Return the plans of the kept evidence beside their predictions."""
    return pairs()


@cache
def compiled_trainers() -> list[Pair]:
    """Return the kept programs of MaxText beside their predictions."""
    return trainers()
