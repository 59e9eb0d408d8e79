"""Models of several stacks, frozen parts and adapters: what they are made of and what counts."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.errors import ModelError
from shardsim.files import parse_yaml
from shardsim.model import (
    Accounting,
    forward_matmul_flops_per_token,
    load_model,
    model_flops_per_token,
    override_model,
)
from shardsim.model.lora import Lora

_SIX_N, _PALM = Accounting.SIX_N, Accounting.PALM


@pytest.mark.parametrize("name", ["t5-xxl", "pali-17b", "clip-b-16", "siglip-so400m"])
def test_a_model_of_several_stacks_is_read_back_as_it_is_written(name: str) -> None:
    model = load_model(name)
    assert load_model(model.to_mapping()) == model
    assert sum(tensor.size for tensor in model.tensors) == sum(
        tensor.size for part in model.parts for tensor in part.model.own_tensors
    )


def test_each_stack_of_t5_works_on_its_own_tokens() -> None:
    model, encoder, decoder = load_model("t5-xxl"), 512, 114
    wide, hidden, mlp, layers, vocab = 4096, 64 * 64, 10240, 24, 32128
    attention, mlps = 4 * wide * hidden, 3 * wide * mlp
    ends = 2 * vocab * wide  # the table and the head, both the decoder's
    vectors = 32 * 64 + wide
    of_encoder = layers * (attention + mlps + 2 * wide) + vectors
    # Of cross-attention, keys and values work on the encoder's tokens.
    of_decoder = layers * (attention + attention / 2 + mlps + 3 * wide) + vectors + ends
    weights = (of_encoder + layers * attention / 2) * encoder + of_decoder * decoder
    assert model_flops_per_token(model, decoder, _SIX_N) == pytest.approx(6 * weights / decoder)
    pairs = encoder**2 + decoder**2 + encoder * decoder
    scores = 12 * layers * hidden * pairs / decoder
    assert model_flops_per_token(model, decoder, _PALM) == pytest.approx(
        6 * weights / decoder + scores
    )
    # Only the decoder's own pairs are halved by a mask.
    halved = model_flops_per_token(model, decoder, Accounting.PALM_CAUSAL)
    assert halved == pytest.approx(
        6 * weights / decoder + scores * (pairs - decoder**2 / 2) / pairs
    )


def test_what_is_frozen_counts_once_and_has_no_gradient() -> None:
    frozen = load_model("pali-17b")
    trained = override_model(frozen, {"encoder.images.frozen": False})
    images = frozen.encoder.images if frozen.encoder else None
    assert images is not None
    more = model_flops_per_token(trained, 64, _SIX_N) - model_flops_per_token(frozen, 64, _SIX_N)
    weights = sum(tensor.size for tensor in images.own_tensors)
    assert more == pytest.approx(4 * weights * 256 / 64)
    still = [tensor.name for tensor in frozen.tensors if not tensor.trained]
    assert still
    assert all(name.startswith("encoder/images/") for name in still)
    assert len(still) == len(images.own_tensors)


def test_adapters_are_named_as_a_yaml_file_names_them() -> None:
    """YAML 1.1 takes the word on, unquoted, for a truth value."""
    base = load_model("llama2-7b")
    given = parse_yaml("lora: {rank: 16, on: [query, value]}", "model")
    changed = override_model(base, given)
    assert changed.lora == Lora(rank=16, on=("query", "value"))
    assert changed.note.endswith("Changed: lora={'on': [query, value], rank: 16}.")
    assert override_model(base, {"lora": changed.lora}).note == changed.note


def test_adapters_alone_are_trained_and_the_rest_has_gradients_of_operands() -> None:
    base = load_model("llama3-8b")
    model = override_model(base, {"lora": {"rank": 16, "on": ["query", "mlp_out"]}})
    rank, wide, mlp = 16, 4096, 14336
    adapters = 32 * rank * ((wide + wide) + (mlp + wide))
    assert model.parameters == base.parameters + adapters
    assert sum(tensor.size for tensor in model.trained_tensors) == adapters
    expected = 4 * base.parameters + 6 * adapters
    assert model_flops_per_token(model, 8192, _SIX_N) == expected
    attention = model_flops_per_token(base, 8192, _PALM) - 6 * base.parameters
    assert model_flops_per_token(model, 8192, _PALM) == pytest.approx(expected + attention)


def test_adapters_of_experts_are_each_experts_own_and_count_where_a_token_goes() -> None:
    base = load_model("mixtral-8x7b")
    model = override_model(base, {"lora": {"rank": 16, "on": ["expert_in", "expert_out"]}})
    one = 32 * 16 * 2 * (4096 + 14336)  # of 8, of which a token goes to 2
    assert sum(tensor.size for tensor in model.trained_tensors) == 8 * one
    expected = 4 * base.active_parameters + 6 * 2 * one
    assert model_flops_per_token(model, 4096, _SIX_N) == expected


# GFLOP of an image as arXiv 2308.00951 prints them, heads included.
SOFT = {"vit-s-16": 9.2, "vit-l-16": 122.9, "softmoe-s-16-128e": 8.6, "softmoe-l-16-128e": 111.1}


@pytest.mark.parametrize(("name", "printed"), SOFT.items())
def test_soft_experts_take_the_printed_flops(name: str, printed: float) -> None:
    model = load_model(name)
    forward = model_flops_per_token(model, None, Accounting.MAXTEXT_2024) * model.sequence / 3
    assert forward / 1e9 == pytest.approx(printed, rel=0.01)


def test_an_option_of_a_stack_that_is_read_changes_by_its_path() -> None:
    model = override_model(load_model("t5-small"), {"encoder.sequence": 1024})
    assert model.encoder is not None
    assert (model.encoder.sequence, model.sequence) == (1024, 114)
    assert "encoder.sequence=1024" in model.note


_T5 = {"base": "t5-small"}
_VIT = {"base": "vit-b-16", "classes": 0}
_LLAMA = {"base": "llama2-7b"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**_VIT, "images": _VIT}, "images: a vit reads those of an encoder of masked images"),
        ({**_VIT, "kept": 196}, "kept: 196 of 196 patches"),
        ({**_VIT, "width": 230}, "the nearest valid width is 224"),
        ({**_VIT, "modulation": "layer"}, "modulation: needs predicts"),
        ({**_VIT, "labels": 10}, "labels: go with a time"),
        ({**_VIT, "prompt": 8}, "prompt: needs prompt_embed"),
        ({**_VIT, "predicts": 3, "pooling": "map"}, "predicts: pixels need no classes"),
        ({**_LLAMA, "sequence": 197, "images": _VIT}, "197 tokens, of which the images' are 197"),
        ({**_LLAMA, "encoder": {"base": "llama2-7b"}}, "must be of family encoder or vit"),
        ({**_LLAMA, "encoder": {"base": "vit-b-16"}}, "encoder: has no loss of its own"),
        ({**_T5, "encoder": {"embed": 256, "shared_embeddings": True}}, "same vocab and embed"),
        ({**_VIT, "text": {"vocab": 64, "sequence": 8}}, "text: towers need pooling"),
        ({**_VIT, "text": {"vocab": 64, "sequence": 8, "features": 7}}, "not as wide as"),
        ({**_LLAMA, "lora": {"rank": 0}}, "lora.rank: expected a positive whole number"),
        ({**_LLAMA, "lora": {"rank": 8, "on": ["querry"]}}, "did you mean 'query'"),
        (
            {**_LLAMA, "lora": {"rank": 8, "on": ["expert_in"]}},
            "model has no expert_in",
        ),
        ({"base": "mixtral-8x7b", "lora": {"rank": 8, "on": ["mlp_in"]}}, "has no mlp_in"),
        ({"base": "gpt3-175b", "lora": {"rank": 8, "on": ["mlp_gate"]}}, "has no mlp_gate"),
        ({**_LLAMA, "lora": {"rank": 8, "on": ["cross_query"]}}, "has no cross_query"),
        ({**_LLAMA, "lora": {"rank": 10**7}}, "up to 1,000,000, found 10000000"),
        ({**_LLAMA, "encoder.sequence": 3}, "unknown"),
    ],
)
def test_what_a_model_cannot_read_is_said(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words.replace(".", r"\.")):
        load_model(data)


def test_model_flops_of_diffusion_are_the_papers() -> None:
    # arXiv 2212.09748, table 4: multiply-adds of a forward pass over an image, in 1e9.
    for name, printed in (("s", 6.06), ("b", 23.01), ("l", 80.71), ("xl", 118.64)):
        model = load_model(f"dit-{name}-2")
        forward = forward_matmul_flops_per_token(model) * model.sequence / 2e9
        assert forward == pytest.approx(printed, rel=2e-3)
        # What shifts and scales works once an image: by token it would be a third too much.
        assert model_flops_per_token(model) * model.sequence / 6e9 == pytest.approx(
            printed, rel=2e-3
        )


def test_an_encoder_of_masked_images_reads_what_is_kept() -> None:
    model = load_model("mae-l-16")
    encoder = model.parts[0].model
    assert (encoder.sequence, model.sequence) == (50, 197)
    assert encoder.patches == 4 * encoder.kept
    changed = override_model(model, {"images.image": 256, "image": 256, "images.kept": 64})
    assert (changed.parts[0].model.sequence, changed.sequence) == (65, 257)


def test_a_video_is_its_frames_of_patches_that_attend_to_a_text() -> None:
    model = load_model("wan2.1-14b")
    assert model.sequence == model.image_tokens == 21 * 45 * 80
    assert override_model(model, {"frames": 1}).sequence == 45 * 80
    more = override_model(model, {"prompt": 513})
    extra = model_flops_per_token(more) - model_flops_per_token(model)
    # A token of text: its keys and values in each layer, two projections, and scores with all.
    weights = 40 * 2 * 5120**2 + 4096 * 5120 + 5120**2
    scores = 40 * 2 * 5120 * model.sequence
    assert extra * model.sequence == pytest.approx(6 * (weights + scores), rel=1e-6)
