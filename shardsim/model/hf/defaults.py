"""What a `config.json` means where a key is missing: transformers' defaults, by model_type.

From the configuration classes of transformers 4.57.6 (models/*/configuration_*.py), the last
release of the series that most published files were written with. Only keys that decide what a
model is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERSION = "transformers 4.57.6"


def _decoder(sizes: tuple[int | None, ...], tokens: int, **more: Any) -> dict[str, Any]:
    return {
        **dict(zip(_SIZES, sizes, strict=True)),
        "head_dim": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": tokens,
        **more,
    }


# What sizes of decoders are, in this order.
_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)
_ROW: dict[str, Any] = {"attention_bias": False}
_QWEN_WINDOW: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LAYERED: dict[str, Any] = {"layer_types": None, **_QWEN_WINDOW}
_GEMMA: dict[str, Any] = {
    **_ROW,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_TOWER: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_channels": 3,
    "patch_size": 16,
}
_VIT: dict[str, Any] = {**_TOWER, "image_size": 224}
_LATENT: dict[str, Any] = {
    **_ROW,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _decoder((32, 4096, 11008, 32, None, 32000), 2048, **_ROW, mlp_bias=False),
    "mistral": _decoder((32, 4096, 14336, 32, 8, 32000), 131072, sliding_window=4096),
    "mixtral": _decoder(
        (32, 4096, 14336, 32, 8, 32000),
        131072,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen2": _decoder((32, 4096, 22016, 32, 32, 151936), 32768, **_LAYERED),
    "qwen3": _decoder(
        (32, 4096, 22016, 32, 32, 151936), 32768, **_LAYERED | _ROW | {"head_dim": 128}
    ),
    "qwen2_moe": _decoder(
        (24, 2048, 5632, 16, 16, 151936),
        32768,
        **_QWEN_EXPERTS | _QWEN_WINDOW,
        **{"qkv_bias": True, "shared_expert_intermediate_size": 5632},
    )
    | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
    "qwen3_moe": _decoder(
        (24, 2048, 6144, 32, 4, 151936), 32768, **_QWEN_EXPERTS | _QWEN_WINDOW | _ROW
    ),
    "qwen3_next": _decoder(
        (48, 2048, 5632, 16, 2, 151936),
        32768,
        **_QWEN_EXPERTS | _ROW | {"head_dim": 256, "layer_types": None},
        **{"full_attention_interval": 4, "shared_expert_intermediate_size": 512},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),
        **{"linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25},
    )
    | {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512},
    "gemma": _decoder((28, 3072, 24576, 16, 16, 256000), 8192, **_GEMMA)
    | {"hidden_activation": None},
    "gemma2": _decoder(
        (26, 2304, 9216, 8, 4, 256000), 8192, **_GEMMA, sliding_window=4096, layer_types=None
    ),
    "gemma3_text": _decoder(
        (26, 2304, 9216, 8, 4, 262208),
        131072,
        **_GEMMA,
        sliding_window=4096,
        layer_types=None,
        sliding_window_pattern=6,
        use_bidirectional_attention=False,
    ),
    # transformers of 2026; src/transformers/models/gemma4/configuration_gemma4.py
    "gemma4_text": _decoder(
        (30, 2304, 9216, 8, 4, 262144),
        131072,
        **_GEMMA,
        sliding_window=512,
        layer_types=None,
        use_bidirectional_attention=None,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        attention_k_eq_v=False,
        global_head_dim=512,
        num_global_key_value_heads=None,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        enable_moe_block=False,
        num_experts=None,
        top_k_experts=None,
        moe_intermediate_size=None,
    ),
    "gpt_oss": _decoder(
        (36, 2880, 2880, 64, 8, 201088),
        131072,
        **{"attention_bias": True, "head_dim": 64},
        num_local_experts=128,
        num_experts_per_tok=4,
        sliding_window=128,
        layer_types=None,
    ),
    "llama4_text": _decoder(
        (48, 5120, 8192, 40, 8, 202048),
        131072,
        **_ROW | {"head_dim": 128},
        intermediate_size_mlp=16384,
        num_local_experts=16,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        moe_layers=None,
    ),
    "deepseek_v2": _decoder(
        (32, 4096, 11008, 32, 32, 32000),
        2048,
        **_LATENT | {"n_routed_experts": 64, "n_shared_experts": 2},
        num_experts_per_tok=None,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
    ),
    "deepseek_v3": _decoder(
        (61, 7168, 18432, 128, 128, 129280),
        4096,
        **_LATENT | {"n_routed_experts": 256, "n_shared_experts": 1},
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
    ),
    "olmo2": _decoder((32, 4096, 11008, 32, None, 50304), 2048, **_ROW),
    "olmo3": _decoder(
        (32, 4096, 11008, 32, None, 50304), 2048, **_ROW, sliding_window=4096, layer_types=None
    ),
    "phi": _decoder(
        (24, 2048, 8192, 32, None, 51200), 2048, **{"hidden_act": "gelu_new", "qk_layernorm": False}
    ),
    "phi3": _decoder((32, 3072, 8192, 32, None, 32064), 4096, sliding_window=None),
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "add_cross_attention": False,
    },
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "vit": {**_VIT, "hidden_act": "gelu", "qkv_bias": True, "pooler_output_size": None},
    "dinov2": {
        **_VIT,
        "patch_size": 14,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
    },
    "dinov2_with_registers": {
        **_VIT,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "num_register_tokens": 4,
    },
    "clip_vision_model": {**_VIT, "patch_size": 32, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {**_VIT, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True},
    "siglip2_vision_model": {
        **_TOWER,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": True,
        "num_patches": 256,
    },
}
_INDEX = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
DEFAULTS = {
    **DEFAULTS,
    "kimi_k2": DEFAULTS["deepseek_v3"],
    "deepseek_v32": {**DEFAULTS["deepseek_v3"], **_INDEX},
}
# Other names of keys that transformers takes as the same (`attribute_map`).
SAME_KEYS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "mixtral": {"num_experts": "num_local_experts"},
}
