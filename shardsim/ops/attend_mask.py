"""Which query-key pairs of attention count, and how many of them a fused kernel computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardsim.graph.arrays import Number

# A fused kernel skips the blocks of so many queries and keys that a mask leaves empty, forward and
# back; others are whole.
BLOCKS = (512, 512)


@dataclass(frozen=True)
class Mask:
    """Which query-key pairs count: all, or of each query the keys up to itself.

    Of those only the last `window` where it is not 0 (arXiv 2004.05150); or, `chunked`, those of
    the same chunk of so many tokens (Llama 4). Of a video's tokens those `along` "space", in the
    same frame, or "time", at the same location, where it is not "". Of all keys so many may be
    `chosen`: those count, and kernels compute all. These have `blocks` of so many queries and keys,
    forward and back.
    """

    causal: bool
    window: int = 0
    along: str = ""
    chosen: int = 0
    blocks: tuple[int, int] = BLOCKS
    chunked: bool = False

    def back(self) -> Mask:
        """Return the mask of the gradient's kernel."""
        return replace(self, blocks=self.blocks[::-1])

    @property
    def local(self) -> bool:
        """Whether every device has all keys that its queries see: a frame is never split."""
        return self.along == "space"

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        along = {"along": self.along} if self.along else {}
        blocks = {"blocks": self.blocks} if self.blocks != BLOCKS else {}
        chunked = {"chunked": True} if self.chunked else {}
        return {"causal": self.causal, "window": self.window, **along, **blocks, **chunked}

    def computed(self, tokens: int, last: Number | None = None) -> Number:
        """Return the share of the pairs that a fused kernel computes, in whole blocks: of all
        queries, or of the `last` so many, which see most."""
        if not self.causal or tokens <= self.blocks[0]:
            return 1.0
        last = tokens if last is None else last
        pairs = self._in_blocks(tokens) - self._in_blocks(tokens - last)
        return np.minimum(pairs / (tokens * last), 1.0)

    def _in_blocks(self, queries: Number) -> Number:
        """Return the pairs that a kernel computes for the first so many queries."""
        size = self.blocks[0]
        blocks, rest = queries // size, queries % size
        last = self._of_blocks(blocks + 1) - self._of_blocks(blocks)
        return (self._of_blocks(blocks) * size + last * rest) * size

    def _of_blocks(self, blocks: Number) -> Number:
        """Return the blocks of keys that a kernel computes for the first so many of queries: of
        each its own and those before, as far as a window goes, or back to where a chunk begins."""
        if self.chunked:
            rows = np.arange(int(np.max(blocks)))
            first = rows * self.blocks[0] // self.window * self.window // self.blocks[0]
            sums = np.concatenate([[0], np.cumsum(rows - first + 1)])
            return sums[np.asarray(blocks, dtype=int)]
        seen = 1 + -(-(self.window - 1) // self.blocks[0]) if self.window else np.inf
        full = np.minimum(blocks, seen)
        return full * (full + 1) / 2.0 + (blocks - full) * full

    def packed(self, tokens: int, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the share of the pairs of each row of `tokens` that a kernel computes which skips
        blocks of no common sequence; `rows` list the tokens of the sequences of each.

        >>> Mask(causal=False).packed(2048, [[1024, 1024], [512, 512, 1000]])
        [0.5, 0.375]
        """
        size = self.blocks[0]
        if tokens <= size:
            return [1.0] * len(rows)
        shares = []
        for row in rows:
            ends = np.cumsum(row)
            first, last = (ends - row) // size, (ends - 1) // size
            blocks = last - first + 1
            done = self._of_blocks(blocks) if self.causal else blocks**2
            both = np.sum(first[1:] == last[:-1])  # where two sequences meet inside a block
            shares.append(float(done.sum() - both) / (tokens / size) ** 2)
        return shares

    def alone(self, lengths: Sequence[int]) -> list[float]:
        """Return the pairs that a kernel computes of each sequence by itself."""
        return [float(self.computed(one)) * one**2 for one in lengths]

    def own(self, queries: Number, striped: Number) -> Number:
        """Return the share of the pairs of so many queries with the keys of the same tokens that a
        kernel computes: of tokens in a row, or `striped`, of two parts that lie apart."""
        if not self.causal:
            return 1.0
        alone, half = (self._in_blocks(q) / q**2 for q in (queries, queries / 2.0))
        # Two halves, each alone, and all of the later one's pairs with the earlier.
        apart = (2.0 * np.minimum(half, 1.0) + (not self.window)) / 4.0
        return np.where(striped, apart, np.minimum(alone, 1.0))

    def counted(self, tokens: int, halved: bool) -> int:
        """Return the pairs that model FLOPs count: all, or `halved` what a causal mask keeps.

        In full a window counts as so many keys of every query; `halved`, what lies in it: w of T
        tokens keep T w - w^2 / 2 pairs (MaxText, `calculate_mixed_attention_model_tflops`). Chunks
        count as sequences of their own.
        """
        if self.chunked:
            chunks, rest = divmod(tokens, self.window)
            return (chunks * self.window**2 + rest**2) // (1 + halved)
        window = min(self.window or self.chosen or tokens, tokens)
        return window * (2 * tokens - window) // 2 if halved else tokens * window
