"""What a layout leaves of each weight on one device."""

from __future__ import annotations

import math

import pytest
from building import axis_layout, decoder, vit
from hypothesis import assume, given
from hypothesis import strategies as st

from shardsim.plan.layout import Layout
from shardsim.plan.split import stored_elements
from shardsim.program.blocks import derived_blocks
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of

ROLES = ("pipeline", "data", "fsdp", "expert", "context", "tensor2", "tensor")
SIZES = st.fixed_dictionaries({role: st.sampled_from([1, 2, 4, 8]) for role in ROLES})
MODELS = st.sampled_from(
    [decoder(), decoder(kv_heads=1, gated_mlp=True), decoder(kv_heads=4), vit(), vit(pooling="map")]
)


def layout(sizes: dict[str, int], context_shards: bool = False) -> Layout:
    return Layout(
        **{role: axis_layout(sizes.get(role, 1)) for role in ROLES},
        context_shards_parameters=context_shards,
    )


@given(MODELS, SIZES, st.sampled_from(ROLES), st.booleans())
def test_sharding_more_never_needs_more_memory(model, sizes, role, context_shards):
    more = {**sizes, role: 2 * sizes[role]}
    assume(model.kv_heads % more["tensor"] == 0)  # fewer heads than members are whole on each
    before = stored_elements(model.tensors, layout(sizes, context_shards))
    after = stored_elements(model.tensors, layout(more, context_shards))
    assert after <= before
    splits = role in ("fsdp", "tensor2", "tensor", "pipeline")
    splits |= role == "context" and context_shards
    assert (after < before) == splits


@given(MODELS, SIZES, st.booleans())
def test_one_device_holds_each_weight_over_what_splits_it(model, sizes, context_shards):
    gather = sizes["fsdp"] * (sizes["context"] if context_shards else 1)
    total = 0.0
    for tensor in model.tensors:
        by = 1
        if tensor.part == "block":
            by *= sizes["pipeline"]
        if tensor.kind != "vector" and "embed" in tensor.axes:
            by *= gather * sizes["tensor2"]
        for axis in tensor.axes:
            if axis in ("heads", "mlp", "vocab"):
                by *= sizes["tensor"]
            if axis == "kv_heads":
                # More members than heads: each holds them all.
                by *= sizes["tensor"] if model.kv_heads % sizes["tensor"] == 0 else 1
        total += tensor.size / by
    stored = stored_elements(model.tensors, layout(sizes, context_shards))
    assert stored == pytest.approx(total, rel=1e-12)


@given(MODELS, SIZES)
def test_data_parallelism_splits_no_weight(model, sizes):
    alone = {**sizes, "data": 1}
    assert stored_elements(model.tensors, layout(sizes)) == stored_elements(
        model.tensors, layout(alone)
    )


@given(MODELS, SIZES, st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2]))
def test_devices_and_microbatches_share_tokens_and_logits(model, sizes, microbatches, residual):
    work = Workload(model=model, batch=2**12, sequence=model.sequence)
    split = layout(sizes).reshaped(microbatches=microbatches, residual=residual)
    blocks = derived_blocks(model, "flash", kind_of(model, split))
    local = Sizes(work, split)
    made = {step.op.out.name: step.op.out for step in (*blocks.layers[0].steps, *blocks.ends.steps)}
    tokens = work.batch * work.sequence
    groups = math.prod(sizes[role] for role in ("data", "fsdp", "expert", "context")) * microbatches
    inner = sizes["tensor2"] * sizes["tensor"]
    stream = sizes["tensor2"] * (sizes["tensor"] if residual else 1)
    assert local.stored(made["x"]) * groups * stream == tokens * model.embed
    assert local.stored(made["up"]) * groups * inner == tokens * model.mlp
    if model.vocab:
        assert local.stored(made["logits"]) * groups * sizes["tensor"] == tokens * model.vocab
