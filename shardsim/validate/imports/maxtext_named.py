"""What `model_name` says already: keys beside it that would make it another model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from shardsim.carried import BOTH, Keys, NotCarried
from shardsim.errors import shown
from shardsim.model import Model
from shardsim.validate.imports.maxtext_blocks import activated

# The block of MaxText's own file of a name; the first that matches.
_BLOCKS = (
    (r"llama[23]", "llama2"),
    (r"llama4", "llama4"),
    (r"mistral", "mistral"),
    (r"mixtral", "mixtral"),
    (r"gemma-", "gemma"),
    (r"gemma2", "gemma2"),
    (r"gemma3", "gemma3"),
    (r"gemma4", "gemma4"),
    (r"gpt3", "gpt3"),
    (r"gpt-oss", "gpt_oss"),
    (r"qwen2", "qwen2"),
    (r"qwen3-next", "qwen3_next"),
    (r"qwen3\.5", "qwen3_5"),
    (r"qwen3-.*-a\d+b", "qwen3_moe"),
    (r"qwen3-", "qwen3"),
    (r"olmo3", "olmo3"),
    (r"deepseek", "deepseek"),
)


def _of(part: str, field: str) -> Callable[[Model], object]:
    """Return what reads a field of a part of a model; none where the model has no such part."""
    return lambda model: getattr(getattr(model, part), field, None)


def _content(model: Model) -> object:
    return model.head_dim - model.latent.rotary if model.latent else None


# Keys that a block counts where a model has what they say, and what the model says.
_SAYS: Mapping[str, Callable[[Model], object]] = {
    "use_qk_norm": lambda model: model.qk_norm,
    "use_post_attn_norm": lambda model: model.post_norms,
    "use_post_ffw_norm": lambda model: model.post_norms or model.mlp_post_norm,
    "attention_bias": _of("biases", "qkv"),
    "mlp_bias": _of("biases", "mlp"),
    "attention_sink": lambda model: model.sinks,
    "sliding_window_size": lambda model: max(model.windows, default=0),
    "interleave_moe_layer_step": _of("experts", "every"),
    "first_num_dense_layers": _of("experts", "dense_layers"),
    "shared_experts": _of("experts", "shared"),
    "routed_bias": _of("experts", "router_bias"),
    "q_lora_rank": _of("latent", "queries"),
    "kv_lora_rank": _of("latent", "keys"),
    "qk_rope_head_dim": _of("latent", "rotary"),
    "qk_nope_head_dim": _content,
    "v_head_dim": _of("latent", "values"),
    "global_num_kv_heads": _of("global_heads", "kv_heads"),
    "global_head_dim": _of("global_heads", "head_dim"),
    "share_kv_projections": _of("global_heads", "values_are_keys"),
}


def said_of(keys: Keys, model: Model, name: str) -> dict[str, object]:
    """Return what MaxText's own file of a name says beside sizes: its block, and its MLP."""
    own: dict[str, object] = {}
    found = [block for start, block in _BLOCKS if re.match(start, name)]
    if found and "decoder_block" in keys.given:
        own["decoder_block"] = found[0]
    if "mlp_activations" in keys.given and not name.startswith("gpt-oss"):  # its block fixes it
        same = activated(keys) == {"activation": model.activation, "gated_mlp": model.gated_mlp}
        words = [model.activation, "linear"][: 1 + model.gated_mlp]
        own["mlp_activations"] = keys["mlp_activations"] if same else words
    return own


def otherwise(keys: Keys, model: Model, said: Mapping[str, object]) -> list[NotCarried]:
    """Return the keys by which a config asks for another model than its name, unread so far."""
    left = []
    if "decoder_block" in keys.given and said.get("decoder_block") != keys["decoder_block"]:
        left.append(_not_taken("decoder_block", keys["decoder_block"], said.get("decoder_block")))
    for key, says in _SAYS.items():
        own = says(model)
        if key in keys.given and key not in keys.read and own and keys.given[key] != own:
            left.append(_not_taken(key, keys[key], own))
    return left


def _not_taken(key: str, value: object, own: object) -> NotCarried:
    stays = f"its {shown(own)} stays" if own else "its own stays"
    return NotCarried(key, value, f"model_name says the model; {stays}", BOTH)
