"""The collectives of a module: kind, groups, bytes, and which of them run beside other work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardsim.program.schedule import PARAMETER_PURPOSES, Move
from shardsim.xla.hlo.between import Part
from shardsim.xla.hlo.calls import offloaded
from shardsim.xla.hlo.check import results_of
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.groups import form_of, permute_of
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import KINDS
from shardsim.xla.hlo.scopes import purpose_of
from shardsim.xla.hlo.sources import named, source_of

_CHAIN = re.compile(r'chain_id="(\d+)"')
_ORIGINS = {
    "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter",
    "all_gather": "all-gather",
}
# Words that JAX's names of the collectives of weights hold, for those that lost their own name.
_WANTED = {"all-gather": "gather", "reduce-scatter": "scatter"}


@dataclass(frozen=True, kw_only=True)
class CompiledCollective:
    """One collective instruction of a compiled program."""

    name: str
    kind: str
    mesh_axes: tuple[str, ...]
    parts: tuple[tuple[str, int, int], ...]  # axes taken in part: name, members, stride
    members: int
    regular: bool  # whether its groups are a grid on the mesh
    shifts: tuple[int, ...]  # of a permute
    array_bytes: float  # the whole array, as `Move.bytes`
    origin: str  # what an all-reduce stands for: "all-gather", "reduce-scatter"
    op_name: str
    source: str  # "explicit.py:67 Explicit.whole_weight"
    block: str
    count: int  # times in one run of the program
    asynchronous: bool  # whether something may run meanwhile

    @property
    def sent_bytes(self) -> float:
        """What one device sends, each time."""
        return sent_bytes(self.kind, self.array_bytes, self.members)

    @property
    def purpose(self) -> str:
        """What it is for, as far as its name tells."""
        return purpose_of(self.op_name)

    def move(self) -> Move:
        """Return it as a task.

        Gathers and scatters that became all-reduces often lose their name; those seen were all of
        weights.
        """
        lost = self.origin and self.purpose not in PARAMETER_PURPOSES
        return Move(
            name=self.name,
            kind=self.kind,
            bytes=self.array_bytes,
            purpose="weights" if lost else self.purpose,
            mesh_axes=self.mesh_axes,
            parts=self.parts if self.regular else (),
            shifts=self.shifts,
            source=self.source,
        )


def sent_bytes(kind: str, array_bytes: float, devices: int) -> float:
    """Return what one device sends for a collective of a whole array of `array_bytes`.

    V (n - 1)/n for an all-gather, reduce-scatter or all-to-all of V bytes over n devices, twice
    that for an all-reduce, all of it for a permute or a broadcast.

    >>> sent_bytes("all-reduce", 1024, 4)
    1536.0
    """
    if kind in ("permute", "broadcast"):
        return float(array_bytes)
    share = (devices - 1) / devices
    return array_bytes * share * (2.0 if kind == "all-reduce" else 1.0)


def chain_of(item: Instruction) -> str:
    """Return the number of the asynchronous chain that a collective belongs to, or nothing."""
    match = _CHAIN.search(item.attributes.get("frontend_attributes", ""))
    return match[1] if match else ""


def custom_target(module: Module, item: Instruction) -> str:
    """Return the target of a custom call, or of the one that a fusion ends with."""
    if item.opcode == "fusion":
        inner = module.called(item)
        return custom_target(module, inner[inner.root])
    return item.attributes.get("custom_call_target", '""')[1:-1]


def read_collective(
    module: Module,
    item: Instruction,
    mesh: Mapping[str, int],
    *,
    block: str,
    count: int,
    asynchronous: bool,
    inside: Instruction | None = None,
    slices: Sequence[Part] = (),
) -> CompiledCollective | None:
    """Return a collective of more than one member, or None where it moves nothing.

    `item` is the operation itself, one that is started, or a fusion around one; `inside` says which
    one where a fusion holds more. It stands in `block` and runs `count` times. Of axes that go over
    `slices` too the mesh has what is inside of one.
    """
    inner, holder = _operation(module, item) if inside is None else (inside, None)
    kind = KINDS[inner.opcode.removesuffix("-start")]
    results = results_of(inner)
    array_bytes = sum(shape.bytes for shape in results)
    parts: tuple[tuple[str, int, int], ...] = ()
    shifts: tuple[int, ...] = ()
    regular = True
    over = {axis for axis, _, _ in slices}
    if kind == "permute":
        permute = permute_of(inner.attribute("source_target_pairs"), mesh)
        axes, shifts, members = permute.axes, permute.shifts, 2 if permute.axes else 1
    else:
        form = form_of(inner.attribute("replica_groups"), mesh)
        axes, members, regular = form.axes, form.size, form.regular
        parts = tuple(
            (part.axis, part.members, part.stride)
            for part in form.parts
            if part.members != mesh[part.axis] or part.axis in over
        )
    if members == 1:
        return None
    if kind == "reduce-scatter":
        array_bytes *= members
    elif kind == "all-reduce" and holder is not None:
        kind = _fused_kind(inner, holder, item, members)
    origin = "" if kind != "all-reduce" else _origin(module, item, inner, members)
    told = named(module, item, _WANTED.get(origin or kind, ""))
    shared = inside is not None and len(_collectives(module, item)) > 1
    return CompiledCollective(
        name=f"{item.name}/{inner.name}" if shared else item.name,
        kind=kind,
        mesh_axes=axes,
        parts=parts,
        members=members,
        regular=regular,
        shifts=shifts,
        array_bytes=array_bytes,
        origin=origin,
        op_name=told.op_name,
        source=source_of(module, told),
        block=block,
        count=count,
        asynchronous=asynchronous,
    )


def _operation(module: Module, item: Instruction) -> tuple[Instruction, Computation | None]:
    """Return the collective in `item`, and the computation that holds it if `item` is a fusion."""
    if item.opcode == "call-start" or "async_execution_thread" in item.attributes:
        return offloaded(module, item)[1], None
    if item.opcode not in ("fusion", "async-start"):
        return item, None
    inner, found = module.called(item), _collectives(module, item)
    if len(found) != 1:
        raise HloError(f"%{item.name}: {len(found)} collectives in one operation", item.line)
    return found[0], inner if item.opcode == "fusion" and not chain_of(found[0]) else None


def _collectives(module: Module, item: Instruction) -> list[Instruction]:
    """Return the collectives that a fusion or a started computation holds."""
    return [one for one in module.called(item).instructions.values() if one.opcode in KINDS]


def _fused_kind(inner: Instruction, holder: Computation, item: Instruction, members: int) -> str:
    """Return what a fused all-reduce is: with a slice for each member, a reduce-scatter.

    The compiler's emitter sends each member only its own part ("SingleInputAllReduceScatter").
    """
    root = holder[holder.root]
    parts = [root]
    if root.opcode == "tuple":
        parts = [holder.operand(root, place) for place in range(len(root.operands))]
    if not all(_own_part(inner, holder, part, members) for part in parts):
        raise HloError(f"%{item.name}: a fusion with an all-reduce in it", item.line)
    return "reduce-scatter"


def _own_part(inner: Instruction, holder: Computation, part: Instruction, members: int) -> bool:
    """Return whether `part` is one member's slice of an array that `inner` gives."""
    if part.opcode != "dynamic-slice":
        return False
    whole = holder.operand(part, 0)
    given = whole if whole.opcode != "get-tuple-element" else holder.operand(whole, 0)
    return given.name == inner.name and part.shape.count * members == whole.shape.count


def _origin(module: Module, item: Instruction, inner: Instruction, members: int) -> str:
    """Return which collective the compiler turned into this all-reduce, if that can be seen.

    A gather becomes a sum of zeros with one member's part in each place; of a scatter each
    member reads only its own part of the sum.
    """
    last = inner.op_name.rpartition("/")[2]
    if last in _ORIGINS:
        return _ORIGINS[last]
    computation = module.homes[item]
    sources = [computation.operand(item, place) for place in range(len(item.operands))]
    sources = [source for source in sources if source.shape.dtype != "token"]
    if all(_pads_with_zeros(module, computation, source, members) for source in sources):
        return "all-gather"
    results = [item]
    if item.shape.is_tuple:
        results = computation.users[item.name]
    if all(_only_parts_are_read(module, computation, result, members) for result in results):
        return "reduce-scatter"
    return ""


def _pads_with_zeros(
    module: Module, computation: Computation, source: Instruction, members: int
) -> bool:
    """Return whether an array is zero but for one member's part."""
    if source.opcode == "fusion":
        inner = module.called(source)
        return _pads_with_zeros(module, inner, inner[inner.root], members)
    if source.opcode != "dynamic-update-slice":
        return False
    whole, part = (computation.operand(source, place) for place in (0, 1))
    if whole.opcode != "broadcast" or part.shape.count * members != whole.shape.count:
        return False
    value = computation.operand(whole, 0)
    return value.opcode == "constant" and value.literal == "0"


def _only_parts_are_read(
    module: Module, computation: Computation, result: Instruction, members: int
) -> bool:
    """Return whether each member reads no more of a result than its own part."""
    users = computation.users[result.name]
    share = result.shape.count / members
    return bool(users) and all(
        _largest_read(module, computation, result, user) <= share for user in users
    )


def _largest_read(
    module: Module, computation: Computation, item: Instruction, user: Instruction
) -> int:
    """Return how many elements of `item` its `user` reads at once."""
    if user.opcode == "dynamic-slice":
        return user.shape.count
    if user.opcode != "fusion":
        return item.shape.count
    inner = module.called(user)
    reads = [
        _largest_read(module, inner, inner[name], reader)
        for name, operand in zip(inner.parameters, user.operands, strict=True)
        if operand == item.name
        for reader in inner.users[name]
    ]
    return max(reads, default=0)
