"""The plans of the compiled blocks: experts, windows, latents, stacks, conditions, adapters.

Models that people train, on small slices of every generation. Their rows stand in a file of their
own beside the evidence of `cases`, whose statistics they have no part in.
"""

from __future__ import annotations

from typing import Any

from shardsim.plan import Plan, plan_from_data
from shardsim.plan.layout import SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data

_CAPACITY = {
    "base": "mixtral-8x7b",
    "experts": {"number": 8, "top_k": 2, "mlp": 14336, "capacity": 1.25},
}
# The index of DeepSeek V3.2 in a smaller model, without experts.
_INDEX = {
    "base": "deepseek-v2-lite",
    "experts": None,
    "latent": {"queries": 1536, "keys": 512, "rotary": 64, "values": 128},
    "index": {"heads": 64, "head_dim": 128, "top": 2048},
}
# Llama 4's attention in a smaller model: chunks of a sequence, and every fourth layer sees all.
_CHUNKS = {"base": "llama3-8b", "windows": [2048, 2048, 2048, 0], "chunked": True}
_ADAPTERS = {"base": "llama3-8b", "lora": {"rank": 16}}
_ROOM, _RING = {"padding": 2}, {"exchange": "ring", "padding": 2}


def _plan(
    model: str | dict[str, Any], machine: str, batch: int, mesh: dict[str, int], **more: Any
) -> dict[str, Any]:
    matmul = "bidirectional" if "model" in mesh else "off"
    overlap = {"matmul": matmul, "weights": True, "gradients": False, "dcn": False}
    given = {"model": model, "machine": machine, "batch": batch, "mesh": mesh}
    rules = rules_data(mesh, residual=SEQUENCE_SHARDED)
    return {**given, "rules": rules, "overlap": overlap, "remat": "full", **more}


# "Group: kind" -> what the plan's file says.
KINDS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b on v5p:4x4x4: dropless, fsdp": _plan(
        "mixtral-8x7b", "v5p:4x4x4", 256, {"fsdp": 64}, sequence=4096
    ),
    "llama3-8b on tpu7x:2x2x2: adapters, fsdp": _plan(
        _ADAPTERS, "tpu7x:2x2x2", 32, {"fsdp": 16}, sequence=8192
    ),
    "mae-l-16 on v6e:4x4: fsdp": _plan("mae-l-16", "v6e:4x4", 2048, {"fsdp": 16}),
    "t5-xxl on v4:4x4x4: encoder and decoder, fsdp": _plan(
        "t5-xxl", "v4:4x4x4", 1024, {"fsdp": 64}, attention="unfused"
    ),
    "cappa-b-16 on v5e:4x4: captioner, fsdp": _plan("cappa-b-16", "v5e:4x4", 1024, {"fsdp": 16}),
    "siglip-so400m on v5e:4x4: towers, fsdp": _plan("siglip-so400m", "v5e:4x4", 1024, {"fsdp": 16}),
    "mixtral-8x7b on v6e:8x8: capacity 1.25, exchanged": _plan(
        _CAPACITY, "v6e:8x8", 128, {"fsdp": 8, "expert": 8}, sequence=4096
    ),
    "deepseek-v2-lite on tpu7x:2x2x2: ring of experts": _plan(
        "deepseek-v2-lite",
        "tpu7x:2x2x2",
        32,
        {"fsdp": 2, "expert": 8},
        sequence=4096,
        experts=_RING,
    ),
    "pali-17b on v4:4x4x4: frozen tower, fsdp": _plan(
        "pali-17b", "v4:4x4x4", 512, {"fsdp": 64}, attention="unfused"
    ),
    "gemma2-9b on v6e:8x8: windows, fsdp": _plan(
        "gemma2-9b", "v6e:8x8", 64, {"fsdp": 64}, sequence=8192
    ),
    "gemma2-9b on v5p:4x4x4: windows, tensor": _plan(
        "gemma2-9b", "v5p:4x4x4", 128, {"fsdp": 16, "model": 4}, sequence=8192
    ),
    "mixtral-8x7b on v5p:4x4x4: dropless, exchanged": _plan(
        "mixtral-8x7b", "v5p:4x4x4", 256, {"fsdp": 8, "expert": 8}, sequence=4096, experts=_ROOM
    ),
    "deepseek-v2-lite on v6e:8x8: latents, dropless, fsdp": _plan(
        "deepseek-v2-lite", "v6e:8x8", 128, {"fsdp": 64}, sequence=4096
    ),
    "deepseek-v2-lite on v5p:2x4x4: index of tokens, fsdp": _plan(
        _INDEX, "v5p:2x4x4", 32, {"fsdp": 32}, sequence=4096
    ),
    "llama3-8b on v5p:2x2x4: attention in chunks, fsdp": _plan(
        _CHUNKS, "v5p:2x2x4", 16, {"fsdp": 16}, sequence=8192
    ),
    "dit-xl-2 on v5e:4x4: fsdp": _plan(
        "dit-xl-2", "v5e:4x4", 512, {"fsdp": 16}, attention="unfused"
    ),
    "softmoe-b-16-128e on v5p:2x2x4: exchanged": _plan(
        "softmoe-b-16-128e", "v5p:2x2x4", 1024, {"fsdp": 2, "expert": 8}, attention="unfused"
    ),
}


def blocks() -> dict[str, dict[str, Plan]]:
    """Return the plans by group and kind, in the order in which they are compiled."""
    found: dict[str, dict[str, Plan]] = {}
    for name, keys in KINDS.items():
        group, _, kind = name.partition(": ")
        found.setdefault(group, {})[kind] = plan_from_data({"name": name, **keys}, name)
    return found
