"""Calls that another core of the chip runs beside the compute stream.

`call-start` hands a computation to the SparseCore, `call-done` waits for it. The computation is one
operation on its parameters, or a call of one in turn; a parameter may be a token, which orders the
call and holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import FREE, FREE_TARGETS, KINDS
from shardsim.xla.hlo.shapes import Shape

THREAD = '"sparsecore"'
_MOVES = frozenset("copy gather reshape slice transpose".split())


def call_fits(module: Module, item: Instruction, given: list[Shape]) -> bool:
    """Return whether a call-start takes its operands, keeps them and gives the result."""
    inner = module.called(item)
    takes = [inner[name].shape.form for name in inner.parameters]
    forms = [shape.form for shape in given]
    kept, result, *more = item.shape.elements
    return (
        takes == forms == [shape.form for shape in kept.elements]
        and result.form == inner[inner.root].shape.form
        and [shape.form for shape in more] in ([], ["u32[]"])
    )


def check_callers(items: Iterable[Instruction]) -> None:
    """Raise `HloError` where two calls start one computation: each has its own."""
    starts: dict[str, str] = {}
    for item in items:
        if item.opcode != "call-start":
            continue
        for name in item.called:
            if name in starts:
                raise HloError(f"%{item.name}: %{starts[name]} starts %{name} too", item.line)
            starts[name] = item.name


def offloaded(module: Module, item: Instruction) -> tuple[Computation, Instruction]:
    """Return the operation that a call-start runs, and the computation that holds it.

    It is a collective, or an operation that only moves data.
    """
    home, found = _only_operation(module, item)
    if found.opcode == "call-start":
        home, found = _only_operation(module, found)
    if found.opcode not in KINDS and not _only_moves(module, found):
        raise HloError(f"%{item.name}: a call of {found.opcode} is not understood", item.line)
    return home, found


def _only_operation(module: Module, item: Instruction) -> tuple[Computation, Instruction]:
    """Return what a call-start calls and the one operation in it, which reads all parameters."""
    thread = item.attribute("async_execution_thread")
    if thread != THREAD:
        raise HloError(f"%{item.name}: a call on {thread} is not understood", item.line)
    home = module.called(item)
    found = home[home.root]
    if found.opcode == "call-done":
        found = home.operand(found, 0)
    arrays = tuple(name for name in home.parameters if home[name].shape.dtype != "token")
    others = len(home.instructions) - len(home.parameters)
    if found.operands != arrays or others != (2 if found.opcode == "call-start" else 1):
        raise HloError(f"%{item.name}: %{home.name} is not one operation", item.line)
    return home, found


def _only_moves(module: Module, item: Instruction) -> bool:
    """Return whether an operation copies, lays out anew or gathers, and computes nothing."""
    if item.opcode != "fusion":
        return item.opcode in _MOVES
    inside = module.called(item).instructions.values()
    return any(one.opcode in _MOVES for one in inside) and all(
        one.opcode in FREE
        or one.opcode in _MOVES
        or one.attributes.get("custom_call_target", '""')[1:-1] in FREE_TARGETS
        for one in inside
    )
