"""The stacks that a loop walks through: a second witness of how often it runs.

A scan over layers takes one slice of every stacked array in each trip, so the arrays say what the
loop's counter should.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardsim.xla.hlo.module import Computation, Instruction, Module

_STEPS = frozenset("copy bitcast convert reshape add subtract clamp select".split())

_Flags = Mapping[str, bool]


def stack_sizes(module: Module, body: Computation, counter: int) -> set[int]:
    """Return the lengths of the arrays that `body` takes one slice of at its counter.

    `counter` is the place of the counter in the loop's state.
    """
    state = {
        item.name: True
        for item in body.instructions.values()
        if item.opcode == "get-tuple-element"
        and int(item.attribute("index")) == counter
        and body.operand(item, 0).opcode == "parameter"
    }
    return set(_sizes(module, body, state))


def _sizes(module: Module, computation: Computation, given: _Flags) -> Iterator[int]:
    counts: dict[str, bool] = dict(given)
    for item in computation.instructions.values():
        inside = [counts.get(name, False) for name in item.operands]
        if item.opcode == "fusion" and any(inside):
            inner = module.called(item)
            flags = dict(zip(inner.parameters, inside, strict=True))
            yield from _sizes(module, inner, flags)
            counts[item.name] = _is_number(item) and _result_counts(module, inner, flags)
        elif item.opcode in _STEPS and _is_number(item):
            counts[item.name] = counts.get(item.name, False) or any(inside)
        elif item.opcode in ("dynamic-slice", "dynamic-update-slice"):
            whole = computation.operand(item, 0).shape
            update = item.opcode == "dynamic-update-slice"
            part = computation.operand(item, 1).shape if update else item.shape
            places = inside[2:] if update else inside[1:]
            for size, taken, counted in zip(whole.dims, part.dims, places, strict=False):
                if counted and taken == 1 and size > 1:
                    yield size


def _result_counts(module: Module, computation: Computation, given: _Flags) -> bool:
    counts = dict(given)
    for item in computation.instructions.values():
        if item.opcode in _STEPS:
            counts[item.name] = any(counts.get(name, False) for name in item.operands)
    return counts.get(computation.root, False)


def _is_number(item: Instruction) -> bool:
    return not item.shape.is_tuple and item.shape.count == 1
