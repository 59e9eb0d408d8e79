"""Encoders and decoders of transformers as options of a model: T5 and mT5.

Source: models/t5/modeling_t5.py of the transformers named in `defaults`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsim.carried import Keys
from shardsim.errors import FileError, shown

TOKENS = 512  # of either sequence: positions are relative, so a model takes any number
FARTHEST = 128  # tokens, beyond which all distances are alike
_MLPS: Mapping[str, Mapping[str, Any]] = {
    "relu": {"activation": "relu"},
    "gated-gelu": {"activation": "gelu", "gated_mlp": True},
    "gated-silu": {"activation": "silu", "gated_mlp": True},
}


def t5(keys: Keys) -> dict[str, Any]:
    """Return the options of a decoder that attends to an encoder."""
    mlp = keys["feed_forward_proj"]
    if not isinstance(mlp, str) or mlp not in _MLPS:
        raise FileError(f"feed_forward_proj: {shown(mlp)} is not modelled")
    if keys["relative_attention_max_distance"] != FARTHEST:
        raise FileError(
            f"relative_attention_max_distance: {shown(keys['relative_attention_max_distance'])} is "
            f"not modelled; {FARTHEST} is"
        )
    layers = keys.count("num_layers")
    return {
        "family": "decoder",
        "layers": keys.count_or("num_decoder_layers", layers),
        "embed": keys.count("d_model"),
        "mlp": keys.count("d_ff"),
        "heads": keys.count("num_heads"),
        "head_dim": keys.count("d_kv"),
        "vocab": keys.count("vocab_size"),
        "sequence": TOKENS,
        "causal": True,
        "norm": "rmsnorm",
        "positions": "relative",
        "buckets": keys.count("relative_attention_num_buckets"),
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        **_MLPS[mlp],
        "encoder": {"layers": layers, "sequence": TOKENS, "shared_embeddings": True},
    }


_T5: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": FARTHEST,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
}
_MT5 = {
    **_T5,
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# What a kind of model has where its config says nothing.
ENCODERS: Mapping[str, Mapping[str, Any]] = {"t5": _T5, "mt5": _MT5}
