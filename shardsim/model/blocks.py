"""A model as a graph: its blocks as short lists of ops, and what stands before and after them.

A new kind of block is a new list of the ops in `shardsim.ops`; what it splits, moves, computes,
keeps and emits follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import eq
from typing import TYPE_CHECKING

from shardsim.graph.arrays import Array, Op
from shardsim.graph.build import Builder, Part
from shardsim.model.block import STATE, Block, LayerKind
from shardsim.model.ends import head, start
from shardsim.ops.project import BACK, INTO

if TYPE_CHECKING:
    from shardsim.model.spec import Model


@dataclass(frozen=True)
class Layer:
    """A block, from the array `x` to the last op's result: `times` in a row in each round."""

    name: str  # what tells it from others of its stack, or nothing
    part: Part
    times: int = 1


@dataclass(frozen=True)
class Stack:
    """Layers that run in rounds: each of them in turn, and that `rounds` times.

    A layer's input, and what its remat policy names, are kept for its own backward pass.
    """

    layers: tuple[Layer, ...]
    rounds: int

    @property
    def round_layers(self) -> int:
        """Layers of a round."""
        return sum(layer.times for layer in self.layers)


@dataclass(frozen=True)
class Graph:
    """A model: stacks of blocks, what stands before them and what after."""

    before: Part
    stacks: tuple[Stack, ...]
    after: Part

    @property
    def layers(self) -> tuple[tuple[Layer, int], ...]:
        """The kinds of layers, and how many of each a model has."""
        return tuple(
            (layer, stack.rounds * layer.times) for stack in self.stacks for layer in stack.layers
        )

    @property
    def ends(self) -> tuple[Op, ...]:
        """The ops around the blocks; the head reads the array that the embedding writes."""
        return self.before.ops + self.after.ops


def graph_of(model: Model, attention: str = "flash") -> Graph:
    """Return the graph of a model, or of a part of one; `attention` is a fused kernel's name or
    "unfused"."""
    before, after = Builder(), Builder()
    head(after, model, start(before, model))
    graph = Graph(before=before.part, stacks=stacks_of(model, attention), after=after.part)
    if model.frozen:
        return still(graph, whole=True)
    return still(graph, whole=False) if model.lora else graph


def still(graph: Graph, *, whole: bool) -> Graph:
    """Return a graph nothing of which is trained: a `whole` one, or only adapters are."""

    def one(array: Array) -> Array:
        kept = array.name.endswith((INTO, BACK)) or not array.weight
        return replace(array, trained=array.trained and kept and not whole)

    def arrays(found: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(map(one, found))

    def needed(op: Op) -> tuple[Array, ...]:
        """Return what gradients of those operands read that have some: of a product, the other."""
        if not op.product:
            return op.needs
        others = zip(op.ins, reversed(op.ins), strict=True)
        return tuple(other for array, other in others if one(array).trained)

    def part(moving: Part) -> Part:
        ops = (
            replace(
                op,
                ins=arrays(op.ins),
                out=one(op.out),
                needs=arrays(needed(op)),
                vectors=arrays(op.vectors),
            )
            for op in moving.ops
        )
        return replace(moving, ops=tuple(ops))

    stacks = tuple(
        replace(
            stack, layers=tuple(replace(layer, part=part(layer.part)) for layer in stack.layers)
        )
        for stack in graph.stacks
    )
    return Graph(before=part(graph.before), stacks=stacks, after=part(graph.after))


def stacks_of(model: Model, attention: str) -> tuple[Stack, ...]:
    """Return the layers: rounds of them that differ in windows or experts, dense ones in front.

    Layers after the last whole round are a stack of their own.
    """
    windows, experts, attends = model.windows or (0,), model.experts, model.attends or ("all",)
    delta = model.delta
    kinds = [
        (
            windows[layer % len(windows)],
            experts is not None and experts.has(layer),
            STATE
            if delta and delta.has(layer)
            else attends[layer % len(attends)].removeprefix("all"),
        )
        for layer in range(model.layers)
    ]
    front = experts.dense_layers if experts else 0
    parts = [kinds[:front]] if front else []
    rest = kinds[front:]
    after = len(rest) % _period(rest)
    parts += [rest[:-after], rest[-after:]] if after else [rest]
    return tuple(_stack(model, attention, part) for part in parts)


def _period(kinds: Sequence[LayerKind]) -> int:
    """Return after how many layers their kinds begin anew, twice or more; else their number.

    >>> local, whole = (512, False, ""), (0, False, "")
    >>> _period([local, local, whole, local, local, whole, local])
    3
    """
    many = len(kinds)
    return next((n for n in range(1, many // 2 + 1) if all(map(eq, kinds, kinds[n:]))), many)


def _stack(model: Model, attention: str, kinds: list[LayerKind]) -> Stack:
    """Return layers as rounds, as short as they are."""
    many = len(kinds)
    length = next(n for n in range(1, many + 1) if kinds[:n] * (many // n) == kinds)
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds[:length])]
    names = [_name(kind, {kind for kind, _ in runs}) for kind, _ in runs]
    layers = [
        Layer(
            name if names.count(name) == 1 else f"{name}, {number}",
            Block(model, attention, kind).part,
            times,
        )
        for number, (name, (kind, times)) in enumerate(zip(names, runs, strict=True), 1)
    ]
    return Stack(layers=tuple(layers), rounds=many // length)


def _name(kind: LayerKind, kinds: set[LayerKind]) -> str:
    """Return what tells a kind of layer from the others."""
    window, experts, along = kind
    words = []
    windows, mixed, ways = (len({*values}) > 1 for values in zip(*kinds, strict=True))
    if windows:
        words.append(f"window {window}" if window else "global")
    if mixed:
        words.append("experts" if experts else "dense")
    if ways:
        words.append(along or "all tokens")
    return ", ".join(words)
