"""What several tests look at and none changes, made once: searches and published runs."""

from __future__ import annotations

from functools import cache
from typing import Any

from shardsim.planner.search import SearchResult, search
from shardsim.validate.runs import Validation, validate


@cache
def searched(model: str, machine: str, batch: int, **options: Any) -> SearchResult:
    """Return what a search finds."""
    return search(model, machine, batch, **options)


@cache
def validated(costs: str = "physical") -> Validation:
    """Return the published runs beside their predictions."""
    return validate(op_costs=costs)
