"""What an implementation does beyond the plan: passes over the Program that a partitioner wrote.

`partition` writes what a plan needs and nothing else. An implementation is a list of rules, each
`Block -> Block`, that add or change tasks by what tasks are (kind, purpose, ring, phase, sizes),
never by their names. Pricing, events and verification read the Program that comes out, so they see
the same. Rules decide which tasks there are; what a task costs is `shardsim.cost.costs`' business.

`python -m shardsim.program.passes` prints the table of docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np

from shardsim.errors import PlanError, nearest
from shardsim.machine import Machine
from shardsim.plan.layout import REPLICATED, SEQUENCE_SHARDED, Layout, Number
from shardsim.plan.plan import DTYPE_BYTES
from shardsim.program.rings import SUM_BYTES
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import (
    ATTENTION,
    ATTENTION_GRADIENT,
    BY_HEAD,
    QUERY_KEY_NORM,
    QUERY_KEY_NORM_GRADIENT,
    Collective,
    Compute,
    Program,
)

LAYER_PHASES = ("forward", "backward")
GATHERED_WEIGHTS = ("weights", "tables", "ends")  # purposes of what is gathered before its use

# Share of a layer's gathers that the TPU compiler does not overlap: of two large and four small
# matrices one large and one small forward, both large and two small ones backward (read off
# maxtext-22b, fully sharded on v4:4x4x4).
AWAITED = {"forward": 0.42, "backward": 0.83}

# Bytes per query-key pair that attention by blocks moves through HBM: scores of float32 written and
# read, probabilities written and read in bf16; backward that again, and the gradients of both:
# probabilities' in float32 written and read, scores' in bf16 written once and read twice.
BLOCKS_BYTES = 4.0 + 4.0 + 2.0 + 2.0
BLOCKS_GRADIENT_BYTES = BLOCKS_BYTES + 4.0 + 4.0 + 2.0 + 2.0 + 2.0

# Bytes per element of a norm of queries and keys that has float32 arrays to itself: the mean, the
# variance and the result read it, the result is written in bf16. The gradient reads and writes
# eight such arrays, one of them in bf16.
NORM_BYTES = 4.0 + 4.0 + 4.0 + 2.0
NORM_GRADIENT_BYTES = 7 * 4.0 + 2.0


@dataclass(frozen=True, kw_only=True)
class Where:
    """The machine and the layout that a Program was written for."""

    machine: Machine
    layout: Layout

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


Rule = Callable[[Block, Where], Block]


def lay_out_gathered_weights(block: Block, where: Where) -> Block:
    """Copy a layer's gathered weights into the layout that matmuls read.

    Seen in every fully sharded program of docs/compiled.md but the seven left to the partitioner.
    """

    def change(task: Task) -> list[Task]:
        if not _of_layer_weights(task, "all-gather"):
            return [task]
        count = task.count * (not where.layout.partitioned)
        return [*_copy(task.name, "copy", task.bytes, count), task]

    return _changed(block, change)


def lay_out_turned_gradients(block: Block, where: Where) -> Block:
    """Transpose half of a layer's gradients before they are scattered, without a tensor axis.

    The compiler makes them in the other layout (seen in the fully sharded programs of
    docs/compiled.md).
    """
    whole = np.equal(where.layout.tensor.size, 1)

    def change(task: Task) -> list[Task]:
        if not _of_layer_weights(task, "reduce-scatter"):
            return [task]
        return [*_copy(task.name, "transpose", task.bytes / 2.0, task.count * whole), task]

    return _changed(block, change)


def place_ring_results(block: Block, where: Where) -> Block:
    """Copy the result of a matmul whose input comes in pieces of the sequence into its place; what
    attention reads by head is turned piece by piece first.

    Seen in the compiled plans "tensor N, sequence" of docs/compiled.md.
    """
    ring = where.sequence_ring

    def change(task: Task) -> list[Task]:
        if not _cut_by_gather(task, block):
            return [task]
        size = task.m * task.n * _width(task)
        if task.purpose == BY_HEAD:
            return [task, *_turned_into_place(task.name, size, task.count * ring)]
        return [task, *_copy(task.name, "copy", size, task.count * ring)]

    return _changed(block, change)


def place_ring_operands(block: Block, where: Where) -> Block:
    """Turn what a ring gathers in the backward pass, piece by piece, and put it into one array:
    weight gradients need it whole, with tokens or embed densest as a ring's pieces are not.

    Seen in the compiled plans with a tensor axis of docs/compiled.md.
    """
    ring = np.greater(where.layout.matmul_overlap, 0)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or block.phase != "backward":
            return [task]
        if (task.kind, task.schedule) != ("all-gather", "ring"):
            return [task]
        return [task, *_turned_into_place(task.name, task.bytes, task.count * ring)]

    return _changed(block, change)


def gather_for_several(block: Block, where: Where) -> Block:
    """Gather whole what several matmuls read, where the compiler's partitioner writes the
    collectives: it cuts what one alone reads.

    XLA's partitioner leaves an operand that others need whole (openxla/xla at 0df7454,
    dot_handler.cc); the partitioned tensor plan of ViT-22B in docs/compiled.md has such gathers.
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.schedule != "ring":
            return [task]
        if task.kind != "all-gather" or len(task.partners) < 2:
            return [task]
        return [replace(task, schedule="exposed", partners=())]

    return _changed(block, change) if where.layout.partitioned else block


def gather_for_the_others(block: Block, where: Where) -> Block:
    """Gather whole, before the ring, what several matmuls read: the partitioner cuts the gather for
    one of them, and the others take it whole.

    Three a layer, synchronous, beside their rings, in MaxText's compiled programs of maxtext-32b,
    maxtext-128b and maxtext-1024b on v5p; as many bytes in that of llama3-70b (docs/trainers.md).
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.schedule != "ring" or task.kind != "all-gather":
            return [task]
        if len(task.partners) < 2 or block.phase not in LAYER_PHASES:
            return [task]
        name, count = f"{task.name}, for the others", task.count * where.ring
        return [replace(task, name=name, schedule="exposed", partners=(), count=count), task]

    return _changed(block, change) if np.any(where.ring) else block


def stop_for_hops(block: Block, where: Where) -> Block:
    """Stop all work for every hop of a ring, one direction after the other, on slices for which
    the compiler makes no permute asynchronous.

    Compiled for v5e, larger than 4x4 (`async_permute_chips` in hardware/v5e.yaml; the rings of
    maxtext-16b in docs/compiled.md).
    """
    most, chips = where.machine.chip.async_permute_chips, where.machine.chips_per_slice
    if most is None or chips <= most:
        return block

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.schedule != "ring":
            return [task]
        return [replace(task, hops_wait=True)]

    return _changed(block, change)


def apply_activations_apart(block: Block, where: Where) -> Block:
    """Run a pointwise operation on its own where a ring puts its matmul's result in place by piece.

    It reads the result and whatever else was fused in, and writes (compiled plans "tensor N,
    sequence" of docs/compiled.md).
    """
    ring = where.sequence_ring

    def change(task: Task) -> list[Task]:
        if not (_cut_by_gather(task, block) and np.any(task.pointwise)):
            return [task]
        m, k, n = task.m, task.k, task.n
        read = task.hbm_bytes - (m * k + k * n + m * n) * _width(task)
        moved = 2.0 * task.pointwise * _width(task) + read
        return [task, *_stream(f"apply after {task.name}", "elementwise", moved, task.count * ring)]

    return _changed(block, change)


def lay_out_by_head(block: Block, where: Where) -> Block:
    """Lay queries and keys out by head, in float32, for their norm or rotation, where a ring or the
    partitioner left them by position (compiled plans of ViT-22B, maxtext-16b, maxtext-22b and
    llama3-70b in docs/compiled.md)."""
    by_position = where.ring | where.layout.partitioned

    def change(task: Task) -> list[Task]:
        if not (isinstance(task, Compute) and task.turns):
            return [task]
        size = SUM_BYTES * task.pointwise
        return [*_copy(task.name, "copy", size, task.count * by_position), task]

    return _changed(block, change)


def norm_by_position(block: Block, where: Where) -> Block:
    """Norm queries and keys in passes of their own over float32 arrays, where a ring or the
    partitioner left them by position, not in the end of the matmul that makes them.

    Compiled plans of ViT-22B in docs/compiled.md: rings of the sequence and the partitioner's.
    """
    by_position = (where.ring | where.layout.partitioned) * 1
    moved = {QUERY_KEY_NORM: NORM_BYTES, QUERY_KEY_NORM_GRADIENT: NORM_GRADIENT_BYTES}

    def change(task: Task) -> list[Task]:
        if not (isinstance(task, Compute) and task.purpose in moved):
            return [task]
        more = np.maximum(moved[task.purpose] * task.pointwise - task.hbm_bytes, 0.0)
        return [replace(task, hbm_bytes=task.hbm_bytes + more * by_position)]

    return _changed(block, change)


def attend_by_blocks(block: Block, where: Where) -> Block:
    """Attend by blocks of keys, scores in HBM and none skipped, where a device has few of the
    queries.

    The emitted program's fused kernel needs as many queries as keys; with the sequence split it
    takes a loop (`shardsim/ops/attend.py`; plans "context N" of docs/compiled.md).
    """

    def change(task: Task) -> list[Task]:
        if not _attends(task):
            return [task]
        split = np.less(task.m, task.n)
        if not np.any(split):
            return [task]
        gradient = task.purpose == ATTENTION_GRADIENT
        pairs = task.m * task.n * task.batch
        moved = pairs * (BLOCKS_GRADIENT_BYTES if gradient else BLOCKS_BYTES)
        skipping = np.where(split, 1.0, task.fraction)
        blocks = replace(
            task,
            hbm_bytes=task.hbm_bytes + split * moved,
            vector_ops=task.vector_ops * skipping / task.fraction,
            fraction=skipping,
        )
        return [blocks]

    return _changed(block, change)


def two_backward_kernels(block: Block, where: Where) -> Block:
    """Compute the gradients of fused attention in two kernels: for keys and values, for queries.

    Each makes scores, softmax and their gradient for itself: seven products instead of five (JAX's
    splash attention, `splash_mha_dkv` and `splash_mha_dq`, as emitted).
    """

    def change(task: Task) -> list[Task]:
        if not (_attends(task) and task.purpose == ATTENTION_GRADIENT):
            return [task]
        fused = np.equal(task.m, task.n)
        return [
            replace(
                task,
                matmuls=task.matmuls + 2 * fused,
                vector_ops=task.vector_ops * (1 + fused),
            )
        ]

    return _changed(block, change)


def all_reduce_over_whole_slices(block: Block, where: Where) -> Block:
    """Make an all-reduce of a reduce-scatter of weights over a whole slice: twice the bytes.
    SparseCores scatter as planned (tpu7x).

    Counted in compiled programs, emitted ones (docs/compiled.md, `shardsim/xla/compare.py`) and
    MaxText's (docs/trainers.md).
    """
    return _all_reduced(block, "reduce-scatter", _over_a_whole_slice(where))


def all_reduce_instead_of_waiting_gathers(block: Block, where: Where) -> Block:
    """Make an all-reduce of an all-gather of weights over a whole slice that is not to overlap:
    twice the bytes. SparseCores gather as planned (tpu7x).

    Counted in compiled programs (docs/compiled.md, `shardsim/xla/compare.py`).
    """
    waits = _over_a_whole_slice(where) & np.logical_not(where.layout.weights_overlap)
    return _all_reduced(block, "all-gather", waits)


def _over_a_whole_slice(where: Where) -> Number:
    """Return whether weights are gathered over all devices of a slice, and no SparseCore does."""
    inside = where.layout.gather.size / where.layout.gather.slices
    whole = np.equal(inside, where.machine.devices_per_slice) & np.greater(inside, 1)
    return whole & (not where.machine.chip.offloads_collectives)


def _all_reduced(block: Block, kind: str, chosen: Number) -> Block:
    """Return a block with all-reduces for the collectives of weights of a kind, where `chosen`."""
    if not np.any(chosen):
        return block

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.purpose not in GATHERED_WEIGHTS:
            return [task]
        if task.kind != kind:
            return [task]
        summed = replace(task, name=f"{task.name}, all-reduced", kind="all-reduce")
        if kind == "all-gather":
            summed = replace(summed, schedule="exposed")
        if np.all(chosen):
            return [summed]
        kept = replace(task, count=task.count * np.logical_not(chosen))
        return [kept, replace(summed, count=task.count * chosen)]

    return _changed(block, change)


def offload_to_sparse_cores(block: Block, where: Where) -> Block:
    """Gather weights and scatter their gradients beside all else, whatever the plan says, on chips
    whose SparseCores do it (`offloads_collectives` in hardware/tpu7x.yaml; plans of llama3-70b in
    docs/compiled.md)."""
    if not where.machine.chip.offloads_collectives:
        return block

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective):
            return [task]
        offloaded = task.purpose in GATHERED_WEIGHTS and task.switch
        return [replace(task, switch="always") if offloaded else task]

    return _changed(block, change)


def await_some_gathers(block: Block, where: Where) -> Block:
    """Let a share of a layer's gathers run beside nothing, once those of the next are on their way.

    Of two large and four small matrices one of each waits forward, both large and two small ones
    backward (read off maxtext-22b, fully sharded on v4:4x4x4; within 0.02 s on v4, v5e and v5p).
    """
    offloaded = where.machine.chip.offloads_collectives
    share = 0.0 if offloaded else AWAITED.get(block.phase, 0.0)
    kept: list[Task] = []
    last: list[Task] = []
    at = 0  # behind the last operation that no reduction waits for
    for task in block.tasks:
        if share and _of_layer_weights(task, "all-gather"):
            part = {"bytes": task.bytes * share, "messages": task.messages * share}
            last.append(replace(task, name=f"{task.name}, awaited", schedule="exposed", **part))
            rest = {"bytes": task.bytes - part["bytes"]}
            rest["messages"] = task.messages - part["messages"]
            task = replace(task, **rest)
        elif isinstance(task, Collective) and task.schedule == "behind" and not at:
            at = len(kept)
        kept.append(task)
    at = at or len(kept)
    return replace(block, tasks=(*kept[:at], *last, *kept[at:]))


IMPLEMENTATIONS: Mapping[str, tuple[Rule, ...]] = {
    # What the plan says and nothing else: a bound on what an implementation of it can reach (but
    # where SparseCores hide what the plan leaves to wait).
    "ideal": (),
    # What the exported code does under the TPU compiler.
    "emitted": (
        gather_for_several,
        lay_out_gathered_weights,
        lay_out_turned_gradients,
        place_ring_results,
        place_ring_operands,
        stop_for_hops,
        apply_activations_apart,
        lay_out_by_head,
        norm_by_position,
        two_backward_kernels,
        attend_by_blocks,
        all_reduce_over_whole_slices,
        all_reduce_instead_of_waiting_gathers,
        offload_to_sparse_cores,
        await_some_gathers,
    ),
    # A training library, as MaxText's compiled programs do.
    "trainer": (gather_for_the_others, all_reduce_over_whole_slices, offload_to_sparse_cores),
}

# How a plan is done where nothing else is said: a chip's figures bound what is possible, the other
# costs hold for what the compiler makes.
USUAL: Mapping[str, str] = {"calibrated": "emitted", "compiler": "emitted", "physical": "ideal"}


def implemented(program: Program, name: str, machine: Machine, layout: Layout) -> Program:
    """Return what the implementation called `name` makes of a partitioned Program.

    `layout` is the one that the program was written for, a single plan or many.
    """
    if name not in IMPLEMENTATIONS:
        raise PlanError(f"as: '{name}' is not possible{nearest(name, IMPLEMENTATIONS)}")
    where = Where(machine=machine, layout=layout)
    blocks = program.blocks
    for rule in IMPLEMENTATIONS[name]:
        blocks = tuple(rule(block, where) for block in blocks)
    return replace(program, blocks=blocks)


def table() -> str:
    """Return the rules of every implementation as a Markdown table."""
    lines = ["| implementation | rule | what it does |", "| --- | --- | --- |"]
    for name, rules in IMPLEMENTATIONS.items():
        if not rules:
            lines.append(f"| `{name}` | | adds nothing |")
        for rule in rules:
            words = " ".join((rule.__doc__ or "").split())
            lines.append(f"| `{name}` | `{rule.__name__}` | {words} |")
    return "\n".join(lines)


def _changed(block: Block, change: Callable[[Task], Iterable[Task]]) -> Block:
    """Return `block` with every task replaced by what `change` makes of it."""
    return replace(block, tasks=tuple(new for task in block.tasks for new in change(task)))


def _of_layer_weights(task: Task, kind: str) -> TypeGuard[Collective]:
    return isinstance(task, Collective) and task.purpose == "weights" and task.kind == kind


def _cut_by_gather(task: Task, block: Block) -> TypeGuard[Compute]:
    """Return whether a matmul of a layer takes its input in pieces where rings run."""
    return isinstance(task, Compute) and task.ring == "gathered" and block.phase in LAYER_PHASES


def _attends(task: Task) -> TypeGuard[Compute]:
    """Return whether it is softmax attention, or its gradient, in one kernel."""
    return isinstance(task, Compute) and task.purpose in (ATTENTION, ATTENTION_GRADIENT)


def _width(task: Compute) -> float:
    """Return the bytes of an element of its arrays: 8-bit formats are made inside a matmul."""
    return max(2.0, float(DTYPE_BYTES[task.dtype]))


def _copy(name: str, kind: str, size: Number, count: Number) -> list[Task]:
    """Return an array of `size` bytes read and written: a "copy", or a "transpose" where another
    axis becomes the densest."""
    return _stream(f"lay out: {name}", kind, 2.0 * size, count)


def _turned_into_place(name: str, size: Number, count: Number) -> list[Task]:
    """Return pieces of an array of `size` bytes turned, then written into the whole."""
    turned = _copy(f"{name} in pieces", "transpose", size, count)
    return [*turned, *_stream(f"put together: {name}", "elementwise", 2.0 * size, count)]


def _stream(name: str, kind: str, moved: Number, count: Number) -> list[Task]:
    return [Compute(name=name, kind=kind, hbm_bytes=moved, count=count)] if np.any(count) else []


if __name__ == "__main__":
    print(table())
