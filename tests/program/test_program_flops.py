"""FLOPs of a Program against the model's own count, split in any way, with any recomputation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from building import build, decoder, vit
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost import predict as predictions
from shardsim.model import Model, forward_matmul_flops_per_token
from shardsim.ops.attend_mask import BLOCKS
from shardsim.plan import Plan, Precision, resolve
from shardsim.plan.remat import POLICIES
from shardsim.program.partition import partition
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Program

SPLITS = {
    "fsdp": {"fsdp": {"x": 4, "y": 4}},
    "data": {"data": {"x": 4, "y": 4}},
    "tensor": {"tensor": {"x": 4, "y": 4}},
    "fsdp and tensor": {"fsdp": {"x": 4}, "tensor": {"y": 4}},
    "data, fsdp and tensor": {"data": {"x": 2}, "fsdp": {"x": 2}, "tensor": {"y": 4}},
    "context and tensor": {"context": {"x": 4}, "tensor": {"y": 4}},
    "two tensor axes": {"tensor2": {"x": 4}, "tensor": {"y": 4}},
    "all": {"fsdp": {"x": 2}, "context": {"x": 2}, "tensor2": {"y": 2}, "tensor": {"y": 2}},
}
HEADLESS = (
    decoder(),
    decoder(kv_heads=4, gated_mlp=True),
    decoder(parallel_block=True, tied_embeddings=True),
    decoder(kv_heads=16, head_dim=128),
    vit(),
    vit(parallel_block=False, qk_norm=False),
)


def program_of(plan: Plan) -> Program:
    return partition(Workload.of(plan), resolve(plan))


def flops(program: Program) -> float:
    """Return the FLOPs of a step on one device, task by task."""
    total = 0.0
    for block in program.blocks:
        for task in block.computes():
            products = 2.0 * task.m * task.k * task.n * task.batch * task.matmuls
            total += float(products * task.fraction * task.count * block.trips)
    return total


def never_computed(model: Model) -> float:
    """Return forward FLOPs a token whose input gradient nobody needs: pixels have none."""
    return 2.0 * model.patch**2 * model.channels * model.embed if model.patch else 0.0


def repeated(model: Model, tensor: int) -> float:
    """Return forward FLOPs a token that tensor shards repeat: key-value heads that they share."""
    keys = 2 * model.layers * 2 * model.embed * model.kv_heads * model.head_dim
    return keys * (max(1, tensor // model.kv_heads) - 1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", HEADLESS, ids=range(len(HEADLESS)))
@pytest.mark.parametrize("microbatches", [1, 4])
def test_without_recomputation_three_times_the_forward_pass(model, split, microbatches):
    plan = build(
        model,
        "v5e:4x4",
        128,
        SPLITS[split],
        remat="none",
        attention="unfused",
        microbatches=microbatches,
    )
    tensor = int(resolve(plan).tensor.size)
    forward = forward_matmul_flops_per_token(model) + repeated(model, tensor)
    expected = (3 * forward - never_computed(model)) * plan.tokens / 16
    assert flops(program_of(plan)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("split", ["fsdp", "fsdp and tensor"])
@pytest.mark.parametrize("pooling", ["map", "mean"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_head_of_a_vision_model_counts(split, pooling, head_dim):
    model = vit(pooling=pooling, classes=1600, head_dim=head_dim)
    plan = build(model, "v5e:4x4", 64, SPLITS[split], remat="none", attention="unfused")
    expected = (3 * forward_matmul_flops_per_token(model) - never_computed(model)) * plan.tokens
    # After pooling all members of tensor and context have the same vectors, and classify them all.
    alike = math.prod(
        math.prod(SPLITS[split].get(role, {}).values()) for role in ("tensor", "context")
    )
    classifier = 3 * 2 * plan.batch * model.embed * model.classes
    assert flops(program_of(plan)) * 16 == pytest.approx(
        expected + (alike - 1) * classifier, rel=1e-12
    )


@pytest.mark.parametrize("sequence", [256, 512, 2048, 8192])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_computes_its_scores_twice_and_skips_half_of_a_mask(sequence, causal):
    model = decoder(causal=causal, sequence=sequence)
    plan = build(model, "v5e:4x4", 32, SPLITS["fsdp"], remat="none")
    pairs = sequence**2
    if causal and sequence > BLOCKS[0]:
        # Blocks of queries times blocks of keys, those above the diagonal left out.
        blocks = sequence // BLOCKS[0]
        pairs = sum(row + 1 for row in range(blocks)) * BLOCKS[0] ** 2
    one_matmul = 2 * model.layers * model.heads * model.head_dim * pairs * plan.batch
    all_but_attention = (
        forward_matmul_flops_per_token(model) * plan.tokens
        - 4 * model.layers * model.heads * model.head_dim * sequence**2 * plan.batch
    )
    expected = 3 * all_but_attention + 7 * one_matmul
    assert flops(program_of(plan)) == pytest.approx(expected / 16, rel=1e-12)


# What each policy computes again, by what the backward pass needs: inputs of every weight
# gradient (attention's context, the MLP's hidden layer), queries, keys, values, probabilities,
# and in a serial block the residual between attention and MLP.
AGAIN = {
    "none": set(),
    "full": {"qkv", "scores", "context", "out", "mlp"},
    "dots": {"scores", "context"},
    "dots_and_context": {"scores"},
    "save_attention": {"scores", "out", "mlp"},
    "save_qkv": {"scores", "context", "out", "mlp"},
    "save_context": {"qkv", "scores", "out", "mlp"},
    "save_mlp": {"qkv", "scores", "context", "out"},
    "save_context_and_mlp": {"qkv", "scores", "out"},
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("gated", [False, True])
def test_recomputation_is_what_the_policy_drops(policy, parallel, attention, gated):
    model = decoder(parallel_block=parallel, gated_mlp=gated, kv_heads=4, causal=False)
    again = AGAIN[policy]
    width, embed = model.heads * model.head_dim, model.embed
    keys = model.kv_heads * model.head_dim
    half = 2 * width * model.sequence  # the scores, or the weighted values, of one token
    extra = 0.0
    extra += ("qkv" in again) * 2 * embed * (width + 2 * keys)
    extra += ("mlp" in again) * 2 * embed * model.mlp * (2 if gated else 1)
    extra += ("out" in again and not parallel) * 2 * width * embed
    if attention == "unfused":
        extra += ("scores" in again) * half + ("context" in again) * half
    else:
        extra += ("context" in again) * 2 * half  # the kernel's own scores are counted always
    plans = [
        build(model, "v5e:4x4", 64, SPLITS["fsdp and tensor"], remat=name, attention=attention)
        for name in (policy, "none")
    ]
    dropped, kept = (flops(program_of(plan)) for plan in plans)
    expected = extra * model.layers * plans[0].tokens / 16
    assert dropped - kept == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_fusing_projections_multiplies_as_much(fused):
    model = decoder(parallel_block=True)
    plan = build(
        model,
        "v5e:4x4",
        64,
        SPLITS["fsdp and tensor"],
        remat="none",
        attention="unfused",
        fused_projections=fused,
    )
    expected = 3 * forward_matmul_flops_per_token(model) * plan.tokens / 16
    assert flops(program_of(plan)) == pytest.approx(expected, rel=1e-12)


@given(st.sampled_from(sorted(SPLITS)), st.sampled_from(sorted(POLICIES)))
def test_hardware_utilisation_counts_every_operation(split, policy):
    plan = build(decoder(), "v5e:4x4", 128, SPLITS[split], remat=policy)
    prediction = predictions.predict(plan)
    done = flops(program_of(plan)) / prediction.step_time_s
    assert prediction.hfu == pytest.approx(done / plan.machine.chip.peak("bf16"), rel=1e-12)
    palm = 6 * plan.model.parameters + 12 * np.prod(
        [plan.model.layers, plan.model.heads, plan.model.head_dim, plan.sequence]
    )
    rate = plan.batch * plan.sequence / prediction.step_time_s / 16
    assert prediction.tokens_per_s_per_chip == pytest.approx(rate, rel=1e-12)
    mfu = rate * palm / plan.machine.chip.peak("bf16")
    assert prediction.mfu == pytest.approx(float(mfu), rel=1e-12)


@pytest.mark.parametrize(("machine", "axes"), [("v3:4x4", "xy"), ("tpu7x:2x2x2", "xyz")])
def test_chips_of_two_devices_have_the_peak_of_both(machine, axes):
    length = 4 if machine == "v3:4x4" else 2
    where = {"fsdp": {axis: length for axis in axes}, "data": {"core": 2}}
    plan = build(decoder(), machine, 128, where)
    prediction = predictions.predict(plan)
    chip = plan.machine.chip
    on_a_chip = chip.devices_per_chip * flops(program_of(plan))
    assert chip.devices_per_chip == 2
    expected = on_a_chip / prediction.step_time_s / chip.peak("bf16")
    assert prediction.hfu == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_scores_stay_in_bf16(attention, compute):
    plan = build(
        decoder(), "v5p:2x2x1", 32, {"fsdp": {"x": 2, "y": 2}}, attention=attention,
        precision=Precision(compute=compute),
    )  # fmt: skip
    program = partition(Workload.of(plan), resolve(plan))
    formats = {
        kind: {
            task.dtype
            for block in program.blocks
            for task in block.computes()
            if task.kind == kind and np.any(task.matmuls) and np.any(task.count)
        }
        for kind in ("matmul", "attention")
    }
    assert formats["attention"] == {"bf16"}
    assert compute in formats["matmul"]
