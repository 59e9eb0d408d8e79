"""`export --to flax`: logical axis rules, for people who have their own Flax model.

Flax resolves a tuple of logical names with rules tried in order; a mesh axis serves one dimension
of an array only, and a rule whose mesh axes are taken is passed over (flax.linen
`logical_to_mesh_axes`). A name without a rule is replicated without a word, so `flax_code` checks
with `resolve_names`, which does the same, that the rules give the plan's own specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardsim.emit.jax_code import header, literal, module_text
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan

Rules = list[tuple[str, tuple[str, ...]]]

# The logical names of each kind of activation.
ACTIVATION_NAMES: dict[str, tuple[str, ...]] = {
    "residual": ("act_batch", "act_residual_tokens", "act_residual_embed"),
    "input": ("act_batch", "act_tokens", "act_embed"),
    "wide": ("act_batch", "act_tokens", "act_mlp"),
    "keys": ("act_batch", "act_tokens", "act_kv_heads"),
    "logits": ("act_batch", "act_tokens", "act_vocab"),
}

_USAGE = """# Flax NNX:
#   with jax.set_mesh(build_mesh(PLAN)), nnx.logical_axis_rules(RULES):
#       model = Model(...)   # weights made with nnx.with_partitioning(init, PARAMETERS["query"])
# Flax linen:
#   with jax.set_mesh(build_mesh(PLAN)), nn.logical_axis_rules(RULES):
#       ...                  # nn.with_logical_partitioning(init, PARAMETERS["query"])
#       x = nn.with_logical_constraint(x, ACTIVATIONS["residual"])
# `with mesh:` instead of jax.set_mesh switches the rules off without a word on current Flax."""


def flax_code(plan: Plan) -> str:
    """Return a Python file with mesh, RULES, and the logical names of weights and activations."""
    data = plan_data(plan)
    rules, parameters = logical_rules(data)
    imports = (
        "import itertools\nimport math\nfrom dataclasses import dataclass\nfrom typing import Any"
    )
    text = module_text("config")
    body = text[text.index("# What the plan") :].rstrip()
    return "\n\n".join(
        [
            header(plan) + "\n#\n" + _USAGE,
            f"from __future__ import annotations\n\n{imports}\n\nimport jax\nimport numpy as np",
            f"RULES = {literal(tuple(rules))}",
            f"PARAMETERS = {literal(parameters)}",
            f"ACTIVATIONS = {literal(ACTIVATION_NAMES)}",
            f"PLAN = {literal(data['plan'])}",
            body + "\n",
        ]
    )


def logical_rules(data: dict[str, Any]) -> tuple[Rules, dict[str, tuple[str, ...]]]:
    """Return the rules of a plan, and the logical names of each weight's dimensions.

    Raises `PlanError` if some array would not resolve to the plan's spec.
    """
    meaning: dict[str, tuple[str, ...]] = {}
    arrays: list[tuple[str, tuple[str, ...], Spec]] = []
    parameters = {}
    for name, entry in data["parameters"].items():
        vector = len(entry["axes"]) == 1
        axes = ["norm" if axis == "embed" and vector else axis for axis in entry["axes"]]
        names = tuple((["layers"] if entry["part"] == "block" else []) + axes)
        parameters[name] = names
        arrays.append((name, names, entry["spec"]))
    for kind, names in ACTIVATION_NAMES.items():
        arrays.append((kind, names, data["activations"][kind]))
    for _, names, spec in arrays:
        for logical, by in zip(names, spec, strict=True):
            meaning.setdefault(logical, tuple(by))
    # Inner dimensions first: where two names of an array share a mesh axis, they keep it.
    order = ("heads", "kv_heads", "mlp", "vocab")
    rules = sorted(
        ((logical, by) for logical, by in meaning.items() if by),
        key=lambda rule: (order.index(rule[0]) if rule[0] in order else len(order), rule[0]),
    )
    for what, names, spec in arrays:
        found = resolve_names(names, rules)
        if found != spec:
            raise PlanError(
                f"export to flax: {what} {names} would lie as {found}, not {spec}: two of its "
                "dimensions share a logical name; export to jax instead"
            )
    return rules, parameters


def resolve_names(names: Sequence[str], rules: Rules) -> Spec:
    """Return the spec that Flax makes of logical names under `rules`.

    >>> rules = [("embed", ("model",)), ("embed", ("data",)), ("mlp", ("model",))]
    >>> resolve_names(("embed", "mlp"), rules)
    [['model'], []]
    """
    spec: list[list[str] | None] = [None] * len(names)
    taken: set[str] = set()
    for logical, axes in rules:
        if logical not in names:
            continue
        at = names.index(logical)
        if spec[at] is None and not taken & set(axes):
            spec[at] = list(axes)
            taken |= set(axes)
    return [axes or [] for axes in spec]
