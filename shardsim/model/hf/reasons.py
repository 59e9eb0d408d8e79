"""Keys of a `config.json` that are in no model: why, and whether they could change a step."""

from __future__ import annotations

from collections.abc import Mapping

from shardsim.carried import BOTH, TIME, Keys, NotCarried, Reason

_LOADING = Reason("how transformers loads or names it, and no part of a training step")
_TOKENS = Reason("which words have a meaning of their own; no work")
_GENERATING = Reason("for generation; a plan trains")
_START = Reason("what weights begin as; no work")
_EPSILON = Reason("a number in a norm; no work")
_ANGLES = Reason("angles of rotary positions, which are numbers; no work")
_FORMAT = Reason("what the file's weights are stored as; a plan has its own formats", BOTH)
_DROPOUT = Reason("dropout is not modelled", BOTH, usual=(0, 0.0, None))
_CAP = Reason("a few operations an element, which a model does not have", (TIME,), usual=(None,))
_LOSS = Reason("a loss beside the model's own is not modelled", (TIME,), usual=(False,))
_SCALE = Reason("a number that scales; no work worth counting")
_LABELS = Reason("names of classes that no head here has")
_PART = Reason("positions turn whole heads here, not a part of each", (TIME,), usual=(1, 1.0))
_OTHER = Reason("another part of the model; one stack of layers is read", BOTH, usual=(None,))

REASONS: Mapping[str, Reason] = {
    **dict.fromkeys(
        ("_name_or_path", "name_or_path", "transformers_version", "tokenizer_class", "model_name"),
        _LOADING,
    ),
    **dict.fromkeys(("use_cache", "return_dict", "output_attentions", "torchscript"), _GENERATING),
    **dict.fromkeys(
        ("output_hidden_states", "task_specific_params", "cache_implementation"), _GENERATING
    ),
    **dict.fromkeys(("do_sample", "max_length", "temperature", "top_p", "top_k"), _GENERATING),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _TOKENS),
    **dict.fromkeys(("decoder_start_token_id", "n_ctx", "image_token_index"), _TOKENS),
    **dict.fromkeys(("boi_token_index", "eoi_token_index", "mm_tokens_per_image"), _TOKENS),
    **dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), _TOKENS),
    **dict.fromkeys(("initializer_range", "initializer_factor", "initial_context_length"), _START),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), _EPSILON),
    **dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base"), _ANGLES),
    **dict.fromkeys(("rope_local_base_freq", "original_max_position_embeddings"), _ANGLES),
    **dict.fromkeys(("torch_dtype", "dtype"), _FORMAT),
    "quantization_config": Reason(
        "weights as they are stored for inference; a plan trains in its own formats", BOTH
    ),
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), _DROPOUT),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "classifier_dropout"), _DROPOUT),
    **dict.fromkeys(("attention_probs_dropout_prob", "drop_path_rate"), _DROPOUT),
    **dict.fromkeys(("summary_first_dropout", "embedding_dropout"), _GENERATING),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _CAP),
    "swiglu_limit": Reason(
        "a few operations an element, which a model does not have", (TIME,), usual=(None,)
    ),
    "output_router_logits": _LOSS,
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise", "norm_topk_prob"), _SCALE),
    **dict.fromkeys(("query_pre_attn_scalar", "scale_attn_weights", "attn_scale"), _SCALE),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "floor_scale"), _SCALE),
    "attn_temperature_tuning": Reason("queries scaled by place", (TIME,), (False,)),
    "reorder_and_upcast_attn": Reason("attention in float32 is not modelled", BOTH, (False,)),
    "pretraining_tp": Reason("slices of a matmul in turn, for numbers alone", (TIME,), (1,)),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), _LABELS),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _PART),
    **dict.fromkeys(("vision_config", "audio_config", "text_config", "projector_config"), _OTHER),
    "attention_chunk_size": Reason(
        "attention reaches the whole sequence, not a chunk; windows and chunked can say it",
        (TIME,),
        usual=(None,),
    ),
    "no_rope_layers": Reason("all layers turn by position here", (TIME,), usual=(None,)),
    "use_qk_norm": Reason("norms of queries and keys without weights", (TIME,), usual=(False,)),
    "auto_map": Reason("code of its own, which is not read; transformers' is taken", BOTH),
    **dict.fromkeys(
        ("_attn_implementation", "attn_implementation"),
        Reason("a plan's `attention` says how it is computed", BOTH),
    ),
    "gradient_checkpointing": Reason("a plan's `remat` says what is kept", BOTH, usual=(False,)),
    "head_dim": Reason("its own widths of heads are read: qk_nope_head_dim and qk_rope_head_dim"),
    "qk_head_dim": Reason("the sum of two widths that are read"),
    **dict.fromkeys(
        ("n_group", "topk_group", "topk_method"),
        Reason("experts are chosen among all, not in groups", (TIME,), (None, 1, "greedy")),
    ),
    "num_nextn_predict_layers": Reason(
        "layers that predict further tokens are not in the model", BOTH, (0, None)
    ),
    **dict.fromkeys(("aux_loss_alpha", "seq_aux", "routed_scaling_factor", "scoring_func"), _SCALE),
    **dict.fromkeys(("ep_size", "rope_interleave"), _LOADING),
    "clip_qkv": Reason("queries, keys and values cut off; a few operations", (TIME,), (None,)),
    **dict.fromkeys(("layerscale_value", "stage_names", "out_features", "out_indices"), _START),
    **dict.fromkeys(("apply_layernorm", "reshape_hidden_states"), _GENERATING),
    "encoder_stride": Reason("for another task's decoder"),
    "pooler_act": _SCALE,
    **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), _GENERATING),
    "summary_proj_to_labels": _GENERATING,
    **dict.fromkeys(("logit_scale_init_value", "projection_dim"), _OTHER),
}
_NO_EXPERTS = "enable_moe_block is false"
_UNREAD: Mapping[str, str] = {
    "intermediate_size": "no layer has an MLP in place of its experts",
    "intermediate_size_mlp": "no layer has an MLP in place of its experts",
    "sliding_window": "no layer has a window",
    "sliding_window_pattern": "layer_types says which layers have a window",
    "_sliding_window_pattern": "layer_types says which layers have a window",
    "max_window_layers": "no layer has a window",
    "layer_types": "all layers see all tokens",
    "hidden_act": "another key says which activation it is",
    "hidden_activation": "hidden_act says which activation it is",
    "use_sliding_window": "layer_types says which layers have a window",
    **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size"), _NO_EXPERTS),
    "num_global_key_value_heads": "attention_k_eq_v is false, or no layer has a window",
    "use_double_wide_mlp": "only layers that share keys and values are wider",
    "vocab_size_per_layer_input": "no layer has embeddings of its own",
    "pooler_output_size": "no pooler stands behind the layers",
}


def left_of(keys: Keys, known: Mapping[str, object], kind: str, prefix: str) -> list[NotCarried]:
    """Return what of a file nothing has read; `known` are keys that its kind has."""
    left = []
    for key in keys.unread():
        value, full = keys.given[key], prefix + key
        if key in REASONS:
            left.append(REASONS[key].of(full, value))
        elif key in _UNREAD and key in known:
            left.append(NotCarried(full, value, _UNREAD[key]))
        else:
            why = f"not a key that is read of a {kind}"
            left.append(NotCarried(full, value, why, BOTH))
    return left
