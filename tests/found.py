"""What several tests look at and none changes: shipped plans and searches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from shardsim.plan import plan_names
from shardsim.planner.found import SearchResult
from shardsim.planner.search import search

# Of shipped plans the fast tier takes these: every family of chips, several slices, each kind of
# mesh. The others differ in size.
SAMPLE = (
    *("llama2-70b-published-v6e-1x256", "llama3-70b-published-tpu7x-1x64"),
    *("maxtext-16b-published-v5e-8x256", "maxtext-32b-published-v5p-1x64"),
    *("palm-540b-published-two-pods", "vit-22b-published-tp2", "vit-22b-published-tp8"),
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
