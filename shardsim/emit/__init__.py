"""Plans as executable JAX, Flax rules or plain data. JAX is imported only where it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from shardsim.emit.dialects.axlearn import axlearn_code
from shardsim.emit.dialects.big_vision import big_vision_code
from shardsim.emit.dialects.flax import flax_code
from shardsim.emit.dialects.keras import keras_code
from shardsim.emit.dialects.levanter import levanter_code
from shardsim.emit.dialects.maxtext_file import maxtext_code
from shardsim.emit.dialects.specs import specs_code
from shardsim.emit.jax_code import jax_code
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import described, plan_data
from shardsim.errors import PlanError, nearest
from shardsim.plan import Plan, PlanOrPath, as_plan, resolve

__all__ = ["FORMS", "build_mesh", "export_plan", "plan_data", "shardings", "shrink", "trainer"]


def _json(plan: Plan) -> str:
    return json.dumps(described(plan), indent=2) + "\n"


def _yaml(plan: Plan) -> str:
    text: str = yaml.safe_dump(described(plan), sort_keys=False, default_flow_style=None, width=96)
    return text


FORMS: dict[str, Callable[[Plan], str]] = {
    "jax": jax_code,
    "specs": specs_code,
    "flax": flax_code,
    "flax-linen": lambda plan: flax_code(plan, "flax-linen"),
    "maxtext": maxtext_code,
    "big_vision": big_vision_code,
    "keras": keras_code,
    "axlearn": axlearn_code,
    "levanter": levanter_code,
    "json": _json,
    "yaml": _yaml,
}
OWN_FORMS = ("jax", "specs", "json", "yaml")  # of no other trainer
CONTEXT_FORMS = (*OWN_FORMS, "maxtext")  # that can say how a context axis attends
HOST_FORMS = ("jax", "json", "yaml", "maxtext")  # that keep weights or state in the host's memory


def export_plan(plan: PlanOrPath, to: str, trainer_path: Path | None = None) -> str:
    """Return the text of `plan` in one of `FORMS`, a form of data or a trainer's own.

    `trainer_path` is an installed MaxText, whose words are then used.
    """
    plan = as_plan(plan)
    if to not in FORMS:
        raise PlanError(f"export: cannot write {to!r}{nearest(to, FORMS)}")
    model = plan.model
    for what, has in (
        ("latents", model.latent),
        ("linear attention", model.delta),
        ("gates of attention", model.output_gate),
        ("branches of another width", model.branch),
        ("experts", model.experts if to != "maxtext" else None),
        ("sinks", model.sinks),
        ("attention in chunks", model.chunked),
        ("several stacks", len(model.parts) > 1),
        ("adapters", model.lora),
        ("layers after the last whole round of windows", len(model.stacks) > 1),
        ("pixels that are predicted", model.predicts),
        ("a text that layers attend to", model.prompt),
        ("images that are not square", model.width > 0),
        ("videos", model.frames > 1),
        ("norms of another kind for queries and keys", model.qk_norm_kind),
        ("scales of branches' channels", model.layer_scale),
        ("registers", model.registers),
        ("norms behind additions", model.deepnorm),
        ("norms within branches", model.sub_norms),
        ("norms of patches", model.patch_norms),
    ):
        if has and to not in OWN_FORMS:
            raise PlanError(f"export to {to}: {what} of {model.name} are not supported")
    if not (plan.context.plain and not resolve(plan).striped) and to not in CONTEXT_FORMS:
        raise PlanError(
            f"export to {to}: context: it cannot say how a context axis attends, and gathers keys "
            "of contiguous tokens; use {order: contiguous}"
        )
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(plan, key) and to not in HOST_FORMS:
            raise PlanError(f"export to {to}: {key}: export of true is not supported; leave it out")
    if plan.accumulation != "repeated" and to not in OWN_FORMS:
        raise PlanError(
            f"export to {to}: accumulation: it has no {plan.accumulation} one; leave the key out"
        )
    if to not in OWN_FORMS and int(resolve(plan).pipeline.size) > 1:
        raise PlanError(
            f"export to {to}: pipeline stages are not supported; name no axis for layers in "
            "rules.parameters"
        )
    if plan.lengths is not None and to not in OWN_FORMS:
        raise PlanError(
            f"export to {to}: lengths are not supported: how rows are filled is for its input; "
            "leave the key out"
        )
    if trainer_path is None:
        return FORMS[to](plan)
    if to != "maxtext":
        raise PlanError(f"export: trainer path: only maxtext's words are read, not those of {to}")
    return maxtext_code(plan, trainer_path)


def build_mesh(plan: Plan, devices: list[Any] | None = None) -> Any:
    """Return the plan's `jax.sharding.Mesh` over `devices`, or over all there are."""
    from shardsim.emit.runtime.config import build_mesh as build

    return build(plan_data(plan)["plan"], devices)


def trainer(plan: Plan, mesh: Any = None) -> Any:
    """Return the `Trainer` that the exported train.py has; without a mesh it runs unsharded."""
    from shardsim.emit.runtime.train import Trainer

    return Trainer(plan_data(plan), mesh)


def shardings(plan: Plan, mesh: Any = None) -> dict[str, dict[str, Any]]:
    """Return the `NamedSharding` of every parameter, its optimizer state, and each activation.

    Keys: parameters, optimizer (both by name of the weight), activations (by kind).
    """
    from jax.sharding import NamedSharding

    from shardsim.emit.runtime.partitioned import to_spec

    data = plan_data(plan)
    mesh = build_mesh(plan) if mesh is None else mesh
    specs = {
        "parameters": {name: entry["spec"] for name, entry in data["parameters"].items()},
        "optimizer": {name: entry["optimizer_spec"] for name, entry in data["parameters"].items()},
        "activations": data["activations"],
    }
    return {
        what: {name: NamedSharding(mesh, to_spec(spec)) for name, spec in of.items()}
        for what, of in specs.items()
    }
