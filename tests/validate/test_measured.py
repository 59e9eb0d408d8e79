"""Steps that were measured on devices, beside their predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from said import shardsim

from shardsim.errors import FileError
from shardsim.files import data_folder
from shardsim.validate.measured import SHIPPED, Measured, append_result, measured, read_results
from shardsim.views.evidence import measured_page

FITTED = 6  # of the steps, named in hardware/h100.yaml


@pytest.fixture(scope="module")
def kept() -> Measured:
    """Return the steps that ship, predicted."""
    return measured()


def test_the_bounds_of_docs_gpu_hold(kept: Measured) -> None:
    summary = kept.summary()
    assert not kept.failed
    assert summary["steps"] == 30
    assert summary["of_another_program"] == 2
    assert summary["median_abs_error"] < 0.03
    assert summary["max_abs_error"] < 0.10
    assert summary["median_abs_peak_error"] < 0.03
    assert summary["max_abs_peak_error"] < 0.09
    assert summary["rank_correlation"] > 0.97


def test_steps_that_nothing_was_fitted_to_are_no_worse(kept: Measured) -> None:
    text = data_folder("hardware").joinpath("h100.yaml").read_text("utf-8")
    named = {word.strip("(,)") for word in text.split()}
    fitted = [step for step in kept.alike if step.id.removeprefix("h100-") in named]
    rest = [abs(s.error) for s in kept.alike if s not in fitted and "-2-" not in s.id]
    assert len(fitted) == FITTED
    assert sorted(rest)[len(rest) // 2] < 0.05


def test_errors_are_predicted_over_measured(kept: Measured) -> None:
    for step in kept.steps:
        assert step.error == pytest.approx(step.predicted_s / step.measured_s - 1.0)


def test_the_page_has_the_table() -> None:
    page = data_folder("plans").parent.joinpath("docs", "gpu.md").read_text("utf-8")
    assert measured_page() in page


def test_an_appended_step_is_read_again(tmp_path: Path) -> None:
    row = dict(read_results(SHIPPED)[0])
    path = tmp_path / "steps.jsonl"
    append_result(path, row)
    append_result(path, {**row, "id": "again", "step_time_s": 2.0 * row["step_time_s"]})
    found = measured(path)
    assert [step.id for step in found.steps] == [row["id"], "again"]
    first, second = found.steps
    assert 1.0 + second.error == pytest.approx((1.0 + first.error) / 2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_time_s": -1.0}, "step_time_s must be a positive number"),
        ({"step_time_s": "fast"}, "step_time_s must be a positive number"),
        ({"plan": "vit-22b"}, "plan must be the keys of a plan file"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    append_result(path, {**read_results(SHIPPED)[0], **change})
    with pytest.raises(FileError, match=words) as told:
        measured(path)
    assert "line 1" in str(told.value)


@pytest.mark.parametrize("text", ["[1]", "{", "\x00", "null"])
def test_a_foreign_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(text, encoding="utf-8")
    result = shardsim("validate", "--measured", str(path))
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1


def test_a_plan_that_cannot_be_predicted_is_said(tmp_path: Path) -> None:
    row = read_results(SHIPPED)[0]
    path = tmp_path / "steps.jsonl"
    append_result(path, {**row, "plan": {**row["plan"], "model": "no-such-model"}})
    found = measured(path)
    assert not found.steps
    assert found.failed[0][0] == row["id"]


def test_the_command_prints_what_json_has(kept: Measured) -> None:
    result = shardsim("validate", "--measured", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["summary"] == pytest.approx(kept.summary())
