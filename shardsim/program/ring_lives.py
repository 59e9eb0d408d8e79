"""What rings over a tensor axis hold while a block runs: pieces, summands, empty arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shardsim.graph.arrays import Array, Dims, Op, Split
from shardsim.graph.derive import Step, Transfer
from shardsim.graph.place import HEAD_WIDTHS
from shardsim.program.across import gathers_stream
from shardsim.program.holds import Passes
from shardsim.program.sized import WIDE, by_place, moved, stored
from shardsim.program.sizes import BY_BLOCKS
from shardsim.program.trace import EMPTY, Live, Size


@dataclass
class RingLives:
    """The arrays of a block and their lives, and what rings over a tensor axis have beside."""

    passes: Passes
    ring: str  # over "embed" or "sequence", or none
    signs: bool = False  # whether the activation's derivative needs no more than signs
    now: int = -1  # the moment
    labels: list[str] = field(default_factory=list)
    arrays: list[Live] = field(default_factory=list)
    named: dict[str, Live] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)  # array -> the one in whose place it is
    sources: dict[str, tuple[Array, ...]] = field(default_factory=dict)  # of what is never written
    whole: dict[str, tuple[int, int, Size]] = field(default_factory=dict)  # weights: their readers
    gradients: dict[str, tuple[int, int, Size]] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()  # results that are never written
    turned: frozenset[str] = frozenset()  # results whose gradients are in float32
    passed: str = ""  # what the ring of now gathers, what it has beside results, the one before
    beside: list[Live] = field(default_factory=list)
    # Of rings that add to one sum: pieces on their way, and the results whose gradients they read.
    pieces: dict[str, list[Live]] = field(default_factory=dict)
    together: dict[str, list[Array]] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)  # when what is gathered was first read
    # What the products of now read, they, and those before.
    rings: tuple[str, ...] = ()
    current: list[Step] = field(default_factory=list)
    earlier: list[Step] = field(default_factory=list)
    before: list[Live] = field(default_factory=list)
    begun: int = 0  # when the ring of now began
    products: list[Live] = field(default_factory=list)  # that its results are not added to yet
    summands: Live | None = None  # of the last product that a ring scatters
    softmaxed: dict[str, Array] = field(default_factory=dict)  # scores -> what is made of them
    hidden: list[tuple[str, Array]] = field(default_factory=list)  # what gradients of MLPs read

    @property
    def waits(self) -> bool:
        """Whether gradients of weights wait for rings."""
        return bool(self.ring and (self.passes.ring_pieces or self.passes.ring_weights_wait))

    @property
    def gradient_written(self) -> bool:
        """Whether the gradient of logits is written, not made in the products that read it."""
        passes = self.passes
        return not passes.ring_pieces or passes.logits_apart or passes.narrow_logits

    def moment(self, label: str) -> None:
        """Begin a moment."""
        self.now = len(self.labels)
        self.labels.append(label)

    def root(self, name: str) -> str:
        """Return the array in whose place another is."""
        while name in self.same:
            name = self.same[name]
        return name

    def make(self, name: str, size: Size) -> None:
        """Make an array, unless it is there."""
        if not self.lives(name):
            self.named[name] = self.passing(name, size)

    def lives(self, name: str) -> bool:
        """Let an array live up to now if it is there, and return whether it is."""
        known = self.named.get(self.root(name))
        if known is not None:
            known.last = self.now
        return known is not None

    def passing(self, name: str, size: Size, times: float = 1.0) -> Live:
        """Note what is there at this moment."""
        self.arrays.append(Live(name, size, self.now, self.now, times))
        return self.arrays[-1]

    def by_blocks(self, op: Op) -> Dims:
        """Return the dimension that what attention to keys that pass round has by blocks has more
        where a kernel may run."""
        kernel = self.passes.pieces_in_kernel and op.kernel and op.kernel.mask
        return (BY_BLOCKS,) if kernel and not kernel.window else ()

    def sums(self, array: Array, place: Split, axes: frozenset[str]) -> Size:
        """Return the size of float32 sums over what passes round `axes`."""
        return Size(array.dims, by_place(array, place), WIDE, axes)

    def scatter(self, name: str, array: Array, place: Split) -> None:
        """Note the float32 summands of a ring that scatters, and pieces on their way."""
        size = Size(array.dims, by_place(array, place), WIDE)
        summands = self.passing(f"{name}, summands", size, self.passes.ring_results)
        if self.passes.ring_apart and self.ring == "sequence":
            if self.summands and self.summands.name == summands.name:
                self.summands.last = self.now
            self.summands = summands
        if self.passes.ring_pieces:
            for before in self.pieces.get(name, ()):
                before.last = self.now
            one = self.passing(f"{name}, pieces", stored(array), self.passes.ring_pieces)
            products = self.pieces.setdefault(name, [])
            products.append(one)
            if len(products) > 1:
                times = self.passes.ring_leaving * len(products)
                self.passing(f"{name}, leaving", stored(array), times)

    def gather(
        self,
        name: str,
        out: Array,
        place: Split,
        gathers: Iterable[Transfer],
        partial: frozenset[str] = frozenset(),
    ) -> None:
        """Note what a ring that gathers has beside the results of all matmuls that read it."""
        gathered = [g for g in gathers if gathers_stream(g)]
        if not self.ring or not gathered:
            return
        if gathered[0].array != self.passed:
            self.passed, self.before, self.beside = gathered[0].array, self.beside, []
            if self.passes.ring_waits:  # both rings end together
                for one in self.products:
                    self.passing(one.name, one.size, one.times)
            self.begun, self.products = self.now, []
        if self.ring == "embed":
            size = Size(out.dims, by_place(out, place), WIDE)
            times = self.passes.ring_sums
            if self.passes.ring_apart:
                size = replace(size, others=gathered[0].axes)
            elif out.wide:  # the result is the sum; beside it is its gradient, half as wide
                times = 0.5 * self.gradient_written
            beside = self.passing(f"{name}, summands", size, times)
            if not out.wide and not self.passes.ring_apart:
                more = replace(size, many=gathered[0].axes)
                one = Live(f"{name}, product", more, self.begun, self.begun, times)
                self.products.append(one)
                self.arrays.append(one)
            if out.wide and not self.passes.ring_apart:  # one product is not added as it is made
                more = replace(size, many=gathered[0].axes)
                self.beside.append(self.passing(f"{name}, product", more, 0.5))
        else:
            size = Size(out.dims, by_place(out, place), "wire")
            beside = self.passing(f"{name}, pieces", size, self.passes.ring_copies)
            # What another axis sums and gathers again is in one by then: one array of the MLP, not
            # two, of ViT-22B on v4, v5p and v6e and of vit-bigg on v5e with two tensor axes.
            if partial and "mlp" in out.dims:
                beside.size = replace(beside.size, alone=partial)
        if out.wide and partial and not (self.ring == "embed" and self.passes.ring_apart):
            # Its gradient comes when its summands over another axis are gone.
            self.arrays.append(replace(beside, born=self.now + 1, last=self.now + 1))
            beside.size = replace(beside.size, alone=partial)
        self.beside.append(beside)
        if self.passes.ring_waits:
            for array in (*self.before, *self.beside):
                array.last = self.now

    def put_together_ahead(self) -> None:
        """Let the arrays in which rings put together gradients be there from the start."""
        for one in self.arrays:
            if one.name.startswith("d ") and one.name.endswith(", whole"):
                one.born = 0

    def empties(self, steps: Sequence[Step]) -> None:
        """Note the empty arrays in which rings put together what they gather and make, and the
        zeros from which sums over what passes round begin, forward and backward."""
        for step in steps:
            if step.op.passed:
                zeros = self.sums(step.op.out, step.place, step.op.passed)
                zeros = replace(zeros, dims=(*zeros.dims, *self.by_blocks(step.op)))
                self.arrays.append(Live(f"{EMPTY}{step.op.out.name}", zeros, 0, self.now, 2.0))
        if not self.ring:
            return
        gathers = [(step, g) for step in steps for g in step.gathers if gathers_stream(g)]
        if self.ring == "embed":
            back = [g for step in steps for g in step.gradient_gathers if gathers_stream(g)]
            wholes = {g.array: g for g in (*(gather for _, gather in gathers), *back)}
            for name, gather in wholes.items():
                self.arrays.append(Live(f"{EMPTY}{name}", moved(gather), 0, self.now))
            return
        every = self.passes.ring_empty == "every"
        empty: dict[str, Size] = {}
        for step, gather in gathers:
            out = step.op.out
            if every or not empty:
                empty[gather.array if every else "whole"] = moved(gather)
            if step.op.product and (every or HEAD_WIDTHS & {*out.dims}):
                empty[out.name] = Size(out.dims, by_place(out, step.place), "wire")
        for step in steps if every else ():
            for gather in step.gradient_gathers:
                of_result = gather.gradient and gather.array == step.op.out.name
                if of_result and gathers_stream(gather) and step.op.product:
                    array = step.op.ins[0]
                    empty[f"d {step.op.out.name}"] = moved(gather)
                    empty[f"d {array.name}"] = Size(array.dims, by_place(array, step.place), "wire")
        for name, size in empty.items():
            joined = every and bool(HEAD_WIDTHS & {*size.dims})
            one = replace(size, joined=joined)
            self.arrays.append(Live(f"{EMPTY}{name}", one, 0, self.now))
