"""What a layout leaves of each weight on one device."""

from __future__ import annotations

import math

import pytest
from building import axis_layout, decoder, vit
from hypothesis import assume, given
from hypothesis import strategies as st

from shardsim.model import Model
from shardsim.plan.layout import Layout
from shardsim.plan.split import stored_elements
from shardsim.program.shapes import Workload, shapes

ROLES = ("pipeline", "data", "fsdp", "context", "tensor2", "tensor")
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


@given(MODELS, SIZES, st.sampled_from([1, 2, 4]))
def test_tokens_of_all_groups_are_the_batch(model, sizes, microbatches):
    work = Workload(model=model, batch=2**12, sequence=model.sequence)
    given_layout = layout(sizes).reshaped(microbatches=microbatches)
    local = shapes(work, given_layout)
    groups = math.prod(sizes[role] for role in ("data", "fsdp", "context"))
    assert local.tokens * groups * microbatches == work.batch * work.sequence
    assert local.layers * sizes["pipeline"] == model.layers


@given(MODELS, SIZES)
def test_matrices_of_a_layer_are_those_of_the_model(model, sizes):
    local = shapes(Workload(model=model, batch=64, sequence=model.sequence), layout(sizes))
    by = sizes["tensor2"] * sizes["tensor"]
    kv = 2 * model.embed * model.kv_heads * model.head_dim
    rest = _matrices(model) - kv
    expected = rest / by + kv / sizes["tensor2"] / min(sizes["tensor"], model.kv_heads)
    assert local.layer_weights == pytest.approx(expected, rel=1e-12)


def _matrices(model: Model) -> int:
    return sum(
        math.prod(tensor.shape)
        for tensor in model.tensors
        if tensor.part == "block" and tensor.kind == "matrix"
    )
