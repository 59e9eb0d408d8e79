"""JAX's splash attention kernels, read from their custom calls.

Operands: two or three tables of whole numbers [1 or heads, query blocks, key blocks], the second
of which is 0 for blocks that the mask leaves empty; q, k, v [..., heads, positions, head_dim];
segments; for a gradient the logarithms, the output's gradient and the row sums; the mask of partial
blocks, or the positions of the queries where the mask is a function of them. JAX notes the sizes of
the blocks in `kernel_metadata`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from shardsim.xla.hlo.errors import HloError, small_number
from shardsim.xla.hlo.kernels import Kernel
from shardsim.xla.hlo.module import Instruction
from shardsim.xla.hlo.shapes import Shape

TARGET = '"tpu_custom_call"'
TABLE = 1  # the operand that says which blocks are left

_NAME = re.compile(r"splash_mha_(fwd|dkv|dq)(_segmented)?(?:_no)?_residuals(?![a-z_])")
_METADATA = re.compile(r"\{(?:.*,)?kernel_metadata=(\{.*\})\}")
_WHOLE = frozenset(("s8", "s16", "s32"))
_MASKS = frozenset(("pred", "s8", "s32"))  # of pairs: Mosaic keeps truth in 32 bits
_BLOCKS = {
    "fwd": ("block_q", "block_kv"),
    "dkv": ("block_q_dkv", "block_kv_dkv"),
    "dq": ("block_q_dq", "block_kv_dq"),
}
_LAYOUTS = ("q_layout", "k_layout", "v_layout")
_HEAD_DIM_MINOR = 1  # of splash's QKVLayout
# Which of the results is the output, by how many there are: JAX's kernels return their scratch
# before it, MaxText's copy of them does not.
_OUTPUT = {2: 0, 4: 3, 5: 3}
_LANES, _SUBLANES = 128, 8  # positions and logarithms are repeated to fill a vector register

Test = Callable[[Shape], bool]


def kernel_of(item: Instruction, given: list[Shape]) -> Kernel | None:
    """Return the splash attention kernel that a custom call is, or None if it is none.

    Raises `HloError` where name, metadata, operands and results do not fit together.
    """
    if item.attributes.get("custom_call_target") != TARGET:
        return None
    found = {match.groups() for match in _NAME.finditer(f"{item.name} {item.op_name}")}
    if not found:
        return None
    if len(found) > 1:
        raise HloError(f"%{item.name}: named like {len(found)} kernels", item.line)
    ((phase, segmented),) = found
    kernel = _Reader(item, given, phase, bool(segmented)).read()
    if kernel is None:
        raise HloError(
            f"%{item.name}: operands or results that do not fit a {phase} kernel of splash"
            " attention",
            item.line,
        )
    return kernel


class _Reader:
    """Takes the operands of a kernel one after another."""

    def __init__(self, item: Instruction, given: list[Shape], phase: str, segmented: bool) -> None:
        self.item = item
        self.left = given[::-1]
        self.phase = phase
        self.segmented = segmented

    def _take(self, test: Test) -> Shape | None:
        """Return the next operand, if it is such a one."""
        return self.left.pop() if self.left and test(self.left[-1]) else None

    def read(self) -> Kernel | None:
        """Return the kernel, or None if anything does not fit."""
        tables: list[Shape] = []
        while (table := self._take(lambda s: s.dtype in _WHOLE and len(s.dims) == 3)) is not None:
            tables.append(table)
        q, k, v = (self._take(lambda shape: len(shape.dims) >= 3) for _ in range(3))
        if q is None or k is None or v is None or len(tables) not in (2, 3):
            return None
        block = self._block(q, k)
        if block is None or not _attends(q, k, v):
            return None
        rows, columns = q.dims[-2] // block[0], k.dims[-2] // block[1]
        heads, *grid = tables[0].dims
        # A grid may be shrunk along the dimension that it walks through fastest.
        fits = grid[0] <= rows and grid[1] == columns
        if self.phase != "dkv":
            fits = grid[0] == rows and grid[1] <= columns
        if not fits or any(table.dims != tables[0].dims for table in tables):
            return None
        if heads not in (1, q.dims[-3]) or not min(grid):
            return None
        of_queries = self._others(q, v)
        if of_queries is None:
            return None
        side = block if self.phase != "dkv" else block[::-1]
        partial = self._take(lambda s: s.dtype in _MASKS and s.dims[1:] == side)
        # Made by the program, the mask has all blocks: static ones have those that differ.
        made = partial is not None and partial.dims[0] == heads * grid[0] * grid[1]
        positions = self._take(self._is_positions(q))
        if self.left:
            return None
        fused = self._results(q, k, v, columns)
        if fused is None:
            return None
        streamed = (q, *of_queries) if self.phase == "dkv" else (k, v)
        streamed_bytes = sum(shape.hbm_bytes for shape in streamed)
        arrays = [*tables, q, k, v, *of_queries, *self.item.shape.arrays]
        return Kernel(
            name=self.item.name,
            phase=self.phase,
            q=q,
            k=k,
            v=v,
            block=block,
            table=(heads, grid[0], grid[1]),
            positions=positions is not None,
            fused=fused,
            streamed_bytes=streamed_bytes,
            other_bytes=sum(shape.hbm_bytes for shape in arrays) - streamed_bytes,
            pairs_bytes=partial.hbm_bytes * q.dims[-3] / heads if partial and made else 0.0,
        )

    def _block(self, q: Shape, k: Shape) -> tuple[int, int] | None:
        """Return the sizes of a block, which the metadata names; they must divide the positions."""
        metadata = _metadata(self.item)
        if any(metadata.get(name) != _HEAD_DIM_MINOR for name in _LAYOUTS):
            return None
        sizes = [metadata.get(name) for name in _BLOCKS[self.phase]]
        rows, columns = (small_number(str(size), 0) for size in sizes)
        if min(rows, columns) < 1 or q.dims[-2] % rows or k.dims[-2] % columns:
            return None
        return rows, columns

    def _others(self, q: Shape, v: Shape) -> tuple[Shape, ...] | None:
        """Take what stands between the values and the mask; return what a gradient reads."""
        if self.segmented:
            for _ in range(2):
                if self._take(lambda s: s.dtype == "s32" and len(s.dims) >= 2) is None:
                    return None
        self._take(lambda s: s.form == f"f32[{_SUBLANES},{q.dims[-3]}]")  # sinks
        found: tuple[Shape, ...] = ()
        if self.phase != "fwd":
            repeated = _SUBLANES if self.phase == "dkv" else 1
            sums = (*q.dims[:-2], repeated, q.dims[-2])
            tests: list[Test] = [
                lambda s: s.dtype == "f32" and s.dims == sums,
                lambda s: s.dims == (*q.dims[:-1], v.dims[-1]),
                lambda s: s.dtype == "f32" and s.dims == sums,
            ]
            taken = [self._take(test) for test in tests]
            found = tuple(shape for shape in taken if shape is not None)
            if len(found) != len(tests):
                return None
        return found

    def _is_positions(self, q: Shape) -> Test:
        length = q.dims[-2]
        dims = (_SUBLANES, length) if self.phase == "dkv" else (length, _LANES)
        return lambda s: s.dtype == "s32" and s.dims == dims

    def _results(self, q: Shape, k: Shape, v: Shape, columns: int) -> bool | None:
        """Return whether dkv makes dQ too; None if the results are not those of the kernel."""
        arrays = self.item.shape.arrays
        forms = [shape.form for shape in arrays]
        if self.phase == "dq":
            return False if len(forms) in (1, 2) and forms[-1] == q.form else None
        if self.phase == "fwd":
            place = _OUTPUT.get(len(forms))
            if place is None:
                return None
            out = (q.dtype, (*q.dims[:-1], v.dims[-1]))
            return False if (arrays[place].dtype, arrays[place].dims) == out else None
        if len(forms) not in (2, 3, 4, 5, 6) or forms[-2:] != [k.form, v.form]:
            return None
        if len(forms) in (2, 4):
            return False
        partial = arrays[-3]
        return True if (partial.dtype, partial.count) == (q.dtype, columns * q.count) else None


def _attends(q: Shape, k: Shape, v: Shape) -> bool:
    """Return whether queries, keys and values are those of one attention."""
    same = q.dims[:-3] == k.dims[:-3] and k.dims[:-1] == v.dims[:-1] and q.dims[-1] == k.dims[-1]
    alike = q.dtype == k.dtype == v.dtype and q.dtype not in _WHOLE
    return same and alike and q.dims[-3] % k.dims[-3] == 0


def _metadata(item: Instruction) -> dict[str, Any]:
    """Return what JAX notes about a kernel: the sizes of its blocks."""
    match = _METADATA.fullmatch(item.attributes.get("frontend_attributes", ""))
    try:
        found = json.loads(json.loads(match[1])["xprof_metadata"]) if match else None
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise HloError(f"%{item.name}: a kernel without its kernel_metadata", item.line)
    return found
