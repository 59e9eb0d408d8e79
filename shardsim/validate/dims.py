"""The model of a row: a preset that its dims agree with, or one made of its dims."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import FileError, ModelError
from shardsim.model import Model, load_model
from shardsim.validate.words import DIMS, ROW, find, flag, mapping, number, whole

# Families whose MLP is gated; asked only where the row does not say and gives no parameter count.
GATED = ("llama", "fuji", "mistral", "gemma", "qwen", "palm", "olmo", "yi-")
# What a preset must agree in, with the row's key for it.
_SAME = (
    ("layers", "layers"),
    ("embed", "d_model"),
    ("mlp", "d_ff"),
    ("heads", "heads"),
    ("kv_heads", "kv_heads"),
    ("head_dim", "d_head"),
    ("vocab", "vocab"),
    ("image", "image"),
    ("patch", "patch"),
)
DEFAULT_VOCAB = 32768
DEFAULT_PATCHES = (14, 16, 32)


def model_of(row: Mapping[str, Any]) -> Model:
    """Return the preset that the row names if its dims agree, else a model made of its dims."""
    named, dims = row.get("model"), dims_of(row)
    if isinstance(named, Mapping):
        named = named.get("name")
    _refuse_experts(dims)
    preset = _preset(named)
    if preset is not None and all(
        getattr(preset, field) == _size(dims, key, getattr(preset, field)) for field, key in _SAME
    ):
        return _with_tokens(preset, row, dims)
    if not dims:
        raise FileError("missing key 'dims', and 'model' is no preset's name")
    name = str(named if named is not None else "model")
    choices = [_model(row, dims, name, gated) for gated in _gated(dims, name)]
    if len(choices) == 1:
        return choices[0]
    wanted = number(find(dims, "params_published", DIMS), "dims.params_published")
    return min(choices, key=lambda model: abs(model.parameters_all - wanted))


def dims_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row's dims, which some give as its `model`."""
    given, model = find(row, "dims", ROW), row.get("model")
    return mapping(model if given is None and isinstance(model, Mapping) else given, "dims")


def _preset(name: Any) -> Model | None:
    if not isinstance(name, str):
        return None
    try:
        return load_model(name.strip())
    except ModelError:
        return None


def _size(dims: Mapping[str, Any], key: str, default: int) -> int:
    value = find(dims, key, DIMS)
    return default if value in (None, 0, False) else whole(value, f"dims.{key}")


def _refuse_experts(dims: Mapping[str, Any]) -> None:
    experts = find(dims, "experts", DIMS)
    if flag(experts) and experts not in (1, "1"):
        raise FileError("dims.experts: mixtures of experts are not modelled")


def _gated(dims: Mapping[str, Any], name: str) -> tuple[bool, ...]:
    """Return whether the MLP is gated; both if the published parameter count is to decide."""
    said = find(dims, "glu", DIMS)
    if said is not None:
        return (flag(said),)
    activation = str(find(dims, "activation", {"activation": ("act", "mlp_activations")})).lower()
    if "glu" in activation or "linear" in activation:
        return (True,)
    if find(dims, "params_published", DIMS) is not None:
        return (False, True)
    return (any(word in name.lower() for word in GATED),)


def _model(row: Mapping[str, Any], dims: Mapping[str, Any], name: str, gated: bool) -> Model:
    for key in ("layers", "d_model", "heads"):
        if find(dims, key, DIMS) is None:
            raise FileError(f"dims: missing key '{key}'")
    layers, width, heads = (_size(dims, key, 0) for key in ("layers", "d_model", "heads"))
    words = name.lower()
    vision = bool(find(dims, "image", DIMS) or find(dims, "patch", DIMS))
    if not find(dims, "vocab", DIMS) and re.match(r"vit\b|vit[-_\d]", words):
        vision = True
    parallel = flag(find(dims, "parallel_block", DIMS))
    head_dim = _size(dims, "d_head", max(1, width // heads))
    causal = find(dims, "causal", DIMS)
    causal = flag(causal) if causal is not None else not vision and "bert" not in words
    data: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._+-]", "-", name).strip("-._+")[:80] or "model",
        "family": "vit" if vision else "decoder",
        "layers": layers,
        "embed": width,
        "mlp": _size(dims, "d_ff", 4 * width),
        "heads": heads,
        "head_dim": head_dim,
        "kv_heads": _size(dims, "kv_heads", heads),
        "gated_mlp": gated,
        "activation": "silu" if gated else "gelu",
        "parallel_block": parallel,
        "qk_norm": flag(find(dims, "qk_norm", DIMS)),
        "causal": causal,
    }
    biases = _biases(find(dims, "bias", DIMS), "none" if gated or parallel else "all")
    if biases:
        data["biases"] = biases
    if vision:
        return _with_tokens(load_model(data | _image(row, dims)), row, dims)
    data |= {
        "tied_embeddings": flag(find(dims, "tied", DIMS)),
        "vocab": _size(dims, "vocab", DEFAULT_VOCAB),
        "positions": "none" if head_dim % 2 else "rotary",
        "sequence": sequence_of(row, dims) or 2048,
    }
    if gated and not (biases and biases["norm"]):
        data["norm"] = "rmsnorm"
    return load_model(data)


def _biases(said: Any, default: str) -> dict[str, bool] | None:
    """Return which maps have biases by a row's words: all, none, "qkv only", "qkv none"."""
    text = str(default if said is None else said).lower()
    if text in ("none", "false", "no", "0", "off"):
        return None
    if "only" in text:
        return {
            "qkv": "qkv" in text,
            "attention_output": "out" in text,
            "mlp": "mlp" in text,
            "norm": "ln" in text or "norm" in text,
        }
    return {
        "qkv": "qkv" not in text and "none" not in text.split("mlp")[0],
        "attention_output": True,
        "mlp": True,
        "norm": "ln" not in text,
    }


def _image(row: Mapping[str, Any], dims: Mapping[str, Any]) -> dict[str, int]:
    """Return image and patch; what does not fill a patch is cut off, as the convolution does."""
    image, patch = _size(dims, "image", 0), _size(dims, "patch", 0)
    tokens = sequence_of(row, dims) or 0
    if not patch and image:
        found = [each for each in DEFAULT_PATCHES if (image // each) ** 2 in (tokens, tokens - 1)]
        found += [each for each in DEFAULT_PATCHES if image % each == 0]
        patch = (found or [DEFAULT_PATCHES[0]])[0]
    patch = patch or DEFAULT_PATCHES[0]
    if not image:
        image = patch * math.isqrt(tokens) if tokens else 224
    return {"image": max(patch, image // patch * patch), "patch": patch}


def sequence_of(row: Mapping[str, Any], dims: Mapping[str, Any]) -> int | None:
    """Return the tokens per sequence that a row states, or None."""
    for value, key in ((find(row, "seq", ROW), "seq"), (find(dims, "tokens", DIMS), "dims.tokens")):
        if value not in (None, 0):
            return whole(value, key)
    return None


def _with_tokens(model: Model, row: Mapping[str, Any], dims: Mapping[str, Any]) -> Model:
    """Return a vit with a class token if that makes its tokens those of the row."""
    if model.family == "vit" and sequence_of(row, dims) == model.patches + 1:
        data = model.to_mapping() | {"pooling": "cls"}
        data.pop("sequence", None)
        return load_model(data)
    return model
