"""What JAX's splash attention kernels execute: products, vector operations, bytes.

A kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) walks through blocks of queries and
keys and skips those that its mask leaves empty. Per block that is left:

- `fwd`: the scores and their product with the values;
- `dkv`: the scores again, dV, dP and dK, and dQ if it is the fused backward kernel, which leaves a
  partial dQ for each block of keys;
- `dq`: the scores again, dP and dQ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardsim.ops.attend import SOFTMAX
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.matmul import Matmul
from shardsim.xla.hlo.shapes import Shape

ELIDED = "{...}"  # what HLO prints in place of a constant of more than ten numbers

# Products whose contraction or width is the head_dim of queries and keys, and that of values.
_PRODUCTS = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1)}


@dataclass(frozen=True, kw_only=True)
class Masks:
    """What is known of the masks of attention kernels, which the text of a module leaves out."""

    causal: bool | None = None  # or whole (False); None: nobody knows
    windows: tuple[int, ...] = ()  # some causal ones may see only so many tokens
    chunked: bool = False  # a window does not slide: it is a chunk
    # Where devices have parts of a sequence: each an early one and a late one (`plan.Context`).
    striped: bool = False
    # Keys pass round, so that beside kernels of their own others run whose keys all queries see.
    pieces: bool = False


UNKNOWN = Masks()


@dataclass(frozen=True, kw_only=True)
class Executed:
    """What one run of a kernel executes."""

    matmuls: tuple[Matmul, ...]
    vector_ops: float
    hbm_bytes: float
    problem: str  # what is not known of its mask, or not expected; else empty


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One splash attention kernel, as far as its custom call tells."""

    name: str
    phase: str  # "fwd", "dkv", "dq"
    q: Shape
    k: Shape
    v: Shape
    block: tuple[int, int]  # queries, keys
    table: tuple[int, int, int]  # of the mask: 1 or heads, blocks of queries, blocks of keys
    positions: bool  # whether the mask is a function of the queries' positions
    fused: bool  # a dkv kernel that makes dQ too
    streamed_bytes: float  # of the operands in HBM that are fetched anew for every block
    other_bytes: float  # of all other arrays in HBM, each moved once
    pairs_bytes: float = 0.0  # of a mask that the program makes, for all heads

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return self.q.dims[-2] // self.block[0], self.k.dims[-2] // self.block[1]

    def executed(self, literal: str, masks: Masks) -> Executed:
        """Return what the kernel executes.

        `literal` is what the module writes for the second table. Where that is elided, the mask
        is one of those that the caller knows, of a window as narrow a table as it can be; if nobody
        knows, all blocks are counted, and `problem` says so. Raises `HloError` if the operands
        belong to another mask.
        """
        causal = masks.causal
        usual = [fraction for grid, fraction in self._masks(masks) if grid == self.table[1:]]
        problem = ""
        if literal != ELIDED:
            fraction = self._counted(literal)
            if self.positions and self.table[1:] == self.blocks:  # of the first queries
                usual.append(float(self._seen(0, before=0).mean()))
            if fraction not in usual:
                problem = f"its mask leaves {fraction:.4g} of the blocks: neither causal nor whole"
        elif self.pairs_bytes and causal is not None:  # of chosen keys any block may have one
            fraction = float(self._seen(0).mean()) if causal else 1.0
        elif causal is None:
            fraction = math.prod(self.table[1:]) / math.prod(self.blocks)
            problem = "its mask is not in the text; all blocks are counted"
        elif not usual or (causal != self.positions and not (causal and masks.pieces)):
            raise HloError(f"%{self.name}: its mask is not {'causal' if causal else 'whole'}")
        else:
            fraction = usual[0]
        return Executed(
            matmuls=self._matmuls(fraction),
            vector_ops=self._vector_ops(fraction),
            hbm_bytes=self._hbm_bytes(fraction),
            problem=problem,
        )

    def _masks(self, masks: Masks) -> Iterator[tuple[tuple[int, int], float]]:
        """Yield the table of each mask that may be expected, and the part of all blocks it has."""
        if not self.positions:
            yield self.blocks, 1.0
            return
        for window in (0, *masks.windows):
            has = self._seen(window, chunked=masks.chunked)
            if masks.striped and not window:  # of an early part and a late one
                yield self.blocks, float((has.mean() + self._seen(0, before=0).mean()) / 2)
                continue
            rows, columns = self.blocks
            if window and self.phase == "dkv":
                rows = int(has.sum(axis=0).max())
            elif window:
                columns = int(has.sum(axis=1).max())
            yield (rows, columns), float(has.mean())

    def _seen(
        self, window: int, before: int | None = None, chunked: bool = False
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which blocks have a key that a query sees: none after it, the last `window`, or
        those of its chunk.

        `before`: keys that stand before the first query. Of fewer queries than keys these are the
        last ones: where devices have parts of a sequence all wait for the one that sees most.
        """
        wide, long = self.block
        rows, columns = (np.arange(many) for many in self.blocks)
        if before is None:
            before = self.k.dims[-2] - self.q.dims[-2]
        first, last = columns * long, (columns + 1) * long - 1
        begin = before + rows[:, None] * wide
        seen = first <= begin + wide - 1
        if chunked and window:
            return seen & (last >= begin // window * window)
        return seen & (last > begin - window) if window else seen

    def _counted(self, literal: str) -> float:
        """Return the part of all blocks for which the table that `literal` writes is not 0."""
        numbers: list[str] = re.findall(r"[^\s{},]+", literal)
        if len(numbers) != math.prod(self.table) or not set(numbers) <= {"0", "1", "2"}:
            raise HloError(f"%{self.name}: the table of its mask is {literal[:60]!r}")
        left = sum(number != "0" for number in numbers)
        return left / (self.table[0] * math.prod(self.blocks))

    def _matmuls(self, fraction: float) -> tuple[Matmul, ...]:
        """Return the products over that part of all query-key pairs."""
        of_queries, of_values = _PRODUCTS[self.phase]
        depths = Counter({self.q.dims[-1]: of_queries + self.fused})
        depths[self.v.dims[-1]] += of_values
        return tuple(
            Matmul(
                m=self.q.dims[-2],
                k=depth,
                n=self.k.dims[-2],
                batch=math.prod(self.q.dims[:-2]),
                products=products,
                fraction=fraction,
            )
            for depth, products in depths.items()
        )

    def _vector_ops(self, fraction: float) -> float:
        """Return float32 vector operations; each backward kernel makes the probabilities anew."""
        pairs = math.prod(self.q.dims[:-1]) * self.k.dims[-2]
        return fraction * pairs * (SOFTMAX.ops if self.phase == "fwd" else SOFTMAX.gradient_ops)

    def _hbm_bytes(self, fraction: float) -> float:
        """Return bytes through HBM.

        The grid of `fwd` and `dq` goes through keys and values once for each block of queries of
        each head, that of `dkv` through queries and what belongs to them for each block of keys.
        Where they are one block, it is there already.
        """
        rows, columns = self.blocks
        if self.phase == "dkv":
            times = columns * fraction if rows > 1 else 1.0
        else:
            heads = self.q.dims[-3] // self.k.dims[-3]
            times = rows * fraction * heads if columns > 1 else 1.0
        return self.other_bytes + self.streamed_bytes * times + self.pairs_bytes * fraction
