"""How often a while loop runs.

JAX's scans count a number of the loop's state up (or down) to a constant. Start, step and limit
are read from the state's first value, the body's result and the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardsim.xla.hlo.errors import HloError, small_number
from shardsim.xla.hlo.module import Computation, Instruction, Module

_SAME = frozenset(("copy", "bitcast", "convert", "reshape"))
_TURNED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclass(frozen=True)
class _Value:
    """A number: element `index` of the loop's state (-1: of nothing) plus `offset`."""

    index: int
    offset: int


_Bound = Mapping[str, _Value | None]


@dataclass(frozen=True)
class Trips:
    """How often a loop runs, and the place of its counter in its state (-1: not known)."""

    count: int
    counter: int


def trips_of(module: Module, computation: Computation, loop: Instruction) -> Trips:
    """Return how often the body of `loop`, an instruction of `computation`, runs."""
    found = _counted(module, computation, loop)
    counted = None if found is None else found.count
    known = loop.config("known_trip_count", "n")
    if known is not None and small_number(str(known), -1) < 0:
        raise HloError(f"%{loop.name}: known_trip_count {known!r}", loop.line)
    if counted is None and known is None:
        raise HloError(f"%{loop.name}: no trip count can be found", loop.line)
    if counted is not None and known is not None and counted != int(known):
        raise HloError(
            f"%{loop.name} counts {counted} trips, but is annotated with {known}", loop.line
        )
    return Trips(int(known), -1) if found is None else found


def _counted(module: Module, computation: Computation, loop: Instruction) -> Trips | None:
    test = module.computations[loop.attribute("condition").removeprefix("%")]
    body = module.computations[loop.attribute("body").removeprefix("%")]
    compared = _compared(module, test, test[test.root], {})
    if compared is None:
        return None
    direction, left, right = compared
    if left.index < 0:
        direction, left, right = _TURNED.get(direction, ""), right, left
    if left.index < 0:
        return None
    result = body[body.root]
    if result.opcode != "tuple":
        return None
    after = _value(module, body, result.operands[left.index], {})
    start = _first(module, computation, loop, left.index)
    limit: int | None = right.offset
    if right.index >= 0:
        kept = _value(module, body, result.operands[right.index], {})
        limit = _first(module, computation, loop, right.index)
        if kept != _Value(right.index, 0) or limit is None:
            return None
        limit += right.offset
    if after is None or after.index != left.index or start is None or limit is None:
        return None
    count = _trips(direction, start + left.offset, after.offset, limit)
    return None if count is None else Trips(count, left.index)


def _trips(direction: str, start: int, step: int, limit: int) -> int | None:
    """Return how often `start`, `start + step`, ... passes the test, or None for no end."""
    if direction == "NE":
        if start == limit:
            return 0
        count, rest = divmod(limit - start, step) if step else (0, 1)
        return count if rest == 0 and count > 0 else None
    if direction not in _TURNED:
        return None
    if direction in ("GT", "GE"):
        start, step, limit = -start, -step, -limit
    last = limit + (direction in ("LE", "GE"))  # the first number that does not pass
    if start >= last:
        return 0
    return -((start - last) // step) if step > 0 else None


def _first(module: Module, computation: Computation, loop: Instruction, index: int) -> int | None:
    """Return what an element of the state is when the loop starts."""
    state = computation.operand(loop, 0)
    if state.opcode != "tuple":
        return None
    value = _value(module, computation, state.operands[index], {})
    return value.offset if value is not None and value.index < 0 else None


def _compared(
    module: Module, computation: Computation, item: Instruction, bound: _Bound
) -> tuple[str, _Value, _Value] | None:
    """Return direction and sides of the comparison that `item` is."""
    if item.opcode == "fusion":
        inner = module.called(item)
        return _compared(module, inner, inner[inner.root], _bind(module, computation, item, bound))
    if item.opcode in _SAME:
        return _compared(module, computation, computation.operand(item, 0), bound)
    if item.opcode != "compare":
        return None
    left, right = (_value(module, computation, name, bound) for name in item.operands)
    if left is None or right is None:
        return None
    return item.attribute("direction"), left, right


def _bind(
    module: Module, computation: Computation, item: Instruction, bound: _Bound
) -> dict[str, _Value | None]:
    inner = module.called(item)
    values = (_value(module, computation, name, bound) for name in item.operands)
    return dict(zip(inner.parameters, values, strict=True))


def _value(module: Module, computation: Computation, name: str, bound: _Bound) -> _Value | None:
    """Return a whole number as an element of the loop's state plus a constant, or None."""
    item = computation[name]
    if name in bound:
        return bound[name]
    if item.shape.is_tuple or item.shape.dims:
        return None
    if item.opcode == "constant":
        size = small_number(item.literal.removeprefix("-"), -1)
        if size < 0:
            return None
        return _Value(-1, -size if item.literal.startswith("-") else size)
    if item.opcode == "get-tuple-element":
        source = computation.operand(item, 0)
        if source.opcode == "parameter":
            return _Value(int(item.attribute("index")), 0)
        if source.opcode == "tuple":
            return _value(module, computation, source.operands[int(item.attribute("index"))], bound)
        return None
    if item.opcode in _SAME:
        return _value(module, computation, item.operands[0], bound)
    if item.opcode == "fusion":
        inner = module.called(item)
        return _value(module, inner, inner.root, _bind(module, computation, item, bound))
    if item.opcode not in ("add", "subtract"):
        return None
    left, right = (_value(module, computation, operand, bound) for operand in item.operands)
    if left is None or right is None:
        return None
    if item.opcode == "subtract":
        right = _Value(right.index, -right.offset)
        if right.index >= 0:
            return None
    if left.index >= 0 and right.index >= 0:
        return None
    return _Value(max(left.index, right.index), left.offset + right.offset)
