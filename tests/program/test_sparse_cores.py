"""What runs beside collectives over a tensor axis where SparseCores do them."""

from __future__ import annotations

from typing import Any

import pytest
from building import decoder

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.program.partition import partition
from shardsim.program.rules import Where
from shardsim.program.schedule import Await, Start
from shardsim.program.shapes import Workload
from shardsim.program.sparse_cores import run_beside_sparse_cores
from shardsim.program.tasks import Collective, Compute

SPLIT = {key: ["model"] for key in ("heads", "kv_heads", "mlp", "vocab")}


def plan_of(
    machine: str = "tpu7x:4x4x4", matmul: str = "off", remat: Any = "full", **model: Any
) -> Plan:
    data = {
        "model": decoder(layers=2, embed=2048, **model).to_mapping(),
        "machine": machine,
        "batch": 256,
        "sequence": 4096,
        "mesh": {"fsdp": {"size": 32 if machine.startswith("tpu7x") else 16}, "model": 4},
        "rules": {
            "parameters": {"embed": ["fsdp"], **SPLIT},
            "activations": {"batch": ["fsdp"], "seq": ["model"], **SPLIT},
        },
        "attention": "flash",
        "overlap": {"matmul": matmul, "weights": True},
        "remat": remat,
        "op_costs": "compiler",
    }
    return plan_from_data(data, "test")


def moves_back(found: Prediction) -> dict[str, tuple[float, float]]:
    """Return of collectives over the tensor axis back: seconds alone, and those waited for."""
    return {
        cost.task.name: (float(cost.time_s), float(cost.exposed_s))
        for cost in found.price.collectives
        if cost.block.startswith("layer backward") and getattr(cost.task, "role", "") == "tensor"
    }


def seconds(found: Prediction, *names: str) -> float:
    """Return what operations of the way back take."""
    return sum(
        float(cost.time_s)
        for cost in found.price.computes
        if cost.block.startswith("layer backward") and cost.task.name in names
    )


def test_what_waits_is_what_its_own_products_do_not_hide() -> None:
    found = predict(plan_of())
    moves = moves_back(found)
    beside = {
        "gather mlp input": seconds(found, "mlp_out d hidden"),
        "gather d attention": seconds(found, "mlp_in dW", "mlp_gate dW", "mlp_out dW"),
        "scatter d attention input": seconds(
            found, "query dW", "key dW", "value dW", "attention_output dW"
        ),
    }
    assert moves.keys() > beside.keys()
    for name, (alone, waits) in moves.items():
        assert waits == pytest.approx(max(alone - beside.get(name, 0.0), 0.0), abs=1e-9), name
    assert all(0.0 < hidden for hidden in beside.values())


@pytest.mark.parametrize(
    "other",
    [
        plan_of("v5p:4x4x4"),
        plan_of(parallel_block=True),
    ],
    ids=["no SparseCores that move", "attention beside the MLP"],
)
def test_elsewhere_all_wait(other: Plan) -> None:
    for name, (alone, waits) in moves_back(predict(other)).items():
        assert waits == pytest.approx(alone), name


@pytest.mark.parametrize("matmul", ["off", "bidirectional"])
@pytest.mark.parametrize("remat", ["full", "none", {"save": ["context"]}])
def test_no_task_is_lost_and_what_is_started_is_awaited(matmul: str, remat: Any) -> None:
    plan = plan_of(matmul=matmul, remat=remat)
    layout = resolve(plan)
    program = partition(Workload.of(plan), layout)
    block = next(one for one in program.blocks if one.phase == "backward")
    after = run_beside_sparse_cores(block, Where(machine=plan.machine, layout=layout))
    counted: list[dict[str, float]] = []
    for one in (block, after):
        total: dict[str, float] = {}
        for task in one.tasks:
            inner = task.task if isinstance(task, Start) else task
            if isinstance(inner, Compute | Collective):
                total[inner.name] = total.get(inner.name, 0.0) + float(inner.count)
        counted.append(total)
    assert counted[0] == counted[1]
    started: set[str] = set()
    for task in after.tasks:
        if isinstance(task, Start):
            started.add(task.name)
        elif isinstance(task, Await):
            started.remove(task.name)
    assert not started


def test_rings_take_as_long_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardsim.program import passes

    plan = plan_of(matmul="bidirectional")
    here = predict(plan).step_time_s
    rules = tuple(r for r in passes.IMPLEMENTATIONS["emitted"] if r is not run_beside_sparse_cores)
    monkeypatch.setattr(passes, "IMPLEMENTATIONS", {**passes.IMPLEMENTATIONS, "emitted": rules})
    assert predict(plan).step_time_s == pytest.approx(here, rel=1e-9)
