"""Calls that another core of the chip runs beside the compute stream.

`call-start` hands a computation to the SparseCore, `call-done` waits for it; dumps write the
same as an `async-start` of a computation that is one `call`. The computation is one operation on
its parameters, or a call of one in turn; a parameter may be a token, which orders the call and
holds nothing. What a scatter adds to may be copied first, by a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import FREE, FREE_TARGETS, KINDS
from shardsim.xla.hlo.shapes import Shape

THREAD = '"sparsecore"'
_STARTS = ("call-start", "async-start")
_DONES = ("call-done", "async-done")
_HOLD = frozenset(("parameter", "tuple", "get-tuple-element"))
_CALLS = frozenset(("call", "custom-call"))
_MOVES = frozenset("copy gather reshape scatter slice transpose".split())

Copied = tuple[Instruction, Computation, Instruction]  # the call, and the copy where it stands


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


def is_prepared(item: Instruction) -> bool:
    """Return whether an async-start only prepares a call, whose operands come with its update."""
    return item.opcode == "async-start" and not item.operands


def update_fits(module: Module, item: Instruction, given: list[Shape]) -> bool:
    """Return whether an async-update that has operands gives a prepared call what it takes."""
    start = module.homes[item].operand(item, 0)
    if not is_prepared(start):
        return False
    inner = module.called(start)
    takes = [inner[name].shape.form for name in inner.parameters]
    kept, result, *_ = item.shape.elements
    return (
        takes == [shape.form for shape in given[1:]] == [shape.form for shape in kept.elements]
        and result.form == inner[inner.root].shape.form
    )


def check_callers(items: Iterable[Instruction]) -> None:
    """Raise `HloError` where two calls start one computation: each has its own."""
    starts: dict[str, str] = {}
    for item in items:
        if item.opcode not in _STARTS or "async_execution_thread" not in item.attributes:
            continue
        for name in item.called:
            if name in starts:
                raise HloError(f"%{item.name}: %{starts[name]} starts %{name} too", item.line)
            starts[name] = item.name


def offloaded(module: Module, item: Instruction) -> tuple[Computation, Instruction]:
    """Return the operation that a call-start runs, and the computation that holds it.

    It is a collective, or an operation that only moves data, where a scatter may add to it.
    """
    home, found = _only_operation(module, item)
    if found.opcode in _STARTS:
        home, found = _only_operation(module, found)
    if found.opcode not in KINDS and not _only_moves(module, found):
        raise HloError(f"%{item.name}: a call of {found.opcode} is not understood", item.line)
    return home, found


def _only_operation(module: Module, item: Instruction) -> tuple[Computation, Instruction]:
    """Return what a call-start calls and the one operation in it, which reads all parameters."""
    thread = item.attribute("async_execution_thread")
    if thread != THREAD:
        raise HloError(f"%{item.name}: a call on {thread} is not understood", item.line)
    home, found = _only_one(module, module.called(item), item)
    while found.opcode in _CALLS and found.called:
        home, found = _only_one(module, module.called(found), item)
    return home, found


def _only_one(
    module: Module, home: Computation, item: Instruction
) -> tuple[Computation, Instruction]:
    """Return the one operation of `home`, which reads all its parameters."""
    found = home[home.root]
    done = found.opcode.removesuffix("-done")
    if done in ("call", "async") and done != found.opcode:
        found = home.operand(found, 0)
    arrays = tuple(name for name in home.parameters if home[name].shape.dtype != "token")
    copied = copied_first(module, home)
    read = tuple(copied[name][0].operands[0] if name in copied else name for name in found.operands)
    read = tuple(map(home.behind, read))
    read = tuple(name for name in read if home[name].shape.dtype != "token")
    beside = {*copied, *(start.name for start, _, _ in copied.values())}
    work = [
        one.opcode
        for one in home.instructions.values()
        if one.opcode not in _HOLD and one.name not in beside
    ]
    wanted = [f"{done}-start", f"{done}-done"] if found.opcode in _STARTS else [found.opcode]
    if read != arrays or work != wanted:
        raise HloError(f"%{item.name}: %{home.name} is not one operation", item.line)
    return home, found


def copied_first(module: Module, home: Computation) -> dict[str, Copied]:
    """Return what calls in `home` copy for its last one, by the name of the copy."""
    found: dict[str, Copied] = {}
    for done in home.instructions.values():
        if done.opcode not in _DONES or done.name == home.root:
            continue
        start = home.operand(done, 0)
        if start.opcode not in _STARTS or len(start.operands) != 1:
            continue
        inner = module.called(start)
        copy = inner[inner.root]
        while copy.opcode in _CALLS and copy.called:
            inner = module.called(copy)
            copy = inner[inner.root]
        if copy.opcode == "copy":
            found[done.name] = start, inner, copy
    return found


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
