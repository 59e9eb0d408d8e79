"""The plans of the compiled techniques: a small model in each way to split a step that is emitted.

Sequence parallelism of every kind, ZeRO stages and accumulation, pipelines, rows of several
sequences: one decoder on sixteen chips, a video on as many. Their rows stand in a file of their own
beside the evidence of `cases`, whose statistics they have no part in.
"""

from __future__ import annotations

from typing import Any

from shardsim.plan import Plan, plan_from_data
from shardsim.plan.resolve import rules_data

MACHINE = "v5p:2x2x4"
GROUP = f"techniques on {MACHINE}"

_DECODER: dict[str, Any] = {
    "name": "decoder-1b",
    "family": "decoder",
    "layers": 8,
    "embed": 2048,
    "mlp": 8192,
    "heads": 16,
    "head_dim": 128,
    "kv_heads": 8,
    "vocab": 32000,
    "sequence": 8192,
    "causal": True,
    "gated_mlp": True,
    "activation": "silu",
    "norm": "rmsnorm",
    "positions": "rotary",
}
_VIDEO: dict[str, Any] = {
    "name": "video-1b",
    "family": "vit",
    "layers": 8,
    "embed": 2048,
    "mlp": 8192,
    "heads": 16,
    "head_dim": 128,
    "kv_heads": 16,
    "patch": 2,
    "image": 64,
    "channels": 4,
    "frames": 16,
    "predicts": 8,
    "positions": "fixed",
    "attends": ["space", "time"],
}
_BY_CONTEXT = {"mesh": {"fsdp": 4, "context": 4}}
_SHARDED = {"mesh": {"fsdp": 16}}
_HYBRID = {"mesh": {"data": 4, "fsdp": 4}}
_STAGED = {"mesh": {"stage": 4, "fsdp": 4}, "microbatches": 8}
_SHORT = {"distribution": "log_normal", "mean": 1500, "deviation": 1200, "as": "packed"}

# Kind of plan -> what its file says besides model, machine and batch, or in their place.
KINDS: dict[str, dict[str, Any]] = {
    "keys gathered, striped": {**_BY_CONTEXT, "context": {"order": "striped"}},
    "ring, striped": {**_BY_CONTEXT, "context": {"keys": "ring", "order": "striped"}},
    "ring, contiguous, no overlap": {
        **_BY_CONTEXT,
        "context": {"keys": "ring", "order": "contiguous", "overlap": False},
    },
    "zero-2, 4 microbatches": {**_SHARDED, "microbatches": 4, "accumulation": "scattered"},
    "frames and locations switched": {**_BY_CONTEXT, "context": {"keys": "dsp"}}
    | {"model": _VIDEO, "batch": 32},
    "ulysses": {**_BY_CONTEXT, "context": {"keys": "ulysses"}},
    "layered, 4 microbatches": {**_SHARDED, "microbatches": 4, "accumulation": "layered"},
    "stages, gpipe": {**_STAGED, "pipeline_schedule": "gpipe"},
    "stages, one forward, one back": {**_STAGED, "pipeline_schedule": "1f1b-ticks"},
    "rows of several sequences": {**_SHARDED, "lengths": _SHORT},
    "hybrid, queries, keys and values in the host's memory": _HYBRID
    | {"remat": {"offload": ["qkv"]}},
    "zero-1, 4 microbatches": {**_SHARDED, "microbatches": 4, "accumulation": "gathered"},
    "zero-3, 4 microbatches": {**_SHARDED, "microbatches": 4},
    "stages dealt round, gpipe": {**_STAGED, "pipeline_schedule": "gpipe"}
    | {"pipeline_interleave": 2},
    "hybrid": _HYBRID,
}


def techniques() -> dict[str, Plan]:
    """Return the plans by kind, in the order in which they are compiled."""
    found = {}
    for kind, keys in KINDS.items():
        data = {
            "name": f"{GROUP}: {kind}",
            "model": _DECODER,
            "machine": MACHINE,
            "batch": 64,
            "remat": "full",
            "rules": rules_data(keys["mesh"]),
            **keys,
        }
        found[kind] = plan_from_data(data, kind)
    return found
