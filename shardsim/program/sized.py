"""Sizes of arrays and of what transfers leave, as what a trace of HBM holds."""

from __future__ import annotations

from dataclasses import replace

from shardsim.graph.arrays import Array, Split
from shardsim.graph.derive import Transfer
from shardsim.program.trace import Size

WIDE = 4.0  # bytes of what is summed, or exponentiated, in float32


def stored(array: Array) -> Size:
    """Return the size of an array where it is stored."""
    return Size(array.dims, array.splits, width_of(array))


def moved(transfer: Transfer) -> Size:
    """Return the size of what a transfer leaves."""
    of_layer = transfer.weight == "matrix" and not transfer.gradient and not transfer.purpose
    width = "weights" if of_layer else "wire"
    return Size(transfer.dims, transfer.by, WIDE if transfer.wide else width, transfer.axes)


def in_tiles(array: Array, transfer: Transfer) -> Size:
    """Return the size of a gathered matrix, of two dimensions, in tiles of HBM."""
    size = moved(transfer)
    split = [array.split[axis] for axis in transfer.axes if array.split.get(axis) in array.dims]
    if len(array.dims) != 2 or not split:
        return size
    axes = tuple(sorted(axis for axis, d in array.split.items() if d == split[0]))
    return replace(size, pieces=(split[0], axes))


def by_place(array: Array, place: Split) -> tuple[tuple[str, str], ...]:
    """Return which axes split which of an array's dimensions where it lies so."""
    return tuple(sorted((axis, d) for axis, d in place.items() if d in array.dims))


def width_of(array: Array) -> str | float:
    """Return the bytes of an element, or the name of their format."""
    return WIDE if array.wide else "wire"
