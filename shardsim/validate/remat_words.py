"""What a row's words say about rematerialisation, in MaxText's, JAX's and Megatron's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.plan.remat import Remat

# MaxText's and others' names of tensors that a remat policy keeps.
TENSORS: Mapping[str, tuple[str, ...]] = {
    "decoder_layer_input": ("layer_input",),
    "layer_input": ("layer_input",),
    "qkv": ("qkv",),
    "qkv_proj": ("qkv",),
    "q": ("qkv",),
    "k": ("qkv",),
    "v": ("qkv",),
    "q_proj": ("qkv",),
    "k_proj": ("qkv",),
    "v_proj": ("qkv",),
    "query_proj": ("qkv",),
    "key_proj": ("qkv",),
    "value_proj": ("qkv",),
    "context": ("context",),
    "out_proj": ("attention_output",),
    "o_proj": ("attention_output",),
    "attention_out": ("attention_output",),
    "mlpwi": ("mlp_hidden",),
    "mlpwi_0": ("mlp_hidden",),
    "mlpwi_1": ("mlp_hidden",),
    "mlpwo": ("mlp_output",),
}
_DOTS = frozenset({"qkv", "attention_output", "mlp_hidden", "mlp_output"})
_FULL = Remat()
_NONE = Remat(save=_DOTS | {"context", "rest"})
_MINIMAL = Remat(save=_DOTS)
_WITH_CONTEXT = Remat(save=_DOTS | {"context"})
REMAT_POLICIES: Mapping[str, Remat] = {
    "none": _NONE,
    "everything_saveable": _NONE,
    "full": _FULL,
    "nothing_saveable": _FULL,
    "minimal": _MINIMAL,
    "minimal_with_quantization": _MINIMAL,
    "dots": _MINIMAL,
    "dots_saveable": _WITH_CONTEXT,
    "checkpoint_dots": _WITH_CONTEXT,
    "dots_with_no_batch_dims_saveable": _MINIMAL,
    "checkpoint_dots_with_no_batch_dims": _MINIMAL,
    "minimal_flash": _WITH_CONTEXT,
    "minimal_with_context": _WITH_CONTEXT,
    "minimal_with_context_and_quantization": _WITH_CONTEXT,
    "selective": _WITH_CONTEXT,
    "save_dot_except_mlp": Remat(save=frozenset({"qkv", "attention_output"})),
    "save_dot_except_mlpwi": Remat(save=frozenset({"qkv", "attention_output", "mlp_output"})),
    "save_dot_with_context_except_mlp": Remat(
        save=frozenset({"qkv", "context", "attention_output"})
    ),
    "save_qkv_proj": Remat(save=frozenset({"qkv"})),
    "save_out_proj": Remat(save=frozenset({"attention_output"})),
    "qkv_proj_offloaded": Remat(offload=frozenset({"qkv"})),
    "minimal_offloaded": Remat(offload=_DOTS),
}
_NO = ("no", "off", "false", "disabled", "without")
_YES = ("true", "yes", "on", "block", "layer", "layers", "uniform", "every", "all", "per")


def remat_of(said: Any) -> tuple[Remat | None, str]:
    """Return the policy that a row's words describe, None if they do not, and a remark on it."""
    if said is None:
        return None, ""
    if isinstance(said, bool):
        return (_FULL if said else _NONE), ""
    words = re.sub(r"\s+", " ", _as_text(said).lower().replace("-", "_")).strip()
    if not words or words.startswith(("unknown", "not stated", "not published", "unstated")):
        return None, ""
    # Megatron's and PyTorch's "full recompute", "selective activation checkpointing".
    tokens = re.findall(r"[a-z_0-9]+", words)
    first = tokens[0] if tokens else ""
    if first == "custom" or _is_list_of_tensors(tokens):
        return _custom(words.removeprefix("custom")), ""
    if first in REMAT_POLICIES:
        return REMAT_POLICIES[first], ""
    if first == "save" or "one activation" in words or "nothing saved" in words:
        return REMAT_POLICIES["full"], ""
    if first in _NO:
        return _NONE, ""
    for name in sorted(REMAT_POLICIES, key=len, reverse=True):
        if name in tokens:
            return REMAT_POLICIES[name], ""
    if first in _YES:
        return _FULL, ""
    return None, f"remat: '{words[:60]}' is not known; taken as not stated"


def _as_text(said: Any) -> str:
    """Return a row's entry as one text: `{policy: custom, context: device}` is a list too."""
    if isinstance(said, Mapping):
        policy = next((said[key] for key in ("policy", "name", "remat_policy") if key in said), "")
        rest = [
            f"{key}={' '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in said.items()
            if key not in ("policy", "name", "remat_policy")
        ]
        return f"{policy}: {', '.join(rest)}" if rest else str(policy)
    if isinstance(said, list):
        return "custom: " + ", ".join(map(str, said))
    return str(said)


def _is_list_of_tensors(tokens: list[str]) -> bool:
    return bool(tokens) and tokens[0] in TENSORS


def _custom(words: str) -> Remat:
    """Read `a, b kept on device; c offloaded`, `a=offload, b=device`, `save=a b, offload=c`."""
    kept: set[str] = set()
    offloaded: set[str] = set()
    for clause in re.split(r"[;.]|\band\b", words):
        host = "offload" in clause and "=" not in clause
        target: set[str] | None = None  # of a `save=`, `offload=` list
        for part in re.findall(r"([a-z_0-9]+)(?:\s*[=:]\s*([a-z_0-9]+))?", clause):
            name, where = part
            if name in ("save", "offload") and where:
                target = offloaded if name == "offload" else kept
                target |= set(TENSORS.get(where, ()))
            elif where and name in TENSORS:
                place = {"offload": offloaded, "host": offloaded, "remat": set()}.get(where, kept)
                place |= set(TENSORS[name])
            elif name in TENSORS:
                (target if target is not None else offloaded if host else kept).update(
                    TENSORS[name]
                )
    kept.discard("layer_input")  # always kept: it is what the scan carries
    return Remat(save=frozenset(kept - offloaded), offload=frozenset(offloaded))
