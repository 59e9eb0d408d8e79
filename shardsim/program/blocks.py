"""Derived blocks of models, made once for each kind of mesh, and what remat policies do to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from shardsim.graph.arrays import Backward, Op, backward
from shardsim.graph.derive import Derived, derive
from shardsim.graph.place import Kind, placed
from shardsim.model import Model
from shardsim.model.blocks import Graph, Layer, Stack, graph_of
from shardsim.plan.layout import Kept, Layout, Number
from shardsim.program.shapes import Workload

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Blocks:
    """The kinds of layers of a model (`Graph.layers`) and its ends on meshes of one kind."""

    layers: tuple[Derived, ...]
    ends: Derived


@lru_cache(maxsize=256)
def graph(model: Model, attention: str) -> Graph:
    """Return a model's graph, made once."""
    return graph_of(model, attention)


@lru_cache(maxsize=1024)
def derived_blocks(model: Model, attention: str, kind: Kind) -> Blocks:
    """Return what one device does for each block of a model, on meshes of a kind."""
    made = graph(model, attention)
    layers: list[Derived] = []
    for number, (layer, _) in enumerate(made.layers):
        first = first_alike(model, attention, number)
        known = first < number
        layers.append(layers[first] if known else derive(placed(layer.part.ops, kind), kind.axes))
    return Blocks(tuple(layers), derive(placed(made.ends, kind), kind.axes))


@lru_cache(maxsize=4096)
def first_alike(model: Model, attention: str, layer: int) -> int:
    """Return the number of the first kind of layer that has the same ops as one."""
    layers = [kind.part.ops for kind, _ in graph(model, attention).layers]
    return layers.index(layers[layer])


@lru_cache(maxsize=4096)
def first_as_large(model: Model, attention: str, layer: int) -> int:
    """Return the number of the first kind of layer that has the same arrays as one: a window says
    which of them a kernel multiplies, not which there are."""
    layers = [[_unmasked(op) for op in kind.part.ops] for kind, _ in graph(model, attention).layers]
    return layers.index(layers[layer])


def _unmasked(op: Op) -> tuple[Op, bool | None]:
    """Return an op without its mask, and whether that one is local; none where it has none."""
    kernel, mask = op.kernel, op.mask
    if kernel:
        kernel, mask = replace(kernel, mask=None), kernel.mask
    return replace(op, kernel=kernel, mask=None), mask.local if mask else None


@lru_cache(maxsize=4096)
def backward_of(model: Model, attention: str, layer: int, kept: frozenset[str]) -> Backward:
    """Return what the backward pass of a kind of layer finds and makes again if `kept` is kept."""
    return backward(graph(model, attention).layers[layer][0].part.ops, kept)


@dataclass(frozen=True)
class Run:
    """Layers that follow each other: rounds of one stack that keep the same."""

    part: int  # of `work.parts`, that they belong to
    work: Workload  # of that part
    stack: Stack
    first: int  # of its kinds of layers, among all of that part
    kept: Kept
    rounds: Number  # that one stage of a pipeline has

    @property
    def trained(self) -> bool:
        """Whether they run back."""
        return not self.work.model.frozen

    @property
    def layers(self) -> Iterator[tuple[int, Layer]]:
        """The kinds of layers of a round, each with its number among all of the part."""
        return enumerate(self.stack.layers, self.first)


def runs(work: Workload, layout: Layout) -> tuple[Run, ...]:
    """Return the layers of a model, first to last: by part and stack, or by what they keep."""
    if len(layout.kept) > 1:
        (stack,) = graph(work.model, work.attention).stacks  # `resolve` refuses others
        return tuple(
            Run(0, work, stack, 0, kept, kept.layers / stack.round_layers) for kept in layout.kept
        )
    found = []
    for number, part in enumerate(work.parts):
        first = 0
        for stack in graph(part.model, part.attention).stacks:
            rounds = stack.rounds / layout.pipeline.size
            if given := layout.stage_layers:  # of the fullest stage
                rounds = stack.rounds * max(given) / sum(given)
            found.append(Run(number, part, stack, first, layout.kept[0], rounds))
            first += len(stack.layers)
    return tuple(found)


def over_policies(kept: Kept, value: Callable[[frozenset[str]], Number]) -> Number:
    """Return a value of what each policy of a group of layers keeps, wherever it lies, as an array
    that broadcasts with its layout."""
    return over(kept.names, kept.shape, value)


def over(policies: Sequence[T], shape: tuple[int, ...], value: Callable[[T], Number]) -> Number:
    """Return a value of each of some policies, as an array of `shape`; () where there is one."""
    if not shape:
        return value(policies[0])
    found = {policy: np.asarray(value(policy)) for policy in dict.fromkeys(policies)}
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    whole = np.broadcast_shapes(*(array.shape for array in found.values()))
    whole = (1,) * (len(shape) - len(whole)) + whole
    if len(axes) == 1 and whole[axes[0] - len(shape)] == 1:
        parts = {policy: np.broadcast_to(array, whole) for policy, array in found.items()}
        return np.concatenate([parts[policy] for policy in policies], axis=axes[0] - len(shape))
    total: Number = 0.0
    for policy, array in found.items():
        total = total + np.reshape([policy == other for other in policies], shape) * array
    return total


def runs_again(policies: Sequence[Backward], shape: tuple[int, ...]) -> dict[int, Number]:
    """Return how often each op runs again: an array of `shape` over policies, or a number if ()."""
    counts: dict[int, Number] = {}
    for number in dict.fromkeys(number for policy in policies for number in policy.again):
        runs = np.array([int(number in policy.again) for policy in policies])
        counts[number] = runs.reshape(shape) if shape else int(runs[0])
    return counts
