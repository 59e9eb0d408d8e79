"""A plan from a mesh whose axes are roles: `fsdp=256,data=4`, as the search would write it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardsim.errors import PlanError, nearest
from shardsim.machine import Machine
from shardsim.model import Model
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, ROLES, SEQUENCE_SHARDED
from shardsim.plan.placement import place
from shardsim.plan.plan import Overlap, Plan, Routing
from shardsim.plan.resolve import AXIS_NAMES, ROLE_OF, rules_by_name
from shardsim.planner.attention import default_attention, with_faster
from shardsim.planner.fixed import ROOM


def parse_mesh(text: str, option: str = "--mesh") -> dict[str, int]:
    """Read a mesh: the size of each role that has one; `option` begins every message.

    >>> parse_mesh("fsdp=256, model=4")
    {'fsdp': 256, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        word, _, size = (piece.strip() for piece in part.partition("="))
        if not (word and re.fullmatch("[0-9]{1,9}", size) and int(size)):
            raise PlanError(f"{option}: '{part[:40]}': expected role=size, such as fsdp=256,data=4")
        if word not in ROLE_OF:
            raise PlanError(f"{option}: no role '{word[:40]}'{nearest(word, ROLE_OF)}")
        if ROLE_OF[word] in sizes:
            raise PlanError(f"{option}: role '{ROLE_OF[word]}' appears twice")
        sizes[ROLE_OF[word]] = int(size)
    return sizes


def plan_of_mesh(
    model: Model,
    machine: Machine,
    batch: int,
    mesh: Mapping[str, int] | None = None,
    sequence: int | None = None,
) -> Plan:
    """Return the plan of a mesh of roles, with what its file could leave out as the search has it.

    The residual stream is split along the sequence over a tensor axis that divides it, else along
    embed, else whole; context shards weights too; a pipeline has one microbatch a stage. A mesh
    may be left out where there is one device. Whether everything divides is not checked here.
    """
    if mesh is None:
        if machine.devices > 1:
            raise PlanError(
                f"--mesh: missing; name the roles of the {machine.devices:,} devices of "
                f"{machine.name}, such as fsdp={machine.devices}"
            )
        mesh = {"data": 1}
    if mesh.get("expert", 1) > 1 and model.experts is None:
        raise PlanError(f"--mesh: {model.name} has no experts; leave out expert={mesh['expert']}")
    sequence = model.sequence if sequence is None else sequence
    used = [role for role in ROLES if mesh.get(role, 1) > 1] or ["data"]
    axes = place({AXIS_NAMES[role]: mesh.get(role, 1) for role in used}, machine)
    uneven = model.experts is not None and model.experts.dropless and "expert" in used
    parameters, activations, optimizer = rules_by_name(
        {axis.name for axis in axes}, residual=usual_residual(model, sequence, mesh)
    )
    plan = Plan(
        name="-".join([model.name, *(f"{axis.name}{axis.size}" for axis in axes)]),
        model=model,
        machine=machine,
        batch=batch,
        sequence=sequence,
        mesh=axes,
        parameters=parameters,
        activations=activations,
        optimizer_rules=optimizer,
        microbatches=mesh.get("pipeline", 1),
        attention=default_attention(model, sequence),
        overlap=Overlap(gradients=False),  # as the search has it
        experts=Routing(padding=ROOM) if uneven else Routing(),
    )
    return with_faster(plan)


def usual_residual(model: Model, sequence: int, mesh: Mapping[str, int]) -> int:
    """Return how the residual stream lies over the tensor axis of a mesh of roles."""
    tensor = mesh.get("tensor", 1)
    if sequence % (mesh.get("context", 1) * tensor) == 0:
        return SEQUENCE_SHARDED
    return REPLICATED if model.embed % (mesh.get("tensor2", 1) * tensor) else EMBED_SHARDED
