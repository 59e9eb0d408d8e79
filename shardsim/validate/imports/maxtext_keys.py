"""MaxText's keys that are in no plan: why, and whether they could change time or HBM.

Names and usual values: AI-Hypercomputer/maxtext@e591f30cb, src/maxtext/configs/base.yml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardsim.carried import BOTH, HBM, TIME, Keys, NotCarried, Reason

_OFF = (False, None, "", 0)

# Keys that could change a step, with the value at which they do not.
MATTERS: Mapping[str, Reason] = {
    "scan_layers": Reason(
        "layers that are no loop hold gradients of many at once: half as much again",
        (HBM,),
        (True,),
    ),
    "matmul_precision": Reason(
        "float32 products of several passes are not modelled", (TIME,), ("default",)
    ),
    "use_dpo": Reason("a second model, and pairs of answers, are not modelled", BOTH, _OFF),
    "use_multimodal": Reason("the encoder of images is not in the plan", BOTH, _OFF),
    "use_audio": Reason("the encoder of sound is not in the plan", BOTH, _OFF),
    "dropout_rate": Reason("dropout is not modelled", BOTH, (0, 0.0)),
    "trainable_parameters_mask": Reason("all parameters are taken to train", BOTH, ([],)),
    "mtp_num_layers": Reason("layers that predict further tokens are not modelled", BOTH, (0,)),
    "custom_mesh_and_rule": Reason(
        "a file of MaxText's own with other rules; the plan has the sizes with base.yml's rules",
        BOTH,
        ("",),
    ),
    "custom_mesh": Reason("another order of devices is not modelled", (TIME,), ("",)),
    "logical_axis_rules": Reason(
        "read for how the residual stream lies; the rest is taken to lie as in base.yml", BOTH
    ),
    "compile_xla_flags": Reason("each of its options is read, or listed by itself"),
    "enable_rampup_batch_size": Reason("a batch that grows is not modelled", BOTH, _OFF),
    "enable_diloco": Reason("replicas that seldom meet are not modelled", BOTH, _OFF),
    "use_iota_embed": Reason("a look-up by a product is priced as a look-up", (TIME,), _OFF),
    "fused_qkv": Reason(
        "one product for queries, keys and values is priced as three", (TIME,), _OFF
    ),
    "fused_mlp": Reason("one product for gate and value is priced as two", (TIME,), _OFF),
    "attn_logits_soft_cap": Reason(
        "a few operations an element, which a model does not have", (TIME,), (0, 0.0, None)
    ),
    "final_logits_soft_cap": Reason(
        "a few operations an element, which a model does not have", (TIME,), (0, 0.0, None)
    ),
    "mlp_activations_limit": Reason(
        "a few operations an element, which a model does not have", (TIME,), (-1, -1.0)
    ),
    "use_qk_clip": Reason("logits of attention are not clipped here", (TIME,), _OFF),
    "moba": Reason("attention to chosen blocks is not modelled", BOTH, _OFF),
    "use_indexer": Reason("the model sees all tokens here, not chosen ones", BOTH, _OFF),
    "engram_layers": Reason("memories of n-grams are not modelled", BOTH, ([],)),
    "mhc_expansion_rate": Reason("several residual streams are not modelled", BOTH, (1,)),
    "hidden_size_per_layer_input": Reason("embeddings of each layer are not modelled", BOTH, (0,)),
    "num_kv_shared_layers": Reason("layers that share keys are not modelled", BOTH, (0,)),
    "share_kv_projections": Reason("keys that are values are not modelled", BOTH, _OFF),
    "partial_rotary_factor": Reason("all of each head turns by position here", (TIME,), (1, 1.0)),
    "nope_layer_interval": Reason("all layers turn by position here", (TIME,), (-1,)),
    "chunk_attn_window_size": Reason(
        "attention reaches the whole sequence, not a chunk; windows and chunked can say it",
        (TIME,),
        (0,),
    ),
    "training_objective": Reason("tokens are predicted in order here", BOTH, ("causal_lm",)),
    "n_routing_groups": Reason("experts are chosen among all, not in groups", (TIME,), (-1,)),
    "use_batch_split_schedule": Reason("a batch in two halves is not modelled", BOTH, _OFF),
    "shard_mode": Reason("collectives are placed as in auto", (TIME,), ("auto",)),
    "allow_split_physical_axes": Reason("axes are laid out by shardsim's own rule", (TIME,), _OFF),
    "optimize_mesh_for_tpu_v6e": Reason("axes are laid out by shardsim's own rule", (TIME,), _OFF),
    "reuse_example_batch": Reason("where examples come from is not modelled"),
    "record_internal_nn_metrics": Reason("sums for the log are not modelled", (TIME,), (0, False)),
    "gradient_clipping_threshold": Reason("the norm of gradients is taken to be made"),
    "int8_training": Reason("read as quantization is", BOTH, _OFF),
    "routed_score_func": Reason("chances of experts cost alike", (TIME,), ("",)),
    "use_random_routing": Reason("experts are taken to have equal shares", (TIME,), _OFF),
    "shard_exp_on_fsdp": Reason("experts' weights lie along embed here", BOTH, _OFF),
    "mesh_axes": Reason("the sizes that are given name their axes"),
    "compile_topology": Reason("the slice is said beside the config"),
    "compile_topology_num_slices": Reason("the slice is said beside the config"),
    "context_parallel_strategy": Reason("no axis splits the sequence"),
    "shard_optimizer_over_data": Reason("no data axis splits the optimizer's state"),
    "mu_dtype": Reason("the optimizer keeps no first moment"),
    "override_model_config": Reason("no model_name says the sizes"),
    "trainable_position_size": Reason("the block has rotary positions"),
    "use_ring_of_experts": Reason("no axis splits experts"),
    "capacity_factor": Reason("no layer has experts"),
}
# Whether they could change a step -> why, and the names that it holds for.
_FAMILIES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        BOTH,
        "adapters, and weights that do not train, are not modelled",
        r"lora_(?!input).*|use_lora.*|peft.*",
    ),
    (
        BOTH,
        "how a pipeline's loops are written",
        r"pipeline_.*|scan_(pipeline|layers_per).*|set_remat_policy_on_.*|num_pipeline_.*"
        r"|num_layers_per_pipeline_stage",
    ),
    (
        (TIME,),
        "a plan prices blocks of 512, or with attention: flash-2048 of 1,024 forward, 2,048 back",
        r"(local_)?sa_block_.*",
    ),
    (
        (TIME,),
        "a kernel's own switch; a plan prices the usual ones",
        r"(local_)?sa_.*|(wi|wo)_tile_.*|(local_)?use_(tokamax|jax)_?\w*|(local_)?use_splash_\w+"
        r"|cost_estimate_.*|use_max_logit_estimate|dq_reduction_steps|ring_scan_unroll|megablox"
        r"|sparse_matmul|merge_gating_gmm|use_gmm_v2|ragged_.*|use_ragged_.*|use_gather_.*"
        r"|use_custom_sort_vjp|num_moe_.*|moe_(chunk|fsdp|dispatch).*|.*two_stage_all_gather"
        r"|use_2d_fsdp_sharding|batch_split_factor|te_.*|causal_block_size|use_.*_pallas_kernel"
        r"|.*_pallas_.*|force_q_layout|vocab_tiling_ag_once|check_vma|topk_routing_group",
    ),
    (
        (TIME,),
        "how a context axis deals out its tokens is not modelled",
        r"context_.*|ulysses_.*",
    ),
    ((), "rotary angles, which are numbers; no work", r".*rope.*|beta_(fast|slow)|mscale|.*mrope.*"
        r"|(original_)?max_position_embeddings"),
    (
        (),
        "of an encoder of images or sound, which is in no plan: see use_multimodal",
        r".*_for_(vit|audio)|\w+_placeholder|(image|video|audio)_path|vision_.*|video_max_.*"
        r"|freeze_(vision|audio)_\w+|dtype_mm|max_num_images_per_example|use_audio_in_video"
        r"|position_id_per_seconds",
    ),
    (
        (),
        "files, names, checkpoints and where they lie; no part of a step",
        r"run_name|base_output_directory|base_config|load_(para|full|from).*|.*checkpoint.*|.*ckpt.*|mtc_.*|hardware"
        r"|lora_input_adapters_path|hf_lora_adapter_path|force_unroll|jax_cache_dir|local_.*"
        r"|compiled_trainstep_file|enable_orbax_v1",
    ),
    (
        (),
        "for logs, profiles and dumps",
        r".*metric.*|.*wandb.*|.*goodput.*|.*tensorboard.*|.*heartbeat.*|report_.*|monitor_.*|log_.*"
        r"|step_deviation_.*|.*profil.*|dump_.*|managed_mldiagnostics.*|xprof_.*|tpu_num_.*|.*_config"
        r"|write_estimator_result|debug_sharding|max_checkify|prometheus_port|jax_debug_.*"
        r"|enable_gcp_.*|save_.*",
    ),
    (
        (),
        "which data, and in what order; batches are taken to be full",
        r"dataset_.*|eval_.*|.*_split|hf_.*|grain_.*|olmo_.*|.*tokeniz.*|add_(bos|eos)|.*_columns?"
        r"|use_truncation|.*chat_template.*|max_corpus_chars|.*shuffl.*|num_epoch|.*packing.*"
        r"|generate_padding_.*|expansion_factor_real_data|.*prompt|max_segments_per_seq|use_sft"
        r"|sft_.*|colocated_.*|global_rampup_samples|per_device_batch_size_.*|block_diffusion_.*"
        r"|.*data_sharding.*|enable_padding_causal_mask|vocab_size_per_.*",
    ),
    (
        (),
        "numbers of the optimizer, of losses and of weights at the start; no work worth counting",
        r"learning_rate.*|lr_.*|wsd_.*|warmup_.*|adam_.*|adamw_mask|muon_.*|steps|skip_step_.*|.*seed"
        r"|dense_init_scale|abort_on_.*|target_eval_loss|normalization_layer_epsilon|.*loss_.*"
        r"|z_loss_multiplier|normalize_embedding_logits|routed_scaling_factor|norm_topk_prob"
        r"|routed_bias_update_rate|distill_.*|temperature_tuning|enable_dropout|v_norm_with_scale"
        r"|qk_norm_with_scale|mtp_.*|use_untrainable_positional_embedding|iterations?|qk_clip_.*",
    ),
    (
        (),
        "for inference and serving; a plan trains",
        r"decode_.*|inference_.*|.*prefill.*|autoregressive_.*|generate_slice|kv_quant_.*|vllm_.*"
        r"|model_call_mode|multi_sampling|return_log_prob|ar_cache_.*|compute_axis_order|reshape_q"
        r"|prefix_.*|enable_prefix_.*|page.*|enable_llm_.*|enable_model_warmup|stack_.*|mla_naive_.*",
    ),
    (
        BOTH,
        "how numbers are quantized beside `quantization`, or kept in float32",
        r".*quant.*|weight_block_size|constant_bound_config|weight_sparsity_.*|use_qwix.*|float32_.*"
        r"|activations_in_float32|cast_logits_to_fp32|logits_dot_in_fp32|experimental_sa_.*|.*fp8.*",
    ),
    (
        (),
        "how jobs start and are kept alive",
        r"jax_distributed_.*|skip_jax_.*|enable_single_controller|elastic_.*|enable_(nnx|pathways).*"
        r"|max_inflight_computations|pure_nnx.*|internal_compile.*|subslice_shape|num_slices|dcn_band.*"
        r"|sharding_tolerance|shardy|remove_size_one_.*|.*_for_eval|override_\w+|enable_.*_controller"
        r"|param_scan_axis|mesh_axes|log_config|use_vertex.*|vertex_.*",
    ),
    (
        (),
        "counts only with a decoder_block, or a switch, that the plan does not have",
        r"engram_.*|mhc_.*|sinkhorn_.*|enable_mhc_.*|gdn_.*|use_qk_norm_in_gdn|indexer_.*|moba_.*"
        r"|q_lora_rank|kv_lora_rank|o_lora_rank|o_groups|qk_(nope|rope)_head_dim|v_head_dim|compress.*"
        r"|global_(head_dim|num_kv_heads)|first_num_.*|use_sliced_.*|mla_.*|use_double_wide_mlp"
        r"|attention_output_dim|moe_expert_input_dim|diloco_.*|.*diloco.*|communication_.*"
        r"|num_communication_.*|use_sequential_layers|inhomogeneous_layer_cycle_interval"
        r"|sliding_window_size|use_post_.*|num_experts(_per_tok)?|base_moe_mlp_dim|shared_experts"
        r"|interleave_moe_layer_step|attention_(bias|sink)|mlp_bias|routed_bias|use_qk_norm"
        r"|trainable_position_size|attention_type|use_ring_of_experts",
    ),
    (
        (),
        "counts with remat_policy=custom only",
        r"decoder_layer_input|indexer_cutoff_threshold|context|(moe_)?mlpwi(_[01])?|(moe_)?mlpwo"
        r"|(query|key|value|kv|qkv|out)_proj|(query|kv)_wa_proj|mla_(q|kv)|attention_out|engram",
    ),
)  # fmt: skip
_PARALLELISM = re.compile(r"(ici|dcn)_(\w+_)?parallelism")
# Usual values of keys of those families, where they are not `_OFF` or a negative number.
_USUAL: Mapping[str, object] = {
    **dict.fromkeys(
        ("cast_logits_to_fp32", "float32_weight_sum", "megablox", "sparse_matmul"), True
    ),
    **dict.fromkeys(("use_custom_sort_vjp", "scan_pipeline_iterations"), True),
    **dict.fromkeys(("sa_fuse_reciprocal", "sa_use_base2_exp"), True),
    "set_remat_policy_on_pipeline_iterations": True,
    "num_layers_per_pipeline_stage": 1,
    "batch_split_factor": 1,
    "context_sharding": "context",
    "context_parallel_strategy": "all_gather",
    "context_parallel_reorder_strategy": "auto",
    "te_comm_gemm_overlap": "disabled",
    "ring_scan_unroll": 1,
}
_PATTERNS = tuple((could, why, re.compile(pattern)) for could, why, pattern in _FAMILIES)
# Sizes that a model's own file says too.
OF_A_MODEL = re.compile(
    r"base_\w+|head_dim|vocab_size|mlp_activations|logits_via_embedding|decoder_block"
)


def known(key: str) -> bool:
    """Return whether MaxText has such a key, as far as it is known here."""
    patterns = (_PARALLELISM, OF_A_MODEL, *(pattern for _, _, pattern in _PATTERNS))
    return key in MATTERS or any(pattern.fullmatch(key) for pattern in patterns)


def left_of(keys: Keys) -> list[NotCarried]:
    """Return what of a config nothing has read, and what is read only in part."""
    left = []
    for key in keys.given:
        value = keys.given[key]
        if key == "logical_axis_rules" or (key not in keys.read and key in MATTERS):
            left.append(MATTERS[key].of(key, value))
        elif key not in keys.read:
            left.append(_of_family(key, value))
    return left


def _of_family(key: str, value: object) -> NotCarried:
    usual = (_USUAL[key],) if key in _USUAL else (*_OFF, -1, -1.0, "None")
    for could, why, pattern in _PATTERNS:
        if pattern.fullmatch(key):
            return Reason(why, could, usual).of(key, value)
    if OF_A_MODEL.fullmatch(key):
        return NotCarried(key, value, "model_name, or another key, says it")
    return NotCarried(key, value, "not a key of MaxText that is known here", BOTH)
