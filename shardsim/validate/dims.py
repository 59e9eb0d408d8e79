"""The model of a row in prose: a preset that its dims agree with, or one made of its dims."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardsim.errors import FileError, ModelError
from shardsim.model import Model, load_model
from shardsim.model.flops import forward_matmul_flops_per_token
from shardsim.validate.words import number, shown, whole

_UNMODELLED = {
    "experts": "mixtures of experts are",
    "num_experts": "mixtures of experts are",
    "window": "attention in a window, but of a size and in all but one of so many layers, is",
    "enc_dec": "an encoder with a decoder that is no preset is",
    "enc_layers": "an encoder with a decoder that is no preset is",
    "cross_attention": "cross-attention of what is no preset is",
}
# Of keys that are not read these, by their names, would make another model or run of it.
UNMODELLED_KEYS = (
    r"mtp|window|sliding|local|cross|^enc|^dec_|encoder|decoder_l|lora|adapter|frozen|freeze"
    r"|expert|moe|linear_att|ssm|mamba|conv|recurren|retriev|share|memory_tok|sparse|dropout|attention_type|mixer"
)
_PRINTED = "gflop_per_image_as_printed"
# What other collections call the keys of `_DIMS`.
_ALIASES = {
    **dict.fromkeys(("n_layers", "num_layers"), "layers"),
    **dict.fromkeys(("hidden_size", "embed_dim", "emb_dim"), "d_model"),
    **dict.fromkeys(("n_heads", "num_heads"), "heads"),
    **dict.fromkeys(("n_kv_heads", "num_kv_heads"), "kv_heads"),
    **dict.fromkeys(("mlp_dim", "intermediate_size"), "d_ff"),
    "head_dim": "d_head",
    "vocab_size": "vocab",
}
# What a preset must agree in, with the row's key for it.
_DIMS = {
    "layers": "layers",
    "embed": "d_model",
    "mlp": "d_ff",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "head_dim": "d_head",
    "vocab": "vocab",
    "image": "image",
    "patch": "patch",
}
# Keys of experts, by the row's keys for them inside `moe`; others of a row say nothing of a model.
_EXPERTS = {
    "number": ("experts", "num_experts"),
    "top_k": ("top_k",),
    "mlp": ("d_ff_expert",),
    "shared": ("shared",),
    "shared_mlp": ("d_ff_shared",),
    "dense_layers": ("dense_layers", "first_dense"),
    "every": ("every",),
    "group": ("group",),
}
_LATENT = {"queries": "q_lora", "keys": "kv_lora", "rotary": "rope", "values": "v"}
_EIGHT_THIRDS = 256  # what an MLP of 8/3 of the width is a multiple of (LLaMA's code)
_GATED = ("llama", "fuji", "mistral", "gemma", "qwen", "palm", "olmo")


def _dims(row: Mapping[str, Any]) -> Mapping[str, Any]:
    dims = row.get("dims") or {}
    if not isinstance(dims, Mapping):
        raise FileError(f"dims: expected a mapping of keys, found {shown(dims)}")
    has = _of_preset(_preset(row))
    for key, value in dims.items():
        if key in has:
            continue
        if key in _UNMODELLED and (value is True or value not in (None, False, 0, 1)):
            raise FileError(f"dims.{key}: {_UNMODELLED[key]} not modelled")
    found: dict[str, Any] = {}
    for key, value in dims.items():
        name = _ALIASES.get(str(key), str(key))
        if value is not None and name in found:
            raise FileError(f"dims: '{key}' and '{name}' are one")
        if value is not None:
            found[name] = value
    if isinstance(size := found.pop("sliding_window", found.get("window")), int | str) and size:
        found["window"] = {"size": size}
    return found


def _preset(row: Mapping[str, Any]) -> Model | None:
    """Return the preset that a row names, or None."""
    try:
        return load_model(str(row.get("model") or "model").strip())
    except ModelError:
        return None


def _of_preset(preset: Model | None) -> set[str]:
    """Return keys of `dims` of which a preset may be a model."""
    return {"window"} | ({"cross_attention"} if preset and preset.prompt else set())


def _plain_window(value: Any) -> bool:
    """Return whether a window says its size, and at most how often a layer has none."""
    return isinstance(value, Mapping) and {"size"} <= set(value) <= {"size", "global_every"}


def _windows(dims: Mapping[str, Any], layers: int) -> dict[str, list[int]]:
    """Return the windows of a round of layers, of which the last one has none; of all `layers`
    where these are no whole rounds."""
    if not (window := dims.get("window")):
        return {}
    size = whole(window["size"], "dims.window.size")
    every = window.get("global_every")
    if every is None:
        return {"windows": [size]}
    one = [size] * (whole(every, "dims.window.global_every") - 1) + [0]
    many = -(-layers // len(one))
    return {"windows": one if layers % len(one) == 0 else (one * many)[:layers]}


def _experts(dims: Mapping[str, Any], layers: int) -> dict[str, Any] | None:
    """Return what a row says of its experts, or None of a model without."""
    said = dims.get("moe")
    if said is not True and said in (None, False, 0, 1):
        return None
    if not isinstance(said, Mapping):
        raise FileError(f"dims.moe: expected a mapping of keys, found {shown(said)}")
    if said.get("kind") == "soft":
        return _soft(said, layers)
    if said.get("kind") not in (None, "sparse", "token choice"):
        raise FileError(f"dims.moe.kind: {shown(said['kind'])} experts are not modelled")
    found: dict[str, Any] = {}
    for key, words in _EXPERTS.items():
        for word in words:
            if said.get(word):
                found[key] = whole(said[word], f"dims.moe.{word}")
    for key, word in (("number", "experts"), ("top_k", "top_k"), ("mlp", "d_ff_expert")):
        if key not in found:
            raise FileError(f"dims.moe: missing key '{word}'")
    if said.get("moe_layers") and "dense_layers" not in found and "every" not in found:
        found["dense_layers"] = max(0, layers - whole(said["moe_layers"], "dims.moe.moe_layers"))
    if said.get("capacity"):
        found["capacity"] = number(said["capacity"], "dims.moe.capacity")
    if "sigmoid" in str(said.get("router", "")).lower():
        found["router"] = "sigmoid"
    return found


def _soft(said: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return soft experts: every slot is a mean of all tokens; in the last layers, or in all."""
    words = {"number": "experts", "soft_slots": "slots_per_expert", "mlp": "d_ff_expert"}
    for word in words.values():
        if not said.get(word):
            raise FileError(f"dims.moe: missing key '{word}'")
    found = {key: whole(said[word], f"dims.moe.{word}") for key, word in words.items()}
    where = said.get("layers", layers)
    having = layers // 2 if where == "last half" else whole(where, "dims.moe.layers")
    return found | {"top_k": 1, "dense_layers": max(0, layers - having)}


def with_printed_slots(model: Model, row: Mapping[str, Any], notes: list[str]) -> Model:
    """Return soft experts with as many slots each as make the GFLOP an image that a row's source
    printed, where that is fewer than the row says.

    A table of models has GFLOP; how many slots were chosen for them is often derived. A figure
    stands for the number of slots whose products come nearest, within half of what one slot more
    takes; one further away counts something else, and says nothing of slots.
    """
    experts, said = model.experts, row.get("measured")
    printed = said.get(_PRINTED) if isinstance(said, Mapping) else None
    if experts is None or not experts.soft_slots or not printed:
        return model
    wanted = number(printed, f"measured.{_PRINTED}")

    def gflop(slots: int) -> float:
        other = replace(model, experts=replace(experts, soft_slots=slots))
        tokens = other.sequence
        return forward_matmul_flops_per_token(other, tokens) * tokens / 1e9

    best = min(range(1, experts.soft_slots + 1), key=lambda slots: abs(gflop(slots) - wanted))
    if abs(gflop(best) - wanted) > (gflop(best + 1) - gflop(best)) / 2.0:
        return model
    if best == experts.soft_slots:
        return model
    notes.append(
        f"dims.moe: slots_per_expert: {best}, not {experts.soft_slots}, makes the {wanted:g} "
        "GFLOP an image that were printed"
    )
    return replace(model, experts=replace(experts, soft_slots=best))


def _alike(experts: Mapping[str, Any], preset: Model, said: Mapping[str, Any]) -> bool:
    """Return whether a preset has the experts that a row says, and those that all tokens go to and
    the layers without, if the row says them."""
    has = preset.experts
    if has is None:
        return False
    same = {"soft_slots": 0, **experts}
    if any(same[key] != getattr(has, key) for key in ("number", "top_k", "mlp", "soft_slots")):
        return False
    shared = experts.get("shared", 0) * experts.get("shared_mlp", experts["mlp"])
    if said.get("shared") is not None and shared != has.shared_width + has.beside * preset.mlp:
        return False
    plain = not {"dense_layers", "every"} & {*experts}
    layers = {key: experts.get(key, least) for key, least in (("dense_layers", 0), ("every", 1))}
    return plain or layers == {key: getattr(has, key) for key in layers}


def _routed(preset: Model, experts: Mapping[str, Any]) -> Model:
    """Return a preset with the capacity of a row: what a run chooses, not the model."""
    assert preset.experts is not None
    capacity = float(experts.get("capacity", 0.0))
    return replace(preset, experts=replace(preset.experts, capacity=capacity))


def _latent(dims: Mapping[str, Any]) -> dict[str, Any]:
    """Return the latents of attention that a row says, and the width of a head."""
    said = dims.get("mla")
    if said in (None, False, 0):
        return {}
    if not isinstance(said, Mapping):
        raise FileError(f"dims.mla: expected a mapping of keys, found {shown(said)}")
    for word in ("kv_lora", "rope", "nope", "v"):
        if not said.get(word):
            raise FileError(f"dims.mla: missing key '{word}'")
    latent = {
        key: whole(said[word], f"dims.mla.{word}")
        for key, word in _LATENT.items()
        if said.get(word)
    }
    return {"latent": latent, "head_dim": whole(said["nope"], "dims.mla.nope") + latent["rotary"]}


def sequence_of(row: Mapping[str, Any]) -> int | None:
    """Return the tokens per sequence that a row states, or None."""
    said = row.get("seq") or _dims(row).get("tokens")
    if thousands := re.fullmatch(r"(\d+) ?k(\b.*)?", str(said).lower()):
        return int(thousands[1]) * 1024  # of tokens "8k" are 8,192
    return whole(said, "seq") if said else None


def model_of(row: Mapping[str, Any], notes: list[str]) -> Model:
    """Return the preset that the row names if its dims agree, else a model made of its dims."""
    dims, name = {**_dims(row)}, str(row.get("model") or "model")
    if re.search(r"\b8 ?/ ?3\b", str(dims.get("d_ff"))):
        dims["d_ff"] = _EIGHT_THIRDS * math.ceil(
            whole(dims.get("d_model"), "dims.d_model") * 8 / 3 / _EIGHT_THIRDS
        )
        notes.append(
            f"dims: d_ff: 8/3 of d_model, as a multiple of {_EIGHT_THIRDS}: {dims['d_ff']:,}"
        )
    if isinstance(window := dims.get("window"), Mapping) and "chunk" in window:
        if whole(window["chunk"], "dims.window.chunk") >= (sequence_of(row) or math.inf):
            del dims["window"]  # a chunk is the whole sequence
    unread = set(dims) - {
        *_DIMS.values(),
        "glu",
        "tied",
        "parallel_block",
        "bias",
        "qk_norm",
        "window",
        "moe",
        "mla",
    }
    unread -= {"tokens", "params_published", "note", "causal"} | _of_preset(_preset(row))
    for key in sorted(unread):
        if re.search(UNMODELLED_KEYS, key.lower()) and dims[key] not in (False, 0, "none"):
            raise FileError(f"dims.{key}: not modelled")
    if unread:
        notes.append(f"dims: not read: {', '.join(sorted(unread))}")
    given = {key: said for key, said in _DIMS.items() if dims.get(said)}
    sizes = {key: whole(dims[said], f"dims.{said}") for key, said in given.items()}
    preset = _preset(row)
    same = preset is not None and all(getattr(preset, key) == size for key, size in sizes.items())
    layers = sizes.get("layers") or (preset.layers if preset else 0)
    plain = _plain_window(dims.get("window"))
    windows = _windows(dims, layers).get("windows") if plain else None
    experts = _experts(dims, sizes.get("layers", 0))
    known = _plain_window(dims.get("window") or {"size": 0}) or (preset and preset.windows)
    if preset is not None and same and known and windows in (None, list(preset.windows)):
        if experts is None and (preset.experts is None or "moe" not in dims):
            return _with_tokens(preset, row)
        if experts is not None and _alike(experts, preset, dims["moe"]):
            return _routed(preset, experts)
    if dims.get("window") and not _plain_window(dims["window"]):
        raise FileError(f"dims.window: {_UNMODELLED['window']} not modelled")
    if not dims:
        raise FileError("missing key 'dims', and 'model' is no preset's name")
    for key in ("layers", "embed", "heads"):
        if key not in sizes:
            raise FileError(f"dims: missing key '{_DIMS[key]}'")
    gated = [bool(dims["glu"])] if "glu" in dims else [False, True]
    if len(gated) > 1 and "params_published" not in dims:
        gated = [any(word in name.lower() for word in _GATED)]
    choices = [_with_tokens(_made(row, dims, sizes, name, each), row) for each in gated]
    if len(choices) == 1:
        return choices[0]
    wanted = number(dims["params_published"], "dims.params_published")
    return min(choices, key=lambda model: abs(model.parameters_all - wanted))


def _made(
    row: Mapping[str, Any], dims: Mapping[str, Any], sizes: dict[str, int], name: str, gated: bool
) -> Model:
    vision = "image" in sizes or "patch" in sizes
    if "vocab" not in sizes and re.match(r"vit\b|vit[-_\d]", name.lower()):
        vision = True
    parallel = bool(dims.get("parallel_block"))
    embed, heads = sizes["embed"], sizes["heads"]
    biases = _biases(str(dims.get("bias", "none" if gated or parallel else "all")).lower())
    defaults = {"mlp": 4 * embed, "kv_heads": heads, "head_dim": max(1, embed // heads)}
    data: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._+-]", "-", name).strip("-._+")[:80] or "model",
        "family": "vit" if vision else "decoder",
        **defaults,
        **sizes,
        "gated_mlp": gated,
        "activation": "silu" if gated else "gelu",
        "parallel_block": parallel,
        "qk_norm": bool(dims.get("qk_norm")),
        "causal": bool(dims.get("causal", not vision and "bert" not in name.lower())),
    }
    if biases:
        data["biases"] = biases
    data |= _windows(dims, sizes["layers"]) | _latent(dims)
    if experts := _experts(dims, sizes["layers"]):
        data["experts"] = experts
    if vision:
        data.pop("vocab", None)
        return load_model(data | _image(sizes, sequence_of(row) or 0))
    data = {"vocab": 32768} | data
    data |= {
        "tied_embeddings": bool(dims.get("tied")),
        "positions": "none" if data["head_dim"] % 2 else "rotary",
        "sequence": sequence_of(row) or 2048,
    }
    if gated and not (biases and biases["norm"]):
        data["norm"] = "rmsnorm"
    return load_model(data)


def _biases(text: str) -> dict[str, bool] | None:
    """Return which maps have biases by a row's words: all, none, "qkv only", "qkv none"."""
    if text in ("none", "false"):
        return None
    if "only" in text:
        words = {"qkv": "qkv", "attention_output": "out", "mlp": "mlp"}
        found = {key: word in text for key, word in words.items()}
        return found | {"norm": "ln" in text or "norm" in text}
    qkv = "qkv" not in text and "none" not in text.split("mlp")[0]
    return {"qkv": qkv, "attention_output": True, "mlp": True, "norm": "ln" not in text}


def _image(sizes: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Return image and patch; what does not fill a patch is cut off, as the convolution does."""
    patch = sizes.get("patch", 14)
    image = sizes.get("image", patch * math.isqrt(tokens) if tokens else 224)
    return {"image": max(patch, image // patch * patch), "patch": patch}


def _with_tokens(model: Model, row: Mapping[str, Any]) -> Model:
    """Return a vit with a class token if that makes its tokens those of the row."""
    if model.family == "vit" and sequence_of(row) == model.patches + 1:
        data = model.to_mapping() | {"pooling": "cls"}
        data.pop("sequence", None)
        return load_model(data)
    return model
