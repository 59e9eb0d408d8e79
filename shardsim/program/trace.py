"""When arrays are live, and how large they are: a trace's peak is a product of matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import mul
from typing import Any

import numpy as np

from shardsim.graph.arrays import Array, Dims
from shardsim.ops.attend_kernels import KERNEL_MULTIPLE, is_short
from shardsim.plan.layout import Number
from shardsim.plan.tiles import LANES, ROWS, in_lanes, in_rows
from shardsim.plan.tiles import filled as whole_tiles
from shardsim.program.sizes import Sizes

Matrix = np.ndarray[Any, np.dtype[np.float64]]

POSITIONS = ("seq", "keys")
EMPTY = "ring buffer, "  # what names of arrays begin with in which rings put things together
FEW = 4  # members of a ring, the matrix unit of each of which adds to the sum of another
STREAM = ("batch", "seq", "embed")
# Rows of statistics that are read as a kernel of attention wrote them, a number in the first of its
# lanes (257 to 2,048 are turned first, whole: vit-h-14 on v4, v5e and v5p, dinov2-g-14 on v5p,
# llama2-7b with a context axis, maxtext-22b on v4, maxtext-16b on v6e; not the 256 of ViT-22B on v4
# and v5p and of vit-bigg, nor the 197 of vit-l-16).
AS_IT_LIES = 256
LITTLE = 1.05  # times its elements: what XLA leaves empty rather than turn an array
NEVER_DENSE = frozenset({"batch", "kv", "group"})
# Multiplications at once in a product of matrices. OpenBLAS hands larger ones to threads, which
# wait for each other longer than these small products take, and turn idly on a busy machine.
AT_ONCE = 2**18


@dataclass(frozen=True)
class Size:
    """Bytes of an array on a device: its dimensions, what splits them, and an element's bytes."""

    dims: Dims
    by: tuple[tuple[str, str], ...]
    width: str | float  # "wire", "reduce", "weights" (of layers, gathered), or bytes
    several: frozenset[str] = frozenset()  # only where these axes have several members
    alone: frozenset[str] = frozenset()  # only where none of these has
    others: frozenset[str] = frozenset()  # one for each other member of a group over these
    many: frozenset[str] = frozenset()  # only where a group over these has more than `FEW` members
    # Gathered along a dimension that these axes split: pieces that are no whole tiles are put one
    # behind another in an array whose own dimension of 1 lies inside, so half of each tile is empty
    # (bf16[1,5120,32768]{2,0,1:T(2,128)(2,1)} in maxtext-16b and, with both batches, llama2-13b).
    pieces: tuple[str, tuple[str, ...]] | None = None
    joined: bool = False  # heads lie one behind another, as rings by rows make them
    turned: str = ""  # only where more than `AS_IT_LIES` of these are turned before they are read

    def __post_init__(self) -> None:  # sizes are looked up more often than anything else
        known = hash(
            (
                self.dims,
                self.by,
                self.width,
                self.several,
                self.alone,
                self.others,
                self.many,
                self.pieces,
                self.joined,
                self.turned,
            )
        )
        object.__setattr__(self, "_hash", known)

    def __hash__(self) -> int:
        found: int = self.__dict__["_hash"]
        return found


@dataclass
class Live:
    """An array, so many times, and the first and last moment of its life."""

    name: str
    size: Size
    born: int
    last: int
    times: float = 1.0


class Measure:
    """Bytes of sizes under a layout, each computed once.

    `tiled` says how HBM holds an array: "" as many elements as there are, "rows" in whole rows of
    `LANES` along its densest dimension, "kernel" so too, and what a fused attention kernel reads
    and writes as it wants it (`KERNEL_MULTIPLE` positions, `LANES` of each head).
    """

    def __init__(
        self,
        sizes: Sizes,
        wire_bytes: float,
        reduce_bytes: float,
        weight_bytes: float | None = None,
        tiled: str = "",
    ) -> None:
        self.sizes = sizes
        self.tiled = tiled
        weights = wire_bytes if weight_bytes is None else weight_bytes
        self.widths = {"wire": wire_bytes, "reduce": reduce_bytes, "weights": weights}
        self.known: dict[Size, Number] = {}
        self._fills: dict[tuple[object, ...], Number] = {}
        self._peaks: dict[int, tuple[Trace, Number]] = {}  # kept, so that no identity comes again

    def __call__(self, size: Size) -> Number:
        """Return bytes on one device."""
        known = self.known.get(size)
        if known is None:
            width = self.widths[size.width] if isinstance(size.width, str) else size.width
            known = self.sizes.moved(size.dims, size.by) * width
            if self.tiled:
                known = known * (self._joined(size) if size.joined else self._filled(size))
            if size.several:
                known = known * self.sizes.several(size.several)
            if size.alone:
                known = known * np.logical_not(self.sizes.several(size.alone))
            if size.others:
                known = known * (self.sizes.members(size.others) - 1)
            if size.many:
                known = known * np.greater(self.sizes.members(size.many), FEW)
            if size.pieces:
                known = known * np.where(self.sizes.part(*size.pieces) % ROWS, 2.0, 1.0)
            if size.turned:
                rows = self._length(size, size.turned)
                known = known * np.greater(rows, AS_IT_LIES)
            self.known[size] = known
        return known

    def peak(self, trace: Trace) -> Number:
        """Return the bytes at the fullest moment of a trace; of one and the same, computed once."""
        known = self._peaks.get(id(trace))
        if known is None:
            known = self._peaks[id(trace)] = trace, trace.peak(self)
        return known[1]

    def _filled(self, size: Size, kept: bool = False) -> Number:
        """Return how many times its elements an array takes in HBM, whatever an element has."""
        key = size.dims, size.by, kept
        if key not in self._fills:
            self._fills[key] = self._in_tiles(size, kept)
        return self._fills[key]

    def _in_tiles(self, size: Size, kept: bool) -> Number:
        """Return how many times its elements an array takes in HBM.

        XLA lays out densest what fills rows best: embed, the positions of heads narrower than a
        row, never heads or sequences, and of softmax the keys (vit-h-14 on v4: 257 tokens). Next to
        it positions fill tiles of `ROWS`. The stream lies with sequences among its rows where they
        fill them (512 x 257 x 320 in vit-h-14 on v4, 1024 x 64 x 416 in vit-bigg on v5e) or where
        that leaves less empty than `LITTLE` (83 x 50 x 4096 in mae-l-16 on v4); so do heads that
        would fill half of them (83 x 50 x 16 x 64 there).
        """
        length = partial(self._length, size)

        def rows(d: str, multiple: int) -> Number:
            return np.ceil(length(d) / multiple) * multiple / np.maximum(length(d), 1.0)

        positions = [d for d in POSITIONS if d in size.dims]
        kernel = self.tiled == "kernel" and positions and "head_dim" in size.dims
        if kernel and not is_short(self.sizes.lengths[positions[0]]):
            of_position = ROWS if kept else KERNEL_MULTIPLE
            return rows("head_dim", LANES) * rows(positions[0], of_position)
        dense = positions if len(positions) > 1 else [d for d in size.dims if d not in NEVER_DENSE]
        if not dense:
            return 1.0

        def filled(d: str) -> Number:
            next_ = [other for other in positions if other != d]
            return reduce(mul, (in_rows(length(other)) for other in next_), rows(d, LANES))

        found = reduce(np.minimum, [filled(d) for d in dense])
        if "batch" not in size.dims or len(positions) != 1:
            return found
        sequences = length("batch")
        if len(size.dims) > len(STREAM):
            return np.where(found < 2.0, found, np.minimum(found, in_lanes(sequences)))
        compact = whole_tiles([length(d) for d in size.dims])
        fits = np.equal(np.mod(sequences, LANES), 0) | np.greater(found, LITTLE)
        return np.where(fits, np.minimum(compact, found), found)

    def of_kept(self, array: Array, ring: bool = False) -> Number:
        """Return how many times its elements an array takes that layers keep.

        Of queries, keys and values as projected each head fills rows where a kernel reads them
        (bf16[44,4,4096,64,96]{4,2,3,1,0} in gpt-neox-20b on v5p, 64 wide in llama3.2-1b on v4 and
        vit-l-16 on v5p); as a `ring` makes them heads lie one behind another (mae-l-16 and
        llama3.2-1b on v4). The kernel's results are kept as it writes them.
        """
        if not self.tiled:
            return 1.0
        size, result = Size(array.dims, array.splits, "wire"), array.keep == "context"
        if ring and not result and "head_dim" in array.dims:
            return self._joined(size)
        return self._filled(size, kept=not result)

    def _joined(self, size: Size) -> Number:
        """Return how many times its elements an array takes whose heads lie one behind another."""
        width = reduce(mul, (self._length(size, d) for d in size.dims[len(STREAM) - 1 :]))
        return in_lanes(width) * in_rows(self._length(size, size.dims[1]))

    def _length(self, size: Size, d: str) -> Number:
        return self.sizes.part(d, [axis for axis, other in size.by if other == d])

    def total(self, arrays: Iterable[Live]) -> Number:
        """Return the bytes of arrays together."""
        return sum(self(array.size) * array.times for array in arrays)


@dataclass(frozen=True)
class Trace:
    """The moments of a block, and what is live at each."""

    labels: tuple[str, ...]
    arrays: tuple[Live, ...]

    @property
    def empty(self) -> tuple[Live, ...]:
        """Arrays in which rings put together what they gather and make."""
        return tuple(array for array in self.arrays if array.name.startswith(EMPTY))

    @cached_property
    def matrix(self) -> Matrix:
        """Moments x arrays: how many times an array is live."""
        at = np.arange(len(self.labels))[:, None]
        spans = [(array.born, array.last, array.times) for array in self.arrays]
        born, last, times = np.array(spans).T
        live: Matrix = ((at >= born) & (at <= last)) * times
        return live

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of arrays, each once."""
        return tuple(dict.fromkeys(array.size for array in self.arrays))

    @cached_property
    def by_size(self) -> Matrix:
        """Moments x `sizes`: how many arrays of a size are live."""
        columns = {size: column for column, size in enumerate(self.sizes)}
        column = np.array([columns[array.size] for array in self.arrays])
        order = np.argsort(column, kind="stable")
        firsts = np.searchsorted(column[order], np.arange(len(columns)))
        return np.add.reduceat(self.matrix[:, order], firsts, axis=1)

    @cached_property
    def fullest(self) -> Matrix:
        """Those rows of `by_size` that no other covers. The peak is at one of them."""
        rows = self.by_size
        covers = (rows[:, None, :] >= rows[None, :, :]).all(axis=2)
        covers &= ~(covers.T & np.tri(len(rows), dtype=bool).T)  # of equal rows the last stays
        return rows[~covers.any(axis=0)]

    def peak(self, measure: Measure) -> Number:
        """Return the bytes at the fullest moment."""
        each = np.stack(np.broadcast_arrays(*(measure(size) for size in self.sizes)))
        plans = each.reshape(len(each), -1)
        # To compare all moments takes as long as to measure them for about as many plans.
        rows = self.fullest if plans.shape[1] > len(self.labels) else self.by_size
        step = max(1, AT_ONCE // rows.size)
        found = [
            (rows @ plans[:, start : start + step]).max(axis=0)
            for start in range(0, plans.shape[1], step)
        ]
        return np.concatenate(found).reshape(each.shape[1:])

    def at_peak(self, measure: Measure) -> tuple[str, list[tuple[str, float]]]:
        """Return one plan's fullest moment, and what is there."""
        each = np.array([float(measure(array.size)) for array in self.arrays])
        row = int((self.matrix @ each).argmax())
        there = zip(self.arrays, self.matrix[row] * each, strict=True)
        return self.labels[row], [(array.name, size) for array, size in there if size > 0]
