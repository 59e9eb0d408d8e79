"""The export on GPUs: what it does otherwise, and the step run where JAX finds devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from said import shardsim

from shardsim.emit.specs import plan_data
from shardsim.plan import plan_from_data
from shardsim.validate.measured import read_results
from shardsim.xla.host import QUICK

SMALL = """\
name: small
model: {name: small, family: vit, layers: 2, embed: 64, heads: 4, patch: 4, image: 16,
        pooling: mean, classes: 8}
machine: "h100:1"
batch: 16
mesh: {data: 1}
rules: {activations: {batch: [data]}}
attention: flash
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that tests start run on the processor, and compile fast rather than well."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", QUICK)


def run(name: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name))],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_parts_of_the_step_that_only_gpus_take() -> None:
    found = run("run_gpu_parts.py")
    assert found["loss"][0] == found["loss"][1]  # type: ignore[index]
    assert max(found["errors"]) < 1e-2  # type: ignore[type-var]
    gpu, usual = found["wide"]  # type: ignore[misc]
    assert gpu == 0 < usual  # matmuls with an operand of float32
    assert found["keeps"] == {"gpu": True, "cpu": False}
    assert found["other"] is False
    assert found["mesh"] == "taken in order"


@pytest.mark.parametrize("machine", ["h100:1", "h100:8", "a100:8"])
def test_no_option_of_the_tpu_compiler_goes_to_a_gpu(machine: str) -> None:
    count = int(machine.split(":")[1])
    data = {"model": "vit-l-16", "machine": machine, "batch": 64, "mesh": {"fsdp": count}}
    rules = {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}}
    made = plan_data(plan_from_data({**data, "rules": rules}, "test"))
    assert made["plan"]["tpu_options"] == {}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_step_is_run_timed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsim.xla.device.BUDGET_S", 0.1)
    plan, results = tmp_path / "small.yaml", tmp_path / "steps.jsonl"
    plan.write_text(SMALL, encoding="utf-8")
    asked = ["verify", str(plan), "--against", "device", "--scale", "full"]
    done = shardsim(*asked, "--measure", "--results", str(results), "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["device"]["platform"] == "cpu"
    assert answer["loss_rel_error"] < 1e-4
    assert answer["grad_rel_error"] < 1e-4
    (row,) = read_results(results)
    assert row["step_time_s"] == answer["step"]["measured_s"] > 0.0
    assert plan_from_data(row["plan"], "row") == plan_from_data(row["plan"], "row")
    shown = shardsim("validate", "--measured", str(results))
    assert "small" in shown.output


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_too_few_devices_are_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardsim.xla.device.shrink", None)  # nothing is compared before
    plan = tmp_path / "small.yaml"
    plan.write_text(
        SMALL.replace("h100:1", "h100:8").replace("data: 1", "data: 8"), encoding="utf-8"
    )
    asked = ["verify", str(plan), "--against", "device", "--scale", "full", "--measure"]
    done = shardsim(*asked)
    assert done.exit_code == 2
    assert "needs 8 devices, but JAX finds 1" in done.output


def test_results_need_a_measured_step(tmp_path: Path) -> None:
    plan = tmp_path / "small.yaml"
    plan.write_text(SMALL, encoding="utf-8")
    for more in (["--against", "device"], ["--against", "host", "--measure"]):
        done = shardsim("verify", str(plan), *more, "--results", "x.jsonl")
        assert done.exit_code == 2
        assert "--results" in done.output
