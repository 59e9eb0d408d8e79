"""The links of any group on a mesh: some of its axes, whole or in part.

Planned collectives run over roles; compiled ones over whatever axes the compiler chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardsim.cost.network import Group, Links, group_of
from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.plan.layout import AxisLayout, Layout, whole_axis
from shardsim.plan.plan import Plan
from shardsim.plan.resolve import axis_layout
from shardsim.program.schedule import Move

DCN = -1  # in place of a torus axis

Part = tuple[str, int, int]  # mesh axis, members, stride


@dataclass(frozen=True)
class _Stretch:
    """What a mesh axis takes of one torus axis."""

    torus: int  # into `Machine.axes`, or DCN
    factor: int
    stride: int


@dataclass(frozen=True)
class Route:
    """A group of devices: its links, and which directed ones it keeps busy."""

    group: Group
    layout: AxisLayout
    order: tuple[int, ...]  # its torus axes (or DCN), as the mesh counts members: major first
    ports: frozenset[str]  # "x+", "y-", "dcn"
    hops: int  # of a permute: the most that one block makes along a torus axis


class RoleLinks:
    """Groups of the roles of a layout of a single plan."""

    def __init__(self, machine: Machine, layout: Layout) -> None:
        self.machine = machine
        self.layout = layout
        self._links = Links(machine, layout)

    def route_of(self, task: Move) -> Route:
        """Return the links of a move that names a role."""
        axis = self.layout.role(task.role)
        signs = "+" if task.ways == 1 else "+-"
        torus = zip(self.machine.axes, axis.factors, strict=True)
        ports = {f"{one.name}{sign}" for one, factor in torus if factor > 1 for sign in signs}
        dcn = {"dcn"} if axis.slices > 1 else set()
        used = {"torus": ports, "dcn": dcn}.get(task.stage, ports | dcn)
        return Route(
            group=self._links[task.role], layout=axis, order=(), ports=frozenset(used), hops=1
        )


class MeshLinks:
    """Groups on the mesh of a plan, or of a layout whose roles have one mesh axis each."""

    def __init__(self, machine: Machine, where: Plan | Layout) -> None:
        self.machine = machine
        self._axes = _of_plan(where) if isinstance(where, Plan) else _of_layout(machine, where)
        self._known: dict[tuple[object, ...], Route] = {}

    def route(
        self, mesh_axes: Sequence[str], parts: Sequence[Part] = (), shifts: Sequence[int] = ()
    ) -> Route:
        """Return the links of the group over `mesh_axes`; of those in `parts` it takes a part.

        `shifts` make it a permute that passes over as many members along its one axis.
        """
        key = (tuple(mesh_axes), tuple(parts), tuple(shifts))
        if key not in self._known:
            self._known[key] = self._route(*key)
        return self._known[key]

    def route_of(self, task: Move) -> Route:
        """Return the links of a move that names mesh axes."""
        return self.route(task.mesh_axes, task.parts, task.shifts)

    def _route(
        self, mesh_axes: tuple[str, ...], parts: tuple[Part, ...], shifts: tuple[int, ...]
    ) -> Route:
        taken = {name: (members, stride) for name, members, stride in parts}
        layout = whole_axis(len(self.machine.axes))
        ports: set[str] = set()
        order: list[int] = []
        for name in mesh_axes:
            stretches = self._stretches(name)
            if name in taken:
                stretches = _part(name, stretches, *taken[name])
            layout = layout.joined(_axis_layout(stretches, len(self.machine.axes)))
            ports |= self._ports(stretches, shifts)
            order += [item.torus for item in stretches if item.torus not in order]
        layout = AxisLayout(
            factors=tuple(int(factor) for factor in layout.factors),
            strides=tuple(int(stride) for stride in layout.strides),
            slices=int(layout.slices),
            slice_stride=int(layout.slice_stride),
        )
        hops = 1
        if shifts and len(mesh_axes) == 1:
            hops = max(_hops(self._stretches(mesh_axes[0]), shift) for shift in shifts)
        return Route(
            group=group_of(self.machine, layout),
            layout=layout,
            order=tuple(order),
            ports=frozenset(ports),
            hops=max(hops, 1),
        )

    def _stretches(self, name: str) -> tuple[_Stretch, ...]:
        if name not in self._axes:
            raise PlanError(
                f"replay: no mesh axis '{name}' of its own; the plan has {', '.join(self._axes)}"
            )
        return self._axes[name]

    def _ports(self, stretches: Sequence[_Stretch], shifts: Sequence[int]) -> set[str]:
        """Return the directed links; a permute in one direction uses only that one."""
        signs = {"+" if shift > 0 else "-" for shift in shifts} or {"+", "-"}
        used = [item.torus for item in stretches if item.factor > 1]
        names = [self.machine.axes[torus].name for torus in used if torus != DCN]
        return {name + sign for name in names for sign in signs} | (
            {"dcn"} if DCN in used else set()
        )


def _of_plan(plan: Plan) -> dict[str, tuple[_Stretch, ...]]:
    """Return what each mesh axis takes of the torus, major to minor as the devices are laid."""
    places = {axis.name: place for place, axis in enumerate(plan.machine.axes)} | {"dcn": DCN}
    axes = {}
    for axis in plan.mesh:
        own = axis_layout(plan.machine, plan.mesh, [axis.name])
        axes[axis.name] = tuple(
            _Stretch(
                torus=places[torus],
                factor=factor,
                stride=int(
                    own.slice_stride if places[torus] == DCN else own.strides[places[torus]]
                ),
            )
            for torus, factor in axis.torus.items()
            if factor > 1
        )
    return axes


def _of_layout(machine: Machine, layout: Layout) -> dict[str, tuple[_Stretch, ...]]:
    axes = {}
    for role, names in layout.names.items():
        if len(names) != 1:
            continue
        axis = layout.role(role)
        stretches = [_Stretch(torus=DCN, factor=int(axis.slices), stride=int(axis.slice_stride))]
        stretches += [
            _Stretch(torus=place, factor=int(factor), stride=int(stride))
            for place, (factor, stride) in enumerate(zip(axis.factors, axis.strides, strict=True))
        ]
        axes[names[0]] = tuple(item for item in stretches if item.factor > 1)
    return axes


def _part(
    name: str, stretches: Sequence[_Stretch], members: int, stride: int
) -> tuple[_Stretch, ...]:
    """Return what every `stride`-th of a mesh axis' devices, `members` of them, take."""
    found = []
    for item in reversed(stretches):
        if stride >= item.factor:
            stride, rest = divmod(stride, item.factor)
            if rest:
                break
            continue
        room, rest = divmod(item.factor, stride)
        taken = min(members, room)
        if rest or room % taken or members % taken:
            break
        if taken > 1:
            found.append(_Stretch(torus=item.torus, factor=taken, stride=item.stride * stride))
        members //= taken
        stride = 1
    else:
        if members == 1:
            return tuple(reversed(found))
    raise PlanError(f"replay: a group takes part of '{name}' that does not follow the torus")


def _axis_layout(stretches: Sequence[_Stretch], dims: int) -> AxisLayout:
    factors, strides = [1] * (dims + 1), [1] * (dims + 1)  # the last one is DCN
    for item in stretches:
        factors[item.torus], strides[item.torus] = item.factor, item.stride
    return AxisLayout(
        factors=tuple(factors[:-1]),
        strides=tuple(strides[:-1]),
        slices=factors[-1],
        slice_stride=strides[-1],
    )


def _hops(stretches: Sequence[_Stretch], shift: int) -> int:
    """Return the most steps along one torus axis of blocks that pass over `shift` members."""
    stages = stage_steps([item.factor for item in stretches], shift)
    return max((around for stage in stages for _, around, _ in stage), default=0)


def stage_steps(factors: Sequence[int], shift: int) -> list[list[tuple[int, int, float]]]:
    """Return how far blocks that pass over `shift` members go along each torus axis of a group.

    `factors` are the members along each of them, major to minor. Members count like digits: some
    go one step further than others, where the digits below carry over. Each pair of cases is
    (steps ahead, steps the shorter way around, share of the members).

    >>> stage_steps([8, 4], 3)
    [[(0, 0, 0.25), (1, 1, 0.75)], [(3, 1, 1.0)]]
    """
    rest, below, low = abs(shift), 1, 0
    stages = []
    for factor in reversed(factors):
        rest, digit = divmod(rest, factor)
        carried = low / below
        cases = [(digit, 1.0 - carried), ((digit + 1) % factor, carried)]
        stages.append(
            [(steps, min(steps, factor - steps), share) for steps, share in cases if share > 0]
        )
        low += digit * below
        below *= factor
    return stages[::-1]
