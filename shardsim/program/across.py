"""What the tensor axis does to what an op reads and makes: gathers, and partial gradients."""

from __future__ import annotations

from collections.abc import Iterable

from shardsim.graph.arrays import Array, Split
from shardsim.graph.derive import Step, Transfer
from shardsim.graph.place import TENSOR
from shardsim.ops.exchange import ROUTED


def on_tensor(axes: Iterable[str]) -> bool:
    """Return whether some of `axes` are of the tensor role."""
    return any(axis in TENSOR for axis in axes)


def gathers_stream(transfer: Transfer) -> bool:
    """Return whether a ring may take the place of a gather."""
    moved = transfer.kind == "all-gather" and not transfer.weight and on_tensor(transfer.axes)
    return moved and transfer.purpose != ROUTED


def gathers(step: Step) -> bool:
    """Return whether an op gathers what it reads."""
    return any(move.kind == "all-gather" for move in step.gathers)


def summed_over_tensor(array: Array, place: Split) -> bool:
    """Return whether the gradient of an operand comes out partial over the tensor axis."""
    return any(on_tensor([axis]) and d not in array.dims for axis, d in place.items())
