"""What XLA does on GPUs beyond a plan: passes of their own, copies of stacks, cuDNN's attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import KernelCosts, costs_of
from shardsim.cost.network import Links
from shardsim.cost.predict import predict
from shardsim.errors import FileError
from shardsim.graph.place import Kind
from shardsim.machine import chip_names, load_chip
from shardsim.machine.kernels import CONSTANTS, kernels_from_data
from shardsim.model import load_model
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.planner.search import search
from shardsim.program.at_once import layer_at_once
from shardsim.program.partition import partition
from shardsim.program.passes import ON_GPU, implemented
from shardsim.program.rules import Where
from shardsim.program.schedule import Work
from shardsim.program.shapes import Workload
from shardsim.program.tasks import NARROWED, Compute

GPUS = [name for name in chip_names() if load_chip(name).kernels]


def vit(**more: Any) -> Plan:
    data = {
        "model": "vit-l-16",
        "machine": "h100:1",
        "batch": 128,
        "mesh": {"data": 1},
        "rules": {"activations": {"batch": ["data"]}},
        "attention": "unfused",
        "remat": "none",
        **more,
    }
    return plan_from_data(data, "test")


def llama(**more: Any) -> Plan:
    return vit(**{"model": {"base": "llama3-8b", "layers": 2}, "batch": 8, "sequence": 2048} | more)


EXPERTS = {"base": "mixtral-8x7b", "layers": 2}
PLANS = [vit(), vit(remat="full"), vit(attention="flash"), llama(), llama(attention="flash")]
PLANS.append(llama(model=EXPERTS))


def blocks(plan: Plan, gpu: bool = True) -> dict[str, list[Compute]]:
    layout = resolve(plan)
    program = partition(Workload.of(plan), layout)
    if gpu:
        program = implemented(program, "emitted", plan.machine, layout)
    return {
        block.name: [task for task in block.tasks if isinstance(task, Compute)]
        for block in program.blocks
    }


def test_every_rule_changes_a_program_and_the_page_says_where_it_was_seen() -> None:
    for rule in ON_GPU["emitted"]:
        changed = False
        for plan in PLANS:
            layout = resolve(plan)
            where = Where(machine=plan.machine, layout=layout)
            program = partition(Workload.of(plan), layout)
            changed |= any(rule(block, where) != block for block in program.blocks)
        assert changed, rule.__name__


def test_nothing_is_fused_into_matmuls() -> None:
    """What a TPU does in a matmul's end is apart: the matmul moves its own arrays, no more."""
    for tasks in blocks(vit()).values():
        for task in tasks:
            if task.kind == "matmul":
                own = 2.0 * (task.m * task.k + task.k * task.n + task.m * task.n) * task.batch
                assert not np.any(task.vector_ops)
                assert task.hbm_bytes <= own * 1.5  # a gradient of the weight may be float32


def test_norms_read_their_rows_once_for_each_sum() -> None:
    rows = 128 * 197 * 1024 * 2.0
    found = blocks(vit())["layer forward"]
    norms = [task for task in found if task.kind == "sum"]
    assert [task.hbm_bytes / rows for task in norms] == [4.0, 4.0]  # two moments, one in, one out
    llamas = [task for task in blocks(llama())["layer forward"] if task.kind == "sum"]
    assert [task.hbm_bytes / (8 * 2048 * 4096 * 2.0) for task in llamas] == [3.0, 3.0]
    for save, moved in ([], 4.0), (["statistics"], 2.0):  # kept sums are not made again
        back = blocks(vit(remat={"save": save}))["layer backward"]
        again = [task for task in back if task.kind == "sum" and task.name.endswith("again")]
        assert [task.hbm_bytes / rows for task in again if np.any(task.count)] == [moved] * 2


def test_scores_are_made_again_where_only_probabilities_are_kept() -> None:
    """The same products run either way: once more beside what is kept, or with all the rest."""
    kept, again = blocks(vit())["layer backward"], blocks(vit(remat="full"))["layer backward"]

    def products(tasks: list[Compute]) -> float:
        return sum(t.flops for t in tasks if t.kind == "attention" and t.matmuls == 1)

    each = 2.0 * 197 * 197 * 64 * 16 * 128
    assert products(kept) == pytest.approx(5 * each)
    assert products(again) == pytest.approx(6 * each)  # the result too
    (scores,) = (task for task in kept if task.name == "scores, again")
    # Queries and keys in bf16, the scores themselves in float32.
    assert scores.hbm_bytes == 16 * 128 * (2 * 197 * 64 * 2 + 197 * 197 * 4)


@pytest.mark.parametrize(
    ("name", "branches"), [("palm-8b", 2), ("gpt-neox-20b", 2), ("vit-l-16", 1)]
)
def test_branches_of_a_parallel_block_are_not_there_together(name: str, branches: int) -> None:
    """With a norm for both or one each: no array of one branch is needed for the other's gradient,
    so what attention needs is gone before that of the MLP is made again, or the other way round."""
    trace = layer_at_once(load_model(name), "unfused", 0, Kind(), frozenset(), True, True)
    assert len(trace.labels) == branches
    there = {one.name: {*range(one.born, one.last + 1)} for one in trace.arrays}
    assert bool(there["scores"] & there["hidden"]) == (branches == 1)


def test_stacks_are_filled_and_copied_only_where_there_are_several_layers() -> None:
    def copied(plan: Plan) -> float:
        return sum(
            float(task.hbm_bytes * task.count)
            for tasks in blocks(plan).values()
            for task in tasks
            if task.kind == "copy"
        )

    assert copied(vit(model={"base": "vit-l-16", "layers": 1})) == 0.0
    assert copied(vit()) > 20 * copied(vit(remat="full")) > 0.0


@pytest.mark.parametrize("tokens", [128, 200, 2048])
def test_cudnn_skips_the_blocks_that_a_mask_leaves_empty(tokens: int) -> None:
    found = blocks(llama(attention="flash", sequence=tokens))["layer forward"]
    (kernel,) = (task for task in found if task.fused)
    padded = -(-tokens // 128) * 128
    assert (kernel.m, kernel.n) == (padded, padded)
    assert kernel.fraction == pytest.approx((padded + 128) / (2 * padded))


def test_lengths_that_cudnn_refuses_are_padded() -> None:
    even, odd = llama(attention="flash", sequence=200), llama(attention="flash", sequence=201)
    pads = [
        sum(float(t.count * t.hbm_bytes) for t in blocks(plan)["layer forward"] if "pad" in t.name)
        for plan in (even, odd)
    ]
    assert pads[0] == 0.0 < pads[1]


def test_a_tpu_is_not_touched() -> None:
    plan = plan_from_data(
        {"model": "vit-22b", "machine": "v4:2x2x1", "batch": 64, "mesh": {"fsdp": 4}}
        | {"rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}}},
        "test",
    )
    kinds = {task.kind for tasks in blocks(plan).values() for task in tasks}
    assert "sum" not in kinds


@pytest.mark.parametrize("name", GPUS)
@given(size=st.sampled_from([1024, 4096, 16384]), k=st.sampled_from([64, 1024, 8192]))
@settings(max_examples=15)
def test_matmuls_are_between_the_cap_of_power_and_the_peak(name: str, size: int, k: int) -> None:
    chip = load_chip(name)
    task = Work(name="m", kind="matmul", m=size, k=k, n=size, matmuls=1)
    least_s = task.flops / (chip.peak("bf16") * chip.matmul_efficiency)
    costs = KernelCosts(chip)
    assert costs.estimate(task).total_s > least_s
    doubled = replace(task, k=2 * k)
    assert costs.estimate(doubled).total_s < 2.0 * costs.estimate(task).total_s


@pytest.mark.parametrize("name", GPUS)
def test_costs_of_arrays_are_those_of_each(name: str) -> None:
    """The search prices many plans at once with the same formulas."""
    costs = costs_of("calibrated", load_chip(name))
    sizes = np.array([1024.0, 4096.0])
    many = Work(name="m", kind="matmul", m=sizes, k=2048, n=1024, matmuls=1, hbm_bytes=sizes * 1e6)
    each = [replace(many, m=m, hbm_bytes=m * 1e6) for m in sizes]
    assert costs.operation(many).total_s == pytest.approx(
        [float(costs.operation(one).total_s) for one in each]
    )


def test_heads_are_rounded_up_in_cudnn() -> None:
    costs = costs_of("calibrated", load_chip("h100"))
    times = [
        float(
            costs.estimate(
                Work(name="a", kind="attention", m=4096, k=k, n=4096, batch=64, matmuls=2,
                     vector_ops=4096 * 4096 * 64, fused="beside")
            ).unit_s
        )
        for k in (64, 72, 128, 130)
    ]  # fmt: skip
    assert times[1] == pytest.approx(times[2])
    assert times[0] < times[2] < times[3]


def test_one_layer_holds_no_copies_of_what_it_keeps() -> None:
    one, two = (predict(vit(model={"base": "vit-l-16", "layers": n})) for n in (1, 2))
    per_layer = two.hbm["activations_bytes"] - one.hbm["activations_bytes"]
    state = two.hbm["parameters_bytes"] - one.hbm["parameters_bytes"]
    grown = two.hbm["peak_bytes"] - one.hbm["peak_bytes"]
    assert grown > per_layer + 4 * state  # and what is copied out of the stack for a layer


def test_wrong_kernels_are_refused() -> None:
    good = load_chip("h100").kernels.to_data()  # type: ignore[union-attr]
    assert kernels_from_data(good, "x").to_data() == good
    for name in CONSTANTS:
        for value in (-1, "fast", True, None):
            wrong = {**good, "constants": {**good["constants"], name: value}}
            with pytest.raises(FileError, match=f"x: {name} must be"):
                kernels_from_data(wrong, "x")
    with pytest.raises(FileError, match="at most 1"):
        kernels_from_data(
            {**good, "constants": {**good["constants"], "copy_hbm_efficiency": 1.5}}, "x"
        )


def test_the_search_takes_only_what_the_prediction_says_fits() -> None:
    found = search("vit-h-14", "h100:4", 512, top=40).predictions
    assert found
    for item in found:
        again = predict(item.plan)
        assert again.fits
        assert again.step_time_s == pytest.approx(item.step_time_s)
        assert again.hbm["peak_bytes"] <= again.hbm["capacity_bytes"]


def test_casts_to_8_bits_are_written_as_they_lie_and_turned() -> None:
    plan = llama(precision={"compute": "fp8"}, attention="flash")
    layout = resolve(plan)
    program = partition(Workload.of(plan), layout)
    done = implemented(program, "trainer", plan.machine, layout)

    def casts(blocks: Any) -> list[Any]:
        tasks = [task for block in blocks for task in block.tasks]
        return [task.hbm_bytes for task in tasks if getattr(task, "purpose", "") == NARROWED]

    assert casts(program.blocks)
    # Read for the scale and to be cast, 2 bytes each; written as a byte, once and twice.
    assert casts(done.blocks) == pytest.approx([size * 6 / 5 for size in casts(program.blocks)])


def test_a_token_goes_once_to_each_node_with_experts_of_it() -> None:
    model = {"base": "qwen3-30b-a3b", "layers": 2}
    mesh = {"expert": {"size": 16, "torus": {"dcn": 2, "node": 8}}}
    activations = {"batch": ["expert"], "expert": ["expert"]}
    rules = {"parameters": {"expert": ["expert"]}, "activations": activations}
    more: dict[str, Any] = {"model": model, "machine": "2*h100:8", "batch": 16, "sequence": 4096}
    plan = vit(**more, mesh=mesh, rules=rules, attention="flash")
    layout = resolve(plan)
    program = partition(Workload.of(plan), layout)
    group = Links(plan.machine, layout)["expert"]

    def sent(blocks: Any, stage: str) -> float:
        tasks = [task for block in blocks for task in block.tasks]
        moves = [task for task in tasks if getattr(task, "kind", "") == "all-to-all"]
        return sum(
            task.count * sent_bytes(task.kind, group, task.bytes, stage)
            for task in moves
            if task.stage == stage or blocks is program.blocks
        )

    done = implemented(program, "trainer", plan.machine, layout)
    # Of 8 of 128 experts none is on the other node in 0.3 % of all cases: one copy, not half of 8.
    missed = math.comb(64, 8) / math.comb(128, 8)
    less = sent(done.blocks, "dcn") / sent(program.blocks, "dcn")
    assert less == pytest.approx((1 - missed) / 4)
    assert sent(done.blocks, "torus") == pytest.approx(sent(program.blocks, "torus"))
