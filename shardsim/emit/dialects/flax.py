"""`export --to flax` and `--to flax-linen`: logical axis rules, for people's own Flax models.

The logical names are the plan's own axes; a stack of layers adds `layers` in front. `flax_code`
resolves the rules as Flax does and refuses an export that would lose a sharding.
"""

from __future__ import annotations

from typing import Any

from shardsim.emit.dialects.python_file import mesh_module
from shardsim.emit.dialects.rules import Array, Rule, check_rules, compare, order_rules, resolve_nnx
from shardsim.emit.jax_code import header
from shardsim.emit.specs import plan_data
from shardsim.plan import Plan

# The logical names of each kind of activation.
ACTIVATION_NAMES: dict[str, tuple[str, ...]] = {
    "residual": ("act_batch", "act_residual_tokens", "act_residual_embed"),
    "input": ("act_batch", "act_tokens", "act_embed"),
    "wide": ("act_batch", "act_tokens", "act_mlp"),
    "keys": ("act_batch", "act_tokens", "act_kv_heads"),
    "logits": ("act_batch", "act_tokens", "act_vocab"),
}
_INNER = ("heads", "kv_heads", "mlp", "vocab")

_USAGE = {
    "flax": """#   with jax.set_mesh(build_mesh(PLAN)), nnx.logical_axis_rules(RULES):
#       model = Model(...)   # whose weights are nnx.Param(init, sharding=PARAMETERS["query"])
# Weights are laid out as they are made, so make them inside. Scanned layers: nnx.vmap with
# transform_metadata={nnx.PARTITION_NAME: "layers"} adds that name, so leave it out there.""",
    "flax-linen": """#   with jax.set_mesh(build_mesh(PLAN)), nn.logical_axis_rules(RULES):
#       ...                  # nn.with_logical_partitioning(init, PARAMETERS["query"])
#       x = nn.with_logical_constraint(x, ACTIVATIONS["residual"])
# Scanned layers: nn.scan with metadata_params={nn.PARTITION_NAME: "layers"} adds that name, so
# leave it out there. nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, RULES)
# gives the shardings to start with.""",
}
_WARNING = """# `with mesh:` instead of jax.set_mesh switches the rules off unnoticed since 0.12.2.
# Remat and microbatches are the model's and the trainer's: PLAN has them, nothing here runs one."""


def flax_code(plan: Plan, form: str = "flax") -> str:
    """Return a Python file with mesh, RULES, and the logical names of weights and activations."""
    data = plan_data(plan)
    rules, parameters = logical_rules(data)
    return mesh_module(
        f"{header(plan)}\n#\n{_USAGE[form]}\n{_WARNING}",
        ("import jax", "import numpy as np"),
        {
            "RULES": tuple((name, axes or None) for name, axes in rules),
            "PARAMETERS": parameters,
            "ACTIVATIONS": ACTIVATION_NAMES,
            "PLAN": data["plan"],
        },
    )


def logical_rules(data: dict[str, Any]) -> tuple[list[Rule], dict[str, tuple[str, ...]]]:
    """Return the rules of a plan, and the logical names of each weight's dimensions.

    Raises `PlanError` if some array would not resolve to the plan's spec.
    """
    parameters = {}
    arrays = []
    for name, entry in data["parameters"].items():
        vector = len(entry["axes"]) == 1
        axes = ["norm" if axis == "embed" and vector else axis for axis in entry["axes"]]
        parameters[name] = tuple((["layers"] if entry["part"] == "block" else []) + axes)
        arrays.append(Array.of(name, parameters[name], entry["spec"]))
    for kind, names in ACTIVATION_NAMES.items():
        arrays.append(Array.of(kind, names, data["activations"][kind], activation=True))
    rules = order_rules(arrays, _INNER)
    # NNX takes a name without a rule for a mesh axis.
    named = {name for name, _ in rules}
    whole = {name for array in arrays for name in array.names if name and name not in named}
    rules += [(name, ()) for name in sorted(whole)]
    check_rules(arrays, rules, "flax")
    for array in arrays:
        compare(array, resolve_nnx(array.names, rules), "flax")
    return rules, parameters
