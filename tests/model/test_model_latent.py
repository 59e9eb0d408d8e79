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

NOPE = 32
LATENTS = st.builds(
    Latent,
    queries=st.sampled_from([0, 64, 192]),
    keys=st.sampled_from([32, 128]),
    rotary=st.sampled_from([2, 16]),
    values=st.sampled_from([2, 9, 34]),
)


def small(latent: Latent, **options: Any) -> Model:
    return decoder(norm="rmsnorm", latent=latent, head_dim=NOPE + latent.rotary, **options)


def matrices(model: Model, latent: Latent) -> int:
    """Return the weights of one layer's attention but for norms (arXiv 2405.04434, section 2.1)."""
    d, h, q, c = model.embed, model.heads, latent.queries, latent.keys
    width = NOPE + latent.rotary
    queries = d * q + q * h * width if q else d * h * width
    keys_and_values = d * (c + latent.rotary) + c * h * (NOPE + latent.values)
    return queries + keys_and_values + h * latent.values * d


@given(LATENTS, st.booleans(), st.sampled_from(["flash", "unfused"]))
def test_weights_by_hand(latent: Latent, parallel: bool, attention: str) -> None:
    model = small(latent, parallel_block=parallel)
    plain = replace(model, latent=None)
    usual = 4 * model.embed * model.heads * model.head_dim
    gained = matrices(model, latent) + latent.queries + latent.keys - usual
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
    width = NOPE + latent.rotary + latent.values
    scores = 2 * model.layers * model.heads * width * tokens // (2 if halved else 1)
    assert attention_flops_per_token(model, tokens, halved=halved) == scores
    mlp, logits = 2 * model.embed * model.mlp, model.embed * model.vocab
    products = 2 * (model.layers * (matrices(model, latent) + mlp) + logits)
    maxtext = Accounting.MAXTEXT_2025 if halved else Accounting.MAXTEXT_2024
    counted = model_flops_per_token(model, tokens, maxtext)
    assert counted == pytest.approx(3 * (products + scores), rel=1e-12)
    if not halved:  # its vocabulary is padded already
        assert model_flops_per_token(model, tokens, Accounting.MEGATRON) == counted
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


SAID = {"keys": 128, "rotary": 16, "values": 40}


def data_of(**changes: Any) -> dict[str, Any]:
    return {**decoder(norm="rmsnorm").to_mapping(), "head_dim": 48, "latent": SAID, **changes}


def test_a_mapping_and_single_keys_say_the_same() -> None:
    model = load_model(data_of())
    assert model.latent == Latent(**SAID)
    assert load_model(model.to_mapping()) == model
    wider = override_model(model, {"latent.rotary": 32, "latent.queries": 256})
    assert wider.latent == Latent(**(SAID | {"queries": 256, "rotary": 32}))
    assert "latent.rotary=32" in wider.note
    assert override_model(wider, {"latent": None}).latent is None
    with pytest.raises(ModelError, match=r"latent: missing key 'keys', as in \{keys: 512, rotary"):
        override_model(decoder(norm="rmsnorm"), {"latent.rotary": 16})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"latent": SAID | {"rotary": 15}}, "latent.rotary: must be even, not 15; the nearest is 16"),
    ({"latent": SAID | {"rotary": 48}}, "latent.rotary: a part of a head's 48, not 48"),
    ({"latent": SAID | {"values": 0}}, "latent.values: expected a whole number, 1 or more, found"),
    ({"latent": SAID | {"values": 64}}, "latent.values: 64 is more than the 48 of keys (head_dim)"),
    ({"latent": SAID | {"nope": 1}}, "latent: unknown key 'nope'"),
    ({"latent": SAID | {"queries": -1}}, "latent.queries: expected a whole number, 0 or more"),
    ({"kv_heads": 4}, "latent: needs as many key-value heads as heads"),
    ({"positions": "none"}, "rotary positions"),
    ({"qk_norm": True}, "no qk_norm"),
    ({"norm": "layernorm"}, "latent: needs norm: rmsnorm, and no biases.qkv"),
    ({"biases": {"qkv": True}}, "latent: needs norm: rmsnorm, and no biases.qkv"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(data_of(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
