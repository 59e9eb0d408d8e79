"""Plans that nobody chose: drawn by number, compiled for what they hold in HBM.

Rules of HBM name the programs that they were read off. What they are worth for another program
shows in plans that no rule was read off: these, whose rows stand in a file of their own
(`python -m shardsim.xla.tpu.held --drawn`). A plan is drawn without a look at what is predicted.
"""

from __future__ import annotations

from random import Random
from typing import Any

from shardsim.errors import PlanError
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.layout import EMBED_SHARDED, SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data

SEEDS, EACH = (18, 19, 20, 21), 30
MODELS = (
    *("llama3.2-1b", "llama3.2-3b", "llama2-13b", "mistral-7b", "qwen2.5-7b", "qwen3-14b"),
    *("olmo2-7b", "phi-3-medium", "gemma-7b", "gemma2-2b", "gemma2-27b", "gemma3-4b"),
    *("pythia-6.9b", "gpt-neox-20b", "gpt2-xl", "palm-8b", "maxtext-32b", "vit-l-16"),
    *("vit-h-14", "dinov2-g-14", "siglip-so400m-14", "mae-l-16"),
)
MACHINES = ("v4:2x2x4", "v4:4x4x4", "v5p:2x2x4", "v5p:4x4x4", "v5e:4x8", "v5e:8x8")
POLICIES = ("full", "full", "dots", "save_attention", "save_qkv", "save_mlp")
TOKENS = (4096, 8192, 16384, 32768)  # of a device


def drawn() -> dict[str, dict[str, Plan]]:
    """Return the first `EACH` legal plans that each of `SEEDS` gives, by group and kind."""
    found = dict[str, dict[str, Plan]]()
    for place, seed in enumerate(SEEDS):
        random = Random(seed)
        for index in range(EACH):
            plan = None
            while plan is None:
                plan = _one(random, place * EACH + index)
            found.setdefault(f"{plan.model.name} on {plan.machine.name}", {})[plan.name] = plan
    return found


def _one(random: Random, index: int) -> Plan | None:
    """Return a plan as drawn, or none if it is not legal."""
    name, machine = random.choice(MODELS), parse_machine(random.choice(MACHINES))
    model, chips = load_model(name), machine.devices
    tensor = random.choice((1, 1, 4, 8))
    data = random.choice((1, 1, 2, 4))
    context = random.choice((1, 1, 1, 4)) if model.causal else 1
    residual = random.choice((SEQUENCE_SHARDED, EMBED_SHARDED))
    tokens, microbatches = random.choice(TOKENS), random.choice((1, 1, 1, 2, 4))
    sequence = random.choice((2048, 4096)) if model.causal else model.sequence
    mesh = {"data": data, "fsdp": chips // (data * context * tensor), "context": context}
    mesh = {axis: size for axis, size in {**mesh, "model": tensor}.items() if size > 1}
    per_device = max(1, round(tokens / sequence)) * microbatches
    given: dict[str, Any] = {
        "name": f"drawn {index}",
        "model": name,
        "machine": machine.name,
        "batch": per_device * chips // (context * tensor),
        "sequence": sequence,
        "mesh": mesh,
        "rules": rules_data(mesh, residual=residual),
        "remat": random.choice(POLICIES),
        "microbatches": microbatches,
        "attention": random.choice(("flash", "flash", "unfused")),
        "optimizer": random.choice(("adamw", "adamw", "adafactor")),
        "overlap": {
            "matmul": random.choice(("bidirectional", "off")) if tensor > 1 else "off",
            "weights": random.random() < 0.75,
            "gradients": False,
            "dcn": False,
        },
    }
    if context > 1:
        given["context"] = {"order": "contiguous"}
    try:
        return plan_from_data(given, given["name"])
    except (PlanError, KeyError):
        return None
