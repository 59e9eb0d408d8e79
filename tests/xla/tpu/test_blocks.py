"""Compiled blocks: the kept compilations of models with experts, several stacks, conditions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardsim.emit.specs import plan_data
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.io import plan_to_data
from shardsim.views.evidence import in_one
from shardsim.xla.tpu.agreement import Pair, pairs
from shardsim.xla.tpu.block_cases import blocks
from shardsim.xla.tpu.rows import BLOCKS, load_rows


@pytest.fixture(scope="module")
def kept() -> list[Pair]:
    return pairs(load_rows(BLOCKS))


def test_rows_are_of_the_plans(kept: list[Pair]) -> None:
    plans = blocks()
    assert len(kept) >= 9
    for pair in kept:
        plan = plans[pair.row["group"]][pair.row["kind"]]
        assert _program(plan_from_data(pair.row["plan"], "kept")) == _program(plan), plan.name


def _program(plan: Plan) -> tuple[object, ...]:
    """Return what decides a compiled program: rules as specs, however a plan words them, and no
    notes. Rows say that they were compiled with the compiler's own limit of on-chip memory."""
    said = plan_to_data(plan)
    if isinstance(said["model"], dict):
        said["model"].pop("note", None)
    words = {key: said[key] for key in said if key not in ("rules", "compiler_options")}
    data = plan_data(replace(plan, compiler_options={}))
    return words, data


def test_hbm_is_near_what_the_compiler_takes(kept: list[Pair]) -> None:
    errors = [abs(pair.peak_error or 0.0) for pair in kept if pair.row["compiled"]]
    assert not [pair for pair in kept if pair.wrongly_fitting or pair.wrongly_refused]
    assert float(np.median(errors)) < 0.2
    assert max(errors) < 0.4


def test_what_is_sent_is_planned(kept: list[Pair]) -> None:
    whole = [pair for pair in kept if "collectives" in pair.row]
    assert whole
    assert all(pair.accounted > 0.999 for pair in whole)


def test_the_page_shows_the_rows(kept: list[Pair]) -> None:
    page = Path(__file__).parents[3].joinpath("docs", "compiled.md").read_text("utf-8")
    assert in_one(kept).strip() in page
