"""Why a collective or a copy of someone's program is not what was asked for, and what removes it.

JAX names an operation after the function that made it: a collective that the program itself calls
for ends in `all_gather`, `psum`, ...; one that the compiler's partitioner adds is named like the
operation for whose sake it is there. Those move arrays that are split one way where they are made
and another where they are used. Weights (and other arguments) that are stored split are gathered
for use because their own sharding says so; that is expected, unless all of them come at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardsim.xla.hlo.collect import CompiledCollective
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import FREE_TARGETS, KINDS, UNARY

# How names of JAX's own collectives begin.
_CALLED = re.compile(
    r"(?:all_gather|psum|pmean|pmax|pmin|pbroadcast|ppermute|pshuffle|reduce_scatter|all_to_all"
    r"|ragged_all_to_all|pgather|pcast|unreduced)\w*$"
)
_ASKED = frozenset(("sharding_constraint", "reshard", "mesh_cast", "device_put"))
_PASSES = UNARY | frozenset(
    "bitcast reshape transpose dynamic-slice slice copy-start copy-done slice-start slice-done"
    " dynamic-slice-start dynamic-slice-done async-start async-done async-update call-start"
    " call-done all-gather all-gather-start all-gather-done".split()
)
LARGE = 1 / 32  # of a device's HBM, gathered whole
USUAL_HBM_BYTES = 16 * 2**30
_FARTHEST = 64  # instructions between a use and an argument
_U = "P.UNCONSTRAINED"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why something is unexpected (empty: it is not), and the constraint that would remove it."""

    why: str = ""
    constraint: str = ""
    argument: str = ""  # of the program, where it is one that is gathered


class Reasons:
    """Judges the collectives and copies of a module."""

    def __init__(self, module: Module, hbm_bytes: float | None, slice_devices: int | None) -> None:
        self.module = module
        self._slice_devices = slice_devices
        self._hbm_bytes = hbm_bytes or USUAL_HBM_BYTES
        self._items = {item.name: item for item in module.homes}
        self._loops = {
            item.attribute("body").removeprefix("%"): item
            for item in module.homes
            if item.opcode == "while"
        }

    def operation(self, name: str) -> Instruction:
        """Return the operation that has a name; of a collective in a fusion or a call its own."""
        outer, _, inner = name.partition("/")
        return self._inner(self._items[outer], inner)

    def collective(self, found: CompiledCollective) -> Reason:
        """Return what is unexpected of a collective."""
        inner = self.operation(found.name)
        if inner.opcode == "send":
            return Reason()  # between slices, as the mesh says
        last = (inner.op_name or found.op_name).rpartition("/")[2]
        if found.kind == "all-reduce" and found.origin == "all-gather":
            return Reason(
                why="a gather that is compiled as a sum of zeros: it sends twice the bytes",
                constraint="compiler option xla_tpu_prefer_async_allgather_to_allreduce=true",
            )
        if _CALLED.match(last) or last in _ASKED:
            return Reason()
        axes = _axes(found.mesh_axes)
        if found.kind == "all-reduce" and found.origin == "reduce-scatter":
            if found.members == self._slice_devices:
                return Reason(
                    why="a scatter over the whole slice, which the TPU compiler writes as a sum: "
                    "it sends twice the bytes",
                    constraint="a second mesh axis for the batch, so that no group is the whole "
                    "slice",
                )
            return Reason(
                why="each device reads only its own part of the sum: a reduce-scatter sends half",
                constraint=f"with_sharding_constraint on the sum, split over {axes} as the array "
                "that it updates",
            )
        if found.kind == "all-gather":
            return self._gather(found, inner)
        ring = len(found.mesh_axes) == 1 and {abs(shift) for shift in found.shifts} == {1}
        if found.kind == "all-to-all" or (found.kind == "permute" and not ring):
            shape = inner.shape.arrays[0].form
            return Reason(
                why=f"resharded: an array (here {shape}) is split one way where it is made, "
                "another where it is used",
                constraint=f"with_sharding_constraint with one spec on both sides of {last or 'it'}"
                f", or keep {axes} off the dimension that {last or 'it'} changes",
            )
        return Reason()

    def copy(self, item: Instruction) -> Reason:
        """Return why an array is laid out anew, and in which layout it is wanted."""
        result = item.shape.arrays[0]
        order = ",".join(str(dim) for dim in reversed(result.minor_to_major))
        comma = "," if len(result.dims) == 1 else ""
        return Reason(
            why=f"laid out anew: {result.form} is wanted in another order of its dimensions",
            constraint="jax.experimental.layout.with_layout_constraint(x, "
            f"Layout(major_to_minor=({order}{comma}))) where it is made",
        )

    def _gather(self, found: CompiledCollective, inner: Instruction) -> Reason:
        home = self.module.homes[self._items[found.name.partition("/")[0]]]
        item = self._items[found.name.partition("/")[0]]
        argument, loops = self.argument(home, item.operands[0] if item.operands else item.name)
        size = found.array_bytes
        constraint = f"jax.lax.with_sharding_constraint(x, {_spec(inner, found)})"
        if argument is None:
            return Reason(
                why="an activation is gathered whole: it is split where it is made, whole where it "
                "is used",
                constraint=f"{constraint} keeps it split",
            )
        if not loops and size > LARGE * self._hbm_bytes and self._enters_loop(home, item):
            return Reason(
                why=f"all of {argument} is gathered at once, before the loop that takes it piece by"
                " piece",
                constraint=f"{constraint} on the piece inside the loop",
                argument=argument,
            )
        if size > 4 * LARGE * self._hbm_bytes:
            return Reason(
                why=f"all of {argument} ({size / 2**30:.1f} GiB) is gathered on every device",
                constraint=f"{constraint} where it is used",
                argument=argument,
            )
        return Reason(argument=argument)

    def argument(self, home: Computation, name: str) -> tuple[str | None, int]:
        """Return the argument of the program that a value is, or a piece of it, and the loops in
        which it stands; None where something is computed on the way."""
        loops = 0
        for _ in range(_FARTHEST):
            item = home[name]
            if item.opcode == "parameter":
                if home.name == self.module.entry:
                    return (item.op_name or name).replace("\\'", "'"), loops
                return None, loops
            if item.opcode == "get-tuple-element":
                source = home.operand(item, 0)
                place = int(item.attribute("index"))
                if source.opcode == "parameter" and (loop := self._loops.get(home.name)):
                    kept = home[home.root]
                    same = kept.opcode == "tuple" and _element(home, kept.operands[place], place)
                    outside = self.module.homes[loop]
                    state = outside.operand(loop, 0)
                    if not same or state.opcode != "tuple":
                        return None, loops
                    home, name = outside, state.operands[place]
                    loops += 1
                    continue
                if source.opcode != "tuple":
                    return None, loops
                name = source.operands[place]
            elif item.operands and (item.opcode in _PASSES or _only_says(item)):
                name = item.operands[0]
            elif item.opcode == "fusion" and self._passes(item):
                name = max(item.operands, key=lambda operand: home[operand].shape.count)
            else:
                return None, loops
        return None, loops

    def _passes(self, item: Instruction) -> bool:
        """Return whether a fusion takes a piece of one array, or another format of it."""
        free = _PASSES | {"parameter", "constant", "tuple", "get-tuple-element", "partition-id"}
        inside = self.module.called(item).instructions.values()
        small = (one.shape.count <= 1 for one in inside if one.opcode not in free)
        return bool(item.operands) and all(small)

    def _enters_loop(self, home: Computation, item: Instruction) -> bool:
        """Return whether a value goes into a loop, itself or in another form."""
        level, seen = [item], {item.name}
        for _ in range(4):
            users = [user for one in level for user in home.users[one.name]]
            if any(user.opcode == "while" for user in users):
                return True
            ways = _PASSES | {"tuple", "fusion", "get-tuple-element"}
            level = [user for user in users if user.opcode in ways and user.name not in seen]
            seen.update(user.name for user in level)
        return False

    def _inner(self, item: Instruction, wanted: str) -> Instruction:
        """Return the collective itself, where `item` is a fusion or a call around one."""
        for _ in range(3):
            if item.opcode.removesuffix("-start") in KINDS or not item.called:
                break
            inner = self.module.computations[item.called[0]]
            inside = [one for one in inner.instructions.values() if one.opcode in KINDS]
            item = next(
                (one for one in inside if not wanted or one.name == wanted), inner[inner.root]
            )
        return item


def _only_says(item: Instruction) -> bool:
    """Return whether a custom call only says something about its operands, or joins them."""
    return item.attributes.get("custom_call_target", "")[1:-1] in FREE_TARGETS


def _element(home: Computation, name: str, place: int) -> bool:
    """Return whether a value is the element of a loop's state that stands at `place`."""
    item = home[name]
    return item.opcode == "get-tuple-element" and item.attribute("index") == str(place)


def _axes(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def _spec(inner: Instruction, found: CompiledCollective) -> str:
    """Return the spec that keeps the dimension split along which an array is gathered."""
    dims = len(inner.shape.arrays[-1].dims)
    split = _axes(found.mesh_axes)
    split = f"({split})" if len(found.mesh_axes) > 1 else split
    along = inner.numbers("dimensions")
    return f"P({', '.join(split if place in along else _U for place in range(dims))})"
