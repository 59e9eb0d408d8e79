"""`export --to specs`: one module with mesh, specs by path, constraints, remat and options.

For a trainer of one's own, with JAX alone. Weights go by the plan's names and by those that common
trainers use; a path that nothing names is told by its shape.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardsim.emit.jax_code import header, literal
from shardsim.emit.source import RUNTIME, module_text
from shardsim.emit.specs import activation_specs, parameter_entries
from shardsim.emit.tpu_options import tpu_options
from shardsim.plan import Plan, resolve

_Axis = tuple[str, int, list[tuple[str, int, int]]]

# What trainers call a weight (Flax, big_vision, MaxText, AXLearn, Levanter, Hugging Face), and a
# word that stands before it in the path where the name alone could be another's.
NAMES: Mapping[str, tuple[str, str]] = {
    "query": ("", "query|wq|q_proj"),
    "key": ("", "key|wk|k_proj"),
    "value": ("", "value|wv|v_proj"),
    "attention_output": ("att", "out|wo|o_proj|out_proj"),
    "mlp_in": ("", "wi|wi_1|up_proj|fc1|fc_in|Dense_0|c_fc"),
    "mlp_gate": ("", "wi_0|gate_proj"),
    "mlp_out": ("mlp|Mlp|ffn|feed_forward", "wo|down_proj|fc2|fc_out|Dense_1|c_proj"),
    "expert_in": ("expert|moe|MoE", "wi|wi_1|w3|up_proj"),
    "expert_gate": ("expert|moe|MoE", "wi_0|w1|gate_proj"),
    "expert_out": ("expert|moe|MoE", "wo|w2|down_proj"),
    "token_embedding": ("", "token_embedder|embedder|embed_tokens|wte"),
    "position_embedding": ("", "pos_embedding|pos_embed|wpe|position_embedder"),
    "patch_embedding": ("", "patch_embed|patchify"),
    "output_head": ("", "lm_head|logits_dense"),
    "router": ("", "gate|router"),
}
_USAGE = """#
#   from THIS_FILE import *
#   mesh = build_mesh()
#   params = jax.device_put(params, shardings(params, mesh))     # state=True for optimizer state
#   with jax.set_mesh(mesh):                                     # in the model:
#       x = constrain(x, "residual")                             # kinds are those of ACTIVATIONS
#       layer = jax.checkpoint(layer, policy=remat_policy())     # names: checkpoint_name(x, "qkv")
#   step = jax.jit(step).lower(params, batch).compile(compiler_options=OPTIONS)
#   assert not check(params, mesh), check(params, mesh)          # which array lies otherwise"""
_FLAT = "flat_"  # of the emitted step alone
_LINE = "# " + "-" * 78 + "\n"
_IMPORTS = """from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Spec = list[list[str]]"""


def specs_code(plan: Plan) -> str:
    """Return the module of a plan. What differs between plans is data, written as literals."""
    layout = resolve(plan)
    weights = list(parameter_entries(plan, layout))
    called = {name.rpartition("/")[2] for name, _ in weights}
    rings = layout.mesh_axes("tensor") + layout.mesh_axes("tensor2")
    rings += layout.mesh_axes("context") if plan.context.keys == "ring" else ()
    axes = list(_axes(plan, rings))
    data = [
        _assigned("PLAN", {"name": plan.name, "machine": plan.machine.name, "batch": plan.batch}),
        "\n# Mesh axes, major first: name, size, and (torus axis, devices, step) that each takes.",
        _assigned("AXES", axes),
        _assigned("RINGS", [name for name, _, parts in axes if name in rings and len(parts) > 1]),
        _assigned("TORUS", [axis.name for axis in plan.machine.axes]),
        "\n# Weights: name, sizes, mesh axes that split each, those of optimizer state, of layers.",
        _assigned(
            "LAYERS", sorted({one["shape"][0] for _, one in weights if one["part"] == "block"})
        ),
        _assigned("WEIGHTS", [(name, *_weight(one)) for name, one in weights]),
        "\n# What else a weight is called: a word before it in the path, and its names.",
        _assigned("NAMES", {name: words for name, words in NAMES.items() if name in called}),
        "\n# Mesh axes that split each dimension of an activation.",
        _assigned(
            "ACTIVATIONS",
            {
                name: spec
                for name, spec in activation_specs(plan, layout).items()
                if not name.startswith(_FLAT)
            },
        ),
        "\n# What each group of layers keeps for the backward pass, by names that the model gives"
        "\n# (statistics: the sums of norms), and the compiler's options.",
        _assigned(
            "REMAT",
            [
                {
                    "layers": group.layers or plan.model.layers,
                    "save": sorted(group.save),
                    "offload": sorted(group.offload),
                }
                for group in plan.remat.groups
            ],
        ),
        _assigned("OPTIONS", tpu_options(plan)),
    ]
    code = module_text(f"{RUNTIME}.laid").partition(_LINE)[2].strip("\n")
    parts = [header(plan) + "\n" + _USAGE, _IMPORTS, "\n".join(data)]
    return (
        "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join([code, *_functions("cycle", "snake")]) + "\n"
    )


def _assigned(name: str, value: Any) -> str:
    return f"{name} = {literal(value)}"


def _axes(
    plan: Plan, rings: Iterable[str]
) -> Iterator[tuple[str, int, list[tuple[str, int, int]]]]:
    """Yield mesh axes with (torus axis, devices of it, step between them); later ones are inner."""
    inner: dict[str, int] = {}
    found = []
    for axis in reversed(plan.mesh):
        parts = [
            (name, factor, inner.get(name, 1)) for name, factor in axis.torus.items() if factor > 1
        ]
        if axis.name in rings and len(parts) > 1:
            parts.sort(key=lambda part: part[1] % 2)  # an even one first: the round trip closes
        for name, factor, _ in parts:
            inner[name] = inner.get(name, 1) * factor
        found.append((axis.name, axis.size, parts))
    yield from reversed(found)


def _weight(entry: Mapping[str, Any]) -> tuple[list[int], Any, Any, list[str]]:
    """Return sizes, spec and spec of the state of one layer's weight, and the spec of layers."""
    stacked = entry["part"] == "block"
    return (
        entry["shape"][stacked:],
        entry["spec"][stacked:],
        entry["optimizer_spec"][stacked:],
        entry["spec"][0] if stacked else [],
    )


def _functions(*names: str) -> list[str]:
    """Return the text of functions that lay rings on the torus."""
    text = module_text(f"{RUNTIME}.config")
    nodes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return [ast.get_source_segment(text, nodes[name]) or "" for name in names]
