"""Compiled blocks: the kept compilations of models with experts, several stacks, conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
        # Compiled with the compiler's own limit of on-chip memory, as their rows say.
        kept_plan = {key: v for key, v in pair.row["plan"].items() if key != "compiler_options"}
        assert kept_plan == plan_to_data(plan), plan.name


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
