"""What rules of an implementation read and write with: where a Program is for, and its tasks.

A rule is `Block -> Block`; it adds or changes tasks by what tasks are (kind, purpose, ring, phase,
sizes), never by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from shardsim.machine import Machine
from shardsim.plan.layout import REPLICATED, SEQUENCE_SHARDED, Layout, Number, somewhere
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import ATTENTION, ATTENTION_GRADIENT, Collective, Compute
from shardsim.records import replace

LAYER_PHASES = ("forward", "backward")


GATHERED_WEIGHTS = ("weights", "tables", "ends")  # purposes of what is gathered before its use


@dataclass(frozen=True, kw_only=True)
class Where:
    """The machine and the layout that a Program was written for."""

    machine: Machine  # or the first of several, which differ in how many devices a slice has
    layout: Layout
    devices: Number | None = None  # of a slice, for each plan; none: the machine's

    @property
    def devices_per_slice(self) -> Number:
        """Devices of a slice."""
        return self.machine.devices_per_slice if self.devices is None else self.devices

    @property
    def permutes_wait(self) -> bool:
        """Whether the compiler makes no permute asynchronous."""
        return self.machine.permutes_wait

    @property
    def ring(self) -> Number:
        """Whether matmuls over the tensor axis may run as rings."""
        layout = self.layout
        split = np.not_equal(layout.residual, REPLICATED) & np.greater(layout.tensor.size, 1)
        return split & np.greater(layout.matmul_overlap, 0)

    @property
    def sequence_ring(self) -> Number:
        """Whether gathers run as rings that pass pieces of the sequence."""
        cut = np.equal(self.layout.residual, SEQUENCE_SHARDED) & (not self.layout.partitioned)
        return self.ring & cut

    @property
    def embed_ring(self) -> Number:
        """Whether they pass pieces of embed, or the partitioner writes them."""
        return self.ring & np.logical_not(self.sequence_ring)


Rule = Callable[[Block, Where], Block]


def changed(block: Block, change: Callable[[Task], Iterable[Task]]) -> Block:
    """Return `block` with every task replaced by what `change` makes of it."""
    return replace(block, tasks=tuple(new for task in block.tasks for new in change(task)))


def of_layer_weights(task: Task, kind: str) -> TypeGuard[Collective]:
    return isinstance(task, Collective) and task.purpose == "weights" and task.kind == kind


def over_whole_slice(task: Collective, where: Where) -> Number:
    """Return whether all devices of a slice take part, where no other core does it. Those of
    experts are over fewer where an axis splits experts."""
    group = where.layout.role(task.role)
    inside = group.size / group.slices
    whole = np.equal(inside, where.devices_per_slice) & np.greater(inside, 1)
    return whole & (not where.machine.chip.offloads_collectives)


def sums_to_gather(task: Collective, where: Where) -> Number:
    """Return whether an all-gather of weights becomes an all-reduce
    (`all_reduce_instead_of_waiting_gathers`)."""
    deep = where.machine.chip.torus_dims > 2
    return over_whole_slice(task, where) & np.logical_not(where.layout.weights_overlap) & deep


def cut_by_gather(task: Task, block: Block) -> TypeGuard[Compute]:
    """Return whether a matmul of a layer takes its input in pieces where rings run."""
    return isinstance(task, Compute) and task.ring == "gathered" and block.phase in LAYER_PHASES


def attends(task: Task) -> TypeGuard[Compute]:
    """Return whether it is softmax attention, or its gradient, in one kernel."""
    return isinstance(task, Compute) and task.purpose in (ATTENTION, ATTENTION_GRADIENT)


# Of the vector operations of what is done in a product's end, those that count in a pass of its
# own: libtpu estimates ReLU, GELU and SiLU alike, at little more than their bytes, and half of what
# all twelve operations of an activation would make of them (v4, v5p, v6e, tpu7x; gated, and their
# gradients too).
APART = 1.0 / 6.0


def in_two(task: Compute) -> list[Task]:
    """Return a product, and what is fused into its end as a pass of its own.

    The pass reads the result and whatever else is read there, and writes.
    """
    m, k, n = task.m, task.k, task.n
    own = (m * k + k * n + m * n) * task.batch * width(task)
    read = np.maximum(task.hbm_bytes - own, 0.0)
    moved = 2.0 * task.pointwise * width(task) + read
    product = replace(task, hbm_bytes=task.hbm_bytes - read, vector_ops=0, pointwise=0)
    apart = stream(f"apply after {task.name}", "elementwise", moved, task.count)
    return [product, *(replace(one, vector_ops=task.vector_ops * APART) for one in apart)]


def width(task: Compute) -> float:
    """Return the bytes of an element of its arrays: 8-bit formats are made inside a matmul."""
    return max(2.0, float(DTYPE_BYTES[task.dtype]))


def copy(name: str, kind: str, size: Number, count: Number) -> list[Compute]:
    """Return an array of `size` bytes read and written: a "copy", or a "transpose" where another
    axis becomes the densest."""
    return stream(f"lay out: {name}", kind, 2.0 * size, count)


def turned_into_place(name: str, size: Number, count: Number) -> list[Compute]:
    """Return pieces of an array of `size` bytes turned, then written into the whole."""
    return [
        *copy(f"{name} in pieces", "transpose", size, count),
        *put_together(name, size, count),
    ]


def put_together(name: str, size: Number, count: Number) -> list[Compute]:
    """Return pieces of `size` bytes in all written into the array that they are of."""
    return stream(f"put together: {name}", "elementwise", 2.0 * size, count)


def stream(name: str, kind: str, moved: Number, count: Number) -> list[Compute]:
    return [Compute(name=name, kind=kind, hbm_bytes=moved, count=count)] if somewhere(count) else []
