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
from dataclasses import dataclass

from shardsim.ops.attend import SOFTMAX
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.matmul import Matmul
from shardsim.xla.hlo.shapes import Shape

ELIDED = "{...}"  # what HLO prints in place of a constant of more than ten numbers

# Products whose contraction or width is the head_dim of queries and keys, and that of values.
_PRODUCTS = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1)}


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

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return self.q.dims[-2] // self.block[0], self.k.dims[-2] // self.block[1]

    def executed(self, literal: str, causal: bool | None) -> Executed:
        """Return what the kernel executes.

        `literal` is what the module writes for the second table. Where that is elided, the mask
        is the one that the caller knows: `causal` or none; if nobody knows (None), all blocks are
        counted, and `problem` says so. Raises `HloError` if the operands belong to another mask.
        """
        usual = self._causal_fraction() if self.positions else 1.0
        whole = self.table[1:] == self.blocks
        problem = ""
        if literal != ELIDED:
            fraction = self._counted(literal)
            if not whole or fraction != usual:
                problem = f"its mask leaves {fraction:.4g} of the blocks: neither causal nor whole"
        elif causal is None:
            fraction = math.prod(self.table[1:]) / math.prod(self.blocks)
            problem = "its mask is not in the text; all blocks are counted"
        elif causal != self.positions or not whole:
            raise HloError(f"%{self.name}: its mask is not {'causal' if causal else 'whole'}")
        else:
            fraction = usual
        return Executed(
            matmuls=self._matmuls(fraction),
            vector_ops=self._vector_ops(fraction),
            hbm_bytes=self._hbm_bytes(fraction),
            problem=problem,
        )

    def _causal_fraction(self) -> float:
        """Return the part of all blocks that have a key no later than some query."""
        rows, columns = self.blocks
        wide, long = self.block
        left = sum(min(((row + 1) * wide - 1) // long + 1, columns) for row in range(rows))
        return left / (rows * columns)

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
        """
        rows, columns = self.blocks
        if self.phase == "dkv":
            times = columns * fraction
        else:
            times = rows * fraction * (self.q.dims[-3] // self.k.dims[-3])
        return self.other_bytes + self.streamed_bytes * times
