"""Reading what trainers print, and telling what is missing; the trainers themselves are not run."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from said import shardsim

from plans import PLANS
from shardsim.emit.dialects.maxtext import maxtext_export
from shardsim.emit.dialects.maxtext_tables import state_paths
from shardsim.emit.dialects.rules import resolve_names
from shardsim.emit.specs import plan_data
from shardsim.errors import ShardsimError
from shardsim.files import read_yaml
from shardsim.plan import Plan
from shardsim.xla.trainers import __main__ as batch
from shardsim.xla.trainers import verify_trainer
from shardsim.xla.trainers.__main__ import CASES, case_plan
from shardsim.xla.trainers.maxtext import read_output
from shardsim.xla.trainers.tiles import LANES, ROWS, tiled_elements

PLAN = PLANS["tensor, sequence, no overlap"]
MADE = maxtext_export(PLAN)


def printed(change: dict[str, str] | None = None, leave_out: str = "") -> str:
    """Return what MaxText would print for `MADE`: parameters as exported but for `change`."""
    shapes = {name: entry["shape"] for name, entry in plan_data(MADE.plan)["parameters"].items()}
    arrays = {array.what: array for array in MADE.arrays if not array.activation}
    lines = []
    for path, weight in state_paths(MADE.block).items():
        if weight not in arrays or weight == leave_out or "/wi/" in path:  # wi is of ungated MLPs
            continue
        spec = resolve_names(arrays[weight].names, MADE.rules)
        shape = list(shapes[weight])
        if arrays[weight].names[0] == "layers":
            spec[:2], shape[:2] = spec[1::-1], shape[1::-1]
        text = str(tuple(tuple(axes) if axes else None for axes in spec))
        lines += [
            f"I1121 06:29:40.55 1 maxtext_utils.py:2207]  model/{path}/value",
            f"    Shape:     float32[{','.join(map(str, shape))}]",
            "    Logical:   P(None,)",
            f"    Physical:  {(change or {}).get(weight, text)}",
        ]
    lines.append("completed step: 0, seconds: 1.2, TFLOP/s/device: 0.0, total, loss: 6.703")
    return "\n".join(lines)


def test_output_as_exported_is_ok() -> None:
    result = read_output(printed(), MADE, {"maxtext": "0.2.5"})
    assert result.ok
    assert len(result.parameters) == len(plan_data(MADE.plan)["parameters"])
    assert result.losses == [6.703]
    data = result.to_data()
    assert data["state"]["compiled_bytes"] is None
    assert data["not_as_exported"] == []


def test_a_parameter_that_lies_otherwise_is_not() -> None:
    result = read_output(printed({"mlp_in": "(None, None, ('tensor',))"}), MADE, {})
    assert not result.ok
    assert result.to_data()["not_as_exported"] == ["mlp_in"]


def test_nor_is_one_that_is_missing() -> None:
    result = read_output(printed(leave_out="query"), MADE, {})
    assert not result.ok
    assert result.missing == ["query"]


@pytest.mark.parametrize(("error", "ok"), [(0.0, True), (0.009, True), (0.02, False)])
def test_state_may_differ_by_a_percent(error: float, ok: bool) -> None:
    result = read_output(printed(), MADE, {})
    result = replace(result, state_bytes=1e9 * (1 + error), exported_state_bytes=1e9)
    assert result.ok == ok


def test_a_loss_that_is_not_finite_is_not_ok() -> None:
    assert not read_output(printed().replace("6.703", "nan"), MADE, {}).ok


@given(shape=st.lists(st.integers(1, 600), min_size=2, max_size=4))
def test_tiles_pad_no_less_than_nothing_and_no_more_than_the_given_layout(shape) -> None:
    stored = tiled_elements(shape)
    rows, lanes = shape[-2:]
    given_layout = math.prod(shape[:-2]) * math.ceil(rows / ROWS) * ROWS
    assert math.prod(shape) <= stored <= given_layout * math.ceil(lanes / LANES) * LANES
    assert stored % (ROWS * LANES) == 0


@pytest.mark.parametrize("case", read_yaml(CASES), ids=lambda case: case["name"])
def test_every_case_is_a_plan(case) -> None:
    assert case_plan(case).machine.devices >= 64


@pytest.mark.parametrize("against", ["maxtext", "big_vision"])
def test_a_trainer_that_is_not_installed_is_one_line(against: str, tmp_path: Path) -> None:
    command = ["verify", "vit-22b-published-tp8", "--against", against]
    run = shardsim(*command, "--trainer-python", str(tmp_path / "nowhere"))
    assert run.exit_code == 2
    lines = run.output.strip().splitlines()
    assert len(lines) == 2  # what is done, and why not
    assert lines[1].startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["flax", "keras"])
def test_the_libraries_lay_out_arrays_as_exported(library: str) -> None:
    """On eight host devices, in processes of their own."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    result = verify_trainer(PLAN, library)
    assert result.ok
    assert len(result.parameters) >= 12
    assert all(one.found == one.planned for one in result.parameters)


def test_peak_and_allocation_are_apart() -> None:
    """Temporaries are what is in use beside the state; gaps between buffers are shown apart."""
    stats = (
        "CompiledMemoryStats peak_memory_in_bytes=900\n"
        "Memory analysis: CompiledMemoryStats(generated_code_size_in_bytes=1, "
        "argument_size_in_bytes=350, output_size_in_bytes=300, alias_size_in_bytes=300, "
        "temp_size_in_bytes=800, host_temp_size_in_bytes=7)"
    )
    data = read_output(f"{printed()}\n{stats}", MADE, {}).to_data()
    assert data["hbm"]["compiled_peak_bytes"] == 900
    assert data["temporaries"]["compiled_bytes"] == 900 - 300
    assert data["temporaries"]["allocated_bytes"] == 800


def test_libraries_have_no_full_scale() -> None:
    with pytest.raises(ShardsimError, match="tiny only"):
        verify_trainer(PLAN, "flax", scale="full")
    with pytest.raises(ShardsimError, match="tiny only"):
        verify_trainer(PLAN, "levanter", scale="full")
    with pytest.raises(ShardsimError, match="models as Llama"):
        verify_trainer(PLANS["fsdp"], "axlearn")
    with pytest.raises(ShardsimError, match="did you mean 'maxtext'"):
        verify_trainer(PLAN, "maxtex")


def test_the_batch_makes_only_the_named_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in the file stays; a run that fails leaves its reason there."""

    def refused(plan: Plan, against: str, **options: object) -> None:
        raise ShardsimError(f"no {against}")

    file = tmp_path / "trainers.yaml"
    file.write_text("libraries-vit-22b in flax, tiny: {ok: true}\n")
    given = ["--flax", "here", "--keras", "here", "--only", "keras, tiny", "-o", str(file)]
    monkeypatch.setattr(batch, "verify_trainer", refused)
    monkeypatch.setattr("sys.argv", ["trainers", *given])
    batch.main()
    assert read_yaml(file) == {
        "libraries-vit-22b in flax, tiny": {"ok": True},
        "maxtext-llama3-8b-v5p in keras, tiny": {"ok": False, "error": "no keras"},
        "libraries-vit-22b in keras, tiny": {"ok": False, "error": "no keras"},
    }
