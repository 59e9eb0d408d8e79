"""Rows that hold several sequences give the numbers of each sequence by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plans import LENGTHS
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.io import plan_to_data
from shardsim.xla.host import LARGEST_ERROR, QUICK, host_environment


def test_packed_and_padded_rows_are_their_sequences() -> None:
    plans = [replace(plan, batch=4) for plan in LENGTHS.values()]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_packed.py"))],
        input=json.dumps([plan_data(plan) for plan in plans]),
        env={"PYTHONPATH": ":".join(sys.path), **host_environment(1, QUICK)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for plan, found in zip(plans, json.loads(done.stdout), strict=True):
        assert found["loss"] <= LARGEST_ERROR, plan.name
        assert found["gradients"] <= LARGEST_ERROR, plan.name
        assert plan.lengths is not None
        assert (found["sequences"] > plan.batch) == plan.lengths.packed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": {"mean": 5, "as": "unpadded"}}, r"lengths.as: export of unpadded"),
        ({"execution": "partitioned"}, r"lengths: export is supported for execution: explicit"),
        ({"machine": "h100:8"}, r"lengths: export for GPUs"),
    ],
)
def test_what_is_not_exported_says_what_to_take(changes: dict[str, Any], said: str) -> None:
    plan: Plan = LENGTHS["padded, data"]
    data = {**plan_to_data(plan), "mesh": {"data": 8}, **changes}
    with pytest.raises(PlanError, match=said):
        plan_data(plan_from_data(data, "plan"))
