"""The words of a runs file: one meaning, many spellings; numbers as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import FileError

# By the key that shardsim's own file uses: what else sources call it. Compared in lower case with
# every run of other characters than letters and digits as one "_".
ROW: Mapping[str, tuple[str, ...]] = {
    "chip": ("accelerator", "hardware", "chip_type", "device_type", "tpu", "gpu"),
    "chips": ("num_chips", "n_chips", "chip_count", "gpus", "num_gpus", "n_gpus", "accelerators"),
    "devices": ("num_devices", "n_devices", "device_count"),
    "cores": ("num_cores", "n_cores", "tensorcores"),
    "slices": ("num_slices", "n_slices", "pods", "num_pods"),
    "topology": ("slice", "slice_name", "machine", "instance", "instance_type", "system", "shape"),
    "dims": ("dimensions", "architecture", "arch", "model_dims", "config", "hyperparameters"),
    "parallelism": ("sharding", "mesh", "mesh_shape", "parallel", "parallelism_config"),
    "global_batch": ("global_batch_size", "batch", "batch_size", "train_batch_size"),
    "batch_tokens": ("global_batch_tokens", "tokens_per_batch", "tokens_per_step"),
    "per_device_batch": (
        "per_device_batch_size",
        "batch_per_device",
        "device_batch",
        "pdb",
        "per_gpu_batch",
        "per_gpu_batch_size",
    ),
    "per_chip_batch": ("per_chip_batch_size", "batch_per_chip"),
    "seq": (
        "sequence",
        "seq_len",
        "seq_length",
        "sequence_length",
        "max_seq_len",
        "max_sequence_length",
        "max_target_length",
        "context_length",
        "block_size",
        "tokens_per_sequence",
    ),
    "microbatches": (
        "num_microbatches",
        "gradient_accumulation",
        "gradient_accumulation_steps",
        "grad_accum",
        "accumulation_steps",
    ),
    "microbatch": ("micro_batch_size", "microbatch_size", "micro_batch", "mbs"),
    "remat": (
        "remat_policy",
        "recompute",
        "recomputation",
        "rematerialization",
        "rematerialisation",
        "activation_checkpointing",
        "activation_recomputation",
        "gradient_checkpointing",
        "checkpointing",
    ),
    "tricks": ("techniques", "options", "flags"),
    "precision": ("dtype", "compute_dtype", "number_format"),
    "optimizer": ("optimiser", "opt_type"),
    "mfu_formula": ("flop_formula", "flops_formula", "mfu_definition", "formula"),
}
DIMS: Mapping[str, tuple[str, ...]] = {
    "layers": (
        "num_layers",
        "n_layers",
        "n_layer",
        "num_hidden_layers",
        "num_decoder_layers",
        "base_num_decoder_layers",
        "depth",
        "blocks",
        "num_blocks",
        "l",
    ),
    "d_model": (
        "hidden",
        "hidden_size",
        "hidden_dim",
        "width",
        "embed",
        "embed_dim",
        "emb_dim",
        "base_emb_dim",
        "n_embd",
        "model_dim",
        "dim",
        "dmodel",
        "d",
    ),
    "d_ff": (
        "ffn",
        "ffn_dim",
        "ff_dim",
        "dff",
        "mlp",
        "mlp_dim",
        "base_mlp_dim",
        "intermediate",
        "intermediate_size",
        "ffn_hidden_size",
        "feed_forward",
        "d_mlp",
        "d_hidden",
    ),
    "heads": (
        "n_heads",
        "num_heads",
        "n_head",
        "num_attention_heads",
        "attention_heads",
        "num_query_heads",
        "base_num_query_heads",
        "q_heads",
        "query_heads",
        "h",
    ),
    "kv_heads": (
        "n_kv_heads",
        "num_kv_heads",
        "num_key_value_heads",
        "base_num_kv_heads",
        "key_value_heads",
        "num_query_groups",
        "kv",
    ),
    "d_head": ("head_dim", "head_size", "dim_head", "d_kv", "d_qkv", "kv_channels", "dhead"),
    "vocab": ("vocab_size", "n_vocab", "vocabulary", "padded_vocab_size", "v"),
    "glu": ("gated", "gated_mlp", "swiglu", "geglu", "gated_linear_unit"),
    "tied": (
        "tied_embeddings",
        "tie_embeddings",
        "tie_word_embeddings",
        "share_embeddings",
        "shared_embeddings",
        "logits_via_embedding",
    ),
    "parallel_block": ("parallel_layers", "parallel_residual", "parallel", "parallel_attention"),
    "bias": ("biases", "use_bias", "use_biases"),
    "qk_norm": ("qk_layernorm", "use_qk_norm", "query_key_norm"),
    "image": ("image_size", "img_size", "resolution", "image_resolution"),
    "patch": ("patch_size",),
    "tokens": ("patches", "num_patches", "num_tokens", "seq", "seq_len", "sequence"),
    "causal": ("is_causal", "causal_attention"),
    "experts": ("num_experts", "n_experts", "moe_experts", "moe"),
    "params_published": ("params", "parameters", "num_params", "n_params", "size"),
}
MEASURED: Mapping[str, tuple[str, ...]] = {
    "tokens_s_chip": (
        "tokens_per_s_per_chip",
        "tokens_per_sec_per_chip",
        "tokens_per_second_per_chip",
        "tokens_s_gpu",
        "tokens_per_s_per_gpu",
        "tokens_per_sec_per_gpu",
        "tok_s_chip",
    ),
    "tokens_s_device": ("tokens_per_s_per_device", "tokens_per_sec_per_device", "tgs"),
    "tokens_s_total": ("tokens_per_s", "tokens_per_sec", "tokens_s", "tokens_per_second"),
    "sequences_s_total": (
        "sequences_s",
        "sequences_per_s",
        "samples_s",
        "samples_per_s",
        "samples_per_sec",
        "images_s",
        "images_per_s",
        "images_per_sec",
        "seqs_s",
    ),
    "sequences_s_chip": (
        "samples_s_chip",
        "images_s_chip",
        "images_per_s_per_chip",
        "images_per_sec_per_chip",
        "samples_per_s_per_chip",
        "sequences_per_s_per_chip",
        "seqs_s_chip",
    ),
    "step_s": (
        "step_time_s",
        "step_time",
        "step_seconds",
        "seconds_per_step",
        "s_per_step",
        "sec_per_step",
        "iteration_s",
        "iteration_time_s",
        "batch_time_s",
    ),
    "step_ms": ("step_time_ms", "ms_per_step", "iteration_ms", "iteration_time_ms"),
    "tflops_chip": (
        "tflops_per_chip",
        "tflop_s_chip",
        "tflops_s_chip",
        "tflops_gpu",
        "tflops_per_gpu",
        "tflop_s_gpu",
        "model_tflops_chip",
        "tflops",
    ),
    "tflops_device": ("tflops_per_device", "tflop_s_device", "tflops_s_device"),
    "pflops_total": ("aggregate_pflops", "pflops", "pflop_s_total", "total_pflops"),
    "mfu_pct": ("mfu", "mfu_percent", "model_flops_utilization"),
}

_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = re.compile(r"[~≈]?\s*(\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmbgt](?![a-z]))?(.*)")


def plain(key: object) -> str:
    """Return a key in lower case with words joined by single underscores."""
    return re.sub(r"[^a-z0-9]+", "_", str(key).lower()).strip("_")


def find(data: Mapping[str, Any], key: str, words: Mapping[str, tuple[str, ...]]) -> Any:
    """Return what `data` holds under `key` or another spelling of it; None if nothing."""
    if data.get(key) is not None:
        return data[key]
    known = {plain(name): value for name, value in data.items() if value is not None}
    for word in (key, *words.get(key, ())):
        if word in known:
            return known[word]
    return None


def number(value: Any, key: str) -> float:
    """Return a positive finite number: 48, "48", "1,024", "21.7B", "54.9 %"; no others.

    >>> number("1,024 chips", "chips"), number("21.7B", "params")
    (1024.0, 21700000000.0)
    """
    found: float | None = None
    if isinstance(value, str) and len(value) <= 60:
        match = _NUMBER.fullmatch(value.strip().lower())
        if match and not re.search(r"\d", match[3]):
            digits = re.sub(r"[,_]", "", match[1])
            found = float(digits) * _SCALES.get(match[2] or "", 1.0)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value)
    if found is None or not math.isfinite(found):
        raise FileError(f"{key}: expected a positive number, found {shown(value)}")
    if not 1e-12 < found < 1e18:
        raise FileError(f"{key}: must be positive and below 10^18, not {found:g}")
    return found


def whole(value: Any, key: str) -> int:
    """Return a positive whole number of at most 10^9; "8k" is 8,192 and "32k" 32,768."""
    found = number(value, key)
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*[kK]\s*", value):
        found = found / 1000 * 1024
    if found != int(found):
        raise FileError(f"{key}: expected a whole number, found {shown(value)}")
    if found > 10**9:
        raise FileError(f"{key}: must be at most 10^9, not {found:g}")
    return int(found)


def flag(value: Any) -> bool:
    """Return whether a row's word means yes."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "no", "none", "false", "off", "0")
    return bool(value)


def mapping(value: Any, key: str) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, an empty one if there is nothing."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FileError(f"{key}: expected a mapping of keys, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value for a message, of bounded length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
