"""What MaxText's `decoder_block` fixes, as options of a model.

Source: AI-Hypercomputer/maxtext@e591f30cb, src/maxtext/models/*.py and layers/attentions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardsim.carried import Keys
from shardsim.errors import FileError, nearest, shown
from shardsim.model.hf.decoders import round_of
from shardsim.model.spec import MOST_LAYERS
from shardsim.validate.words import whole

_ACTIVATIONS: Mapping[str, str] = {
    **dict.fromkeys(("gelu", "gelu_new", "quick_gelu"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
}


def scales(scale: int) -> dict[str, int]:
    """Return how MaxText spreads `global_parameter_scale`, a power of two, over the sizes.

    Source: MaxText/pyconfig.py, get_individual_scales: heads and MLP first, then width.
    """
    log = scale.bit_length() - 1
    if 2**log != scale:
        raise FileError(f"global_parameter_scale: must be a power of two, not {scale}")
    base, rest = divmod(log, 3)
    return {"heads": 2 ** (base + (rest > 0)), "embed": 2 ** (base + (rest > 1)), "layers": 2**base}


def options_of(keys: Keys, name: str) -> dict[str, Any]:
    """Return what `load_model` takes, of a config whose sizes stand in its own keys."""
    # Releases before August 2023 have no key for the block; theirs is the default one.
    block = keys["decoder_block"]
    if not isinstance(block, str) or block not in BLOCKS:
        if isinstance(block, str) and block in REFUSED:
            raise FileError(f"decoder_block: {block} is not modelled: {REFUSED[block]}")
        raise FileError(f"decoder_block: {shown(block)} is not modelled{nearest(block, BLOCKS)}")
    return {"name": name, **BLOCKS[block](keys, _base(keys), name)}


def activated(keys: Keys) -> dict[str, Any]:
    """Return which function stands in an MLP, and whether a gate does."""
    words = keys["mlp_activations"]
    if not isinstance(words, list) or not words:
        raise FileError("mlp_activations: expected a list, such as [silu, linear]")
    word = str(words[0])
    return {"activation": _ACTIVATIONS.get(word, word), "gated_mlp": len(words) > 1}


def _base(keys: Keys) -> dict[str, Any]:
    times = scales(whole(keys["global_parameter_scale"], "global_parameter_scale"))
    heads = keys.get("base_num_heads", keys["base_num_query_heads"])

    def size(key: str, scale: int, value: Any = None) -> int:
        return whole(keys[key] if value is None else value, key) * scale

    layers = size("base_num_decoder_layers", times["layers"])
    if layers > MOST_LAYERS:
        raise FileError(f"base_num_decoder_layers: at most {MOST_LAYERS:,}, found {layers:,}")
    return {
        "family": "decoder",
        "layers": layers,
        "embed": size("base_emb_dim", times["embed"]),
        "mlp": size("base_mlp_dim", times["heads"]),
        "heads": size("base_num_query_heads", times["heads"], heads),
        "kv_heads": size("base_num_kv_heads", times["heads"], keys.get("base_num_kv_heads", heads)),
        "head_dim": size("head_dim", 1),
        "vocab": size("vocab_size", 1),
        "sequence": size("max_target_length", 1),
        **activated(keys),
        "causal": True,
        "tied_embeddings": keys.flag("logits_via_embedding"),
        "norm": "rmsnorm",
        "positions": "rotary",
    }


Made = dict[str, Any]


def masked(keys: Keys) -> Made:
    """Return which tokens a query sees, where `attention_type` decides it for all layers."""
    kind = keys["attention_type"]
    if kind == "mla":
        raise FileError("attention_type: mla is modelled of decoder_block deepseek only")
    if kind not in ("global", "full", "local_sliding"):
        raise FileError(
            f"attention_type: {shown(kind)} is not modelled; global, full and local_sliding are"
        )
    if kind == "local_sliding":
        return {"windows": [whole(keys["sliding_window_size"], "sliding_window_size")]}
    return {"causal": kind != "full"}


def _plain(keys: Keys, made: Made, name: str) -> Made:
    return {**made, **masked(keys)}


def _default(keys: Keys, made: Made, name: str) -> Made:
    return {**_plain(keys, made, name), "parallel_block": True}


def _gpt3(keys: Keys, made: Made, name: str) -> Made:
    made = {**_plain(keys, made, name), "norm": "layernorm", "positions": "none", "biases": True}
    size = keys["trainable_position_size"]
    if size == -1:
        return made
    return {**made, "positions": "learned", "sequence": whole(size, "trainable_position_size")}


def _experts(keys: Keys, made: Made, **more: Any) -> Made:
    """Return experts in place of the MLP; without a capacity factor none drops a token."""
    width = keys["base_moe_mlp_dim"]
    times = scales(whole(keys["global_parameter_scale"], "global_parameter_scale"))["heads"]
    own = isinstance(width, int) and width > 0  # releases of 2024 have only base_mlp_dim
    factor = keys["capacity_factor"]
    return {
        "number": whole(keys["num_experts"], "num_experts"),
        "top_k": whole(keys["num_experts_per_tok"], "num_experts_per_tok"),
        "mlp": width * times if own else made["mlp"],
        **({"capacity": factor} if isinstance(factor, (int, float)) and factor > 0 else {}),
        **more,
    }


def _mistral(keys: Keys, made: Made, name: str) -> Made:
    made = _plain(keys, made, name)
    if keys["num_experts"] == 1:
        return made
    return _mixtral(keys, made, name)


def _mixtral(keys: Keys, made: Made, name: str) -> Made:
    experts = _experts(keys, made)
    return {**made, **masked(keys), "mlp": experts["mlp"], "experts": experts}


def _qwen2(keys: Keys, made: Made, name: str) -> Made:
    biases, normed = {"qkv": keys.flag("attention_bias")}, keys.flag("use_qk_norm")
    return {**_plain(keys, made, name), "biases": biases, "qk_norm": normed}


def _qwen3(keys: Keys, made: Made, name: str) -> Made:
    return {**_plain(keys, made, name), "qk_norm": keys.flag("use_qk_norm")}


def _qwen3_moe(keys: Keys, made: Made, name: str) -> Made:
    return {**_mixtral(keys, made, name), "qk_norm": keys.flag("use_qk_norm")}


def _post_norms(keys: Keys) -> bool:
    attention, mlp = (keys.flag(f"use_post_{part}_norm") for part in ("attn", "ffw"))
    if attention != mlp:
        raise FileError(
            "use_post_ffw_norm: a model has norms behind both attention and MLP, or behind none"
        )
    return attention


def _window(keys: Keys) -> int:
    return whole(keys["sliding_window_size"], "sliding_window_size")


def _gemma2(keys: Keys, made: Made, name: str) -> Made:
    # A layer of MaxText's is two: a local one and a global one.
    layers, windows = 2 * made["layers"], [_window(keys), 0]
    return {**made, "layers": layers, "post_norms": _post_norms(keys), "windows": windows}


def _gemma3(keys: Keys, made: Made, name: str) -> Made:
    window = _window(keys)
    windows = [0 if layer % 6 == 5 else window for layer in range(made["layers"])]
    normed = {"qk_norm": True, "post_norms": _post_norms(keys)}
    return {**made, **normed, "windows": round_of(windows)}


def _gemma4(keys: Keys, made: Made, name: str) -> Made:
    if keys.flag("v_norm_with_scale"):
        raise FileError("v_norm_with_scale: true is not modelled: norms of values have no scale")
    window = _window(keys)
    windows = [0 if layer % 6 == 5 else window for layer in range(made["layers"])]
    heads = {
        "kv_heads": keys.count("global_num_kv_heads", least=0) or made["kv_heads"],
        "head_dim": keys.count("global_head_dim", least=0) or made["head_dim"],
        "values_are_keys": keys.flag("share_kv_projections"),
    }
    if not all(windows):
        made["global_heads"] = heads
    if keys["num_experts"] != 1:
        apart = {"beside": True, "apart": True, "scales": True}
        made["mlp"] *= whole(keys["shared_experts"], "shared_experts")
        made["experts"] = _experts(keys, made, **apart)
        if not _post_norms(keys):
            raise FileError(
                "use_post_ffw_norm: false with experts is not modelled: norms are behind those"
            )
    normed = {"qk_norm": True, "value_norm": True, "post_norms": _post_norms(keys)}
    return {**made, **normed, "residual_scale": True, "windows": round_of(windows)}


def _gpt_oss(keys: Keys, made: Made, name: str) -> Made:
    bias = keys.flag("attention_bias")
    experts = _experts(keys, made, router_bias=keys.flag("routed_bias"))
    return {
        **made,
        "activation": "silu",  # the product with a sigmoid, which MaxText lists by itself
        "mlp": experts["mlp"],
        "windows": [_window(keys), 0],
        "sinks": keys.flag("attention_sink"),
        "biases": {"qkv": bias, "attention_output": bias, "mlp": keys.flag("mlp_bias")},
        "experts": experts,
    }


def _llama4(keys: Keys, made: Made, name: str) -> Made:
    every = whole(keys["interleave_moe_layer_step"], "interleave_moe_layer_step")
    shared = whole(keys["shared_experts"], "shared_experts")
    experts = _experts(keys, made, shared=shared, every=every, router="sigmoid")
    if every == 1:
        made = {**made, "mlp": experts["mlp"]}
    return {**made, "experts": experts}


def _envy(keys: Keys, made: Made, name: str) -> Made:
    every = whole(keys["interleave_moe_layer_step"], "interleave_moe_layer_step")
    normed = {"qk_norm": keys.flag("use_qk_norm"), "mlp_post_norm": keys.flag("use_post_ffw_norm")}
    return {**_plain(keys, made, name), **normed, "experts": _experts(keys, made, every=every)}


def _deepseek(keys: Keys, made: Made, name: str) -> Made:
    if keys["attention_type"] != "mla":
        raise FileError(
            f"attention_type: {shown(keys['attention_type'])} is not modelled of the deepseek "
            "block; mla is"
        )
    for key, usual, what in (
        ("mhc_expansion_rate", 1, "several residual streams are mixed before and behind a branch"),
        ("engram_layers", [], "memories of n-grams are looked up"),
    ):
        if keys[key] != usual:
            raise FileError(
                f"{key}: {shown(keys[key])} is not modelled: {what}, with weights of its own; "
                "what that costs is not known"
            )
    rotary = whole(keys["qk_rope_head_dim"], "qk_rope_head_dim")
    experts = _experts(
        keys,
        made,
        shared=keys.count("shared_experts", least=0),
        dense_layers=keys.count("first_num_dense_layers", least=0),
        router="sigmoid" if keys["routed_score_func"] == "sigmoid" else "softmax",
        router_bias=keys.flag("routed_bias"),
    )
    latent = {
        "queries": keys.count("q_lora_rank", least=0),
        "keys": whole(keys["kv_lora_rank"], "kv_lora_rank"),
        "rotary": rotary,
        "values": whole(keys["v_head_dim"], "v_head_dim"),
    }
    if keys.flag("use_indexer"):
        if keys["indexer_loss_scaling_factor"]:
            raise FileError(
                "indexer_loss_scaling_factor: a loss of the index is not modelled; 0 is"
            )
        made["index"] = {
            key: whole(keys[f"indexer_{own}"], f"indexer_{own}")
            for key, own in (("heads", "n_heads"), ("head_dim", "head_dim"), ("top", "topk"))
        }
    width = whole(keys["qk_nope_head_dim"], "qk_nope_head_dim") + rotary
    heads = {"kv_heads": made["heads"], "head_dim": width}
    return {**made, **heads, "latent": latent, "experts": experts}


def _olmo3(keys: Keys, made: Made, name: str) -> Made:
    window, bias, normed = _window(keys), keys.flag("attention_bias"), keys.flag("use_qk_norm")
    # One norm over all heads where model_name says olmo3, as the name of a model's own file does.
    whole_norm = name.startswith("olmo3")
    return {
        **made,
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": normed,
        **({"qk_norm_over": "heads"} if normed and whole_norm else {}),
        "biases": {"qkv": bias, "attention_output": bias},
        "windows": [window, window, window, 0],
    }


def _qwen3_custom(keys: Keys, made: Made, name: str) -> Made:
    width = whole(keys["attention_output_dim"], "attention_output_dim")
    if keys["moe_expert_input_dim"] != width:
        raise FileError("moe_expert_input_dim: must be attention_output_dim, as MaxText has it")
    made = _qwen3_moe(keys, made, name)
    return made if width == made["embed"] else {**made, "branch": width}


def _qwen3_next(keys: Keys, made: Made, name: str) -> Made:
    every = whole(keys["inhomogeneous_layer_cycle_interval"], "inhomogeneous_layer_cycle_interval")
    sizes = {
        key: whole(keys[f"gdn_{own}"], f"gdn_{own}")
        for key, own in (
            ("key_heads", "num_key_heads"),
            ("value_heads", "num_value_heads"),
            ("key_dim", "key_head_dim"),
            ("value_dim", "value_head_dim"),
            ("taps", "conv_kernel_dim"),
            ("chunk", "chunk_size"),
        )
    }
    if not keys.flag("use_qk_norm_in_gdn"):
        raise FileError(
            "use_qk_norm_in_gdn: false is not modelled: linear attention has queries and keys of "
            "length one"
        )
    made = {**_mistral(keys, made, name), "output_gate": True}
    made |= {"qk_norm": True}  # whatever use_qk_norm says
    if every > 1:
        made |= {"delta": {**sizes, "every": every}}
    if "experts" in made:
        shared = whole(keys["shared_experts"], "shared_experts") if keys["shared_experts"] else 0
        made["experts"] |= {"shared": shared, "shared_gate": bool(shared)}
    return made


BLOCKS: Mapping[str, Callable[[Keys, Made, str], Made]] = {
    "default": _default,
    "llama2": _plain,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "gemma": _plain,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt3": _gpt3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "olmo3": _olmo3,
    "deepseek": _deepseek,
    "envy": _envy,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_next,
    "qwen3_custom_moe": _qwen3_custom,
}
REFUSED: Mapping[str, str] = {
    "deepseek4": (
        "compressed attention, and experts chosen by hashes; a model can say neither, nor "
        "hyper-connections"
    ),
    "gemma4_small": (
        "embeddings of each layer, and layers that share keys and values of others; a model has "
        "neither"
    ),
    "simple": "a layer for tests of MaxText, without attention",
    "simple_mlp": "a layer for tests of MaxText, without attention",
}
# What names of such models begin with, and their block.
NAMES: Mapping[str, str] = {"deepseek4": "deepseek4", "gemma4-e": "gemma4_small"}
