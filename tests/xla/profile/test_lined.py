"""Traces lined up with plans: rows that add up, and rates that are learned back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from making import US, Row, chrome

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import ShardsimError
from shardsim.machine import Machine, load_chip_file, override_chip
from shardsim.plan import Plan, plan_from_data
from shardsim.xla.profile.keys import STACKS, owners
from shardsim.xla.profile.learn import learn
from shardsim.xla.profile.lined import line_up

GPU = "/device:GPU:0"
# A name of a kernel, and JAX's of an operation, by which each kind of work is known.
NAMES = {
    "matmul": ("nvjet_tst_128x256", "dot_general"),
    "attention": ("cudnn_fmha_fprop", "attend"),
    "elementwise": ("loop_add_fusion", "add"),
    "optimizer": ("loop_multiply_fusion", "optimizer_update/mul"),
    "sum": ("input_reduce_fusion", "reduce_sum"),
    "copy": ("MemcpyD2D", "copy"),
    "transpose": ("input_transpose_fusion", "transpose"),
}


def gpu_plan(**more: object) -> Plan:
    data = {
        "name": "one GPU",
        "model": {"base": "vit-22b", "layers": 2},
        "machine": "h100:1",
        "batch": 64,
        "mesh": {"data": 1},
        "rules": {"activations": {"batch": ["data"]}},
        "remat": "none",
        "attention": "unfused",
        "op_costs": "physical",
        **more,
    }
    return plan_from_data(data, "test")


def with_rates(plan: Plan, rates: dict[str, float]) -> Plan:
    """Return the plan on a chip that has other rates."""
    machine = plan.machine
    chip = override_chip(machine.chip, rates)
    return replace(plan, machine=Machine(chip=chip, shape=machine.shape))


def trace_of(prediction: Prediction, path: Path, idle_us: float = 0.0) -> Path:
    """Write the trace of two steps in which all takes what is predicted, and a pause after each."""
    rows: list[Row] = []
    at = 0.0
    for _ in range(2):
        for number, cost in enumerate(prediction.price.computes):
            if float(cost.count):
                kernel, scope = NAMES[cost.task.kind]
                told = {"hlo_module": "jit_step", "hlo_op": f"fusion.{number}"}
                told["name"] = f"jit(step)/{scope}"
                rows.append((kernel, at, float(cost.time_s) / US, told))
                at += float(cost.time_s) / US
        at += idle_us
    return chrome(path, {(GPU, "Stream #7(Compute)"): rows})


def test_a_trace_of_what_is_predicted_differs_nowhere(tmp_path):
    plan = gpu_plan()
    prediction = predict(plan)
    lined = line_up(plan, trace_of(prediction, tmp_path / "t.json.gz", idle_us=500.0))
    assert lined.profile.step_s == pytest.approx(prediction.step_time_s + 500.0 * US)
    (first, *rest) = lined.by_kind
    assert (first.kind, first.predicted_s) == ("idle", 0.0)
    assert first.measured_s == pytest.approx(500.0 * US)
    assert {row.kind for row in rest} >= {"matmul", "attention", "elementwise", "optimizer"}
    for row in rest:
        assert row.difference_s == pytest.approx(0.0, abs=1e-9 * lined.profile.step_s)
    for rows in (lined.rows, lined.by_kind):
        assert sum(row.measured_s for row in rows) == pytest.approx(lined.profile.step_s)
        assert sum(row.predicted_s for row in rows) == pytest.approx(prediction.step_time_s)
    assert any("operations are told apart by name alone" in text for text in lined.warnings)


@pytest.mark.parametrize("costs", ["physical", "calibrated"])
@pytest.mark.parametrize(("hbm", "matmul"), [(0.5, 0.6), (0.95, 0.4), (0.7, 0.9)])
def test_rates_are_learned_back_from_a_chip_that_has_them(tmp_path, hbm, matmul, costs):
    plan = gpu_plan(op_costs=costs)
    rates = {"hbm_efficiency": hbm, "matmul_efficiency": matmul}
    slower = predict(with_rates(plan, rates))
    learned = learn(line_up(plan, trace_of(slower, tmp_path / "t.json.gz")))
    assert {rate.figure: rate.value for rate in learned.rates} == pytest.approx(rates, abs=2e-4)
    for residual in learned.residuals:
        assert abs(residual.after) < 1e-3
        assert abs(residual.before) >= abs(residual.after)


def test_what_is_learned_is_a_hardware_file(tmp_path, shardsim):
    plan_path, output = tmp_path / "plan.json", tmp_path / "h100.yaml"
    plan_path.write_text(
        json.dumps(
            {
                "name": "one GPU",
                "model": "vit-l-16",
                "machine": "h100:1",
                "batch": 64,
                "mesh": {"data": 1},
                "rules": {"activations": {"batch": ["data"]}},
                "op_costs": "physical",
            }
        )
    )
    plan = gpu_plan(model="vit-l-16", remat="full")
    slower = predict(with_rates(plan, {"matmul_efficiency": 0.5}))
    trace = trace_of(slower, tmp_path / "t.json.gz")
    words = ["calibrate", str(plan_path), "--profile", str(trace), "-o", str(output)]
    result = shardsim(*words)
    assert result.exit_code == 0, result.output
    assert "matmul_efficiency" in result.stdout
    chip = load_chip_file(output)
    assert chip.matmul_efficiency == pytest.approx(0.5, abs=2e-4)
    figure = chip.figures["matmul_efficiency"]
    assert figure["status"] == "measured"
    assert "calibrate --profile" in figure["source"]
    same = {name for name in chip.figures if chip.figures[name] == plan.machine.chip.figures[name]}
    assert set(chip.figures) - same <= {"matmul_efficiency", "hbm_efficiency"}


def test_nothing_is_learned_from_devices_of_another_kind(tmp_path):
    plan = gpu_plan(machine="v4:1x1x1")
    lined = line_up(plan, trace_of(predict(gpu_plan()), tmp_path / "t.json.gz"))
    assert any("a trace of gpu devices, and a plan for v4" in text for text in lined.warnings)
    with pytest.raises(ShardsimError, match="nothing of v4 can be learned"):
        learn(lined)


def test_verify_shows_the_step_by_kind_and_its_data_adds_up(tmp_path, shardsim):
    plan = gpu_plan(model="vit-l-16")
    path = tmp_path / "plan.json"
    words = {"name": "p", "model": "vit-l-16", "machine": "h100:1", "batch": 64}
    words |= {"mesh": {"data": 1}, "rules": {"activations": {"batch": ["data"]}}}
    path.write_text(json.dumps(words))
    trace = trace_of(predict(plan), tmp_path / "t.json.gz", idle_us=100.0)
    data = json.loads(shardsim("verify", str(path), "--profile", str(trace), "--json").stdout)
    for key in ("rows", "kinds"):
        measured, predicted = (
            sum(row[side] for row in data[key]) for side in ("measured_s", "predicted_s")
        )
        assert measured == pytest.approx(data["measured_step_s"])
        assert predicted == pytest.approx(data["predicted_step_s"])
        differences = [abs(row["difference_s"]) for row in data[key]]
        assert differences == sorted(differences, reverse=True)
    assert (data["device"], data["devices"], data["steps"]) == ("gpu", 1, 1)
    busy_s = sum(op["own_s"] for op in data["operations"])
    assert busy_s == pytest.approx(data["measured_step_s"] - 100.0 * US)
    shown = shardsim("verify", str(path), "--profile", str(trace))
    assert shown.exit_code == 0
    for row in data["kinds"]:
        assert row["kind"] in shown.stdout


@pytest.mark.parametrize("attention", ["unfused", "flash"])
@pytest.mark.parametrize("model", ["vit-22b", "gemma2-27b", "mixtral-8x7b", "llama3-8b"])
def test_every_planned_task_belongs_to_an_op_or_to_the_loop(model, attention):
    plan = gpu_plan(model=model, machine="v4:2x2x1", mesh={"data": 4}, attention=attention)
    owner = owners(plan.model, attention)
    left = {
        cost.task.name
        for cost in predict(plan).price.computes
        if cost.task.kind in ("matmul", "attention", "elementwise")
        if owner(cost.task.name) == cost.task.name
    }
    assert left <= set(STACKS), left
    assert left >= {"cast weights", "accumulate gradients"}
