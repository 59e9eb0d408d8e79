"""big_vision in tables: its ViT, and the names and dimensions of its parameters.

From big_vision (2025-05): `models/vit.py`, `sharding.py`, `optax.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardsim.emit.dialects.nearest import ALL_BIASES, Block
from shardsim.plan.remat import POLICIES

VIT = (
    Block(
        "vit",
        {
            "parallel_block": False,
            "gated_mlp": False,
            "activation": "gelu",
            "causal": False,
            "qk_norm": False,
            "norm": "layernorm",
            "post_norms": False,
            "final_norm": True,
            "biases": ALL_BIASES,
            "kv_heads": 0,  # as many as heads
        },
    ),
)
POOLINGS: Mapping[str, str] = {"mean": "gap", "map": "map", "cls": "tok", "none": "none"}
POSITIONS: Mapping[str, str] = {"learned": "learn", "fixed": "sincos2d"}
DTYPES: Mapping[str, str] = {"f32": "float32", "bf16": "bfloat16"}

# Tensors kept -> names in jax.checkpoint_policies. A dot with batch dimensions is attention's.
REMAT: Mapping[frozenset[str], str] = {
    frozenset(): "nothing_saveable",
    frozenset(
        {"qkv", "attention_output", "mlp_hidden", "mlp_output"}
    ): "dots_with_no_batch_dims_saveable",
    POLICIES["none"]: "everything_saveable",
}
# Optimizer -> config.optax_name and config.optax.
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "adamw": ("scale_by_adam", {}),
    "adamw-bf16-mu": ("scale_by_adam", {"mu_dtype": "bfloat16"}),
    "adafactor": ("big_vision.scale_by_adafactor", {}),
    "momentum": ("big_vision.momentum_hp", {"dtype": "float32"}),
    "sgd": ("big_vision.sgd", {}),
}

_BLOCK = "Transformer/encoderblock"
_ATTENTION = "MultiHeadDotProductAttention_0"


def _attention(ours: str, theirs: str) -> dict[str, str]:
    weights = {
        "query": "query/kernel",
        "key": "key/kernel",
        "value": "value/kernel",
        "query_bias": "query/bias",
        "key_bias": "key/bias",
        "value_bias": "value/bias",
        "attention_output": "out/kernel",
        "attention_output_bias": "out/bias",
    }
    return {f"{ours}{name}": f"{theirs}/{_ATTENTION}/{path}" for name, path in weights.items()}


def _mlp(ours: str, theirs: str) -> dict[str, str]:
    weights = {
        "mlp_in": "Dense_0/kernel",
        "mlp_in_bias": "Dense_0/bias",
        "mlp_out": "Dense_1/kernel",
        "mlp_out_bias": "Dense_1/bias",
    }
    return {f"{ours}{name}": f"{theirs}/MlpBlock_0/{path}" for name, path in weights.items()}


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}_{part}": f"{theirs}/{part}" for part in ("scale", "bias")}


# Weight -> path of the parameter, with layers scanned.
PATHS: Mapping[str, str] = {
    "patch_embedding": "embedding/kernel",
    "patch_embedding_bias": "embedding/bias",
    "position_embedding": "pos_embedding",
    "cls_token": "cls",
    **_norm("attention_norm", f"{_BLOCK}/LayerNorm_0"),
    **_norm("mlp_norm", f"{_BLOCK}/LayerNorm_1"),
    **_attention("", _BLOCK),
    **_mlp("", _BLOCK),
    **_norm("final_norm", "Transformer/encoder_norm"),
    "pooling_probe": "MAPHead_0/probe",
    **_attention("pooling_", "MAPHead_0"),
    **_norm("pooling_norm", "MAPHead_0/LayerNorm_0"),
    **_mlp("pooling_", "MAPHead_0"),
    "classifier": "head/kernel",
    "classifier_bias": "head/bias",
}
# Dimensions that a parameter has before ours: of a convolution, of a batch of one.
MORE_DIMENSIONS: Mapping[str, int] = {
    "patch_embedding": 2,
    "position_embedding": 1,
    "cls_token": 2,
    "pooling_probe": 2,
}
# One pattern for weights that lie alike; every other weight is replicated.
PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *(
        (f".*/{where}.*/{pattern}", tuple(f"{ours}{name}" for name in names))
        for where, ours in ((f"{_BLOCK}/", ""), ("MAPHead_0/", "pooling_"))
        for pattern, names in (
            ("(query|key|value)/kernel", ("query", "key", "value")),
            ("(query|key|value)/bias", ("query_bias", "key_bias", "value_bias")),
            ("out/kernel", ("attention_output",)),
            ("Dense_0/kernel", ("mlp_in",)),
            ("Dense_0/bias", ("mlp_in_bias",)),
            ("Dense_1/kernel", ("mlp_out",)),
        )
    ),
    (".*/pos_embedding", ("position_embedding",)),
    (".*/head/kernel", ("classifier",)),
)
# Adafactor's second moments have other dimensions than their parameters: the fields v_row, v_col
# and v of the first transformation in `scale_by_adafactor`, by number.
FACTORED = "opt/[0-9]+/0/0/[123]/.*"

# The only logical axes of activations; the MLP's hidden layer has those of the residual stream.
ACTIVATIONS: Mapping[str, tuple[str, str, str]] = {
    "residual": ("act_batch", "act_len", "act_emb"),
    "wide": ("act_batch", "act_len", "act_emb"),
}
INNER = ("act_emb",)
# Weights that stay whole whatever the plan says, and why.
WHOLE: Mapping[str, str] = {
    "patch_embedding": "no activation before the first block is constrained, and a split kernel "
    "made the compiler gather the batch there (38 GB of temporaries for ViT-22B)",
}
