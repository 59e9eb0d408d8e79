"""A model's options are checked when it is made, and what is wrong is named."""

import dataclasses
from typing import Any

import pytest

from shardsim.errors import ModelError
from shardsim.model import Biases, Latent, Model, load_model

TINY = dict[str, Any](layers=2, embed=8, mlp=32, heads=4, head_dim=2, kv_heads=4, sequence=16)
TINY_VIT = TINY | {"name": "tiny-vit", "family": "vit", "patch": 4, "image": 16}
TINY_DECODER = TINY | {"name": "tiny", "family": "decoder", "kv_heads": 2, "vocab": 64}


def test_tiny_models_are_valid() -> None:
    assert Model(**TINY_VIT).patches == 16
    assert Model(**TINY_DECODER).attention_width == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, ["layers", "positive whole number", "0"]),
        ({"layers": 2.0}, ["layers", "2.0"]),
        ({"layers": True}, ["layers", "true"]),
        ({"embed": "wide"}, ["embed", "wide"]),
        ({"embed": 10**9 + 1}, ["embed", "10^9"]),
        ({"embed": 10**5000}, ["embed", "10^9"]),
        ({"vocab": -1}, ["vocab", "-1"]),
        ({"heads": 48, "kv_heads": 5}, ["kv_heads", "nearest valid number is 4"]),
        ({"heads": 4, "kv_heads": 8}, ["kv_heads", "nearest valid number is 4"]),
        ({"heads": 999_999_937, "kv_heads": 500_000_000}, ["kv_heads", "number is 999999937"]),
        ({"family": "gpt"}, ["family", "decoder"]),
        ({"activation": "gelo"}, ["activation", "did you mean 'gelu'"]),
        ({"activation": ["gelu"]}, ["activation", "gelu"]),
        ({"norm": "rms"}, ["norm", "rmsnorm"]),
        ({"positions": "rope"}, ["positions", "rotary"]),
        ({"pooling": "gap"}, ["pooling", "map"]),
        ({"parameter_convention": "blocks"}, ["parameter_convention", "block-matrices"]),
        ({"causal": 1}, ["causal", "true or false"]),
        ({"biases": True}, ["biases", "True"]),
        ({"norm": "rmsnorm", "biases": Biases(norm=True)}, ["biases.norm", "rmsnorm"]),
        ({"positions": "rotary", "head_dim": 3}, ["head_dim", "4"]),
        ({"name": "../tiny"}, ["name", "letters"]),
        ({"name": "a\nb"}, ["name", "letters"]),
        ({"name": 3}, ["name", "3"]),
        ({"note": 3}, ["note", "text"]),
        ({"vocab": 0}, ["vocab", "decoder"]),
        ({"registers": 4}, ["registers", "vit"]),
        ({"input_norm": True}, ["input_norm", "vit"]),
        ({"latent": {"keys": 4}}, ["latent"]),
        ({"latent": Latent(keys=4, rotary=2, values=2)}, ["latent", "as many key-value heads"]),
        (
            {"latent": Latent(keys=4, rotary=2, values=2), "kv_heads": 4, "positions": "rotary"},
            ["latent.rotary", "part of a head's 2"],
        ),
        ({"pre_norms": False}, ["pre_norms", "post_norms: true"]),
        ({"post_norms": True, "mlp_post_norm": True}, ["mlp_post_norm"]),
        ({"parallel_norms": True}, ["parallel_norms", "serial"]),
        ({"deepnorm": -1.0}, ["deepnorm", "factor", "-1.0"]),
        ({"deepnorm": 2.0, "post_norms": True}, ["deepnorm", "post_norms"]),
        ({"sub_norms": True, "parallel_block": True}, ["sub_norms", "parallel_block"]),
        ({"patch_norms": True}, ["patch_norms", "vit"]),
        ({"parallel_block": True, "layer_scale": True}, ["layer_scale", "parallel"]),
        ({"qk_norm_over": "heads"}, ["qk_norm_over", "qk_norm: true"]),
        ({"qk_norm_over": "all"}, ["qk_norm_over", "heads"]),
        ({"patch": 4}, ["patch", "vit"]),
        ({"pooling": "map"}, ["pooling", "vit"]),
    ],
)
def test_bad_decoder_gives_one_clear_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        Model(**(TINY_DECODER | changes))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 0}, ["patch", "224"]),
        ({"image": 18}, ["image", "nearest valid image is 16"]),
        ({"vocab": 100}, ["vocab", "classes"]),
        ({"tied_embeddings": True}, ["tied_embeddings"]),
        ({"classes": 10}, ["pooling", "map"]),
        ({"head_bias": True}, ["head_bias"]),
    ],
)
def test_bad_vit_gives_one_clear_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        Model(**(TINY_VIT | changes))
    for word in words:
        assert word in str(caught.value)


def test_biases_must_be_flags() -> None:
    with pytest.raises(ModelError, match=r"biases: qkv: expected true or false, found 'yes'"):
        Biases(qkv="yes")  # type: ignore[arg-type]


def test_models_cannot_be_changed_and_can_be_keys() -> None:
    model = load_model("vit-22b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.layers = 1  # type: ignore[misc]
    assert model.parameters  # what is computed once does not change what a model equals
    assert {model: 1}[dataclasses.replace(model)] == 1


def test_class_token_is_one_more_token() -> None:
    model = Model(**(TINY_VIT | {"pooling": "cls", "sequence": 17}))
    assert (model.patches, model.image_tokens) == (16, 17)
