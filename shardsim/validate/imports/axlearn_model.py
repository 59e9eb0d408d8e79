"""The model of an AXLearn trainer config: its causal language models, as options of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shardsim.carried import Keys
from shardsim.errors import FileError, nearest, shown
from shardsim.validate.imports.axlearn_text import listed

# What the table of published experiments does not say.
USUAL: Mapping[str, Any] = {
    "family": "decoder",
    "causal": True,
    "norm": "rmsnorm",
    "positions": "rotary",
    "gated_mlp": True,
    "activation": "silu",
}
_DECODER = "model.decoder"
_STACK = f"{_DECODER}.transformer"
_PIPELINED = "PipelinedTransformerLayer"
_STACKS = ("RepeatedTransformerLayer", "StackedTransformerLayer", _PIPELINED)
_ATTENTION = {"FlashAttention": "flash", "GroupedQueryAttention": "unfused"}
_ATTENTION |= {"MultiheadAttention": "unfused"}
_ACTIVATIONS = {"nn.silu": "silu", "nn.relu": "relu", "nn.gelu": "gelu", "quick_gelu": "gelu"}
_NORMS = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
_INPUTS = ("FusedQKVLinear", "FusedGroupedQKVLinear", "QKVLinear", "GroupedQKVLinear")
_MLP = "TransformerFeedForwardLayer"
_GATINGS = {"Top2Gating": 2, "TopKGating": None, "TopKDropFreeGating": None}


def model_of(values: Keys) -> tuple[dict[str, Any], str, int]:
    """Return options of the model, its attention's kernel, and a pipeline's microbatches."""
    kind = values.get("model.klass", None)
    if kind != "axlearn.common.causal_lm.Model":
        raise FileError(f"model.klass: {shown(kind)} is not read; causal_lm.Model is")
    stack = _klass(values, _STACK, _STACKS)
    dim = values.count(f"{_DECODER}.dim")
    layers = values.count(f"{_STACK}.num_layers")
    layer = f"{_STACK}.layer"
    every = 1
    if _klass(values, layer, ("TransformerLayer", "StackedTransformerLayer")) != "TransformerLayer":
        every = values.count(f"{layer}.num_layers", most=64)
        layers *= every
        layer = f"{layer}.layer[{every - 1}]"
        _same(values, every)
    options, attention = _attention(values, f"{layer}.self_attention", dim)
    options |= _mlp(values, layer, dim, every)
    options |= _norms(values, layer)
    tied = f"{_DECODER}.lm_head.klass" not in values
    microbatches = values.count(f"{_STACK}.num_microbatches") if stack == _PIPELINED else 1
    return (
        {
            "family": "decoder",
            "causal": True,
            "layers": layers,
            "embed": dim,
            "vocab": values.count(f"{_DECODER}.vocab_size"),
            "tied_embeddings": tied,
            **options,
        },
        attention,
        microbatches,
    )


def _klass(values: Keys, key: str, known: tuple[str, ...]) -> str:
    said = values.get(f"{key}.klass", None)
    name = str(said).rpartition(".")[2]
    if name not in known:
        raise FileError(f"{key}.klass: {shown(said)} is not read{nearest(name, known)}")
    return name


def _same(values: Keys, every: int) -> None:
    """Raise `FileError` if layers of a round differ in more than their MLPs."""
    first = f"{_STACK}.layer.layer[0]."
    for number in range(1, every):
        own = f"{_STACK}.layer.layer[{number}]."
        for key, value in values.given.items():
            if key.startswith(first) and ".feed_forward." not in key:
                other = own + key[len(first) :]
                values.read.update((key, other))
                if values.given.get(other, value) != value:
                    raise FileError(f"{other}: layers of a round that differ in attention")


def _attention(values: Keys, key: str, dim: int) -> tuple[dict[str, Any], str]:
    inner = f"{key}.attention"
    kernel = _ATTENTION[_klass(values, inner, tuple(_ATTENTION))]
    heads = values.count(f"{inner}.num_heads")
    width = values.count_or(f"{inner}.hidden_dim", dim)
    if width % heads:
        raise FileError(f"{inner}.num_heads: {width} does not divide by {heads} heads")
    linear = f"{inner}.input_linear"
    rotary = _klass(values, linear, (*_INPUTS, "RoFormerQKVLinear")) == "RoFormerQKVLinear"
    if rotary:
        linear = f"{linear}.input_linear"
        _klass(values, linear, _INPUTS)
    positions = "rotary" if rotary else "none"
    if f"{_DECODER}.emb.pos_emb.klass" in values:
        _klass(values, f"{_DECODER}.emb.pos_emb", ("LearnedPositionalEmbedding",))
        positions = "learned"
    grouped = f"{linear}.num_kv_heads"
    causal, mask = values.get(f"{inner}.causal", True), f"{inner}.mask.sliding_window_size"
    if causal is not True and mask not in values:
        raise FileError(f"{inner}.causal: {shown(causal)} is not modelled")
    normed = f"{inner}.query_scale.norm.klass" in values
    return {
        "heads": heads,
        "head_dim": width // heads,
        "kv_heads": values.count_or(grouped, heads),
        "positions": positions,
        "qk_norm": normed,
        "windows": [values.count(mask)] if mask in values else [],
        "biases": {
            "qkv": _bias(values, f"{linear}.layer.bias"),
            "attention_output": _bias(values, f"{inner}.output_linear.bias"),
            "mlp": False,
            "norm": False,
        },
    }, kernel


def _bias(values: Keys, key: str) -> bool:
    return values.flag(key) if key in values else True  # AXLearn's linear layers have one


def _hidden(values: Keys, key: str, dim: int) -> int:
    """Return the width of a hidden layer: a number, or a multiple of the model's, rounded up."""
    if f"{key}.fn" not in values:
        return values.count(key)
    if not str(values[f"{key}.fn"]).endswith(("scale_fn", "scaled_hidden_dim")):
        raise FileError(f"{key}.fn: {shown(values[f'{key}.fn'])} is not read")
    scale, step = values[f"{key}.scale"], values.count_or(f"{key}.round_up_to_multiples_of", 1)
    if type(scale) not in (int, float) or not 0 < scale <= 1000:
        raise FileError(f"{key}.scale: {shown(scale)}: expected a number up to 1000")
    return int(math.ceil(round(dim * scale) / step) * step)


def _mlp(values: Keys, layer: str, dim: int, every: int) -> dict[str, Any]:
    """Return the MLP, and experts where the last layer of a round has them."""
    key = f"{layer}.feed_forward"
    words = listed(values.given, f"{key}.activation")
    values.read.update(one for one in values.given if one.startswith(f"{key}.activation"))
    words = words if isinstance(words, list) else [words]
    gated = len(words) == 2 and words[1] == "linear"
    if str(words[0]) not in _ACTIVATIONS or len(words) > 2 or (len(words) == 2 and not gated):
        raise FileError(f"{key}.activation: {shown(words)} is not modelled")
    made: dict[str, Any] = {"gated_mlp": gated, "activation": _ACTIVATIONS[str(words[0])]}
    first = f"{layer.rpartition('[')[0]}[0].feed_forward"
    kind = _klass(values, key, (_MLP, "TransformerFeedForwardMoE",
                                "TransformerFeedForwardDropFreeMoE"))  # fmt: skip
    width = _hidden(values, f"{key}.hidden_dim", dim)
    if kind == _MLP:
        if every > 1:
            raise FileError(f"{key}.klass: a round of layers without experts is not read")
        return {**made, "mlp": width}
    gating = f"{key}.gating"
    top = _GATINGS[_klass(values, gating, tuple(_GATINGS))]
    number = "num_experts_per_token" if f"{gating}.num_experts_per_token" in values else "top_k"
    factor = values.get(f"{gating}.train_capacity_factor", 0)
    experts = {
        "number": values.count(f"{key}.num_experts"),
        "top_k": top or values.count(f"{gating}.{number}"),
        "mlp": width,
        "every": every,
        **({"capacity": float(factor)} if isinstance(factor, int | float) and factor > 0 else {}),
    }
    dense = width
    if every > 1:
        dense = _dense(values, first, key, every, dim)
    return {**made, "mlp": dense, "experts": experts}


def _dense(values: Keys, first: str, key: str, every: int, dim: int) -> int:
    """Return the hidden layer of a round's other layers, which are alike."""
    widths: set[int] = set()
    for number in range(every - 1):
        own = first.replace("[0]", f"[{number}]")
        _klass(values, own, (_MLP,))
        widths.add(_hidden(values, f"{own}.hidden_dim", dim))
        for name in ("activation", "structure"):
            if listed(values.given, f"{own}.{name}") != listed(values.given, f"{key}.{name}"):
                raise FileError(f"{own}.{name}: another than of the layer with experts")
            values.read.update(one for one in values.given if one.startswith(f"{own}.{name}"))
    if len(widths) > 1:
        raise FileError(f"{first}.hidden_dim: layers of a round with several widths")
    return widths.pop()


def _norms(values: Keys, layer: str) -> dict[str, Any]:
    """Return the norms: in front of both branches, and behind them in the hybrid structure."""
    kind = _NORMS[_klass(values, f"{_DECODER}.output_norm", tuple(_NORMS))]
    behind = {}
    for part in ("self_attention", "feed_forward"):
        structure = values.get(f"{layer}.{part}.structure", "prenorm")
        if structure not in ("prenorm", "hybridnorm"):
            raise FileError(f"{layer}.{part}.structure: {shown(structure)} is not modelled")
        behind[part] = structure == "hybridnorm"
    if behind["self_attention"] and not behind["feed_forward"]:
        raise FileError(f"{layer}.self_attention.structure: a norm behind attention alone")
    norm = "post_norms" if behind["self_attention"] else "mlp_post_norm"
    return {"norm": kind, **({norm: True} if behind["feed_forward"] else {})}
