"""The tiny plans whose compiled programs are in `data/`."""

from __future__ import annotations

import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from shardsim.plan import Plan, plan_from_data
from shardsim.plan.resolve import rules_data
from shardsim.xla.hlo import CompiledProgram, read_hlo

FOLDER = Path(__file__).parent / "data"

_SIZES = {"layers": 3, "embed": 512, "mlp": 1024, "heads": 8, "head_dim": 64}
_VIT = {
    **_SIZES,
    "name": "vit",
    "family": "vit",
    "kv_heads": 8,
    "sequence": 64,
    "patch": 4,
    "image": 32,
    "parallel_block": True,
    "qk_norm": True,
    "pooling": "map",
    "classes": 128,
    "biases": {"attention_output": True, "mlp": True},
}
_LLAMA = {
    **_SIZES,
    "name": "llama",
    "family": "decoder",
    "kv_heads": 4,
    "sequence": 256,
    "vocab": 1024,
    "causal": True,
    "gated_mlp": True,
    "activation": "silu",
    "norm": "rmsnorm",
    "positions": "rotary",
}
_INSIDE = {axis: ["model"] for axis in ("heads", "mlp", "vocab")}

DATA: dict[str, dict[str, Any]] = {
    # Collective matmuls in both directions, weights over the other axis.
    "vit-explicit": {
        "model": _VIT,
        "machine": "v4:2x2x2",
        "batch": 64,
        "mesh": {"fsdp": 2, "model": 4},
        "remat": "full",
        "optimizer": "adafactor",
    },
    # Weights over all devices, gathered asynchronously; a loop of layers in a loop of microbatches.
    "llama-microbatches": {
        "model": _LLAMA,
        "machine": "v5e:4x4",
        "batch": 128,
        "mesh": {"fsdp": 16},
        "remat": "full",
        "microbatches": 2,
        # In bf16 the compiler (libtpu 0.0.42.1) stops with an internal error, in its pass
        # while-loop-all-reduce-code-motion.
        "precision": {"reduce": "f32"},
    },
    # Gathers and scatters are called on the SparseCore; attention is a kernel.
    "llama-sparsecore": {
        "model": _LLAMA,
        "machine": "tpu7x:2x2x1",
        "batch": 64,
        "mesh": {"fsdp": 8},
        "remat": "full",
    },
    # The compiler chooses the collectives.
    "llama-partitioned": {
        "model": {**_LLAMA, "vocab": 512},
        "machine": "v5e:4x4",
        "batch": 64,
        "mesh": {"data": 2, "fsdp": 4, "model": 2},
        "rules": {
            "parameters": {"embed": ["fsdp"], **_INSIDE},
            "activations": {"batch": ["data", "fsdp"], **_INSIDE},
        },
        "remat": "none",
        "execution": "partitioned",
    },
    # Causal attention in JAX's splash kernels: two blocks of queries and of keys, all recomputed.
    "llama-splash": {
        "model": {**_LLAMA, "sequence": 1024, "heads": 4, "kv_heads": 2, "head_dim": 128},
        "machine": "v5e:2x2",
        "batch": 8,
        "mesh": {"fsdp": 4},
        "remat": "full",
        "attention": "flash",
    },
}


def plan_of(name: str) -> Plan:
    """Return the plan of a sample; where it says no rules, the usual ones."""
    data = {"name": name, "op_costs": "physical", "rules": rules_data(DATA[name]["mesh"])}
    return plan_from_data(data | DATA[name], name)


# The program `matmuls`: a few products and every kind of collective, on this mesh of v5e:4x4.
MATMULS_MESH = {"a": 4, "b": 4}
ROWS, INNER, COLUMNS, BATCH = 256, 384, 512, 6


NAMES = (*DATA, "matmuls")


@lru_cache
def text_of(name: str) -> str:
    """Return the text of a sample; its file begins with a line that names the versions."""
    text = lzma.decompress((FOLDER / f"{name}.hlo.xz").read_bytes()).decode()
    return text.partition("\n")[2]


def mesh_of(name: str) -> dict[str, int]:
    """Return the mesh of a sample."""
    if name == "matmuls":
        return MATMULS_MESH
    return {axis.name: axis.size for axis in plan_of(name).mesh}


@lru_cache
def compiled(name: str) -> CompiledProgram:
    """Return a sample, read."""
    return read_hlo(text_of(name), mesh_of(name))
