"""Bytes of arrays as the TPU compiler stores them: in tiles, with the least padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from shardsim.plan.optimizer import OPTIMIZERS

ROWS, LANES = 8, 128  # of a tile of 4-byte elements (OpenXLA, "Tiled layout")


def stored_bytes(
    shape: Sequence[int],
    spec: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    optimizer: str,
    *,
    element_bytes: float = 4.0,
    state_ways: int = 1,
) -> float:
    """Return the bytes that one device holds of a weight and its moments.

    A rest that does not divide counts as a part. Moments are no wider than the weight, and lie
    split `state_ways` further.
    """
    local = tuple(
        math.ceil(length / math.prod(sizes[axis] for axis in axes))
        for length, axes in zip(shape, spec, strict=True)
    )
    moments = sum(min(each, element_bytes) for each in OPTIMIZERS[optimizer].moments)
    return tiled_elements(local) * (element_bytes + moments / state_ways)


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
