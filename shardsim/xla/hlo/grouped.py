"""Grouped matmuls in one kernel, read from their custom calls.

JAX's megablox (`jax.experimental.pallas.ops.tpu.megablox`) and the compiler's own kernel of
`ragged_dot` take a few numbers that say which rows belong to which group, then two arrays: rows
[rows, k] and a matrix for each group, [groups, k, n] or [groups, n, k], for a result [rows, n]; or
for the gradient of the matrices rows of two arrays, for a result [groups, k, n].
"""

from __future__ import annotations

import re

from shardsim.xla.hlo.matmul import Matmul
from shardsim.xla.hlo.module import Instruction
from shardsim.xla.hlo.shapes import Shape
from shardsim.xla.hlo.splash import TARGET

_NAME = re.compile(r"jit\(t?gmm\)+/pallas_call|ragged-dot-none")


def grouped_of(item: Instruction, given: list[Shape]) -> Matmul | None:
    """Return the product of a grouped matmul's kernel, or None for what is none.

    All rows count, as they do where the groups fill them; tiles that groups share are not counted.
    """
    if item.attributes.get("custom_call_target") != TARGET or not _NAME.search(
        f"{item.op_name} {item.name}"
    ):
        return None
    arrays = [shape for shape in given if not shape.dtype.startswith("s")]
    if len(arrays) != 2 or item.shape.dtype != arrays[0].dtype:
        return None
    left, right, out = arrays[0].dims, arrays[1].dims, item.shape.dims
    if len(out) == 2 and len(left) == 2 and len(right) == 3:
        rows, columns = out
        if left[0] == rows and sorted(right[1:]) == sorted((left[1], columns)):
            return Matmul(m=rows, k=left[1], n=columns, batch=1, products=1)
    if len(out) == 3 and len(left) == len(right) == 2:
        rows = right[0]
        if right[1] == out[2] and sorted(left) == sorted((rows, out[1])):
            return Matmul(m=out[1], k=rows, n=out[2], batch=1, products=1)
    return None
