"""What a report says of the kept compilations: the figures of the rows, and of the right ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.model import override_model
from shardsim.plan import load_plan, plan_from_data
from shardsim.planner.changes import changed
from shardsim.report import sections_fidelity
from shardsim.report.document import Text
from shardsim.report.sections_fidelity import compiled_items, compiled_pairs, same_plan
from shardsim.units import GIB
from shardsim.views.table import Table
from shardsim.xla.tpu.agreement import kendall, pairs
from shardsim.xla.tpu.rows import as_compiled, load_rows

ROWS = load_rows()
GROUP = ROWS[0]["group"]


def kept_plan(row: dict[str, Any]) -> Any:
    return plan_from_data(row["plan"], "plan")


def test_the_table_holds_the_rows_of_the_same_model_and_slice() -> None:
    plan = kept_plan(ROWS[0])
    found = compiled_pairs(plan)
    words, table = compiled_items(plan, found)
    assert isinstance(words, Text)
    assert isinstance(table, Table)
    rows = [row for row in ROWS if row["group"] == GROUP]
    assert len(table.rows) == len(rows)
    for shown, row in zip(table.cells, rows, strict=True):
        item = predict(as_compiled(kept_plan(row)))
        assert shown[1] == f"{100 * item.mfu:.1f}"
        assert shown[2] == (f"{100 * row['mfu']:.1f}" if "mfu" in row else "-")
        assert shown[6] == (f"{row['peak_bytes'] / GIB:.1f}" if row["peak_bytes"] else "-")
    read = [row for row in rows if "step_time_s" in row]
    predicted = [predict(kept_plan(row), costs="calibrated").step_time_s for row in read]
    rank = kendall(predicted, [row["step_time_s"] for row in read])
    assert len(read) < 2 or f"{rank:.2f}" in words.text
    assert f"{sum(row['compiled'] for row in rows)} compiled" in words.text


def test_another_model_of_that_name_has_no_rows() -> None:
    plan = kept_plan(ROWS[0])
    other = replace(plan, model=override_model(plan.model, {"layers": 2}))
    assert compiled_pairs(other) == []


def test_without_rows_of_its_own_a_plan_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan("vit-e-data-parallel")
    some = pairs(ROWS[::6])
    monkeypatch.setattr(
        sections_fidelity, "pairs", lambda rows=None: some if rows is None else pairs(rows)
    )
    (words,) = compiled_items(plan, compiled_pairs(plan))
    assert isinstance(words, Text)
    assert f"{len(some)} plans" in words.text
    monkeypatch.setattr(sections_fidelity, "pairs", lambda: [])
    assert compiled_items(plan, []) == []


def test_a_plan_is_known_by_what_it_does() -> None:
    row = next(row for row in ROWS if "mfu" in row)
    plan = kept_plan(row)
    found = compiled_pairs(plan)
    renamed = replace(plan, name="mine", note="of my own")
    assert same_plan(renamed, found) is not None
    assert same_plan(replace(plan, batch=2 * plan.batch), found) is None
    refused = [pair for pair in found if "mfu" not in pair.row]
    assert all(same_plan(pair.predicted.plan, [pair]) is None for pair in refused)


def test_a_gpu_is_not_judged_by_the_tpu_compiler() -> None:
    plan = changed(load_plan("vit-22b-published-tp8"), {"machine": "h100:8", "mesh.data": 1})
    assert compiled_pairs(plan) == []
    assert same_plan(plan, []) is None
    assert compiled_items(plan, []) == []
