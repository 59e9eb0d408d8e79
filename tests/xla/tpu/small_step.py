"""A small plan that the TPU compiler takes a few seconds for.

Twice as wide it takes three times as long. Two layers of this size crash it for v4: it fuses
gathers into matmuls, and those would be too small for two cores (`BarrierMegacore in primary or
secondary region`).
"""

from __future__ import annotations

from typing import Any

from shardsim.plan import Plan, plan_from_data

MODEL = {
    "name": "small",
    "family": "vit",
    "layers": 1,
    "embed": 256,
    "mlp": 256,
    "heads": 2,
    "head_dim": 128,
    "kv_heads": 2,
    "sequence": 64,
    "patch": 4,
    "image": 32,
    "pooling": "mean",
    "classes": 16,
}


def small_plan(machine: str = "v4:2x2x1", **more: Any) -> Plan:
    """Return a plan of a small ViT on four chips."""
    data = {
        "name": "small plan",
        "model": MODEL,
        "machine": machine,
        "batch": 32,
        "mesh": {"fsdp": 4},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
        "remat": "full",
        "attention": "unfused",
    }
    return plan_from_data({**data, **more}, "small plan")
