"""Compiled programs beside the plans that they were made from."""

from __future__ import annotations

from collections import Counter

import hlo_samples as samples
import pytest

from shardsim.cost.predict import predict
from shardsim.program.schedule import Await, Move, Start, Work
from shardsim.xla.hlo import HloError, read_hlo
from shardsim.xla.hlo.collect import sent_bytes

PLANS = tuple(samples.DATA)


def planned_flops(name: str, kind: str) -> float:
    """Return the FLOPs of one kind of work in the planned step, on one device."""
    costs = predict(samples.plan_of(name)).price.computes
    return sum(float(cost.flops) for cost in costs if cost.task.kind == kind)


@pytest.mark.parametrize("name", ["llama-microbatches", "llama-partitioned", "llama-sparsecore"])
def test_matmuls_are_those_of_the_plan(name: str) -> None:
    assert samples.compiled(name).matmul_flops == planned_flops(name, "matmul")


def test_matmuls_of_a_vit_are_those_of_the_plan() -> None:
    # The classifier, whole on each of the 4 members of the model axis, among them.
    name = "vit-explicit"
    assert samples.compiled(name).matmul_flops == planned_flops(name, "matmul")


@pytest.mark.parametrize(
    ("name", "products"), [("llama-microbatches", 8), ("llama-partitioned", 7)]
)
def test_products_of_attention(name: str, products: int) -> None:
    # Planned is a flash kernel: 2 products forward, 5 backward, 2 again under full remat. The
    # emitted code keeps the scores it recomputes, which saves one.
    plan, compiled = samples.plan_of(name), samples.compiled(name)
    layout = {axis.name: axis.size for axis in plan.mesh}
    devices = plan.machine.devices
    tokens = plan.tokens / devices * layout.get("model", 1)
    width = plan.model.heads * plan.model.head_dim / layout.get("model", 1)
    one = 2 * tokens * plan.sequence * width
    assert compiled.flops - compiled.matmul_flops == products * one * plan.model.layers


@pytest.mark.parametrize("name", PLANS)
def test_the_program_holds_what_the_operations_do(name: str) -> None:
    compiled = samples.compiled(name)
    works = [(work, block.trips) for block in compiled.schedule.blocks for work in block.computes()]
    cycles = sum((work.cycles or 0) * trips for work, trips in works)
    assert cycles == pytest.approx(compiled.cycles, rel=1e-12)
    flops = sum(float(work.flops) * trips for work, trips in works)
    assert flops == pytest.approx(compiled.flops, rel=1e-12)
    kinds = {operation.kind for operation in compiled.operations}
    # The products of a kernel are not seen.
    seen = set() if "tpu_custom_call" in samples.text_of(name) else {"attention"}
    assert {"matmul", "elementwise", "copy"} | seen <= kinds
    phases = Counter(operation.phase for operation in compiled.operations)
    assert set(phases) >= {"forward", "backward", "update"}
    # Without remat only attention's scores are computed again.
    again = {item.kind for item in compiled.operations if item.phase == "recomputation"}
    assert ("matmul" in again) == (name != "llama-partitioned")


@pytest.mark.parametrize("name", samples.NAMES)
def test_what_is_started_is_awaited_once(name: str) -> None:
    compiled = samples.compiled(name)
    for block in compiled.schedule.blocks:
        for task in block.tasks:
            assert isinstance(task, (Work, Move, Start, Await))
    tasks = [task for block in compiled.schedule.blocks for task in block.tasks]
    started = [task.name for task in tasks if isinstance(task, Start)]
    awaited = [task.name for task in tasks if isinstance(task, Await)]
    assert len(set(started)) == len(started)
    assert sorted(started) == sorted(awaited)
    for name_ in started:
        (start,) = (
            i for i, task in enumerate(tasks) if isinstance(task, Start) and task.name == name_
        )
        (end,) = (i for i, task in enumerate(tasks) if task == Await(name=name_))
        assert start < end


def test_an_asynchronous_chain_is_one_gather() -> None:
    compiled = samples.compiled("llama-microbatches")
    text = samples.text_of("llama-microbatches")
    chains = text.count('custom_call_target="AsyncCollectiveStart"')
    inside = text.count(" all-gather(") - sum(
        entry.kind == "all-gather" and not entry.asynchronous for entry in compiled.collectives
    )
    gathers = [
        entry for entry in compiled.collectives if entry.kind == "all-gather" and entry.asynchronous
    ]
    assert 0 < chains == len(gathers)
    assert inside >= 3 * chains  # it is written in the start, in each step and in the end


def test_the_collectives_of_the_small_program() -> None:
    compiled = samples.compiled("matmuls")
    m, n, b = samples.ROWS, samples.COLUMNS, samples.BATCH
    array = 2 * m * n
    found = {
        (entry.kind, entry.mesh_axes, entry.parts, entry.array_bytes, entry.count)
        for entry in compiled.collectives
    }
    assert found == {
        ("all-reduce", ("a",), (), array, 5),
        ("all-gather", ("b",), (), 4 * array, 5),
        ("reduce-scatter", ("b",), (), 4 * array, 5),
        ("permute", ("a",), (), array, 5),
        ("all-to-all", ("b",), (), array, 5),
        ("all-reduce", ("b",), (("b", 2, 1),), 2 * b * m * n, 1),
    }
    for entry in compiled.collectives:
        members = 2 if entry.parts else 4
        assert entry.sent_bytes == sent_bytes(entry.kind, entry.array_bytes, members)


def test_the_weights_of_the_layers_are_gathered_and_their_gradients_scattered() -> None:
    compiled = samples.compiled("llama-microbatches")
    planned: dict[str, tuple[float, float]] = {}
    for cost in predict(samples.plan_of("llama-microbatches")).price.collectives:
        assert isinstance(cost.task, Move)
        _, before = planned.get(cost.task.name, (0.0, 0.0))
        planned[cost.task.name] = float(cost.task.bytes), before + float(cost.count)
    for block, kind, name in (
        ("loop 2, part 1", "all-gather", "gather weights forward"),
        ("loop 3, part 1", "all-gather", "gather weights backward"),
        ("loop 3, part 1", "all-reduce", "scatter gradients of weights"),
    ):
        found = [e for e in compiled.collectives if (e.block, e.kind) == (block, kind)]
        assert {entry.count for entry in found} == {planned[name][1]}
        assert sum(entry.array_bytes for entry in found) == planned[name][0]
    # The compiler sums all gradients of a layer at once, for all, and each takes its part.
    (scatter,) = (e for e in compiled.collectives if e.origin)
    assert (scatter.kind, scatter.origin, scatter.block) == (
        "all-reduce",
        "reduce-scatter",
        "loop 3, part 1",
    )


@pytest.mark.parametrize("name", PLANS)
def test_collectives_and_copies_come_from_a_line(name: str) -> None:
    compiled = samples.compiled(name)
    for entry in compiled.collectives:
        assert ".py:" in entry.source
    gathers = [e for e in compiled.collectives if "gather_weights/all_gather" in e.op_name]
    assert all("gather" in entry.source or "weight" in entry.source for entry in gathers)
    assert bool(gathers) == (samples.plan_of(name).execution == "explicit")
    cycles = [(copy.cycles or 0) * copy.trips for copy in compiled.copies]
    assert cycles == sorted(cycles, reverse=True)
    assert compiled.copies


def test_a_mesh_of_another_size_is_refused() -> None:
    with pytest.raises(HloError, match="compiled for 16 devices, but the mesh has 8"):
        read_hlo(samples.text_of("matmuls"), {"a": 8})
