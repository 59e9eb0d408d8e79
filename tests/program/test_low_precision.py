"""Low precision: what is multiplied, what is cast, and what travels in eight bits."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.plan.io import plan_to_data
from shardsim.planner.changes import changed
from shardsim.program.partition import partition
from shardsim.program.schedule import Move
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Compute
from shardsim.simulate import simulate_plan


def plan_of(machine: str = "v5e:4x4", **precision: Any) -> Plan:
    data = {
        "model": {"base": "llama2-7b", "name": "small", "layers": 4},
        "machine": machine,
        "batch": 64,
        "sequence": 4096,
        "mesh": {"fsdp": 16},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
        "precision": precision,
    }
    return plan_from_data(data, "plan")


def tasks(plan: Plan, phase: str = "") -> list[Any]:
    program = partition(Workload.of(plan), resolve(plan))
    return [task for block in program.blocks if phase in block.phase for task in block.tasks]


def formats(plan: Plan) -> dict[str, str]:
    return {
        task.name: task.dtype
        for task in tasks(plan)
        if isinstance(task, Compute) and task.kind == "matmul"
    }


def cast_bytes(plan: Plan) -> float:
    return sum(float(task.hbm_bytes) for task in tasks(plan) if "quantise" in task.name)


def test_weights_are_cast_in_one_pass_or_after_one_that_finds_their_scale() -> None:
    """Float32 weights of a layer, a sixteenth of them: read once or twice, then written."""
    weights = (4 * 4096 * 4096 + 3 * 4096 * 11008) / 16
    eight = {"compute": "int8", "weights": "int8"}
    for precision, one_bytes in (
        ({}, 4 + 2),
        (eight, 4 + 4 + 1),
        (eight | {"scales": "static"}, 4 + 1),
    ):
        casts = [task for task in tasks(plan_of(**precision)) if task.name == "cast weights"]
        assert [task.hbm_bytes for task in casts] == [weights * one_bytes] * 2, precision


def test_products_that_stay_in_bf16_are_those_that_are_named() -> None:
    every = formats(plan_of(compute="int8"))
    assert set(every.values()) == {"int8"}
    for word, names in {
        "head": {"output_head"},
        "attention": {"query", "key", "value", "attention_output"},
        "mlp": {"mlp_in", "mlp_gate", "mlp_out"},
    }.items():
        found = formats(plan_of(compute="int8", bf16=[word]))
        kept = {name.split()[0] for name, dtype in found.items() if dtype == "bf16"}
        assert kept == names
    found = formats(plan_of(compute="int8", bf16=["weight_gradients"]))
    assert {name for name, dtype in found.items() if dtype == "bf16"} == {
        name for name in found if name.endswith("dW")
    }
    # What stays is not cast.
    assert cast_bytes(plan_of(compute="int8", bf16=["mlp"])) < cast_bytes(plan_of(compute="int8"))
    nothing = plan_of(compute="int8", bf16=["head", "attention", "mlp"])
    assert cast_bytes(nothing) == 0


def test_scales_that_are_known_need_no_pass_over_the_operand() -> None:
    dynamic, static, unit = (
        cast_bytes(plan_of(compute="int8", scales=scales))
        for scales in ("dynamic", "static", "unit")
    )
    assert static == unit == pytest.approx(dynamic * 1.5 / 2.5)
    times = [
        predict(plan_of(compute="int8", scales=scales)).step_time_s
        for scales in ("static", "dynamic")
    ]
    assert times[0] < times[1] < predict(plan_of()).step_time_s


def test_weights_travel_in_eight_bits_and_their_gradients_do_not() -> None:
    usual, narrow = plan_of(compute="int8"), plan_of(compute="int8", weights="int8")
    for phase in ("forward", "backward"):
        pairs = zip(tasks(usual, phase), tasks(narrow, phase), strict=True)
        for one, other in pairs:
            if not isinstance(one, Move) or not one.count:
                continue
            if one.kind == "all-gather":
                assert other.bytes == one.bytes / 2
            else:
                assert other.bytes == one.bytes
    tables = [
        sum(float(task.bytes) for task in tasks(plan, "head") if isinstance(task, Move))
        for plan in (usual, narrow)
    ]
    assert tables[0] == tables[1]
    one, other = predict(usual), predict(narrow)
    assert other.hbm["peak_bytes"] < one.hbm["peak_bytes"]
    attention = plan_of(compute="int8", weights="int8", bf16=["attention"])
    sizes = [
        sum(float(t.bytes) for t in tasks(plan, "forward") if isinstance(t, Move))
        for plan in (narrow, attention, usual)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_events_agree_with_weights_in_eight_bits() -> None:
    plan = plan_of(compute="int8", weights="int8", scales="static", bf16=["head"])
    assert simulate_plan(plan).step_time_s == pytest.approx(predict(plan).step_time_s, rel=5e-3)
    assert plan_from_data(plan_to_data(plan), "again") == plan


@pytest.mark.parametrize(
    ("machine", "precision", "said"),
    [
        ("v4:2x2x4", {"compute": "fp8"}, r"v4 has no fp8"),
        ("v5e:4x4", {"weights": "int8"}, r"precision.weights: products of bf16 have no scales"),
        ("v5e:4x4", {"scales": "static"}, r"precision.scales: products of bf16"),
        ("v5e:4x4", {"bf16": ["head"]}, r"precision.bf16: products of bf16"),
        ("v5e:4x4", {"compute": "int8", "weights": "bf16"}, r"precision.weights: what is cast"),
        ("v5e:4x4", {"compute": "int8", "bf16": ["heads"]}, r"'heads' is not possible"),
        ("v5e:4x4", {"compute": "int8", "bf16": "head"}, r"precision.bf16: expected a list"),
        ("v5e:4x4", {"compute": "int8", "scales": "row"}, r"precision.scales: 'row' is not"),
        ("v5e:4x4", {"sparsity": "4:2"}, r"precision.sparsity: expected n:m in quotes"),
    ],
)
def test_what_is_no_precision_is_refused(
    machine: str, precision: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        plan_of(machine, **precision)


def test_what_gains_nothing_says_why() -> None:
    sparse = predict(plan_of(sparsity="2:4"))
    assert sparse.step_time_s == predict(plan_of()).step_time_s
    assert any("gains nothing: v5e multiplies zeros" in text for text in sparse.warnings)
    slow = predict(plan_of("v4:2x2x4", compute="int8"))
    assert any("int8 multiplies no faster than bf16 on v4" in text for text in slow.warnings)
    assert slow.step_time_s > predict(plan_of("v4:2x2x4")).step_time_s


def test_two_of_four_is_skipped_where_a_chip_can_and_not_for_gradients_of_weights() -> None:
    plan = plan_of("2*h100:8")
    sparse = changed(plan, {"precision.sparsity": "2:4"})
    times = [predict(one).time["compute_s"] for one in (plan, sparse)]
    assert times[0] * 0.55 < times[1] < times[0] * 0.85  # forward and back, not the gradients
    for task in tasks(sparse):
        if isinstance(task, Compute) and task.kind == "matmul":
            assert task.sparse == (not task.name.endswith("dW") and "head" not in task.name)
    other = predict(changed(plan, {"precision.sparsity": "1:4"}))
    assert other.step_time_s == predict(plan).step_time_s
    assert any("skips zeros of 2:4 alone" in text for text in other.warnings)
