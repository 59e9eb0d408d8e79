"""Latent attention in a model: its weights, and the FLOPs that are counted of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import decoder
from hypothesis import given
from hypothesis import strategies as st

from shardsim.errors import ModelError
from shardsim.model import (
    Accounting,
    Latent,
    Model,
    attention_flops_per_token,
    load_model,
    model_flops_per_token,
    override_model,
)
from shardsim.model.blocks import graph_of

LATENTS = st.builds(
    Latent,
    query=st.sampled_from([0, 64, 192]),
    key_value=st.sampled_from([32, 128]),
    rope=st.sampled_from([2, 16]),
    nope=st.sampled_from([8, 32]),
    value=st.sampled_from([2, 9, 10]),
)


def small(latent: Latent, **options: Any) -> Model:
    return decoder(norm="rmsnorm", latent=latent, head_dim=latent.nope + latent.rope, **options)


def matrices(model: Model, latent: Latent) -> int:
    """Return the weights of one layer's attention but for norms (arXiv 2405.04434, section 2.1)."""
    d, h, q, c = model.embed, model.heads, latent.query, latent.key_value
    key = latent.nope + latent.rope
    queries = d * q + q * h * key if q else d * h * key
    keys_and_values = d * (c + latent.rope) + c * h * (latent.nope + latent.value)
    return queries + keys_and_values + h * latent.value * d


@given(LATENTS, st.booleans(), st.sampled_from(["flash", "unfused"]))
def test_weights_by_hand(latent: Latent, parallel: bool, attention: str) -> None:
    model = small(latent, parallel_block=parallel)
    plain = replace(model, latent=None)
    usual = 4 * model.embed * model.heads * model.head_dim
    gained = matrices(model, latent) + latent.query + latent.key_value - usual
    assert model.parameters_all - plain.parameters_all == model.layers * gained
    assert model.block_matrices - plain.block_matrices == model.layers * (
        matrices(model, latent) - usual
    )
    # An array is told by its name, whether it is a weight or made.
    for layer, _ in graph_of(model, attention).layers:
        made = {op.out.name for op in layer.part.ops}
        assert made.isdisjoint({tensor.name for tensor in model.tensors})


@given(LATENTS, st.sampled_from([96, 512]), st.booleans())
def test_flops_by_hand(latent: Latent, tokens: int, halved: bool) -> None:
    model = small(latent)
    width = latent.nope + latent.rope + latent.value
    scores = 2 * model.layers * model.heads * width * tokens // (2 if halved else 1)
    assert attention_flops_per_token(model, tokens, halved=halved) == scores
    mlp, logits = 2 * model.embed * model.mlp, model.embed * model.vocab
    products = 2 * (model.layers * (matrices(model, latent) + mlp) + logits)
    maxtext = Accounting.MAXTEXT_2025 if halved else Accounting.MAXTEXT_2024
    counted = model_flops_per_token(model, tokens, maxtext)
    assert counted == pytest.approx(3 * (products + scores), rel=1e-12)
    palm = Accounting.PALM_CAUSAL if halved else Accounting.PALM
    counted = model_flops_per_token(model, tokens, palm)
    assert counted == 6 * model.parameters + 3 * scores


def test_flops_are_those_that_maxtext_printed() -> None:
    # AI-Hypercomputer/tpu-recipes@c8cfe2f, training/ironwood: TFLOP/s/chip over tokens/s/chip.
    counted = model_flops_per_token(load_model("deepseek-v3"), 4096, Accounting.MAXTEXT_2025)
    assert counted / 1e9 == pytest.approx(607.53e3 / 2425.75, rel=2e-4)


# Billions as printed, and the last digit: of V3 with the head but without the embedding
# (README_WEIGHTS.md of deepseek-ai/DeepSeek-V3), of the others arXiv 2405.04434, 3.1.2 and B.
@pytest.mark.parametrize(
    ("name", "embedding", "printed", "last"),
    [
        ("deepseek-v3", False, 36.6, 0.1),
        ("deepseek-v2", True, 21, 1),
        ("deepseek-v2-lite", False, 2.4, 0.1),
    ],
)
def test_active_parameters_are_what_a_token_meets(
    name: str, embedding: bool, printed: float, last: float
) -> None:
    model = load_model(name)
    active = model.active_parameters - (0 if embedding else model.vocab * model.embed)
    assert abs(active / 1e9 - printed) < last


SAID = {"key_value": 128, "rope": 16, "nope": 32, "value": 40}


def test_a_mapping_and_single_keys_say_the_same() -> None:
    data = {**decoder(norm="rmsnorm").to_mapping(), "latent": SAID}
    del data["head_dim"]
    model = load_model(data)
    assert (model.latent, model.head_dim) == (Latent(**SAID), 48)
    assert load_model(model.to_mapping()) == model
    wider = override_model(model, {"latent.rope": 32, "latent.query": 256})
    assert (wider.latent, wider.head_dim) == (Latent(**(SAID | {"query": 256, "rope": 32})), 64)
    assert "latent.rope=32" in wider.note
    assert override_model(wider, {"latent": None}).latent is None
    with pytest.raises(
        ModelError, match=r"latent: missing key 'key_value', as in \{key_value: 512"
    ):
        override_model(decoder(norm="rmsnorm"), {"latent.rope": 16})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"latent": SAID | {"rope": 15}}, "latent.rope: rotary positions need an even number, found"),
    ({"latent": SAID | {"value": 0}}, "latent.value: expected a whole number, 1 or more, found 0"),
    (
        {"latent": SAID | {"value": 64}},
        "latent.value: 64 is more than the 48 of keys (nope + rope)",
    ),
    ({"latent": SAID | {"nop": 1}}, "latent: unknown key 'nop'"),
    ({"latent": SAID | {"query": -1}}, "latent.query: expected a whole number, 0 or more, found"),
    ({"head_dim": 64}, "head_dim: with latent attention use 48: that of queries is latent.nope"),
    ({"kv_heads": 4}, "kv_heads: with latent attention use 16: each head has keys and values"),
    ({"positions": "none"}, "positions: with latent attention use rotary: latent.rope is turned"),
    ({"qk_norm": True}, "qk_norm: with latent attention use false: latents are normed instead"),
    ({"norm": "layernorm"}, "norm: with latent attention use rmsnorm: latents have that norm"),
    ({"biases": {"qkv": True}}, "biases.qkv: with latent attention use false: projections of"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    data = {**decoder(norm="rmsnorm").to_mapping(), "latent": SAID}
    del data["head_dim"]
    with pytest.raises(ModelError) as caught:
        load_model(data | changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
