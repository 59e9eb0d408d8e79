"""The collectives of a Program follow the algebra of its sharding."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from building import build, decoder, plans, vit
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.predict import CollectiveUse, predict
from shardsim.machine import override_chip
from shardsim.model import Biases, Model, load_model
from shardsim.plan import Plan, Precision, resolve
from shardsim.program.partition import partition
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Collective, Program

TENSOR = {"fsdp": {"x": 4}, "tensor": {"y": 4}}


def program_of(plan: Plan) -> Program:
    return partition(Workload.of(plan), resolve(plan))


def used(program: Program, block: str, role: str) -> list[Collective]:
    tasks = program.block(block).collectives()
    return [task for task in tasks if task.role == role and float(task.count) > 0]


def statistics(program: Program, block: str) -> list[Collective]:
    tasks = program.block(block).collectives()
    return [task for task in tasks if task.purpose == "norm statistics" and float(task.count) > 0]


def kinds(tasks: list[Collective]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for task in tasks:
        counts[task.kind] += int(task.count)
    return counts


def sent(uses: Sequence[CollectiveUse], kind: str, axis: str, purpose: str) -> float:
    """Return the bytes that one device sends in a step over the mesh axes with `axis` in them."""
    return sum(
        use.bytes_per_chip
        for use in uses
        if use.kind == kind and axis in use.mesh_axes and use.purpose == purpose
    )


def layer_matrices(model: Model) -> int:
    """Return the weights of one layer's matrices, written out."""
    width, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    gates = 2 if model.gated_mlp else 1
    return model.embed * (2 * width + 2 * keys + (gates + 1) * model.mlp)


@pytest.mark.parametrize("residual", ["seq", "embed"])
@pytest.mark.parametrize(("parallel", "fused"), [(False, False), (True, False), (True, True)])
def test_a_split_residual_is_gathered_and_scattered_once_a_branch(residual, parallel, fused):
    model = decoder(parallel_block=parallel)
    options: dict[str, Any] = {"residual": residual, "fused_projections": fused}
    program = program_of(build(model, "v5e:4x4", 64, TENSOR, remat="none", **options))
    branches = 1 if parallel else 2
    forward = kinds(used(program, "layer forward", "tensor"))
    assert forward == Counter({"all-gather": branches, "reduce-scatter": branches})
    # Backward: the output's gradient in, the input's gradient out, and the input once more for
    # the weight gradients.
    backward = kinds(used(program, "layer backward", "tensor"))
    assert backward["all-gather"] == 2 * branches
    assert backward["reduce-scatter"] == branches
    # Over a split embed, norms sum their statistics forward and their gradients backward.
    sums = Counter({"all-reduce": branches} if residual == "embed" else {})
    for block in ("layer forward", "layer backward"):
        assert kinds(statistics(program, block)) == sums


@pytest.mark.parametrize("parallel", [False, True])
def test_a_replicated_residual_is_summed_once_a_branch(parallel):
    model = decoder(parallel_block=parallel)
    program = program_of(build(model, "v5e:4x4", 64, TENSOR, remat="none", residual=""))
    branches = 1 if parallel else 2
    for block in ("layer forward", "layer backward"):
        assert kinds(used(program, block, "tensor")) == Counter({"all-reduce": branches})


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("residual", ["", "seq"])
def test_recomputing_the_output_projection_sums_it_again(parallel, residual):
    model = decoder(parallel_block=parallel)
    counts = {}
    for policy in ("none", "full"):
        plan = build(model, "v5e:4x4", 64, TENSOR, remat=policy, residual=residual)
        counts[policy] = kinds(used(program_of(plan), "layer backward", "tensor"))
    kind = "reduce-scatter" if residual else "all-reduce"
    again = counts["full"] - counts["none"]
    assert again == (Counter() if parallel else Counter({kind: 1}))


@pytest.mark.parametrize("residual", ["", "seq"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_activation_traffic_of_tensor_parallelism(residual, microbatches):
    # Each branch moves 2 (k - 1)/k of its tokens forward, in bf16, either way.
    model = decoder(vocab=2048)
    plan = build(
        model, "v5e:4x4", 64, TENSOR, remat="none", residual=residual, microbatches=microbatches
    )
    program = program_of(plan)
    group_tokens = plan.batch * plan.sequence / 4 / microbatches
    each = group_tokens * model.embed * 2 * 3 / 4
    forward = sum(
        task.bytes * 3 / 4 * (2 if task.kind == "all-reduce" else 1) * task.count
        for task in used(program, "layer forward", "tensor")
    )
    assert float(forward) == pytest.approx(2 * 2 * each, rel=1e-12)
    trips = program.block("layer forward").trips
    assert float(trips) == model.layers * microbatches


def starts(plan: Plan) -> dict[tuple[str, str], float]:
    """Return how many arrays move, by kind of collective and axis, by what starts cost."""
    slow = override_chip(
        plan.machine.chip,
        {"collective_overhead_s": 1.0, "hop_latency_s": 0.0, "link_bytes_per_s": 1e30},
    )
    found: dict[tuple[str, str], float] = defaultdict(float)
    for use in predict(replace(plan, machine=replace(plan.machine, chip=slow))).collectives:
        found[use.kind, "+".join(use.mesh_axes)] += use.time_s
    return found


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_array_is_a_message_of_its_own(gated, parallel, fused, microbatches):
    if fused and not parallel:
        pytest.skip("only a parallel block fuses its projections")
    model = decoder(gated_mlp=gated, parallel_block=parallel)
    where = {"context": {"x": 4}, "fsdp": {"y": 4}}
    options: dict[str, Any] = {"fused_projections": fused, "microbatches": microbatches}
    found = starts(build(model, "v5e:4x4", 128, where, remat="none", **options))
    # Query, key, value, output and the MLP's two or three; fused, one into and one out of a block.
    matrices = 2 if fused else 6 + gated
    tables = 2
    trips = model.layers * microbatches
    weights = 2 * trips * matrices + microbatches * tables
    assert found["all-gather", "f"] == pytest.approx(weights, rel=1e-6)
    gradients = trips * matrices + microbatches * tables
    assert found["reduce-scatter", "f"] == pytest.approx(gradients, rel=1e-6)
    # Keys and values, forward and again for the backward pass; their gradients.
    assert found["all-gather", "c"] == pytest.approx(2 * 2 * trips, rel=1e-6)
    assert found["reduce-scatter", "c"] == pytest.approx(2 * trips, rel=1e-6)
    # Gradients once a step; an all-reduce is two collectives.
    once = 2 * (model.layers * matrices + tables)
    assert found["all-reduce", "c"] == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("model", [decoder(), decoder(kv_heads=4, gated_mlp=True), vit()])
@pytest.mark.parametrize("tensor", [1, 4])
def test_weights_are_gathered_twice_and_gradients_scattered_once(microbatches, model, tensor):
    where = {"fsdp": {"x": 4}, "tensor": {"y": 4}} if tensor > 1 else {"fsdp": {"x": 4, "y": 4}}
    members = 16 // tensor
    plan = build(model, "v5e:4x4", 128, where, microbatches=microbatches)
    uses = predict(plan).collectives
    weights = model.layers * layer_matrices(model) / tensor
    tables = model.vocab * model.embed * (1 if model.tied_embeddings else 2) / tensor
    rows = model.patch**2 * model.channels  # of the patch embedding
    if model.positions == "learned":
        rows += model.sequence
    ends = tables + rows * model.embed
    each = (members - 1) / members * microbatches
    # Layers are gathered again for the backward pass; what is before and after them is not.
    gathered, scattered = (2 * weights + ends) * each, (weights + ends) * each
    assert sent(uses, "all-gather", "f", "parameters") == pytest.approx(2 * gathered, rel=1e-12)
    assert sent(uses, "reduce-scatter", "f", "parameters") == pytest.approx(
        2 * scattered, rel=1e-12
    )
    wide = predict(replace(plan, precision=Precision(reduce="f32"))).collectives
    assert sent(wide, "reduce-scatter", "f", "parameters") == pytest.approx(
        4 * scattered, rel=1e-12
    )
    assert sent(wide, "all-gather", "f", "parameters") == pytest.approx(2 * gathered, rel=1e-12)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("over_data", [False, True])
@pytest.mark.parametrize(
    "where", [{"data": {"x": 4, "y": 4}}, {"data": {"x": 4}, "fsdp": {"y": 4}}]
)
def test_gradients_of_all_matrices_are_summed_over_replicas_once(microbatches, over_data, where):
    fsdp = 4 if "fsdp" in where else 1
    members = 16 // fsdp
    model = decoder()
    plan = build(model, "v5e:4x4", 128, where, microbatches=microbatches, over_data=over_data)
    uses = predict(plan).collectives
    weights = model.layers * layer_matrices(model) + 2 * model.vocab * model.embed
    elements = weights / fsdp * (members - 1) / members
    # The scales of all norms, in float32, over all devices.
    scales = (2 * model.layers + 1) * model.embed * 4 * 2 * 15 / 16
    if over_data:
        assert sent(uses, "reduce-scatter", "d", "parameters") == pytest.approx(
            elements * 2, rel=1e-12
        )
        # What comes back are the float32 parameters.
        assert sent(uses, "all-gather", "d", "parameters") == pytest.approx(elements * 4, rel=1e-12)
        assert sent(uses, "all-reduce", "d", "parameters") == pytest.approx(scales, rel=1e-12)
    else:
        assert sent(uses, "all-reduce", "d", "parameters") == pytest.approx(
            elements * 4 + scales, rel=1e-12
        )


@pytest.mark.parametrize("over_data", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_gradients_are_summed_over_context_where_it_holds_the_same_weights(over_data, shards):
    model = decoder()
    where = {"context": {"x": 4}, "data": {"y": 4}}
    plan = build(
        model, "v5e:4x4", 128, where, over_data=over_data, context_shards=shards, remat="none"
    )
    weights = model.layers * layer_matrices(model) + 2 * model.vocab * model.embed
    uses = predict(plan).collectives
    summed = [use for use in uses if use.kind == "all-reduce" and use.purpose == "parameters"]
    found = {use.mesh_axes: use.bytes_per_chip for use in summed}
    # The scales of all norms, in float32, over all devices.
    scales = (2 * model.layers + 1) * model.embed * 4 * 2 * 15 / 16
    expected = {("d", "c"): scales}
    if over_data:
        # Scattered over data first: what is left is summed over context.
        if not shards:
            expected["c",] = weights / 4 * 2 * 2 * 3 / 4
    elif shards:
        expected["d",] = weights / 4 * 2 * 2 * 3 / 4
    else:
        expected["d", "c"] += weights * 2 * 2 * 15 / 16
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_of_two_biases_that_are_added_one_gradient_is_made(microbatches, parallel):
    # A compiler sees that both gradients are the same, unless they add up over microbatches.
    model = decoder(
        parallel_block=parallel, biases=Biases(attention_output=True, mlp=True, norm=True)
    )
    plan = build(model, "v5e:4x4", 64, {"data": {"x": 4, "y": 4}}, microbatches=microbatches)
    vectors = sum(tensor.size for tensor in model.tensors if tensor.kind == "vector")
    if parallel and microbatches == 1:
        vectors -= model.layers * model.embed
    found = [
        float(move.bytes)
        for block in partition(Workload.of(plan), resolve(plan)).blocks
        for move in block.collectives()
        if move.purpose == "small gradients" and move.count
    ]
    assert sum(found) == 4 * vectors


def test_context_gathers_keys_and_values_and_scatters_their_gradients():
    model = decoder(kv_heads=4, vocab=1024)
    where = {"context": {"x": 4}, "fsdp": {"y": 4}}
    plan = build(model, "v5e:4x4", 16, where, remat="none")
    uses = predict(plan).collectives
    tokens = plan.batch * plan.sequence / 4  # of one sequence group
    keys = tokens * 2 * model.kv_heads * model.head_dim * 2
    each = keys * 3 / 4 * model.layers
    # Forward, and again for the gradient, whatever is kept: gathered arrays never are.
    assert sent(uses, "all-gather", "c", "activations") == pytest.approx(2 * each, rel=1e-12)
    assert sent(uses, "reduce-scatter", "c", "activations") == pytest.approx(each, rel=1e-12)
    full = predict(build(model, "v5e:4x4", 16, where)).collectives
    assert sent(full, "all-gather", "c", "activations") == pytest.approx(2 * each, rel=1e-12)


def test_the_last_pipeline_stage_passes_gradients_back_once_a_microbatch():
    model = decoder()
    plan = build(model, "v5e:4x4", 64, {"pipeline": {"x": 4}, "fsdp": {"y": 4}}, microbatches=8)
    tokens = plan.batch * plan.sequence / 4 / 8
    expected = 8 * tokens * model.embed * 2
    prediction = predict(plan)
    found = sent(prediction.collectives, "permute", "p", "activations")
    assert found == pytest.approx(expected, rel=1e-12)
    # P - 1 of M + P - 1 slots are idle.
    for phase in ("forward", "backward"):
        blocks = [block for block in prediction.schedule.blocks if block.phase == phase]
        assert sum(float(block.trips) for block in blocks) == 2 * 8
    assert prediction.schedule.pipeline.bubble == pytest.approx(3 / 8)


@given(plans())
def test_only_axes_longer_than_one_carry_traffic(plan):
    for use in predict(plan).collectives:
        members = math.prod(plan.axis(name).size for name in use.mesh_axes)
        assert members > 1 or use.kind == "host-transfer"
        assert use.bytes_per_chip > 0
        assert 0 <= use.exposed_s


@given(plans())
def test_no_collective_is_counted_over_one_device(plan):
    layout = resolve(plan)
    for block in program_of(plan).blocks:
        for task in block.collectives():
            if float(task.count) > 0 and float(block.trips) > 0:
                assert layout.role(task.role).size > 1, (block.name, task.name)
            assert float(task.count) == int(task.count)


@given(plans(), st.sampled_from([2, 4]))
def test_more_microbatches_never_gather_less(plan, times):
    groups = plan.batch // plan.microbatches
    if groups % times:
        plan = replace(plan, batch=plan.batch * times)
    finer = replace(plan, microbatches=plan.microbatches * times)

    def gathered(of: Plan) -> float:
        return sum(
            use.bytes_per_chip
            for use in predict(of).collectives
            if use.kind == "all-gather" and use.purpose == "parameters"
        )

    assert gathered(finer) >= gathered(plan)


@pytest.mark.parametrize("name", ["v4:1x1x1", "v5e:1x1"])
@pytest.mark.parametrize("model", [decoder(layers=2), vit(layers=2, pooling="map", classes=10)])
def test_one_device_moves_nothing(name, model):
    prediction = predict(build(model, name, 4, {"data": {}}))
    assert prediction.collectives == ()
    assert prediction.time["exposed_comm_s"] == 0
    assert prediction.time["bubble_s"] == 0


@pytest.mark.parametrize(
    ("policy", "again"), [("none", 0), ("save_qkv", "mlp"), ("save_mlp", "qkv"), ("full", "both")]
)
@pytest.mark.parametrize("gated", [False, True])
def test_a_second_tensor_axis_scatters_inputs_and_gathers_outputs(policy, again, gated):
    # Forward: sums of the wide side scattered, and whole again for the output projections;
    # backward: the gradient of that, that once more for the weight gradients, and the gradient of
    # the sums. What is computed again is summed again.
    model = decoder(gated_mlp=gated)
    where = {"tensor2": {"x": 4}, "tensor": {"y": 4}}
    plan = build(model, "v5e:4x4", 64, where, remat=policy)
    uses = predict(plan).collectives
    width = model.heads * model.head_dim / 4
    mlp_in = model.mlp / 4 * (2 if gated else 1)
    ins, outs = 3 * width + mlp_in, width + model.mlp / 4
    more = {0: 0.0, "mlp": mlp_in, "qkv": 3 * width, "both": ins}[again]
    each = model.layers * plan.tokens * 2 * 3 / 4
    assert sent(uses, "reduce-scatter", "u", "activations") == pytest.approx(
        each * (ins + outs + more), rel=1e-12
    )
    assert sent(uses, "all-gather", "u", "activations") == pytest.approx(
        each * (outs + outs + ins), rel=1e-12
    )


def test_published_algebra_of_a_parallel_layer():
    # 2 d a token forward: d gathered before the fused input, d scattered after the fused output.
    model = load_model("vit-22b")
    plan = build(
        model,
        "v4:8x8x16",
        65536,
        {"data": {"x": 8, "z": 16}, "tensor": {"y": 8}},
        fused_projections=True,
        microbatches=8,
    )
    tasks = used(program_of(plan), "layer forward", "tensor")
    tokens = plan.batch * plan.sequence / 128 / 8
    assert [(task.kind, float(task.bytes)) for task in tasks] == [
        ("all-gather", tokens * 6144 * 2),
        ("reduce-scatter", tokens * 6144 * 2),
    ]
    forward = program_of(plan).block("layer forward").computes()
    matmuls = [(task.k, task.n) for task in forward if task.kind == "matmul"]
    assert matmuls == [(6144, (3 * 6144 + 24576) / 8), ((6144 + 24576) / 8, 6144)]
