"""Runs files: each key of a row, what it leaves open, and what is refused with which words."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import FileError
from shardsim.machine import load_chip
from shardsim.model import Accounting, load_model, model_flops_per_token
from shardsim.plan import plan_from_data
from shardsim.plan.io import KEYS as PLAN_KEYS
from shardsim.validate.rows import KEYS, Run, read_run
from shardsim.validate.runs import validate, validate_data

ROW: dict[str, Any] = {
    "id": "row",
    "model": "llama2-7b",
    "machine": "v5p:4x4x4",
    "batch": 256,
    "sequence": 4096,
    "mesh": {"fsdp": 64},
    "remat": "full",
    "measured": {"tokens_per_s_per_chip": 5000},
    "source": "nowhere",
}


def run_of(**changes: Any) -> Run:
    """Return the run of the row above with some keys changed; None removes one."""
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    return read_run(row, "runs.yaml: runs[0]")


def test_a_row_is_the_plan_that_a_plan_file_with_its_keys_is() -> None:
    rules = {
        "parameters": {"embed": ["fsdp"], "heads": ["model"], "mlp": ["model"]},
        "activations": {"batch": ["fsdp"], "heads": ["model"], "mlp": ["model"]},
    }
    choices = {
        "mesh": {"fsdp": 16, "model": 4},
        "rules": rules,
        "remat": {"save": ["qkv"], "offload": ["layer_input"]},
        "attention": "unfused",
        "microbatches": 2,
        "overlap": {"matmul": "off", "gradients": False},
        "precision": {"compute": "bf16", "reduce": "f32"},
        "optimizer": "adafactor",
    }
    run = run_of(**choices)
    given = {key: value for key, value in (ROW | choices).items() if key in PLAN_KEYS}
    assert run.plans == (plan_from_data(given | {"name": "row"}, "plan"),)
    assert run.filled == {}


@pytest.mark.parametrize(
    ("mesh", "parameters", "activations"),
    [
        ({"data": 64}, {}, {"batch": ("data",)}),
        ({"data": 4, "fsdp": 16}, {"embed": ("fsdp",)}, {"batch": ("data", "fsdp")}),
        (
            {"fsdp": 16, "context": 4, "model": 1},
            {"embed": ("fsdp", "context")},
            {"batch": ("fsdp",), "seq": ("context",)},
        ),
    ],
)
def test_axes_with_the_usual_names_need_no_rules(
    mesh: dict[str, int], parameters: dict[str, Any], activations: dict[str, Any]
) -> None:
    (plan,) = run_of(mesh=mesh).plans
    assert (plan.parameters, plan.activations) == (parameters, activations)
    assert {axis.name: axis.size for axis in plan.mesh} == {
        name: size for name, size in mesh.items() if size > 1
    }


def test_what_a_source_leaves_open_is_every_combination() -> None:
    run = run_of(
        machine=["v5p:4x4x4", "v5p:4x4x8"], batch=[128, 256], mesh={"fsdp": "rest", "model": [1, 4]}
    )
    found = [
        (plan.machine.chips, plan.batch, {axis.name: axis.size for axis in plan.mesh})
        for plan in run.plans
    ]
    assert found == [
        (chips, batch, {"fsdp": chips} if model == 1 else {"fsdp": chips // model, "model": model})
        for chips in (64, 128)
        for batch in (128, 256)
        for model in (1, 4)
    ]
    (row,) = validate_data(
        {"runs": [ROW | {"mesh": {"fsdp": "rest", "model": [1, 2, 4]}}]}, ""
    ).rows
    assert row.low is not None
    assert row.high is not None
    assert row.predicted is not None
    assert row.low < row.predicted < row.high
    assert "3 plans" in row.notes[0]


def test_remat_that_is_not_stated_is_the_least_that_fits() -> None:
    names = set()
    for batch in (64, 256, 512, 768, 4096):
        chosen = run_of(remat=None, batch=batch).plans[0].remat.name
        before = {"none": (), "dots": ("none",), "full": ("none", "dots")}[chosen]
        assert not any(predict(run_of(remat=name, batch=batch).plans[0]).fits for name in before)
        names.add(chosen)
    assert names == {"none", "dots", "full"}


FLOPS = model_flops_per_token(load_model("llama2-7b"), 4096, Accounting.SIX_N)


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ({"tokens_per_s_per_chip": 5000}, 5000),
        ({"tokens_per_s": 320000}, 5000),
        ({"step_time_s": 4.0}, 256 * 4096 / 4.0 / 64),
        ({"tflops_per_s_per_chip": 250}, 250e12 / FLOPS),
        ({"mfu": 0.5}, 0.5 * 459e12 / FLOPS),
        ({"step_time_s": 4.0, "mfu": 0.9}, 256 * 4096 / 4.0 / 64),
        ({"speedup_over_one_slice": 1.9}, None),
    ],
)
def test_the_measured_rate(measured: dict[str, float], rate: float | None) -> None:
    found = run_of(measured=measured, accounting="six_n").rate()
    assert found == (None if rate is None else pytest.approx(rate))


def test_an_mfu_is_of_the_peak_of_the_row_s_number_format() -> None:
    run = run_of(measured={"mfu": 0.5}, accounting="six_n", precision={"compute": "int8"})
    assert run.rate() == pytest.approx(0.5 * load_chip("v5p").peak("int8") / FLOPS)


def test_two_slices_against_one() -> None:
    row = ROW | {"machine": "2*v5p:4x4x4", "mesh": {"data": 2, "fsdp": 64}}
    row["measured"] = {"speedup_over_one_slice": 1.9}
    (found,) = validate_data({"runs": [row]}, "runs.yaml").rows
    (one,) = validate_data({"runs": [ROW | {"batch": 128}]}, "runs.yaml").rows
    assert found.predicted is not None
    assert one.predicted is not None
    assert found.predicted_ratio == pytest.approx(2 * found.predicted / one.predicted)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chips": 64}, "unknown key 'chips'"),
        ({"optimiser": "adamw"}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"batch": None}, "missing key 'batch'"),
        ({"measured": None}, "missing key 'measured'"),
        ({"source": None}, "missing key 'source'"),
        ({"batch": "2,048 sequences"}, "batch: must be a positive whole number, not '2,048 seq"),
        ({"mesh": "fsdp 64"}, "mesh: expected axis names, each with a size, such as {data: 128"),
        ({"mesh": {"fsdp": "64-way"}}, "mesh.fsdp.size: must be a positive whole number"),
        ({"mesh": {"fsdp": "rest", "data": "rest"}}, "mesh: only one axis can be the rest"),
        ({"mesh": {"fsdp": "rest", "model": 48}}, "mesh: sizes multiply to 48, which does not div"),
        ({"mesh": {"ulysses": 16, "fsdp": 4}}, "what axis 'ulysses' splits must be said in"),
        ({"mesh": {"ring": 16, "fsdp": 4}}, "(context gathers keys and values)"),
        ({"attention": "ring"}, "attention: 'ring' is not possible; choose from: flash, flash-20"),
        ({"remat": "full (one activation kept)"}, "remat: unknown remat policy 'full (one act"),
        ({"precision": "bf16 compute"}, "precision: expected a mapping of keys, found str"),
        ({"measured": {"mfu_pct": 54.9}}, "measured: unknown key 'mfu_pct'; did you mean 'mfu'"),
        ({"measured": {"mfu": 54.9}}, "measured.mfu: must be between 0 and 1 (54.9 % is 0.549)"),
        ({"measured": {"mfu": 0.5}}, "missing key 'accounting': measured.mfu says nothing without"),
        ({"measured": {"step_time_s": "4 s"}}, "measured.step_time_s: expected a number"),
        ({"measured": {"step_time_s": -1}}, "measured.step_time_s: must be positive, not -1"),
        ({"accounting": "palms"}, "unknown accounting 'palms'; did you mean 'palm'"),
        ({"machine": ["v5p:4x4x4", "v4:4x4x4"]}, "machine: its slices are of different chips"),
        ({"filled": {"btach": "?"}}, "filled: unknown key 'btach'; did you mean 'batch'"),
        ({"batch": list(range(64, 64 * 103, 64))}, "its lists give more than 100 plans"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_line_with_file_row_and_key(changes: dict[str, Any], why: str) -> None:
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    result = validate_data([ROW | {"id": "good"}, row], "runs.yaml")
    assert [each.id for each in result.rows] == ["good"]
    ((name, reason),) = result.failed
    assert name == "row"
    assert reason.startswith("runs.yaml: runs[1] ('row'): ")
    assert why in reason
    assert "\n" not in reason
    with pytest.raises(FileError, match=r"^runs.yaml: runs\[0\] "):  # nothing else is in the file
        validate_data([row], "runs.yaml")


def test_sizes_that_trainers_pad_are_predicted_with_a_note() -> None:
    (row,) = validate_data([ROW | {"batch": 100}], "runs.yaml").rows
    assert row.notes[0].startswith("uneven: batch: ")


def test_what_is_filled_in_is_printed_and_so_is_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "runs.yaml"
    file.write_text(yaml.safe_dump({"runs": [ROW | {"filled": {"mesh.fsdp": "not published"}}]}))
    (row,) = validate(file).to_data()["rows"]
    assert row["filled"] == {"mesh.fsdp": "not published"}
    assert row["fits"] is True
    assert 8e9 < row["hbm_peak_bytes"] < 95e9


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["v4:4x4x4", "rest", "fsdp 8 x tp 8", "flash", "full", "custom: q, k"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["fsdp", "model", "mfu", "layers", "kernel", "x"]), inner,
                      max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_row_is_a_run_or_one_line(changes: dict[str, Any]) -> None:
    with contextlib.suppress(FileError):  # and no other error
        read_run(ROW | changes, "runs.yaml: runs[0]")
