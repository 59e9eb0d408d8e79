"""Rules about rings over the tensor axis: what a compiler does with the pieces that come and go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsim.plan.layout import Number
from shardsim.plan.tiles import LANES
from shardsim.program.attention_rules import in_kernel
from shardsim.program.rings import SUM_BYTES
from shardsim.program.rules import (
    Where,
    attends,
    changed,
    copy,
    cut_by_gather,
    put_together,
    stream,
    width,
)
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import (
    BY_HEAD,
    QUERY_KEY_NORM,
    QUERY_KEY_NORM_GRADIENT,
    Collective,
    Compute,
)

# Bytes per element of a norm of queries and keys that has float32 arrays to itself: the mean, the
# variance and the result read it, the result is written in bf16. The gradient reads and writes
# eight such arrays, one of them in bf16.
NORM_BYTES = 4.0 + 4.0 + 4.0 + 2.0
NORM_GRADIENT_BYTES = 7 * 4.0 + 2.0


def place_ring_results(block: Block, where: Where) -> Block:
    """Write the result of a matmul whose input comes in pieces of the sequence into its place, and
    turn what attention reads by head. Forward, where a loop over layers that gathers ahead finds an
    empty array that was made before it, it copies that first.

    Seen in the compiled plans "tensor N, sequence" of docs/compiled.md, on v4, v5e, v5p and v6e.
    """
    ring = where.sequence_ring
    looped = np.greater(block.trips, where.layout.microbatches) & (block.phase == "forward")
    looped = looped & where.layout.weights_overlap

    def change(task: Task) -> list[Task]:
        if not cut_by_gather(task, block):
            return [task]
        size, count = task.m * task.n * width(task), task.count * ring
        return [
            task,
            *copy(f"empty array of {task.name}", "copy", size, count * looped),
            *put_together(task.name, size, count),
            *copy(task.name, "transpose", size, count * (task.purpose == BY_HEAD)),
        ]

    return changed(block, change)


def place_ring_operands(block: Block, where: Where) -> Block:
    """Put what a ring gathers in the backward pass into one array, as weight gradients need it;
    pieces of embed are turned first, which have another dimension densest.

    Seen in the compiled plans with a tensor axis of docs/compiled.md.
    """
    ring = np.greater(where.layout.matmul_overlap, 0)
    turned = np.logical_not(where.sequence_ring)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or block.phase != "backward":
            return [task]
        if (task.kind, task.schedule) != ("all-gather", "ring"):
            return [task]
        count = task.count * ring
        return [
            task,
            *copy(f"{task.name} in pieces", "transpose", task.bytes, count * turned),
            *put_together(task.name, task.bytes, count),
        ]

    return changed(block, change)


def _by_pieces(where: Where) -> Number:
    """Return whether a ring leaves sums and heads to passes of their own: every one of the
    sequence, and of embed those of matrix units 128 wide (llama2-70b, maxtext-16b, maxtext-22b,
    palm-8b and ViT-22B on v4, v5e and v5p; not ViT-22B on v6e, nor llama3-70b on tpu7x)."""
    of_embed = where.embed_ring & (not where.layout.partitioned)
    return where.sequence_ring | (of_embed & (where.machine.chip.mxu_dim <= LANES))


def turn_heads_into_rows(block: Block, where: Where) -> Block:
    """Turn what attention makes by head into rows, which a ring reads: its result, and backward
    that again and the gradients of queries, keys and values. Over embed not where a matrix unit is
    256 wide.

    Seen in the compiled plans "tensor N, sequence" and "tensor 4, embed" of docs/compiled.md.
    """
    ring = _by_pieces(where)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute):
            return [task]
        if task.ring == "scattered" and task.sums_heads:
            size = task.m * task.k * width(task)
            return [*copy(f"operand of {task.name}", "transpose", size, task.count * ring), task]
        result_again = task.purpose == BY_HEAD and not task.again and block.phase == "backward"
        if cut_by_gather(task, block) and result_again:
            size = task.m * task.n * width(task)
            return [task, *copy("context for its weights", "transpose", size, task.count * ring)]
        return [task]

    return changed(block, change)


def add_up_ring_ends(block: Block, where: Where) -> Block:
    """Add what comes last from both sides of a ring to the device's own product, which is in
    float32, in a pass, not in the end of that product; the sum stays where the operation behind
    reads it. Over embed not where a matrix unit is 256 wide.

    Seen in the compiled plans "tensor N, sequence" and "tensor 4, embed" of docs/compiled.md.
    """
    ring = _by_pieces(where)
    own = 1.0 / where.layout.tensor.size
    wires = {task.name: width(task) for task in block.tasks if isinstance(task, Compute)}

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective):
            return [task]
        if (task.kind, task.schedule) != ("reduce-scatter", "ring"):
            return [task]
        wire = next((wires[name] for name in task.partners if name in wires), 2.0)
        moved = task.bytes * own / wire * (SUM_BYTES + 2.0 * wire)
        return [task, *stream(f"end of {task.name}", "elementwise", moved, task.count * ring)]

    return changed(block, change)


def apply_activations_apart(block: Block, where: Where) -> Block:
    """Run a pointwise operation on its own where a ring puts its matmul's result in place by piece.

    It reads the result and whatever else was fused in, and writes. Backward it is done again by
    what reads it: the product of the weight's gradient, or the pass that makes the gradients of two
    projections (compiled plans "tensor N, sequence" of ViT-22B, vit-bigg and palm-8b in
    docs/compiled.md).
    """
    ring = where.sequence_ring

    def change(task: Task) -> list[Task]:
        if not (cut_by_gather(task, block) and np.any(task.pointwise)) or task.again:
            return [task]
        m, k, n = task.m, task.k, task.n
        read = task.hbm_bytes - (m * k + k * n + m * n) * width(task)
        moved = 2.0 * task.pointwise * width(task) + read
        return [task, *stream(f"apply after {task.name}", "elementwise", moved, task.count * ring)]

    return changed(block, change)


def sum_biases_beside(block: Block, where: Where) -> Block:
    """Sum up gradients of biases in passes that read them anyway, of norms and activations, where
    rings of the sequence cut the products before and behind.

    Seen in the compiled plans "tensor N, sequence" of ViT-22B and vit-bigg in docs/compiled.md.
    """
    apart = np.logical_not(where.sequence_ring)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.end_of not in weights or task.purpose == BY_HEAD:
            return [task]
        return [replace(task, count=task.count * apart)]

    computes = [task for task in block.tasks if isinstance(task, Compute)]
    weights = {task.name for task in computes if task.kind == "matmul" and task.of_weights}
    return changed(block, change) if block.phase == "backward" else block


def lay_out_by_head(block: Block, where: Where) -> Block:
    """Lay queries and keys out by head, in float32, for their norm or rotation, where a ring of
    embed left them by position, or one of the sequence by rows and a kernel reads them (compiled
    plans of ViT-22B, maxtext-16b, maxtext-22b and llama3-70b in docs/compiled.md; rows for a kernel
    of llama2-70b on v5p and llama3-70b on tpu7x, and without one of none of five)."""
    kernels = [in_kernel(task, where) for task in block.tasks if attends(task)]
    kernel = kernels[-1] if kernels else False
    by_position = where.embed_ring | (where.sequence_ring & kernel)

    def change(task: Task) -> list[Task]:
        if not (isinstance(task, Compute) and task.turns):
            return [task]
        size = SUM_BYTES * task.pointwise
        return [*copy(task.name, "copy", size, task.count * by_position), task]

    return changed(block, change)


def norm_by_position(block: Block, where: Where) -> Block:
    """Norm queries and keys in passes of their own over float32 arrays, where a ring of embed left
    them by position, not in the end of the matmul that makes them (compiled plans of ViT-22B in
    docs/compiled.md)."""
    by_position = where.embed_ring * 1
    moved = {QUERY_KEY_NORM: NORM_BYTES, QUERY_KEY_NORM_GRADIENT: NORM_GRADIENT_BYTES}

    def change(task: Task) -> list[Task]:
        if not (isinstance(task, Compute) and task.purpose in moved):
            return [task]
        more = np.maximum(moved[task.purpose] * task.pointwise - task.hbm_bytes, 0.0)
        return [replace(task, hbm_bytes=task.hbm_bytes + more * by_position)]

    return changed(block, change)
