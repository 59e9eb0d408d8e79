"""MaxText in tables: its blocks, and its names for weights, activations and kept tensors.

From MaxText 0.2.5: `layers/attentions.py`, `layers/linears.py`, `layers/embeddings.py`,
`models/gpt3.py`, `layers/nnx_decoders.py`, `configs/base.yml`.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardsim.emit.dialects.nearest import ALL_BIASES, Block
from shardsim.model import Biases
from shardsim.ops import attend_mask
from shardsim.ops.attend import KERNELS

# What `decoder_block` fixes. "default" is a parallel block on one norm.
_RMS = {
    "family": "decoder",
    "norm": "rmsnorm",
    "biases": Biases(),
    "positions": "rotary",
    "qk_norm": False,
    "post_norms": False,
    "final_norm": True,
}
BLOCKS = (
    Block("llama2", {**_RMS, "parallel_block": False}),
    Block("qwen3", {**_RMS, "parallel_block": False, "qk_norm": True}),
    Block("qwen2", {**_RMS, "parallel_block": False, "biases": Biases(qkv=True)}),
    Block("default", {**_RMS, "parallel_block": True}),
    Block(
        "gpt3",
        {
            **_RMS,
            "parallel_block": False,
            "norm": "layernorm",
            "biases": ALL_BIASES,
            "positions": "learned",
            "kv_heads": 0,  # as many as heads
        },
    ),
)
# Of models with experts in all layers, and nothing beside them.
EXPERT_BLOCKS = (
    Block("mixtral", {**_RMS, "parallel_block": False}),
    Block("qwen3_moe", {**_RMS, "parallel_block": False, "qk_norm": True}),
)
# Options of experts that those blocks can say; others have to be as usual.
EXPERT_OPTIONS = ("number", "top_k", "mlp", "capacity")
# Switches of a block that are off unless a file says so.
SWITCHES: Mapping[str, Mapping[str, bool]] = {
    "qwen3": {"use_qk_norm": True},
    "qwen3_moe": {"use_qk_norm": True, "norm_topk_prob": True},
    "qwen2": {"attention_bias": True},
}
# MaxText trains token decoders only.
ONLY = {"patch": 0, "image": 0, "pooling": "none", "classes": 0}

# Roles of mesh axes that MaxText has an axis for, and the key that sizes it.
AXES: Mapping[str, str] = {role: role for role in ("data", "fsdp", "expert", "context", "tensor")}
SIZE_KEYS: Mapping[str, str] = {name: f"{name}_parallelism" for name in AXES.values()}

_NORMS = ("block_norm", "attention_norm", "mlp_norm", "final_norm")
# Weight -> logical axes, without the stack of layers; where `models/gpt3.py` has others, those.
WEIGHTS: Mapping[str, tuple[str | None, ...]] = {
    "token_embedding": ("vocab", "embed_vocab"),
    "position_embedding": ("vocab", "embed_vocab"),
    **{f"{norm}_{part}": ("norm",) for norm in _NORMS for part in ("scale", "bias")},
    "query": ("embed_attn", "q_heads", "kv"),
    "key": ("embed_attn", "kv_heads", "kv_head_dim"),
    "value": ("embed_attn", "kv_heads", "kv_head_dim"),
    "query_bias": ("heads", "kv"),
    "key_bias": ("heads", "kv"),
    "value_bias": ("heads", "kv"),
    "attention_output": ("heads", "kv", "embed_attn"),
    "attention_output_bias": ("embed_attn",),
    "query_norm_scale": ("norm",),
    "key_norm_scale": ("norm",),
    "mlp_in": ("embed", "mlp"),
    "mlp_gate": ("embed", "mlp"),
    "mlp_in_bias": ("mlp",),
    "mlp_gate_bias": ("mlp",),
    "mlp_out": ("mlp", "embed"),
    "mlp_out_bias": ("embed",),
    "router": ("embed", None),
    "expert_in": ("exp", "embed_moe", "mlp_moe"),
    "expert_gate": ("exp", "embed_moe", "mlp_moe"),
    "expert_out": ("exp", "mlp_moe", "embed_moe"),
    "output_head": ("embed_vocab", "vocab"),
}
OWN_WEIGHTS: Mapping[str, Mapping[str, tuple[str | None, ...]]] = {
    "gpt3": dict.fromkeys(("query", "key", "value"), ("embed_attn", "heads", "kv")),
    "qwen2": {
        "query_bias": ("q_heads", "kv"),
        **dict.fromkeys(("key_bias", "value_bias"), ("kv_heads", "kv_head_dim")),
    },
}

# Kind of activation -> logical axes of [batch, tokens, width] (of heads, for queries and keys).
_TOKENS = "activation_length"
ACTIVATIONS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "residual": (
        ("activation_batch", "activation_norm_length", "activation_embed"),
        ("activation_batch_attn", "activation_input_length_attn", "activation_embed_attn"),
    ),
    "wide": (
        ("activation_batch", _TOKENS, "activation_mlp"),
        ("activation_batch_attn", "activation_length_attn", "activation_heads"),
        ("activation_batch_attn", "activation_q_length", "activation_heads"),
    ),
    "keys": (("activation_kv_batch", "activation_length_attn", "activation_kv_heads"),),
    "logits": (("activation_embed_and_logits_batch", _TOKENS, "activation_vocab"),),
}
# The default block has no axis of its own for the residual's tokens.
DEFAULT_RESIDUAL = ("activation_batch", _TOKENS, "activation_embed")
# models/gpt3.py constrains queries, keys and values alike.
GPT3_HEADS = ("activation_batch", _TOKENS, "activation_heads")

# First to keep their mesh axes: what matmuls compute.
INNER = (
    *("activation_mlp", "activation_heads", "activation_kv_heads", "activation_vocab"),
    *("activation_embed", "activation_embed_attn", "q_heads", "heads", "kv_heads", "mlp", "vocab"),
    *("exp", "mlp_moe"),
)
# Never split by a plan, whatever their default rule.
WHOLE = (
    *("norm", "qkv", "kv", "kv_head_dim", "layers", "activation_kv", "activation_kv_head_dim"),
    "activation_kv_length",
)
# Names that older releases did not tell apart.
OLDER: Mapping[str, str] = {
    "embed_attn": "embed",
    "embed_vocab": "embed",
    "embed_moe": "embed",
    "mlp_moe": "mlp",
    "q_heads": "heads",
    "kv_head_dim": "kv",
    "activation_embed_attn": "activation_embed",
    "activation_batch_attn": "activation_batch",
    "activation_length_attn": "activation_length",
    "activation_q_length": "activation_length",
    "activation_input_length_attn": "activation_norm_length",
}

# Tensor of a layer -> MaxText's names in a custom remat policy; gated MLPs have two inputs.
REMAT: Mapping[str, tuple[str, ...]] = {
    "qkv": ("query_proj", "key_proj", "value_proj"),
    "context": ("context",),
    "attention_output": ("out_proj",),
    "mlp_hidden": ("mlpwi",),
    "mlp_output": ("mlpwo",),
    "layer_input": ("decoder_layer_input",),
    "statistics": (),  # has no name there
}
GATED_HIDDEN = ("mlpwi_0", "mlpwi_1")
# Without a flash kernel, which names its result "context" itself (layers/attentions.py only).
UNFUSED_CONTEXT: Mapping[str, tuple[str, ...]] = {
    name: ("attention_out",)
    for name in ("llama2", "qwen2", "qwen3", "default", "mixtral", "qwen3_moe")
}

# Why MaxText does not attend over a context axis in other ways than by gathering keys.
NO_KEYS: Mapping[str, str] = {
    "ring": "MaxText passes keys round on GPUs only (context_parallel_strategy); use gathered",
    "ulysses": "MaxText gathers keys and does not exchange heads for tokens; use gathered",
}

# Optimizers that MaxText has, with the keys that choose them.
OPTIMIZERS: Mapping[str, Mapping[str, str]] = {
    "adamw": {"opt_type": "adamw"},
    "adamw-bf16-mu": {"opt_type": "adamw", "mu_dtype": "bfloat16"},
    "sgd": {"opt_type": "sgd"},
}
DTYPES: Mapping[str, str] = {"f32": "float32", "bf16": "bfloat16"}

# Path in MaxText's state, after `model/` or a moment's -> weight. The first that fits the block.
_LLAMA_NORMS = {
    "pre_self_attention_layer_norm": "attention_norm",
    "post_self_attention_layer_norm": "mlp_norm",
}
_HEAD_NORMS = {f"self_attention/{part}_norm": f"{part}_norm" for part in ("query", "key")}
_NORM_PATHS: Mapping[str, Mapping[str, str]] = {
    "llama2": _LLAMA_NORMS,
    "qwen2": _LLAMA_NORMS,
    "qwen3": _LLAMA_NORMS | _HEAD_NORMS,
    "mixtral": _LLAMA_NORMS,
    "qwen3_moe": _LLAMA_NORMS | _HEAD_NORMS,
    "default": {"pre_self_attention_norm": "block_norm"},
    "gpt3": {"pre_self_attention_norm": "attention_norm", "mlp/mlp_layer_norm": "mlp_norm"},
}
_LINEAR_PATHS: Mapping[str, str] = {
    "self_attention/query": "query",
    "self_attention/key": "key",
    "self_attention/value": "value",
    "self_attention/out": "attention_output",
    "mlp/wi": "mlp_in",
    "mlp/wi_0": "mlp_gate",
    "mlp/wi_1": "mlp_in",
    "mlp/wo": "mlp_out",
}
# Where a block has its experts.
_EXPERT_PATHS: Mapping[str, str] = {"mixtral": "MoeBlock_0", "qwen3_moe": "moe_block"}


def state_paths(block: str) -> dict[str, str]:
    """Return the weight at each path of MaxText's state, for one kind of block."""
    paths = {
        "token_embedder/embedding": "token_embedding",
        "decoder/position_embedder/embedding": "position_embedding",
        "decoder/logits_dense/kernel": "output_head",
    }
    for part in ("scale", "bias"):
        paths[f"decoder/decoder_norm/{part}"] = f"final_norm_{part}"
        for path, norm in _NORM_PATHS[block].items():
            paths[f"decoder/layers/{path}/{part}"] = f"{norm}_{part}"
    for path, weight in _LINEAR_PATHS.items():
        paths[f"decoder/layers/{path}/kernel"] = weight
        paths[f"decoder/layers/{path}/bias"] = f"{weight}_bias"
    if block in _EXPERT_PATHS:
        at = f"decoder/layers/{_EXPERT_PATHS[block]}"
        paths[f"{at}/gate/kernel"] = "router"
        for path, part in (("wi_0", "gate"), ("wi_1", "in"), ("wo", "out")):
            paths[f"{at}/{path}"] = f"expert_{part}"
    return paths


def blocks_of(kernel: str) -> dict[str, int]:
    """Return the keys of a fused kernel's blocks, where they are not MaxText's own (512).

    >>> blocks_of("flash"), blocks_of("flash-2048")["sa_block_q_dkv"]
    ({}, 2048)
    """
    fused = KERNELS.get(kernel)
    if fused is None or fused.blocks == attend_mask.BLOCKS:
        return {}
    forward, back = fused.blocks
    return {
        **dict.fromkeys(("sa_block_q", "sa_block_kv", "sa_block_kv_compute"), forward),
        **dict.fromkeys(("sa_block_q_dkv", "sa_block_kv_dkv", "sa_block_kv_dkv_compute"), back),
        **dict.fromkeys(("sa_block_q_dq", "sa_block_kv_dq"), back),
    }
