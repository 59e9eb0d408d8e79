"""Arrays with named dimensions and the operations between them: what a model is made of.

A block is a list of ops. Nothing here knows of meshes, batches or formats: an array says what its
dimensions are called and what kind of array it is, an op what it reads, writes and multiplies, what
its gradient reads, and what it moves through HBM once a compiler has fused what it can.

>>> x = Array("x", ("batch", "seq", "embed"), stream=True)
>>> w = weight("query", "embed", "heads", "head_dim")
>>> op = einsum(x, w, Array("q", ("batch", "seq", "heads", "head_dim"), keep="qkv"))
>>> matmul_dims(x.dims, w.dims, op.out.dims)
Matmul(rows=('batch', 'seq'), inner=('embed',), columns=('heads', 'head_dim'), batch=())
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

Number = Any  # float, int, bool or a numpy array of them, an entry a plan

Dims = tuple[str, ...]
Split = Mapping[str, str]  # mesh axis -> the dimension that it splits


@dataclass(frozen=True)
class Array:
    """An activation or a weight.

    `stream` arrays lie as the residual stream does between the matmuls. `keep` is the name under
    which a remat policy keeps it ("" for what no policy names: it is always computed again).
    `weight` is "matrix" (multiplies tokens), "table" (looked up or added by row), "vector" (a bias,
    a scale, a probe), or "" for an activation. Sums that cross devices in float32 are `wide`.
    `purpose` says what moving it is for, where that is not clear from the rest. `lies` is the row
    of `place.RULES` that says how it is stored, where its kind does not.

    What is `handed` is made in one list of ops and read in others: where it is read its gradient
    adds up, over layers too, and stays partial over the axes that are `owed`; where it is made that
    sum begins a backward pass.
    """

    name: str
    dims: Dims
    stream: bool = False
    keep: str = "rest"
    weight: str = ""
    wide: bool = False
    trained: bool = True  # whether it has a gradient
    purpose: str = ""
    lies: str = ""
    handed: bool = False
    owed: Dims = ()
    split: Split = field(default_factory=dict)  # where it is stored: see `placed`
    original: Array | None = None  # of a view: the array itself
    renamed: tuple[tuple[str, str], ...] = ()  # of a view: dimensions that have another name

    @cached_property
    def splits(self) -> tuple[tuple[str, str], ...]:
        """Which axes split which of its own dimensions where it is stored."""
        return tuple(sorted((axis, d) for axis, d in self.split.items() if d in self.dims))

    def view(self, *dims: str, **renamed: str) -> Array:
        """Return the same array as an op sees it that has other names for its dimensions."""
        dims = dims or tuple(renamed.get(d, d) for d in self.dims)
        return replace(self, dims=dims, original=self, renamed=tuple(renamed.items()))

    def stored(self, split: Split) -> Array:
        """Return the array where it is stored; of a view `split` is of the array itself."""
        if self.original is None:
            return replace(self, split=split)
        names = dict(self.renamed)
        own = {axis: names.get(d, d) for axis, d in split.items()}
        return replace(self, split=own, original=replace(self.original, split=split))


def weight(name: str, *dims: str, kind: str = "matrix", purpose: str = "") -> Array:
    """Return a weight; `kind` is "matrix", "table" or "vector"."""
    return Array(name, dims, keep="", weight=kind, purpose=purpose)


@dataclass(frozen=True, kw_only=True)
class Apart:
    """What crosses HBM where a compiler fuses nothing into matmuls, as XLA does on GPUs: statistics
    are passes of their own, and matmuls' results are read again.

    In units of the elements of the result, as `Stream` has them. `sums`: over rows or columns.
    """

    passes: float
    gradient_passes: float = 0.0
    sums: bool = False


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What an op that is no matmul takes, in units of the elements of its result.

    `passes` arrays of that size cross HBM and `ops` float32 operations are done for each element.
    `fused` operations run in the end of the matmul that makes the op's first operand; those of the
    gradient in the end of the matmul that makes the gradient of its result, with `fused_reads`
    more arrays read there. Of copies of tokens, `beside` passes are more where those of a token lie
    side by side. In the end of the product that makes its last operand it moves `joined` arrays,
    its gradient `joined_gradient` in that of the one that makes the gradient of its result; none:
    it stays apart.
    """

    passes: float = 0.0
    ops: float = 0.0
    gradient_passes: float = 0.0
    gradient_ops: float = 0.0
    fused: float = 0.0
    fused_gradient: float = 0.0
    fused_reads: float = 0.0
    beside: float = 0.0
    beside_gradient: float = 0.0
    joined: float | None = None
    joined_gradient: float | None = None
    by_head: bool = False  # a norm of each head of queries or keys
    sums: float = 0.0  # of `passes`, those that make the operand that is kept as "statistics"
    apart: Apart | None = None  # where nothing is fused into matmuls, if that differs


@dataclass(frozen=True)
class Matmul:
    """Which dimensions a product has: [rows, inner] x [inner, columns], one for each of `batch`."""

    rows: Dims
    inner: Dims
    columns: Dims
    batch: Dims = ()


def matmul_dims(left: Dims, right: Dims, out: Dims) -> Matmul:
    """Return the dimensions of a product of two arrays, by where each of them appears."""
    return Matmul(
        rows=tuple(d for d in left if d in out and d not in right),
        inner=tuple(d for d in left if d in right and d not in out),
        columns=tuple(d for d in right if d in out and d not in left),
        batch=tuple(d for d in left if d in right and d in out),
    )


@dataclass(frozen=True)
class Counted:
    """What model FLOPs count of an op instead of what it multiplies: `times` products of `dims`."""

    unit: str
    times: int
    dims: Dims


class Pairs(Hashable, Protocol):
    """Which of the pairs of queries and keys a softmax is over, in a sequence of so many tokens."""

    @property
    def causal(self) -> bool:
        """Whether a query sees no later keys."""

    @property
    def local(self) -> bool:
        """Whether every device has all keys that its queries see."""

    @property
    def blocks(self) -> tuple[int, int]:
        """How many queries and keys a fused kernel takes at once."""

    @property
    def window(self) -> int:
        """How many keys a query sees at most, itself and those before; 0: all of them."""

    def back(self) -> Pairs:
        """Return the pairs of the gradient's kernel, in its blocks."""

    def computed(self, tokens: int, last: Number | None = None) -> Number:
        """Return the share of all pairs that a fused kernel computes."""

    def packed(self, tokens: int, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the share of the pairs of each row of several sequences."""

    def alone(self, lengths: Sequence[int]) -> list[float]:
        """Return the pairs that a kernel computes of each sequence by itself."""

    def own(self, queries: Number, striped: Number) -> Number:
        """Return the share of the pairs of queries and keys of the same tokens."""

    def counted(self, tokens: int, halved: bool) -> int:
        """Return the pairs that model FLOPs count, in full or `halved` by a causal mask."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A fused attention kernel: products that never leave the chip, operands that do once.

    `mask` says which pairs a softmax is over, whose scores the gradient makes again; without one
    there is no softmax inside. Vector operations run `beside` its products, or in turn with them.
    `widths` are the dimensions that model FLOPs count instead of the inner one, product by product:
    of operands that were padded to be as wide as the widest.
    """

    shape: Matmul
    products: int
    gradient_products: int
    ops: float  # vector operations of a query-key pair
    gradient_ops: float
    mask: Pairs | None = None
    beside: bool = True
    widths: Dims = ()


@dataclass(frozen=True)
class Op:
    """`out` (+)= f(`ins`): several ops with one `out` add to it, and their sum settles once.

    `needs` is what its gradient reads besides the gradient of its result. `vectors` are scales and
    biases: too small to have a say in where it runs. With `reach` = (dimension, length) it reads
    neighbours along that dimension, as far as `length`, of the operands in `reached`.

    Implementations transpose an `eager` op as it stands: where it sums over devices, or gathers,
    they sum its gradient too, though all devices hold the same. Ops of one `call` have the
    gradients of their operands summed at once and apart from other calls, though one sum of all
    would do later.

    A `relay` is its operand, where another array is stored. Products of experts have rows in
    groups: each costs a tile of rows more, where they are cut in tiles (`tile`). Model FLOPs leave
    out what is not `counted`, and of an op that has them take its `counts`. `dtype` is a product's
    format, where it is not the plan's.

    What mesh axes split in it follows from its arrays, but for those in `over`. Operands that it
    wants whole over axes in `passed` come round them piece by piece. A product of scores, or with
    them, says in `mask` which pairs model FLOPs count.
    """

    ins: tuple[Array, ...]
    out: Array
    needs: tuple[Array, ...] = ()
    vectors: tuple[Array, ...] = ()
    product: bool = False  # a matmul of its two operands
    unit: str = "matmul"  # or "attention": whose scores stay in bf16, and whose mask may skip some
    kernel: Kernel | None = None
    stream: Stream = Stream()
    reach: tuple[str, str] | None = None
    reached: tuple[str, ...] = ()
    eager: bool = False
    call: str = ""
    relay: bool = False
    tile: bool = False
    counted: bool = True
    counts: Counted | None = None
    dtype: str = ""
    over: Split = field(default_factory=dict)
    passed: frozenset[str] = frozenset()
    mask: Pairs | None = None

    @property
    def name(self) -> str:
        """The weight that it multiplies with, else what it makes."""
        made = next((array.name for array in self.ins if array.weight and self.product), "")
        return made or self.out.name

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Operands and result."""
        return (*self.ins, self.out)


def einsum(a: Array, b: Array, out: Array, *vectors: Array, unit: str = "matmul") -> Op:
    """Return a product of two arrays, summed over what the result does not have, plus biases."""
    return Op((a, b), out, (a, b), vectors, product=True, unit=unit)


def pointwise(ins: Sequence[Array], out: Array, *vectors: Array, stream: Stream = Stream()) -> Op:
    """Return an op whose gradient reads its operands again."""
    return Op(tuple(ins), out, tuple(ins), vectors, stream=stream)


def linear(ins: Sequence[Array], out: Array, *vectors: Array, stream: Stream = Stream()) -> Op:
    """Return an addition, a rotation or a look-up: the gradient reads nothing."""
    return Op(tuple(ins), out, (), vectors, stream=stream)


def makers(ops: Sequence[Op]) -> dict[str, list[int]]:
    """Return by name of array the places of the ops that make it."""
    made: dict[str, list[int]] = {}
    for number, op in enumerate(ops):
        made.setdefault(op.out.name, []).append(number)
    return made


@dataclass(frozen=True)
class Backward:
    """What a backward pass finds and what it makes again, under one remat policy."""

    again: tuple[int, ...]  # ops that run again, in order
    kept: tuple[Array, ...]  # arrays that are there since the forward pass, but for its input


def backward(ops: Sequence[Op], policy: frozenset[str]) -> Backward:
    """Return what is computed again: a mesh has no say in it."""
    made = makers(ops)
    seen: set[str] = set()
    again: list[int] = []
    kept: list[Array] = []

    def need(array: Array) -> None:
        array = array.original or array
        if array.name in seen or array.weight:
            return
        seen.add(array.name)
        if array.keep in policy and array.name in made:
            kept.append(array)
            return
        for number in made.get(array.name, ()):
            for operand in ops[number].ins:
                need(operand)
            again.append(number)

    for op in reversed(ops):
        for array in op.needs:
            need(array)
    return Backward(again=tuple(again), kept=tuple(kept))


def weights_of(ops: Sequence[Op]) -> tuple[Array, ...]:
    """Return the weights that ops use, each once, in order."""
    found = {a.name: a.original or a for op in ops for a in (*op.ins, *op.vectors) if a.weight}
    return tuple(found.values())
