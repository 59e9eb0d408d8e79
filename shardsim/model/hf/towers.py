"""Towers of images of transformers as options of a model.

Source: models/vit, dinov2, clip, siglip and siglip2 of the transformers named in `defaults`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from shardsim.carried import BOTH, HBM, Keys, NotCarried
from shardsim.errors import FileError, shown
from shardsim.model.hf.decoders import activation, head_dim
from shardsim.model.spec import MOST_LAYERS

Made = tuple[dict[str, Any], list[NotCarried]]


def _tower(
    keys: Keys, image: int, patch: int, qkv_bias: bool, mlp: int | None = None
) -> dict[str, Any]:
    embed, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    return {
        "family": "vit",
        "layers": keys.count("num_hidden_layers", most=MOST_LAYERS),
        "embed": embed,
        "heads": heads,
        "head_dim": head_dim(keys, embed, heads),
        "mlp": mlp or keys.count("intermediate_size"),
        "patch": patch,
        "image": image,
        "channels": keys.count("num_channels"),
        "activation": activation(keys, "hidden_act"),
        "positions": "learned",
        "biases": {"qkv": qkv_bias, "attention_output": True, "mlp": True, "norm": True},
    }


def _square(keys: Keys, key: str) -> int:
    """Return the side of a square, given as a number or as two equal ones."""
    value = keys[key]
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**5:
        raise FileError(f"{key}: {shown(value)}: only squares of whole pixels are modelled")
    return value


def _pixels(keys: Keys) -> tuple[int, int, list[NotCarried]]:
    """Return the side of an image and of a patch; pixels of no whole patch are cut off."""
    image, patch = _square(keys, "image_size"), _square(keys, "patch_size")
    if image < patch:
        raise FileError(f"image_size: an image of {image} pixels holds no patch of {patch}")
    side = image // patch * patch
    if side == image:
        return image, patch, []
    why = f"{side // patch} patches of {patch} pixels a side: {side} pixels are read"
    return side, patch, [NotCarried("image_size", image, why)]


def _labels(keys: Keys) -> int:
    """Return the classes: those that id2label names; transformers has two where it is missing."""
    names = keys["id2label"] if "id2label" in keys else None
    if names is None:
        return keys.count("num_labels", least=0) if "num_labels" in keys else 2
    if not isinstance(names, dict):
        raise FileError(f"id2label: expected names by number, found {shown(names)}")
    return len(names)


def _vit(keys: Keys, architecture: str) -> Made:
    image, patch, left = _pixels(keys)
    made = _tower(keys, image, patch, keys.flag("qkv_bias"))
    made["pooling"] = "cls"
    if architecture == "ViTForImageClassification":
        made["classes"] = _labels(keys)
    elif architecture == "ViTModel":
        width = keys.count_or("pooler_output_size", made["embed"])
        why = f"the pooler, a dense layer of {made['embed'] * width + width:,} parameters, is left"
        left.append(NotCarried("architectures", [architecture], f"{why} out", BOTH))
    else:
        why = "what stands behind the layers is not known; taken as features of the class token"
        left.append(
            NotCarried("architectures", [architecture] if architecture else None, why, BOTH)
        )
    return made, left


def _dinov2(keys: Keys, architecture: str) -> Made:
    image, patch, left = _pixels(keys)
    embed, gated = keys.count("hidden_size"), keys.flag("use_swiglu_ffn")
    mlp = embed * keys.count("mlp_ratio")
    if gated:  # two thirds of it, in whole eights
        mlp = (mlp * 2 // 3 + 7) // 8 * 8
    made = _tower(keys, image, patch, keys.flag("qkv_bias"), mlp)
    made |= {"pooling": "cls", "layer_scale": True, "gated_mlp": gated}
    if gated:
        made["activation"] = "silu"
    masked = f"the token of masked patches, {embed:,} parameters, is left out"
    if "num_register_tokens" in keys:
        made["registers"] = keys.count("num_register_tokens", least=0)
        left.append(NotCarried("mask_token", True, masked, (HBM,)))
    elif keys.flag("use_mask_token"):
        left.append(NotCarried("use_mask_token", True, masked, (HBM,)))
    if not architecture.endswith("Model"):
        left.append(_other_head(architecture))
    return made, left


def _other_head(architecture: str) -> NotCarried:
    why = "what stands behind the layers is not known; taken as features of the class token"
    return NotCarried("architectures", [architecture], why, BOTH)


def _clip(keys: Keys, architecture: str) -> Made:
    image, patch, left = _pixels(keys)
    made = _tower(keys, image, patch, True)
    if architecture.endswith(("CLIPModel", "WithProjection")):
        why = "the projection of the tower's result is left out, and the tower of text"
        left.append(NotCarried("architectures", [architecture], why, BOTH))
    return {**made, "pooling": "cls", "patch_bias": False, "input_norm": True}, left


def _siglip(keys: Keys, architecture: str) -> Made:
    image, patch, left = _pixels(keys)
    return _pooled(keys, _tower(keys, image, patch, True)), left


def _siglip2(keys: Keys, architecture: str) -> Made:
    patch, patches = _square(keys, "patch_size"), keys.count("num_patches")
    side = math.isqrt(patches)
    if side * side != patches:
        raise FileError(f"num_patches: {patches} is no square; only square images are modelled")
    return _pooled(keys, _tower(keys, side * patch, patch, True)), []


def _pooled(keys: Keys, made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "pooling": "map" if keys.flag("vision_use_head") else "none"}


TOWERS: Mapping[str, Callable[[Keys, str], Made]] = {
    "vit": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip2,
}
