"""Meshes in other people's trainers, all of which leave the placement to JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardsim.errors import PlanError
from shardsim.plan import Plan
from shardsim.plan.layout import Layout
from shardsim.plan.placement import place


@dataclass(frozen=True)
class MeshShape:
    """The axes of a mesh, major to minor, with their sizes inside a slice and over slices."""

    names: tuple[str, ...]
    inside: tuple[int, ...]
    slices: tuple[int, ...]
    split: bool  # some axis takes a part of a torus axis
    remarks: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes over the whole job."""
        return tuple(a * b for a, b in zip(self.inside, self.slices, strict=True))


def mesh_shape(plan: Plan, trainer: str, *, several_slices: bool) -> MeshShape:
    """Return the plan's mesh as a trainer takes it; raise `PlanError` for what it would change.

    JAX's `create_device_mesh` decides which torus axes a mesh axis lies on, from the sizes alone;
    where the plan wants others, its predicted times do not hold for the trainer. Where a torus
    axis must be split, JAX decides how, and a remark says so.
    """
    machine = plan.machine
    if machine.slices > 1 and not several_slices:
        raise PlanError(
            f"export to {trainer}: {machine.name} has {machine.slices} slices, and {trainer} "
            "builds its mesh over one; export to maxtext instead"
        )
    over = [axis.torus.get("dcn", 1) for axis in plan.mesh]
    inside = {axis.name: axis.size // s for axis, s in zip(plan.mesh, over, strict=True)}
    lengths = {axis.name: axis.length for axis in machine.axes}
    split = any(
        part not in (1, lengths[torus])
        for axis in plan.mesh
        for torus, part in axis.torus.items()
        if torus != "dcn"
    )
    remarks = []
    if split:
        remarks.append("some mesh axes take parts of a torus axis; JAX decides which parts")
    else:
        for axis, placed in zip(plan.mesh, place(inside, replace(machine, slices=1)), strict=True):
            wanted = {name: n for name, n in axis.torus.items() if n > 1 and name != "dcn"}
            if dict(placed.torus) != wanted:
                raise PlanError(
                    f"export to {trainer}: mesh axis '{axis.name}' lies on {_torus(wanted)} in the "
                    f"plan, but JAX's create_device_mesh, which {trainer} calls, would lay it on "
                    f"{_torus(placed.torus)}; leave torus out of the plan's mesh to lay it so"
                )
    return MeshShape(
        names=tuple(inside),
        inside=tuple(inside.values()),
        slices=tuple(over),
        split=split,
        remarks=tuple(remarks),
    )


def _torus(factors: Mapping[str, int]) -> str:
    return " ".join(f"{name}{n}" for name, n in factors.items()) or "nothing"


def rename_axes(layout: Layout, mesh: MeshShape, own: Mapping[str, str]) -> dict[str, str]:
    """Return the trainer's name of each mesh axis: `own[role]` for a role with one axis.

    Other axes keep their names unless the trainer means something else by them.
    """
    renamed = {}
    roles = {name: role for role, names in layout.names.items() for name in names}
    for name in mesh.names:
        role = roles.get(name, "")
        if role in own and len(layout.names[role]) == 1:
            renamed[name] = own[role]
        else:
            renamed[name] = f"plan_{name}" if name in own.values() else name
    return renamed
