"""A trace of a small step on host devices, recorded and read end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardsim.xla.host import host_environment
from shardsim.xla.profile.files import open_trace

PLAN = {
    "name": "tiny",
    "model": {
        "name": "tiny",
        "family": "vit",
        "layers": 2,
        "embed": 32,
        "heads": 2,
        "patch": 4,
        "image": 8,
        "pooling": "mean",
        "classes": 8,
    },
    "machine": "v4:2x1x1",
    "batch": 8,
    "mesh": {"fsdp": 2},
    "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
    "remat": "none",
    "attention": "unfused",
    "optimizer": "sgd",
}
STEPS = 3
# A quick compilation, and none that puts a product and what reads it into one operation.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan and the folder with what was recorded of its step."""
    pytest.importorskip("jax")
    folder = tmp_path_factory.mktemp("recorded")
    plan = folder / "plan.json"
    plan.write_text(json.dumps(PLAN))
    words = ["-m", "shardsim.xla.profile.record", str(plan), str(folder / "out")]
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | host_environment(2, FLAGS) | {"PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, *words, "--steps", str(STEPS), "--host-devices", "2"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    trace = Path(run.stdout.strip().splitlines()[-1])
    assert trace.name.endswith(".xplane.pb")
    return plan, trace


def test_a_recorded_step_is_laid_beside_its_plan(recorded, shardsim):
    plan, trace = recorded
    out = shardsim("verify", str(plan), "--profile", str(trace), "--json")
    assert out.exit_code == 0, out.output
    data = json.loads(out.stdout)
    assert (data["device"], data["devices"], data["steps"]) == ("cpu", 2, STEPS - 1)
    assert data["program"].startswith("jit_step(")
    rows = data["rows"]
    assert sum(row["measured_s"] for row in rows) == pytest.approx(data["measured_step_s"])
    assert sum(row["predicted_s"] for row in rows) == pytest.approx(data["predicted_step_s"])
    # All matmuls of the plan are found by their sizes, all collectives by their mesh axes, and
    # nearly all that is left by the function of the emitted program that made it.
    for kind in ("matmul", "attention", "collective"):
        mine = [row for row in rows if row["kind"] == kind and row["predicted_s"] > 0]
        assert mine
        assert all(row["measured_s"] > 0 for row in mine), mine
    assert all("fsdp" in row["what"] for row in rows if row["kind"] == "collective")
    lost_s = sum(row["measured_s"] for row in rows if not row["lined_up"])
    assert lost_s == pytest.approx(sum(op["own_s"] for op in data["not_lined_up"]))
    assert lost_s < 0.2 * data["measured_step_s"]
    products = [row for row in rows if row["kind"] == "matmul" and row["lined_up"]]
    assert {row["what"].rpartition(" (")[2] for row in products} >= {
        "16 x 32 x 32)",  # 16 tokens on a device; queries, keys, values and attention's output
        "16 x 32 x 128)",  # both matrices of the MLP
    }


def test_a_chrome_trace_of_the_same_steps_says_the_same(recorded, shardsim):
    plan, trace = recorded
    other = next(trace.parent.glob("*.trace.json.gz"))
    hlo = trace.parents[3] / "step.hlo"
    found = [
        json.loads(shardsim("verify", str(plan), "--profile", *words, "--json").stdout)
        for words in ([str(trace)], [str(other), "--hlo", str(hlo)])
    ]
    steps = [data["measured_step_s"] for data in found]
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)
    kinds = [{row["kind"]: row["measured_s"] for row in data["kinds"]} for data in found]
    assert kinds[0] == pytest.approx(kinds[1], rel=1e-3, abs=1e-8)
    damaged = other.with_name("damaged.json.gz")
    damaged.write_bytes(other.read_bytes()[:-100])
    refused = shardsim("verify", str(plan), "--profile", str(damaged))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "a damaged gzip file" in refused.stderr


def test_the_program_is_in_the_xplane_file(recorded):
    _, trace = recorded
    names = open_trace(trace).programs()
    assert any(name.startswith("jit_step(") for name in names)


def test_steps_of_another_plan_are_noticed(recorded, shardsim, plan_file, tmp_path):
    _, trace = recorded
    hlo = trace.parents[3] / "step.hlo"
    refused = shardsim("verify", str(plan_file), "--profile", str(trace), "--hlo", str(hlo))
    assert refused.exit_code == 2
    assert "runs on 2 devices, but the plan's mesh has 64" in refused.stderr
    noticed = shardsim("verify", str(plan_file), "--profile", str(trace), "--json")
    assert noticed.exit_code == 0
    warnings = " ".join(json.loads(noticed.stdout)["warnings"])
    assert "no matmul of the plan is in the trace" in warnings
    assert "62 fewer than the plan" in warnings
    one = tmp_path / "one.json"
    one.write_text(json.dumps(PLAN | {"machine": "v4:1x1x1", "mesh": {"fsdp": 1}}))
    more = shardsim("verify", str(one), "--profile", str(trace))
    assert more.exit_code == 2
    assert "a step on 2 devices, but the plan has 1" in more.stderr
