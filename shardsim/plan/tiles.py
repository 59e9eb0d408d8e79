"""Arrays in tiles of a TPU's HBM: 8 rows of 128 lanes, which no array leaves half empty for less.

The dimension that is densest in memory fills rows of 128, the next one tiles of 8 of them (of 1, 2
or 4 where it has no more). Of what a step is given XLA takes as these two what leaves least empty:
f32[32,160,16,80]{3,2,1,0:T(8,128)} takes 1.6 times its bytes, and so does every other order of it;
f32[44,24576,96]{1,2,0:T(8,128)} and f32[48,26,8192]{2,0,1:T(8,128)} none more (arguments of
vit-h-14, vit-bigg, gpt-neox-20b, llama2-13b, llama3.2-1b and vit-l-16 on v4, v5e and v5p). Stacks
that a loop over layers reads or makes have the layer outermost: bf16[48,26,8192]{2,1,0} takes 1.23
times its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import permutations
from math import prod

import numpy as np

from shardsim.model import Tensor
from shardsim.plan.layout import Layout, Number
from shardsim.plan.split import named, split

ROWS, LANES = 8, 128  # of a tile


def in_lanes(length: Number) -> Number:
    """Return how many times its length the densest dimension takes."""
    return np.ceil(length / LANES) * LANES / np.maximum(length, 1.0)


def in_rows(length: Number) -> Number:
    """Return how many times its length the dimension takes that is densest but one.

    >>> [float(in_rows(length)) for length in (1, 3, 8, 12)]
    [1.0, 1.3333333333333333, 1.0, 1.3333333333333333]
    """
    few = np.exp2(np.ceil(np.log2(np.maximum(length, 1.0))))
    return np.where(length < ROWS, few, np.ceil(length / ROWS) * ROWS) / np.maximum(length, 1.0)


def filled(lengths: Sequence[Number]) -> Number:
    """Return how many times its elements an array of these lengths takes at least."""
    if len(lengths) < 2:
        return 1.0
    whole = [bool(np.all(np.equal(np.mod(length, LANES), 0))) for length in lengths]
    even = [bool(np.all(np.equal(np.mod(length, ROWS), 0))) for length in lengths]
    if any(whole[i] and even[j] for i, j in permutations(range(len(lengths)), 2)):
        return 1.0
    pairs = permutations(lengths, 2)
    return reduce(np.minimum, (in_lanes(dense) * in_rows(next_) for dense, next_ in pairs))


def unfilled_elements(
    tensors: Sequence[Tensor], layout: Layout, *, state: bool = False, by_layer: bool = False
) -> Number:
    """Return the elements that tiles of weights, or of one moment of each, have beyond these; of
    stacks that a loop goes through `by_layer`."""
    total: Number = 0.0
    for tensor in tensors:
        dimensions = split(*named(tensor, state=state), layout)
        outermost = by_layer and len(dimensions) > 2
        inner = [item.local for item in dimensions if not (outermost and item.axis == "layers")]
        beyond = filled(inner) - 1.0
        if np.any(beyond):
            total = total + prod(item.local for item in dimensions) * beyond
    return total


def unfilled_rows(tensors: Sequence[Tensor], layout: Layout) -> Number:
    """Return the elements beyond `unfilled_elements` that sums of microbatches' gradients have of
    embeddings: rows are added to as they are looked up, so each fills lanes of its own.

    f32[256000,32]{1,0:T(8,128)} in palm-8b on v4, where the parameters are {0,1}; so too in
    llama3-8b on v6e, llama2-7b on v5p and maxtext-16b on v6e.
    """
    total: Number = 0.0
    for tensor in tensors:
        if tensor.kind == "table" and len(tensor.axes) == 2:
            rows, dense = (item.local for item in split(*named(tensor, state=True), layout))
            beyond = in_lanes(dense) * in_rows(rows) - filled([rows, dense])
            total = total + rows * dense * np.maximum(beyond, 0.0)
    return total
