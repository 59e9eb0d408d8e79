"""Shapes that must follow from each other: what shows that a text was damaged.

Every array is written down at least twice, where it is made and where it is used. The rules here
compare the two for the operations that decide what a program costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from shardsim.xla.hlo.calls import call_fits, check_callers, is_prepared, update_fits
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.groups import form_of, permute_of
from shardsim.xla.hlo.matmul import matmul_of
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import BINARY, KINDS, UNARY
from shardsim.xla.hlo.shapes import Shape
from shardsim.xla.hlo.splash import kernel_of

Mesh = Mapping[str, int]
Rule = Callable[[Instruction, list[Shape]], bool]

_SLICE = re.compile(r"\[(\d+):(\d+)(?::(\d+))?\]")
_PADDING = re.compile(r"(-?\d+)_(-?\d+)(?:_(\d+))?")


def check_module(module: Module, mesh: Mesh) -> None:
    """Raise `HloError` at the first instruction that contradicts what it reads or calls."""
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            _check(module, computation, instruction, mesh)
    check_callers(module.homes)


def _check(module: Module, computation: Computation, item: Instruction, mesh: Mesh) -> None:
    given = [computation[name].shape for name in item.operands]
    rule = _RULES.get(item.opcode)
    try:
        good = rule is None or rule(item, given)
        good = good and _calls_fit(module, item, given)
        kind = KINDS.get(item.opcode.removesuffix("-start"))
        if kind is not None and good:
            good = _collective_fits(kind, item, given, mesh)
    except (IndexError, ValueError, ZeroDivisionError):
        good = False
    except HloError as error:
        raise error.at(item.line) from None
    if not good:
        raise HloError(
            f"%{item.name}: {item.opcode} to {item.shape.form[:60]} does not fit its operands",
            item.line,
        )


def _calls_fit(module: Module, item: Instruction, given: list[Shape]) -> bool:
    """Return whether called computations take the operands and give the result."""
    forms = [shape.form for shape in given]
    if item.opcode in ("fusion", "call", "async-start"):
        inner = module.called(item)
        takes = [inner[name].shape.form for name in inner.parameters]
        gives = inner[inner.root].shape.form
        if is_prepared(item):
            return [item.shape.elements[place].form for place in (0, 1)] == ["()", "()"]
        if item.opcode == "async-start":
            return takes == forms and item.shape.elements[1].form == gives
        return takes == forms and gives == item.shape.form
    if item.opcode == "async-update" and len(given) > 1:
        return update_fits(module, item, given)
    if item.opcode == "call-start":
        return call_fits(module, item, given)
    if item.opcode == "while":
        body = module.computations[item.attribute("body").removeprefix("%")]
        test = module.computations[item.attribute("condition").removeprefix("%")]
        state = item.shape.form
        places = [body[name].shape.form for name in (*body.parameters, body.root)]
        places += [test[name].shape.form for name in test.parameters]
        return [*forms, *places] == [state] * 4 and test[test.root].shape.form == "pred[]"
    return True


def _same_dims(item: Instruction, given: list[Shape]) -> bool:
    """Return whether result and all operands have the same dimensions."""
    return bool(given) and all(shape.dims == item.shape.dims for shape in given)


def _same_form(item: Instruction, given: list[Shape]) -> bool:
    return len(given) == 1 and given[0].form == item.shape.form


def _alike(item: Instruction, given: list[Shape]) -> bool:
    # The TPU compiler adds a bf16 operand to an f32 one without a conversion.
    return _same_dims(item, given) and all(
        shape.dtype == item.shape.dtype or (shape.dtype, item.shape.dtype) == ("bf16", "f32")
        for shape in given
    )


def _tuple(item: Instruction, given: list[Shape]) -> bool:
    return [shape.form for shape in given] == [shape.form for shape in item.shape.elements]


def _element(item: Instruction, given: list[Shape]) -> bool:
    return given[0].elements[int(item.attribute("index"))].form == item.shape.form


def _same_count(item: Instruction, given: list[Shape]) -> bool:
    return given[0].count == item.shape.count


def _bitcast(item: Instruction, given: list[Shape]) -> bool:
    same = given[0].count == item.shape.count or given[0].bytes == item.shape.bytes
    return same or given[0].padded_bytes == item.shape.padded_bytes


def _broadcast(item: Instruction, given: list[Shape]) -> bool:
    places = item.numbers("dimensions")
    return given[0].dims == tuple(item.shape.dims[place] for place in places)


def _transpose(item: Instruction, given: list[Shape]) -> bool:
    order = item.numbers("dimensions")
    return sorted(order) == list(range(len(given[0].dims))) and item.shape.dims == tuple(
        given[0].dims[place] for place in order
    )


def _reduce(item: Instruction, given: list[Shape]) -> bool:
    gone = item.numbers("dimensions")
    half = len(given) // 2
    left = tuple(size for place, size in enumerate(given[0].dims) if place not in gone)
    return 2 * half == len(given) and all(array.dims == left for array in item.shape.arrays)


def _sliced(item: Instruction, source: Shape) -> tuple[int, ...]:
    ranges = _SLICE.findall(item.attribute("slice"))
    if len(ranges) != len(source.dims):
        raise ValueError
    sizes = []
    for (low, high, step), size in zip(ranges, source.dims, strict=True):
        if not int(low) <= int(high) <= size:
            raise ValueError
        sizes.append(-(-(int(high) - int(low)) // int(step or 1)))
    return tuple(sizes)


def _slice(item: Instruction, given: list[Shape]) -> bool:
    return item.shape.dims == _sliced(item, given[0])


def _slice_start(item: Instruction, given: list[Shape]) -> bool:
    return item.shape.elements[0].elements[0].form == given[0].form and item.shape.elements[
        1
    ].dims == _sliced(item, given[0])


def _copy_start(item: Instruction, given: list[Shape]) -> bool:
    return all(item.shape.elements[place].form == given[0].form for place in (0, 1))


def _second(item: Instruction, given: list[Shape]) -> bool:
    """A -done gives the second element of what was started."""
    return given[0].elements[1].form == item.shape.form


def _dynamic_slice(item: Instruction, given: list[Shape]) -> bool:
    sizes = item.numbers("dynamic_slice_sizes")
    fits = all(a <= b for a, b in zip(sizes, given[0].dims, strict=True))
    return fits and item.shape.dims == sizes and len(given) == 1 + len(sizes)


def _dynamic_update_slice(item: Instruction, given: list[Shape]) -> bool:
    fits = all(a <= b for a, b in zip(given[1].dims, given[0].dims, strict=True))
    return fits and given[0].form == item.shape.form and len(given) == 2 + len(given[0].dims)


def _dynamic_slice_start(item: Instruction, given: list[Shape]) -> bool:
    sizes = item.numbers("dynamic_slice_sizes")
    fits = all(a <= b for a, b in zip(sizes, given[0].dims, strict=True))
    return fits and item.shape.elements[1].dims == sizes and len(given) == 1 + len(sizes)


def _dynamic_update_slice_start(item: Instruction, given: list[Shape]) -> bool:
    fits = all(a <= b for a, b in zip(given[1].dims, given[0].dims, strict=True))
    whole = item.shape.elements[1].form == given[0].form
    return fits and whole and len(given) == 2 + len(given[0].dims)


def _pad(item: Instruction, given: list[Shape]) -> bool:
    sizes = []
    for text, size in zip(item.attribute("padding").split("x"), given[0].dims, strict=True):
        match = _PADDING.fullmatch(text)
        if not match:
            return False
        low, high, inner = (int(number or 0) for number in match.groups())
        sizes.append(size + low + high + inner * max(size - 1, 0))
    return tuple(sizes) == item.shape.dims


def _concatenate(item: Instruction, given: list[Shape]) -> bool:
    (along,) = item.numbers("dimensions")
    total = list(given[0].dims)
    total[along] = sum(shape.dims[along] for shape in given)
    others = [shape.dims[:along] + shape.dims[along + 1 :] for shape in given]
    return tuple(total) == item.shape.dims and others.count(others[0]) == len(others)


def _matmul(item: Instruction, given: list[Shape]) -> bool:
    matmul_of(item, given[0], given[1])
    return True


def _select(item: Instruction, given: list[Shape]) -> bool:
    return _same_dims(item, given[1:]) and given[0].dims in ((), item.shape.dims)


def _clamp(item: Instruction, given: list[Shape]) -> bool:
    return given[1].form == item.shape.form


def _compare(item: Instruction, given: list[Shape]) -> bool:
    return _same_dims(item, given) and item.shape.dtype == "pred"


def _custom_call(item: Instruction, given: list[Shape]) -> bool:
    target = item.attribute("custom_call_target")
    if target == '"ConcatBitcast"':
        whole = item.shape
        same = sum(shape.count for shape in given) == whole.count
        parts = sum(shape.bytes for shape in given)  # of the array as it lies in memory
        return same or parts in (whole.bytes, whole.padded_bytes)
    if target == '"AsyncCollectiveStart"':
        return item.shape.elements[1].count == given[0].count
    if target == '"AsyncCollectiveDone"':
        return item.shape.form == given[1].form == given[2].form
    kernel_of(item, given)
    return True


def results_of(item: Instruction) -> list[Shape]:
    """Return the arrays that a collective leaves, started or not."""
    shape = item.shape
    kind = item.opcode.removesuffix("-start")
    if item.opcode.endswith("-start") and kind != "all-reduce":
        return list(shape.elements[1].arrays)
    return list(shape.arrays)


def _collective_fits(kind: str, item: Instruction, given: list[Shape], mesh: Mesh) -> bool:
    """Return whether each operand becomes its result over groups of the size that is written."""
    results = results_of(item)
    if item.opcode.endswith("-start") and kind != "all-reduce":
        kept = list(item.shape.elements[0].arrays)
        if [shape.form for shape in kept] != [shape.form for shape in given]:
            return False
    if kind == "permute":
        permute_of(item.attribute("source_target_pairs"), mesh)
        return [s.form for s in results] == [s.form for s in given]
    size = form_of(item.attribute("replica_groups"), mesh).size
    if kind == "all-to-all":
        return sum(s.count for s in results) == sum(s.count for s in given)
    if kind in ("all-reduce", "broadcast"):  # some change the type of what they sum
        return [s.dims for s in results] == [s.dims for s in given]
    (along,) = item.numbers("dimensions")
    if len(results) != len(given):
        return False
    for result, shape in zip(results, given, strict=True):
        small, large = (shape, result) if kind == "all-gather" else (result, shape)
        wanted = list(small.dims)
        wanted[along] *= size
        if tuple(wanted) != large.dims:
            return False
    return True


_RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _same_dims),
    **dict.fromkeys(BINARY, _alike),
    "tuple": _tuple,
    "get-tuple-element": _element,
    "bitcast": _bitcast,
    "reshape": _same_count,
    "broadcast": _broadcast,
    "transpose": _transpose,
    "reduce": _reduce,
    "slice": _slice,
    "slice-start": _slice_start,
    "copy-start": _copy_start,
    **dict.fromkeys(
        (
            "slice-done",
            "dynamic-slice-done",
            "dynamic-update-slice-done",
            "collective-permute-done",
            "all-gather-done",
            "async-done",
            "call-done",
        ),
        _second,
    ),
    "dynamic-slice-start": _dynamic_slice_start,
    "dynamic-update-slice-start": _dynamic_update_slice_start,
    "copy-done": lambda item, given: given[0].elements[0].form == item.shape.form,
    "all-reduce-done": _same_form,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _dynamic_update_slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "convolution": _matmul,
    "dot": _matmul,
    "select": _select,
    "clamp": _clamp,
    "compare": _compare,
    "custom-call": _custom_call,
}
