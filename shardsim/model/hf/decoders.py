"""Decoders of transformers as options of a model: one function a kind of block.

Each reads the keys that decide what its kind is made of, and returns what `load_model` takes.
Source: models/*/modeling_*.py of the transformers named in `defaults`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from shardsim.carried import Keys
from shardsim.errors import FileError, nearest, shown
from shardsim.model.spec import MOST_LAYERS

# Tokens of a plan's sequence where positions are rotary: a model takes any number.
TOKENS = 8192
_ACTIVATIONS: Mapping[str, str] = {
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"), "gelu"),
    **dict.fromkeys(("quick_gelu", "gelu_accurate"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
}
_WINDOWED, _FULL, _CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


def activation(keys: Keys, key: str) -> str:
    """Return the activation that a key names; the kinds of gelu cost the same."""
    name = keys[key]
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise FileError(f"{key}: {shown(name)} is not modelled{nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def head_dim(keys: Keys, embed: int, heads: int) -> int:
    """Return the width of a head: its own key's, or that of equal parts of the residual."""
    if "head_dim" in keys and keys["head_dim"] is not None:
        return keys.count("head_dim")
    if embed % heads:
        raise FileError(
            f"num_attention_heads: {embed} of hidden_size does not divide by {heads} heads, and "
            "no head_dim is given"
        )
    return embed // heads


def round_of(windows: Sequence[int]) -> list[int]:
    """Return the shortest round of windows that gives every layer's; none if all see all.

    >>> round_of([4, 0, 4, 0]), round_of([0, 0]), round_of([4, 4, 0])
    ([4, 0], [], [4, 4, 0])
    """
    many = len(windows)
    length = next(
        n
        for n in range(1, many + 1)
        if many % n == 0 and list(windows[:n]) * (many // n) == list(windows)
    )
    return list(windows[:length]) if any(windows) else []


def _base(keys: Keys, act: str = "hidden_act") -> dict[str, Any]:
    """Return what RMSNorm, rotary positions and a gated MLP have in common."""
    embed, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    return {
        "family": "decoder",
        "layers": keys.count("num_hidden_layers", most=MOST_LAYERS),
        "embed": embed,
        "heads": heads,
        "kv_heads": keys.count_or("num_key_value_heads", heads),
        "head_dim": head_dim(keys, embed, heads),
        "vocab": keys.count("vocab_size"),
        "sequence": min(TOKENS, keys.count("max_position_embeddings")),
        "gated_mlp": True,
        "activation": activation(keys, act),
        "causal": True,
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "norm": "rmsnorm",
        "positions": "rotary",
    }


def _dense(keys: Keys, act: str = "hidden_act") -> dict[str, Any]:
    return {**_base(keys, act), "mlp": keys.count("intermediate_size")}


def _attention_biases(keys: Keys) -> dict[str, bool]:
    """Return biases of all four projections of attention, which one key decides."""
    bias = keys.flag("attention_bias")
    return {"qkv": bias, "attention_output": bias}


def _all_layers(keys: Keys) -> list[int]:
    """Return one window for all layers, or none."""
    window = keys.count_or("sliding_window", 0)
    return [window] if window else []


def _layer_windows(keys: Keys, layers: int, usual: Callable[[int], bool]) -> list[int]:
    """Return the windows by `layer_types`, or where that is missing by what is `usual`."""
    kinds = keys["layer_types"]
    if kinds is None:
        kinds = [_WINDOWED if usual(layer) else _FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FileError(f"layer_types: expected one kind for each of {layers} layers")
    for kind in kinds:
        if kind not in (_WINDOWED, _FULL):
            raise FileError(
                f"layer_types: {shown(kind)} is not modelled; {_FULL} and {_WINDOWED} are"
            )
    if _WINDOWED not in kinds:
        return []
    window = keys.count("sliding_window")
    return round_of([window if kind == _WINDOWED else 0 for kind in kinds])


def _last_layers(keys: Keys, layers: int) -> list[int]:
    """Return Qwen's windows: a switch, and a number of layers in front that see all."""
    if not keys.flag("use_sliding_window"):
        if isinstance(keys.given.get("layer_types"), list):
            return _layer_windows(keys, layers, lambda _: False)
        keys.read.add("layer_types")
        return []
    whole = keys.count("max_window_layers", least=0)
    sized = keys["sliding_window"] is not None
    if "layer_types" not in keys:
        window = keys.count_or("sliding_window", 0)
        return round_of([window if layer >= whole else 0 for layer in range(layers)])
    return _layer_windows(keys, layers, lambda layer: sized and layer >= whole)


def _llama(keys: Keys) -> dict[str, Any]:
    biases = {**_attention_biases(keys), "mlp": keys.flag("mlp_bias")}
    return {**_dense(keys), "biases": biases}


def _mistral(keys: Keys) -> dict[str, Any]:
    return {**_dense(keys), "windows": _all_layers(keys)}


def _experts(
    keys: Keys,
    number: str = "num_experts",
    mlp: str = "moe_intermediate_size",
    top_k: str = "num_experts_per_tok",
    **more: Any,
) -> dict[str, Any]:
    """Return experts by the names of their keys, and what else is known of them."""
    return {
        "number": keys.count(number),
        "top_k": keys.count(top_k),
        "mlp": keys.count(mlp),
        **more,
    }


def _mixtral(keys: Keys) -> dict[str, Any]:
    experts = _experts(keys, "num_local_experts", "intermediate_size")
    return {**_base(keys), "windows": _all_layers(keys), "experts": experts}


def _qwen2(keys: Keys) -> dict[str, Any]:
    made = _dense(keys)
    windows = _last_layers(keys, made["layers"])
    return {**made, "biases": {"qkv": True}, "windows": windows}


def _qwen3(keys: Keys) -> dict[str, Any]:
    made = _dense(keys)
    windows = _last_layers(keys, made["layers"])
    return {**made, "biases": _attention_biases(keys), "qk_norm": True, "windows": windows}


def _sparse(keys: Keys) -> dict[str, int]:
    """Return which layers have experts: Qwen's step, and the layers that it names as dense."""
    step, dense = keys.count("decoder_sparse_step"), keys["mlp_only_layers"] or []
    front = len(dense) if isinstance(dense, list) else 0
    if not isinstance(dense, list) or any(layer not in dense for layer in range(front)):
        raise FileError(
            f"mlp_only_layers: {shown(dense)}: a model can say dense layers in front, "
            "[0, 1, ...], and every n-th layer; no others"
        )
    return {"dense_layers": front, "every": step}


def _qwen_moe(keys: Keys, **more: Any) -> dict[str, Any]:
    """Return what Qwen's models with experts have in common; `more` is said of the experts."""
    made, sparse = _base(keys), _sparse(keys)
    made["experts"] = {**_experts(keys, **more), **sparse}
    if sparse["dense_layers"] or sparse["every"] > 1:
        made["mlp"] = keys.count("intermediate_size")
    return made


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    made = _qwen_moe(keys)
    # All layers have the window in its modelling code, whatever max_window_layers says.
    windows = _all_layers(keys) if keys.flag("use_sliding_window") else []
    return {**made, "biases": _attention_biases(keys), "qk_norm": True, "windows": windows}


def _gemma(keys: Keys) -> dict[str, Any]:
    # hidden_activation decides; where it is missing, the tanh kind of gelu whatever hidden_act is.
    act = "hidden_activation" if keys["hidden_activation"] is not None else "hidden_act"
    made = _dense(keys, act)
    return {**made, "activation": "gelu", "biases": _attention_biases(keys)}


def _gemma2(keys: Keys) -> dict[str, Any]:
    made = _dense(keys, "hidden_activation")
    windows = _layer_windows(keys, made["layers"], lambda layer: layer % 2 == 0)
    biases = _attention_biases(keys)
    return {**made, "biases": biases, "post_norms": True, "windows": windows}


def _gemma3(keys: Keys) -> dict[str, Any]:
    made = _dense(keys, "hidden_activation")
    if keys.flag("use_bidirectional_attention"):
        raise FileError(
            "use_bidirectional_attention: windows that see both ways are not modelled; false is"
        )
    name = "sliding_window_pattern"
    every = keys.count(f"_{name}" if f"_{name}" in keys.given else name)
    windows = _layer_windows(keys, made["layers"], lambda layer: (layer + 1) % every != 0)
    return {
        **made,
        "biases": _attention_biases(keys),
        "qk_norm": True,
        "post_norms": True,
        "windows": windows,
    }


def _gemma4(keys: Keys) -> dict[str, Any]:
    made = _dense(keys, "hidden_activation")
    for key, why in (
        ("hidden_size_per_layer_input", "embeddings of each layer are not modelled"),
        ("num_kv_shared_layers", "layers that share keys and values are not modelled"),
    ):
        if keys[key] != 0:
            raise FileError(f"{key}: {shown(keys[key])}: {why}; 0 is")
    if keys["use_bidirectional_attention"] == "all":
        raise FileError(
            "use_bidirectional_attention: windows that see both ways are not modelled; null is"
        )
    windows = _layer_windows(keys, made["layers"], lambda layer: (layer + 1) % 6 != 0)
    alike = keys.flag("attention_k_eq_v")
    own = keys.count_or("num_global_key_value_heads", made["kv_heads"])
    heads = {
        "kv_heads": own if alike else made["kv_heads"],
        "head_dim": keys.count("global_head_dim"),
        "values_are_keys": alike,
    }
    if keys.flag("enable_moe_block"):
        made["experts"] = _experts(
            keys, top_k="top_k_experts", beside=True, apart=True, scales=True
        )
    return {
        **made,
        "biases": _attention_biases(keys),
        "qk_norm": True,
        "value_norm": True,
        "post_norms": True,
        "residual_scale": True,
        "windows": windows,
        **({"global_heads": heads} if any(windows) else {}),
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    made = _base(keys)
    experts = _experts(keys, "num_local_experts", "intermediate_size", router_bias=True)
    windows = _layer_windows(keys, made["layers"], lambda layer: layer % 2 == 0)
    biases = {**_attention_biases(keys), "mlp": True}
    return {**made, "biases": biases, "windows": windows, "sinks": True, "experts": experts}


def _llama4(keys: Keys) -> dict[str, Any]:
    made = _base(keys)
    step, layers = keys.count("interleave_moe_layer_step"), made["layers"]
    listed = keys["moe_layers"]
    if listed is not None and listed != list(range(step - 1, layers, step)):
        raise FileError(f"moe_layers: {shown(listed)}: a model can say every n-th layer only")
    local = "num_local_experts", "intermediate_size"
    experts = _experts(keys, *local, shared=1, every=step, router="sigmoid")
    if step > 1:
        made["mlp"] = keys.count("intermediate_size_mlp")
    return {**made, "biases": _attention_biases(keys), "experts": experts}


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    shared = keys.count("shared_expert_intermediate_size")
    made = _qwen_moe(keys, shared=1, shared_mlp=shared, shared_gate=True)
    windows = _last_layers(keys, made["layers"])
    return {**made, "biases": {"qkv": keys.flag("qkv_bias")}, "windows": windows}


def _qwen3_next(keys: Keys) -> dict[str, Any]:
    shared = keys.count("shared_expert_intermediate_size")
    made = _qwen_moe(keys, shared=1, shared_mlp=shared, shared_gate=True)
    every, types = keys.count("full_attention_interval", least=2), keys["layer_types"]
    usual = [
        "full_attention" if layer % every == every - 1 else "linear_attention"
        for layer in range(made["layers"])
    ]
    if types not in (None, usual):
        raise FileError(
            f"layer_types: {shown(types)}: a model can say that every {every}th layer has full "
            "attention, and others linear; no others"
        )
    delta = {
        "key_heads": keys.count("linear_num_key_heads"),
        "value_heads": keys.count("linear_num_value_heads"),
        "key_dim": keys.count("linear_key_head_dim"),
        "value_dim": keys.count("linear_value_head_dim"),
        "taps": keys.count("linear_conv_kernel_dim"),
        "every": every,
    }
    biases = _attention_biases(keys)
    normed = {"qk_norm": True, "output_gate": True, "biases": biases}
    return {**made, **normed, "delta": delta}


def _olmo2(keys: Keys) -> dict[str, Any]:
    return {
        **_dense(keys),
        "biases": _attention_biases(keys),
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "qk_norm_over": "heads",
    }


def _olmo3(keys: Keys) -> dict[str, Any]:
    made = _olmo2(keys)
    windows = _layer_windows(keys, made["layers"], lambda layer: (layer + 1) % 4 != 0)
    return {**made, "windows": windows}


def _phi(keys: Keys) -> dict[str, Any]:
    return {
        **_dense(keys),
        "gated_mlp": False,
        "norm": "layernorm",
        "biases": True,
        "parallel_block": True,
        "head_bias": True,
        "qk_norm": keys.flag("qk_layernorm"),
    }


def _gpt_neox(keys: Keys) -> dict[str, Any]:
    parallel = keys.flag("use_parallel_residual")
    embed, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    return {
        "family": "decoder",
        "layers": keys.count("num_hidden_layers", most=MOST_LAYERS),
        "embed": embed,
        "heads": heads,
        "head_dim": head_dim(keys, embed, heads),
        "mlp": keys.count("intermediate_size"),
        "vocab": keys.count("vocab_size"),
        "sequence": min(TOKENS, keys.count("max_position_embeddings")),
        "activation": activation(keys, "hidden_act"),
        "causal": True,
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "positions": "rotary",
        "biases": {**_attention_biases(keys), "mlp": True, "norm": True},
        "parallel_block": parallel,
        "parallel_norms": parallel,
    }


def _deepseek(keys: Keys, router: str) -> dict[str, Any]:
    made = _dense(keys)
    heads, rotary = made["heads"], keys.count("qk_rope_head_dim")
    for key, usual in (("attention_bias", False), ("moe_layer_freq", 1)):
        if keys[key] != usual:
            raise FileError(f"{key}: {shown(keys[key])} is not modelled; {usual} is")
    if made["kv_heads"] != heads:
        raise FileError(f"num_key_value_heads: latent attention has as many as heads, {heads}")
    experts = _experts(
        keys,
        "n_routed_experts",
        shared=keys.count_or("n_shared_experts", 0),
        dense_layers=keys.count("first_k_dense_replace", least=0),
        router=router,
    )
    latent = {
        "queries": keys.count_or("q_lora_rank", 0),
        "keys": keys.count("kv_lora_rank"),
        "rotary": rotary,
        "values": keys.count("v_head_dim"),
    }
    width = keys.count("qk_nope_head_dim") + rotary
    return {**made, "head_dim": width, "latent": latent, "experts": experts}


def _deepseek_v32(keys: Keys) -> dict[str, Any]:
    index = {
        name: keys.count(f"index_{own}")
        for name, own in (("heads", "n_heads"), ("head_dim", "head_dim"), ("top", "topk"))
    }
    return {**_deepseek(keys, "sigmoid"), "index": index}


def _gpt2(keys: Keys) -> dict[str, Any]:
    if keys["add_cross_attention"]:
        raise FileError("add_cross_attention: attention to an encoder is not modelled; false is")
    embed, heads = keys.count("n_embd"), keys.count("n_head")
    return {
        "family": "decoder",
        "layers": keys.count("n_layer", most=MOST_LAYERS),
        "embed": embed,
        "heads": heads,
        "head_dim": head_dim(keys, embed, heads),
        "mlp": keys.count_or("n_inner", 4 * embed),
        "vocab": keys.count("vocab_size"),
        "sequence": keys.count("n_positions"),
        "activation": activation(keys, "activation_function"),
        "causal": True,
        "tied_embeddings": keys.flag("tie_word_embeddings"),
        "positions": "learned",
        "biases": True,
    }


FAMILIES: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma4_text": _gemma4,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    "deepseek_v2": partial(_deepseek, router="softmax"),
    "deepseek_v3": partial(_deepseek, router="sigmoid"),
    "deepseek_v32": _deepseek_v32,
    "kimi_k2": partial(_deepseek, router="sigmoid"),
    "qwen2_moe": _qwen2_moe,
    "qwen3_next": _qwen3_next,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi": _phi,
    "gpt_neox": _gpt_neox,
    "phi3": _mistral,
    "gpt2": _gpt2,
}
# Kinds that no options of a model can say, and why.
REFUSED: Mapping[str, str] = {
    "olmo": "its norms have no weights; a model's norms have a scale",
    "phimoe": "experts beside norms and an output head with biases, in a router of its own",
    **dict.fromkeys(
        ("umt5", "bart", "mbart", "marian", "pegasus", "whisper", "longt5"),
        "an encoder and a decoder with positions or norms of another kind than T5's",
    ),
    **dict.fromkeys(
        ("bert", "roberta", "deberta", "deberta-v2", "modernbert", "distilbert", "electra"),
        "an encoder of tokens; a model can say decoders, and encoders of images",
    ),
    **dict.fromkeys(
        ("mamba", "mamba2", "rwkv", "jamba", "recurrent_gemma", "falcon_mamba"),
        "layers that keep a recurrent state of another kind than the gated delta rule's",
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"),
        "embeddings of each layer, and layers that share keys and values; a model has neither",
    ),
    **dict.fromkeys(
        ("clip_text_model", "siglip_text_model", "siglip2_text_model"),
        "a tower of text without an output head; a model of tokens has one",
    ),
}
