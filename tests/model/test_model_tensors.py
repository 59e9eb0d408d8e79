"""Every weight is listed once, with a name for each of its dimensions."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.model import (
    Biases,
    Model,
    Tensor,
    load_model,
    model_names,
    parameters,
    published_count,
)
from shardsim.model.tensors import AXES, KINDS, PARTS


@pytest.mark.parametrize("name", model_names())
def test_parameters_are_the_published_count(name: str) -> None:
    known = published_count(name)
    assert known.agrees(load_model(name).parameters)
    assert known.within <= 0.07 * known.parameters  # the last printed digit; or named by size
    assert bool(known.less) == bool(known.why)


def test_most_published_counts_are_exact() -> None:
    exact = [name for name in model_names() if not published_count(name).within]
    assert len(exact) >= 110


def test_counts_are_those_of_modules_by_hand() -> None:
    """facebookresearch/DiT and Wan-Video/Wan2.1, module by module."""
    d = 1152
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 6 * d * d + 6 * d
    ends = (16 + 1) * d + (256 + 1) * d + (d + 1) * d + 1001 * d + (d + 1) * 2 * d + (d + 1) * 32
    assert load_model("dit-xl-2").parameters == 28 * block + ends
    d, f = 5120, 13824
    block = 8 * d * (d + 1) + 4 * d + 2 * d + 2 * d * f + f + d + 6 * d
    ends = (64 + 1) * d + (4096 + 1) * d + (d + 1) * d + (256 + 1) * d + (d + 1) * d
    ends += (d + 1) * 6 * d + (d + 1) * 64 + 2 * d
    assert load_model("wan2.1-14b").parameters == 40 * block + ends
    assert load_model("vit-22b").parameters == 48 * (4 * 6144**2 + 2 * 6144 * 24576)


def test_vit_22b_with_everything_counted() -> None:
    model = load_model("vit-22b")
    blocks, width, mlp = model.parameters, 6144, 24576
    kept_biases = 48 * (width + mlp + width)  # attention output, MLP in and out
    norms = 48 * (width + 2 * 128) + width  # one per parallel block, QK-norm, the last; no biases
    embedding = 14 * 14 * 3 * width + width + 256 * width
    pooling = width + 4 * width**2 + 4 * width + 2 * width + 2 * width * mlp + mlp + width
    assert model.parameters_all == blocks + kept_biases + norms + embedding + pooling


def names(model: Model, part: str = "block") -> list[str]:
    return [tensor.name for tensor in parameters(model) if tensor.part == part]


def test_blocks_hold_what_their_options_say() -> None:
    plain = ["query", "key", "value", "attention_output"]
    palm = load_model("palm-8b")
    assert names(palm) == ["block_norm_scale", *plain, "mlp_in", "mlp_gate", "mlp_out"]
    serial = replace(palm, parallel_block=False, gated_mlp=False)
    assert names(serial) == ["attention_norm_scale", *plain, "mlp_norm_scale", "mlp_in", "mlp_out"]
    gemma = load_model("gemma2-2b")
    assert [name for name in names(gemma) if "norm" in name] == [
        "attention_norm_scale",
        "post_attention_norm_scale",
        "mlp_norm_scale",
        "post_mlp_norm_scale",
    ]
    assert {"query_norm_scale", "key_norm_scale"} < set(names(load_model("vit-22b")))
    assert names(palm, "input") == ["token_embedding"]
    assert names(palm, "output") == ["final_norm_scale"]
    assert names(load_model("llama3-8b"), "output") == ["final_norm_scale", "output_head"]


def test_multi_query_keys_have_one_head() -> None:
    by_name = {tensor.name: tensor for tensor in parameters(load_model("palm-540b"))}
    assert by_name["query"] == Tensor(
        "query", ("embed", "heads", "head_dim"), (18432, 48, 256), 118, "matrix"
    )
    assert by_name["key"].axes == ("embed", "kv_heads", "head_dim")
    assert by_name["key"].shape == (18432, 1, 256)
    assert by_name["attention_output"].axes == ("heads", "head_dim", "embed")


flags = st.booleans()


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Small models of every kind."""
    small = st.integers(1, 6)
    kv_heads = draw(small)
    vit = draw(flags)
    patch = draw(st.integers(1, 4)) if vit else 0
    norm = draw(st.sampled_from(["layernorm", "rmsnorm"]))
    pooling = draw(st.sampled_from(["none", "mean", "map", "cls"])) if vit else "none"
    parallel, post_norms, qk_norm = draw(flags), draw(flags), draw(flags)
    return Model(
        name="drawn",
        family="vit" if vit else "decoder",
        layers=draw(small),
        embed=draw(small),
        mlp=draw(small),
        heads=kv_heads * draw(small),
        head_dim=2 * draw(small),
        kv_heads=kv_heads,
        sequence=draw(small),
        vocab=0 if vit else draw(small),
        parallel_block=parallel,
        parallel_norms=parallel and draw(flags),
        gated_mlp=draw(flags),
        causal=draw(flags),
        tied_embeddings=not vit and draw(flags),
        head_bias=not vit and draw(flags),
        qk_norm=qk_norm,
        qk_norm_over=draw(st.sampled_from(["head", "heads"])) if qk_norm else "head",
        norm=norm,
        pre_norms=parallel or not post_norms or draw(flags),
        post_norms=post_norms,
        mlp_post_norm=not parallel and not post_norms and draw(flags),
        layer_scale=not parallel and draw(flags),
        final_norm=draw(flags),
        positions=draw(st.sampled_from(["learned", "rotary", "fixed", "none"])),
        biases=Biases(
            qkv=draw(flags),
            attention_output=draw(flags),
            mlp=draw(flags),
            norm=norm == "layernorm" and draw(flags),
        ),
        patch=patch,
        image=patch * draw(small),
        registers=draw(st.integers(0, 3)) if vit else 0,
        patch_bias=not vit or draw(flags),
        input_norm=vit and draw(flags),
        pooling=pooling,
        classes=0 if pooling == "none" else draw(st.integers(0, 6)),
    )


@settings(max_examples=80, deadline=None)
@given(models())
def test_tensors_are_consistent_and_sum_to_the_count(model: Model) -> None:
    tensors = parameters(model)
    assert sum(tensor.stack * math.prod(tensor.shape) for tensor in tensors) == model.parameters_all
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    lengths: dict[str, int] = {}
    for tensor in tensors:
        assert len(tensor.axes) == len(tensor.shape)
        assert set(tensor.axes) <= set(AXES)
        assert tensor.kind in KINDS
        assert tensor.part in PARTS
        assert tensor.stack == (model.layers if tensor.part == "block" else 1)
        for axis, length in zip(tensor.axes, tensor.shape, strict=True):
            assert lengths.setdefault(axis, length) == length  # a name means one length


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 5))
def test_layers_count_in_proportion(model: Model, more: int) -> None:
    one, two = replace(model, layers=1), replace(model, layers=2)
    grown = replace(model, layers=model.layers + more)
    per_layer = two.parameters_all - one.parameters_all
    assert grown.parameters_all - model.parameters_all == more * per_layer
    assert grown.block_matrices * model.layers == model.block_matrices * grown.layers


@settings(max_examples=40, deadline=None)
@given(models())
def test_a_gate_adds_one_more_matrix(model: Model) -> None:
    plain, gated = replace(model, gated_mlp=False), replace(model, gated_mlp=True)
    bias = model.mlp if model.biases.mlp else 0
    added = gated.parameters_all - plain.parameters_all
    assert added == model.layers * (model.embed * model.mlp + bias)
    per_layer = (gated.block_matrices - plain.block_matrices) // plain.layers
    assert per_layer == model.embed * model.mlp


@settings(max_examples=40, deadline=None)
@given(models())
def test_block_matrices_are_the_closed_form(model: Model) -> None:
    counted = replace(model, parameter_convention="block-matrices").parameters
    attention = model.embed * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    mlp = (3 if model.gated_mlp else 2) * model.embed * model.mlp
    assert counted == model.layers * (attention + mlp) <= model.parameters_all


@settings(max_examples=60, deadline=None)
@given(models())
def test_each_option_adds_its_own_vectors(model: Model) -> None:
    """What LayerNorm's bias doubles, heads share, and a branch or an image has once."""
    norm = model.embed * (1 + model.biases.norm)
    heads = model.head_dim * (model.heads + model.kv_heads - 2) * (1 + model.biases.norm)
    pixels = model.channels * model.patch**2 * (1 + model.biases.norm)
    inner = (model.heads * model.head_dim + model.mlp) * (1 + model.biases.norm)
    added = {
        "parallel_norms": (False, True, model.layers * norm if model.parallel_block else None),
        "pre_norms": (False, True, 2 * model.layers * norm if model.post_norms else None),
        "layer_scale": (False, True, 2 * model.layers * model.embed),
        "head_bias": (False, True, model.vocab or None),
        "qk_norm_over": ("head", "heads", model.layers * heads if model.qk_norm else None),
        "registers": (0, 4, 4 * model.embed if model.patch else None),
        "patch_bias": (False, True, model.embed if model.patch else None),
        "input_norm": (False, True, norm if model.patch else None),
        "patch_norms": (False, True, norm + pixels if model.patch else None),
        "sub_norms": (False, True, None if model.parallel_block else model.layers * inner),
    }
    for key, (without, having, count) in added.items():
        serial_only = key in ("pre_norms", "layer_scale")
        if count is None or (serial_only and model.parallel_block):
            continue
        plain, more = (replace(model, **{key: value}) for value in (without, having))
        assert more.parameters_all - plain.parameters_all == count, key
