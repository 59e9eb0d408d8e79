"""Bytes of arrays as the TPU compiler stores them: in tiles, with the least padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

ROWS, LANES = 8, 128  # of a tile of 4-byte elements (OpenXLA, "Tiled layout")


def local_shape(
    shape: Sequence[int], spec: Sequence[Sequence[str]], sizes: dict[str, int]
) -> tuple[int, ...]:
    """Return what one device holds of an array; a rest that does not divide counts as a part."""
    return tuple(
        math.ceil(length / math.prod(sizes[axis] for axis in axes))
        for length, axes in zip(shape, spec, strict=True)
    )


def tiled_elements(shape: Sequence[int]) -> int:
    """Return how many elements are stored for an array of `shape`.

    The two minor dimensions are padded to tiles; the compiler may choose which they are, and
    takes those that pad least.

    >>> tiled_elements((14, 14, 3, 6144)) == 16 * 14 * 3 * 6144
    True
    """
    if len(shape) < 2:
        return math.prod(shape)
    return min(
        math.prod(length for at, length in enumerate(shape) if at not in (row, lane))
        * math.ceil(shape[row] / ROWS)
        * ROWS
        * math.ceil(shape[lane] / LANES)
        * LANES
        for row, lane in itertools.permutations(range(len(shape)), 2)
    )
