"""What libraries of GPUs run beside other work over a tensor axis and an expert axis."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.program.partition import partition
from shardsim.program.passes import implemented
from shardsim.program.schedule import Await, Start
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Collective, Compute

SPLIT = {key: ["model"] for key in ("heads", "kv_heads", "mlp", "vocab")}


def gpt(*, tokens: bool = True, matmul: str = "off", **more: Any) -> Plan:
    data = {
        "model": {"base": "gpt3-175b", "layers": 2},
        "machine": "h100:8",
        "batch": 1,
        "sequence": 2048,
        "mesh": {"model": 8},
        "rules": {
            "parameters": SPLIT,
            "activations": SPLIT | ({"seq": ["model"]} if tokens else {}),
        },
        "attention": "flash",
        "overlap": {"matmul": matmul},
        "remat": "none",
        "precision": {"parameters": "bf16", "master": "f32"},
        **more,
    }
    return plan_from_data(data, "test")


def over_tensor(found: Prediction, phase: str) -> tuple[float, float]:
    """Return seconds of layers' collectives over the tensor axis: on their own, and waited for."""
    moves = [
        cost
        for cost in found.price.collectives
        if isinstance(cost.task, Collective)
        and (cost.task.role, cost.task.purpose) == ("tensor", "block")
        and cost.block.startswith(f"layer {phase}")
    ]
    return sum(float(one.time_s) for one in moves), sum(float(one.exposed_s) for one in moves)


def test_two_thirds_of_the_way_back_is_hidden_where_tokens_are_split() -> None:
    """Forward two gathers and two scatters wait. Back a gather for each product of two waits, and
    a gather and a scatter for each of the others run beside gradients."""
    found = predict(gpt(), implementation="trainer")
    alone, waits = over_tensor(found, "forward")
    assert waits == pytest.approx(alone)
    back = {
        cost.task.name: float(cost.exposed_s / cost.time_s)
        for cost in found.price.collectives
        if cost.block.startswith("layer backward") and cost.task.name.startswith(("gather", "sca"))
    }
    hidden = {"gather mlp input", "scatter d mlp input"}
    hidden |= {"gather attention input", "scatter d attention input"}
    assert back.keys() == hidden | {"gather d mlp", "gather d attention"}
    assert all(back[name] == pytest.approx(0.0, abs=1e-9) for name in hidden)
    assert back["gather d attention"] == pytest.approx(1.0)
    assert back["gather d mlp"] >= 1.0 - 1e-9  # behind what the head left on the way
    other = predict(gpt(), implementation="torchtitan")
    alone, waits = over_tensor(other, "backward")
    assert waits >= alone * (1 - 1e-9)


def test_sums_of_gradients_are_hidden_where_all_have_all_tokens() -> None:
    found = predict(gpt(tokens=False), implementation="trainer")
    alone, waits = over_tensor(found, "forward")
    assert waits == pytest.approx(alone)
    alone, waits = over_tensor(found, "backward")
    assert alone > 0
    assert waits == pytest.approx(0.0, abs=1e-9)


def test_what_runs_as_a_ring_does_not_run_beside_weights_too() -> None:
    """With rings the tasks that would start have a count of zero."""
    plan = gpt(matmul="bidirectional")
    layout = resolve(plan)
    program = implemented(partition(Workload.of(plan), layout), "trainer", plan.machine, layout)
    block = next(one for one in program.blocks if one.phase == "backward")
    started = [task.task for task in block.tasks if isinstance(task, Start)]
    assert started
    assert not any(float(task.count) for task in started if isinstance(task, Collective))


def test_gradients_of_weights_come_behind_what_is_sent_and_before_it_is_awaited() -> None:
    plan = gpt()
    layout = resolve(plan)
    written = partition(Workload.of(plan), layout)
    program = implemented(written, "trainer", plan.machine, layout)
    block = next(one for one in program.blocks if one.phase == "backward")
    sent: set[str] = set()
    beside: dict[str, int] = {}
    for task in block.tasks:
        if isinstance(task, Start):
            sent.add(task.name)
        elif isinstance(task, Await):
            sent.remove(task.name)  # or it was not on its way
        elif isinstance(task, Compute) and task.kind == "matmul":
            for name in sent:
                beside[name] = beside.get(name, 0) + (1 if task.of_weights else 0)
    assert not sent
    scattered = {name: number for name, number in beside.items() if name.startswith("scatter")}
    assert sorted(scattered.values()) == [1, 3]  # the MLP's; queries, keys and values
    assert all(not number for name, number in beside.items() if name.startswith("gather"))
    before = next(one for one in written.blocks if one.phase == "backward")
    made = [
        sorted(task.name for task in one.tasks if isinstance(task, Compute) and task.of_weights)
        for one in (before, block)
    ]
    assert made[0] == made[1]


def experts(tensor: int, **more: Any) -> Plan:
    """Return two layers of experts over eight nodes, with `tensor` GPUs for one sequence."""
    members = 8 // tensor
    mesh = {
        "expert": {"size": 4 * members, "torus": {"dcn": 4, "node": members}},
        **({"model": {"size": tensor, "torus": {"node": tensor}}} if tensor > 1 else {}),
    }
    split = SPLIT if tensor > 1 else {}
    data = {
        "model": {"base": "qwen3-235b-a22b", "layers": 2},
        "machine": "4*h100:8",
        "batch": 4 * members,
        "sequence": 4096,
        "mesh": mesh,
        "rules": {
            "parameters": {"expert": ["expert"], **split},
            "activations": {
                "batch": ["expert"],
                "expert": ["expert"],
                **split,
                **({"seq": ["model"]} if tensor > 1 else {}),
            },
        },
        "attention": "flash",
        "overlap": {"matmul": "off"},
        "remat": "none",
        "precision": {"parameters": "bf16", "master": "f32"},
        **more,
    }
    return plan_from_data(data, "test")


def to_experts(found: Prediction, role: str = "expert") -> dict[str, tuple[float, float]]:
    """Return bytes that a device sends, and seconds that wait, by name, of what experts get."""
    return {
        cost.task.name: (float(cost.sent_bytes / cost.count), float(cost.exposed_s))
        for cost in found.price.collectives
        if isinstance(cost.task, Collective)
        and cost.task.role == role
        and cost.task.purpose == "experts"
        and cost.block.startswith("layer forward")
        and float(cost.count)
    }


def test_each_member_of_a_tensor_axis_sends_its_own_tokens_to_experts() -> None:
    one, two = (to_experts(predict(experts(size), implementation="trainer")) for size in (1, 2))
    name = "turn copies, between nodes"
    assert two[name][0] == pytest.approx(one[name][0] / 2, rel=0.01)
    inside = to_experts(predict(experts(2), implementation="trainer"), "tensor")
    # Eight copies of 4,096 tokens are there behind it, of which each of two had half.
    assert inside["turn copies, over tensor"][0] == pytest.approx(8 * 4096 * 4096 * 2 / 2)


def test_what_goes_to_experts_waits_only_beyond_another_microbatchs_work() -> None:
    plan = experts(1)
    alone = predict(plan, implementation="trainer")
    combined = predict(plan, implementation="combined-1f1b")
    waits = sum(
        float(cost.exposed_s)
        for cost in alone.price.collectives
        if isinstance(cost.task, Collective) and cost.task.role == "expert"
    )
    work = sum(
        float(cost.time_s) for cost in alone.price.computes if cost.block.startswith("layer")
    )
    saved = alone.step_time_s - combined.step_time_s
    assert 0 < saved <= min(waits, work) * (1 + 1e-9)
    narrow = experts(1, sequence=256)
    hidden = predict(narrow, implementation="combined-1f1b")
    assert hidden.step_time_s < predict(narrow, implementation="trainer").step_time_s
    assert combined.price.flops == pytest.approx(alone.price.flops)
