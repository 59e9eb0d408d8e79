"""What MaxText's base.yml says where a config does not: the keys that make a plan.

Releases differ: 0.2.5 (2026) trains Llama-like models, the repository of 2023 its own parallel
blocks (MaxText/configs/base.yml at commit 76bd53b0f, December 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAME: Mapping[str, Any] = {
    "per_device_batch_size": 12.0,
    "max_target_length": 2048,
    "gradient_accumulation_steps": 1,
    "global_parameter_scale": 1,
    "ici_fsdp_parallelism": -1,
    "remat_policy": "full",
    "base_num_decoder_layers": 16,
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "grad_dtype": "float32",
    "num_vocab_tiling": 1,
    "optimizer_memory_host_offload": False,
    "parameter_memory_host_offload": False,
    "scan_layers": True,
    "opt_type": "adamw",
    "mu_dtype": "",
    "attention": "autoselected",
    "attention_type": "global",
    "model_name": "default",
    "override_model_config": False,
    "quantization": "",
    "context_parallel_load_balance": True,
    "context_parallel_strategy": "all_gather",
    "shard_optimizer_over_data": False,
    "num_pipeline_microbatches": -1,
    "num_pipeline_repeats": -1,
    "num_layers_per_pipeline_stage": 1,
    "sliding_window_size": 0,
    "global_head_dim": 0,
    "global_num_kv_heads": 0,
    "share_kv_projections": False,
    "v_norm_with_scale": True,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_num_dense_layers": 0,
    "routed_score_func": "",
    "use_indexer": False,
    "mhc_expansion_rate": 1,
    "engram_layers": [],
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "base_moe_mlp_dim": -1,
    "shared_experts": 0,
    "interleave_moe_layer_step": 1,
    "capacity_factor": -1.0,
    "use_ring_of_experts": False,
    "routed_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "attention_sink": False,
    "use_qk_norm": False,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
    "trainable_position_size": -1,
    "compile_topology": "",
    "compile_topology_num_slices": -1,
    "mesh_axes": ["data", "fsdp", "context", "tensor"],
    "logical_axis_rules": [["activation_embed", ["tensor"]]],
}
CURRENT: Mapping[str, Any] = {
    **_SAME,
    "decoder_block": "llama2",
    "base_emb_dim": 2048,
    "base_num_query_heads": 16,
    "base_num_kv_heads": 16,
    "base_mlp_dim": 7168,
    "head_dim": 128,
    "mlp_activations": ["silu", "linear"],
    "vocab_size": 32000,
    "logits_via_embedding": False,
}
OF_2023: Mapping[str, Any] = {
    **_SAME,
    "decoder_block": "default",
    "base_emb_dim": 2560,
    "base_num_query_heads": 8,
    "base_mlp_dim": 8192,
    "head_dim": 256,
    "mlp_activations": ["relu"],
    "vocab_size": 32768,
    "logits_via_embedding": True,
    "attention": "flash",
}
# Only there in 2023.
KEYS_OF_2023 = ("base_num_heads", "int8_training", "dataset_path")
KEYS_SINCE = ("decoder_block", "base_num_query_heads", "model_name")
