"""What is live in HBM while a block runs: every array from the op that makes it to its last reader.

A `Trace` is made once for a kind of mesh, a remat policy and an implementation: at which moment of
the backward pass each array appears and is last read. Sizes come later, as numbers or arrays of one
entry a plan, so that the peak of many plans is a product of matrices: moments x arrays x plans.

Elementwise ops work in place, additions of gradients too. What a matmul sums over devices is whole
until it is scattered; what is gathered stays whole from its first reader to its last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shardsim.graph.arrays import Array, Backward, Dims, Split
from shardsim.graph.derive import Derived, Step, Transfer

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What an implementation does beyond the plan."""

    gathers_ahead: int  # matmuls before the first that needs it, a weight's gather starts
    gradients_waiting: int  # later gradients that are computed before one is scattered
    stream_bytes: float | None = None  # an element of the gradient of the stream; None: as it is
    lanes: float = 128.0  # float32 numbers that a fused attention kernel keeps of each row
    activation_kept: bool = True  # a gated hidden layer is an array between its two matmuls
    ring_sums: float = 1.0  # float32 summands of a whole result in a ring over embed
    ring_copies: float = 0.0  # of a result, beside it, in a ring over the sequence


@dataclass(frozen=True)
class Size:
    """Bytes of an array: its dimensions on a device, an element, and for which plans it exists."""

    dims: Dims
    by: tuple[tuple[str, str], ...]
    width: str | float  # "wire", "reduce", or bytes
    several: frozenset[str] = frozenset()  # only where these axes have several members
    ring: str = ""  # only with a ring over "embed" or "sequence", or without any: "none"
    times: float = 1.0


@dataclass
class Live:
    """An array, and the first and last moment of its life."""

    name: str
    size: Size
    born: int
    last: int


@dataclass(frozen=True)
class Trace:
    """The moments of a block, and what is live at each."""

    labels: tuple[str, ...]
    arrays: tuple[Live, ...]

    @cached_property
    def matrix(self) -> Matrix:
        """Moments x arrays: 1 where an array is live. Moments that others cover are left out."""
        at = np.arange(len(self.labels))[:, None]
        born = np.array([array.born for array in self.arrays])
        last = np.array([array.last for array in self.arrays])
        return ((at >= born) & (at <= last)).astype(float)

    @cached_property
    def fullest(self) -> Matrix:
        """The rows of `matrix` that no other row covers: the peak is at one of them."""
        rows = np.unique(self.matrix, axis=0)
        covered = [
            any((other >= row).all() for j, other in enumerate(rows) if j != i)
            for i, row in enumerate(rows)
        ]
        return rows[~np.array(covered)]


class Tracer:
    """Follows the ops of a block."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.labels: list[str] = []
        self.arrays: list[Live] = []
        self.named: dict[str, Live] = {}
        self.same: dict[str, str] = {}  # array -> the one in whose place it is
        self.whole: dict[str, tuple[int, int, Size]] = {}  # weights: first and last reader
        self.gradients: dict[str, tuple[int, Size]] = {}

    @property
    def now(self) -> int:
        """The moment."""
        return len(self.labels) - 1

    def root(self, name: str) -> str:
        """Return the array in whose place another is."""
        while name in self.same:
            name = self.same[name]
        return name

    def make(self, name: str, size: Size) -> None:
        """Make an array, unless it is there."""
        if self.root(name) in self.named:
            self.named[self.root(name)].last = self.now
            return
        self.named[name] = Live(name, size, self.now, self.now)
        self.arrays.append(self.named[name])

    def passing(self, name: str, size: Size) -> None:
        """Note what is there at this moment only."""
        self.arrays.append(Live(name, size, self.now, self.now))

    def read(self, array: Array, transfers: Iterable[Transfer], prefix: str = "") -> None:
        """Read an array, whole if it is gathered; what was kept appears when it is first read."""
        name = prefix + (array.original or array).name
        for transfer in transfers:
            if transfer.array == array.name and transfer.gradient == bool(prefix):
                if f"{name}, whole" not in self.named:
                    self.touch(name, array)
                self.make(f"{name}, whole", moved(transfer))
                return
        self.touch(name, array)

    def touch(self, name: str, array: Array) -> None:
        """Let an array live up to now."""
        sources = self.sources.get(self.root(name))
        if sources is not None:
            for source in sources:
                self.touch(source.name, source)
            return
        self.make(name, stored(array.original or array))

    sources: dict[str, tuple[Array, ...]]

    def forward(self, step: Step, again: str = "") -> None:
        """Run an op."""
        op, place = step.op, step.place
        self.labels.append(op.name + again)
        for array in op.ins:
            if array.weight:
                self.weight(array, step.gathers)
            elif array.trained:
                self.read(array, step.gathers)
        if op.stream.fused and not (op.stream.passes and self.passes.activation_kept):
            self.sources[op.out.name] = op.ins
            return
        partial = frozenset().union(*(move.axes for move in step.settles))
        if op.product and partial:
            over_tensor = any(_tensor(move.axes) for move in step.settles)
            ring = "none" if over_tensor and op.out.stream else ""
            self.passing(
                f"{op.out.name}, partial", placed(op.out, place, several=partial, ring=ring)
            )
            if ring:
                self._ring_result(op.out)
        if op.product and not op.out.stream:
            self._ring_pieces(op.out, place, step.gathers)
        self.make(op.out.name, stored(op.out))
        if op.kernel and op.kernel.softmax:
            lanes = Size(op.out.dims[:-1], _by(op.out, place), 4.0, times=self.passes.lanes)
            self.make(f"{op.out.name}, statistics", lanes)

    def _ring_result(self, out: Array) -> None:
        """A ring's summands on their way and the one made, in float32."""
        for ring in ("embed", "sequence"):
            size = stored(out)
            self.passing(
                f"{out.name}, in a ring", Size(size.dims, size.by, 4.0, ring=ring, times=3.0)
            )

    def _ring_pieces(self, out: Array, place: Split, gathers: Iterable[Transfer]) -> None:
        """What a ring that gathers has beside its result."""
        if not any(_tensor(g.axes) and g.kind == "all-gather" and not g.weight for g in gathers):
            return
        dims, by = out.dims, _by(out, place)
        sums, copies = self.passes.ring_sums, self.passes.ring_copies
        self.passing(f"{out.name}, summands", Size(dims, by, 4.0, ring="embed", times=sums))
        self.passing(f"{out.name}, pieces", Size(dims, by, "wire", ring="sequence", times=copies))

    def backward(self, step: Step) -> None:
        """Run an op's gradient."""
        op, place = step.op, step.place
        self.labels.append(f"{op.name} gradient")
        d = f"d {op.out.name}"
        if step.gradient_settles and op.out.stream:
            self.named.pop(self.root(f"{d}, partial"), None)
            self.make(d, self.stream(op.out))
        if op.product or op.kernel or op.needs:
            self.read(op.out, step.gradient_gathers, "d ")
        for array in op.needs:
            if array.weight:
                self.weight(array, step.gradient_gathers)
            elif array.trained:
                self.read(array, step.gradient_gathers)
        if op.kernel and op.kernel.softmax:
            self.make(f"{op.out.name}, statistics", stored(op.out))
        for array in op.ins:
            if array.weight or not array.trained:
                continue
            target = f"d {(array.original or array).name}"
            in_place = not op.product and not op.kernel and array.dims == op.out.dims
            if in_place and self.root(target) not in self.named and self.root(d) in self.named:
                self.same[target] = self.root(d)
                self.touch(d, op.out)
            elif op.product and self._settled(array, step):
                by = placed(array.original or array, place)
                self.make(f"{target}, partial", Size(by.dims, by.by, by.width, ring="none"))
                self._ring_result(array)
            else:
                size = self.stream(array) if array.stream else stored(array.original or array)
                self.make(target, size)
                if op.product and not array.stream:
                    self._ring_pieces(array, place, step.gradient_gathers)
        for array in op.ins:
            if array.weight in ("matrix", "table"):
                size = placed(
                    array,
                    place,
                    several=frozenset(
                        a for a in array.split if a not in place or place[a] != array.split[a]
                    ),
                    width="reduce",
                )
                self.gradients[array.name] = (self.now, size)

    def _settled(self, array: Array, step: Step) -> bool:
        """Return whether the gradient of an operand comes out partial over a tensor axis."""
        return array.stream and any(
            _tensor([axis]) and d not in array.dims for axis, d in step.place.items()
        )

    def stream(self, array: Array) -> Size:
        """Return the gradient of an array of the stream."""
        size = stored(array)
        width = self.passes.stream_bytes
        return size if width is None else Size(size.dims, size.by, width)

    def weight(self, array: Array, transfers: Iterable[Transfer]) -> None:
        """Read a weight, whole."""
        for transfer in transfers:
            if transfer.array == array.name:
                first = self.whole.get(array.name, (self.now, 0, moved(transfer)))[0]
                self.whole[array.name] = (first, self.now, moved(transfer))

    def trace(self) -> Trace:
        """Return all of it: whole weights and gradients take their places, round the loop."""
        spans = [
            (f"{name}, gathered", first, last, size, -self.passes.gathers_ahead)
            for name, (first, last, size) in self.whole.items()
        ]
        spans += [
            (f"d {name}, whole", at, at, size, self.passes.gradients_waiting)
            for name, (at, size) in self.gradients.items()
        ]
        for ahead in (True, False):
            some = [span for span in spans if (span[4] <= 0) == ahead]
            times = sorted({first for _, first, _, _, _ in some})
            for name, first, last, size, by in some:
                rounds, index = divmod(times.index(first) + by, len(times))
                start, stop = (times[index], last) if by <= 0 else (last, times[index])
                if rounds:
                    self.arrays.append(Live(name, size, start, self.now))
                    self.arrays.append(Live(name, size, 0, stop))
                else:
                    self.arrays.append(Live(name, size, start, stop))
        return Trace(tuple(self.labels), tuple(self.arrays))


def layer_trace(derived: Derived, back: Backward, passes: Passes) -> Trace:
    """Return what is live while a layer runs again and back."""
    tracer = Tracer(passes)
    tracer.sources = {}
    steps = derived.steps
    first, final = steps[0].op.ins[0], steps[-1].op.out
    tracer.labels.append("enter")
    tracer.make(first.name, stored(first))
    tracer.make(f"d {final.name}", tracer.stream(final))
    for number in back.again:
        tracer.forward(steps[number], " again")
    for step in reversed(steps):
        if step.trained:
            tracer.backward(step)
    return tracer.trace()


def stored(array: Array) -> Size:
    """Return the size of an array where it is stored."""
    return Size(array.dims, _by(array, array.split), _width(array))


def placed(
    array: Array,
    place: Split,
    several: frozenset[str] = frozenset(),
    ring: str = "",
    width: str = "",
) -> Size:
    """Return the size of an array as an op makes it."""
    return Size(array.dims, _by(array, place), width or _width(array), several, ring)


def moved(transfer: Transfer) -> Size:
    """Return the size of what a transfer leaves."""
    return Size(transfer.dims, transfer.by, 4.0 if transfer.wide else "wire", transfer.axes)


def _by(array: Array, place: Split) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((axis, d) for axis, d in place.items() if d in array.dims))


def _width(array: Array) -> str | float:
    return 4.0 if array.wide else "wire"


def _tensor(axes: Iterable[str]) -> bool:
    return any(axis.startswith("tensor") and not axis.startswith("tensor2") for axis in axes)
