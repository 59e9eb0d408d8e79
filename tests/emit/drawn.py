"""Plans drawn from a number: blocks of every shape over one tensor axis or two."""

from __future__ import annotations

from random import Random
from typing import Any

from plans import MODELS, make
from shardsim.plan import Plan

_BIASES = {"qkv": True, "attention_output": True, "mlp": True}
_MESHES = (
    {"fsdp": 2, "model2": 2, "model": 2},
    {"fsdp": 2, "context": 2, "model": 2},
    {"fsdp": 2, "model": 4},
)


def drawn(number: int) -> Plan:
    """Return a plan on eight devices; of the even numbers it has norms behind parallel branches."""
    pick = Random(number).choice
    parallel = number % 2 == 0 or pick([True, False])
    MODELS[f"drawn-{number}"] = {
        **MODELS["gemma"],
        "name": f"drawn-{number}",
        "parallel_block": parallel,
        "post_norms": number % 2 == 0 or pick([True, False]),
        "kv_heads": pick([1, 2, 4, 8]),
        "gated_mlp": pick([True, False]),
        "norm": pick(["rmsnorm", "layernorm"]),
        "positions": pick(["rotary", "learned"]),
        "qk_norm": pick([True, False]),
        "biases": pick([{}, _BIASES]),
    }
    mesh = pick(_MESHES)
    second = [axis for axis in mesh if axis == "model2"]
    stream = {"embed": second, "seq": [axis for axis in mesh if axis == "context"]}
    split = pick(["", "embed", "seq"])
    stream = {key: [*axes, *(["model"] if key == split else [])] for key, axes in stream.items()}
    inside = {axis: ["model"] for axis in ("heads", "mlp", "vocab")}
    more: dict[str, Any] = {
        "overlap": {"matmul": pick(["off", "unidirectional", "bidirectional"])},
        "remat": pick(["full", "none", "dots", "save_mlp", "save_context"]),
        "attention": pick(["flash", "unfused"]),
        "microbatches": pick([1, 2]),
        "fused_projections": parallel and pick([True, False]),
    }
    activations = {key: axes for key, axes in stream.items() if axes} | {"batch": ["fsdp"]}
    parameters = {"embed": ["fsdp", *second], **inside}
    return make(f"drawn-{number}", dict(mesh), parameters, activations, **more)
