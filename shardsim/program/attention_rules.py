"""Rules about attention: what its kernel fetches, pads, computes and splits in parts."""

from __future__ import annotations

import numpy as np

from shardsim.ops.attend import FUSED_GRADIENT, SOFTMAX
from shardsim.ops.attend_kernels import KERNEL_MULTIPLE, one_block
from shardsim.plan.layout import Number
from shardsim.plan.tiles import LANES
from shardsim.program.rings import SUM_BYTES
from shardsim.program.rules import (
    Where,
    attends,
    changed,
    stream,
    width,
)
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import (
    ATTENTION_GRADIENT,
    BY_HEAD,
    PASSED,
    WINDOWED,
    Compute,
)
from shardsim.records import replace

# Bytes per query-key pair that attention by blocks moves through HBM: scores of float32 written and
# read, probabilities written and read in bf16; backward that again, and the gradients of both:
# probabilities' in float32 written and read, scores' in bf16 written once and read twice.
BLOCKS_BYTES = 4.0 + 4.0 + 2.0 + 2.0


BLOCKS_GRADIENT_BYTES = BLOCKS_BYTES + 4.0 + 4.0 + 2.0 + 2.0 + 2.0


def wait_for_the_last(block: Block, where: Where) -> Block:
    """Attend as long as the last part of a split sequence does, which all others wait for: parts
    follow each other, unless they are striped, and the last queries see most keys.

    Every device runs the same program (plans "context N" of docs/compiled.md); MaxText without
    `context_parallel_load_balance`.
    """

    def change(task: Task) -> list[Task]:
        if not attends(task) or not np.any(np.less(task.m, task.n)):
            return [task]
        alone = np.less(task.m, task.n) & np.logical_not(where.layout.striped)
        return [_computing(task, np.where(alone, task.last_fraction, task.fraction))]

    return changed(block, change)


def _computing(task: Compute, fraction: Number) -> Compute:
    """Return attention that computes another fraction of the pairs."""
    scale = fraction / task.fraction
    return replace(task, vector_ops=task.vector_ops * scale, fraction=fraction)


def attend_in_blocks(block: Block, where: Where) -> Block:
    """Attend by blocks of keys, with scores in HBM and none skipped but those that a striped order
    leaves out, where parts of a split sequence are no whole tiles, and where keys pass round and a
    window cuts them.

    The emitted program's kernel and its loop (`flash_attention` in
    `shardsim/ops/attend_kernels.py`; plans "context N" of docs/compiled.md).
    """

    def change(task: Task) -> list[Task]:
        if not attends(task):
            return [task]
        split = np.less(task.m, task.n)
        if not np.any(split):
            return [task]
        gradient, striped = task.purpose == ATTENTION_GRADIENT, where.layout.striped
        blocks = split & np.logical_not(in_kernel(task, where))
        done: Number = 1.0  # of the pairs, by blocks
        if task.ring and task.causal:  # of all keys but its own a member takes half
            done = np.where(striped, 0.5 * (1.0 + task.m / task.n), 1.0)
        moved = done * task.m * task.n * task.batch
        moved = moved * (BLOCKS_GRADIENT_BYTES if gradient else BLOCKS_BYTES)
        cut = replace(
            task,
            hbm_bytes=task.hbm_bytes + blocks * moved,
            own_fraction=np.where(blocks, 1.0, task.own_fraction),
        )
        return [_computing(cut, np.where(blocks, done, task.fraction))]

    return changed(block, change)


def attend_to_few(block: Block, where: Where) -> Block:
    """Attend to few keys with their scores in HBM: a kernel would pad them to whole tiles, and with
    them queries and results (frames of a video in docs/compiled.md: eight times).
    """

    def change(task: Task) -> list[Task]:
        if not attends(task) or task.causal or np.any(task.whole_fraction):
            return [task]
        few = np.less_equal(2 * task.n, KERNEL_MULTIPLE) & np.equal(task.m, task.n)
        passes = SOFTMAX.gradient_passes if task.purpose == ATTENTION_GRADIENT else SOFTMAX.passes
        scores = task.m * task.n * task.batch * width(task)
        return [replace(task, hbm_bytes=task.hbm_bytes + few * scores * passes)]

    return changed(block, change)


def attend_to_whole_rows(block: Block, where: Where) -> Block:
    """Attend to packed rows as wholes, under a mask that keeps sequences apart: which blocks are
    empty is known only as the step runs, and JAX's kernel plans what it skips before.

    JAX's splash attention (`SegmentIds`), as emitted and as MaxText calls it.
    """

    def change(task: Task) -> list[Task]:
        if not attends(task) or not np.any(task.whole_fraction):
            return [task]
        whole = task.whole_fraction
        ops = task.vector_ops * whole / task.fraction
        return [replace(task, fraction=whole, last_fraction=whole, vector_ops=ops)]

    return changed(block, change)


def make_whole_heads(block: Block, where: Where) -> Block:
    """Make queries, keys and values for a kernel, and the gradient of what it gives, in lanes of
    their own for every head: products make the padding of heads that are no multiple too.

    Compiled plans of vit-bigg on v5e in docs/compiled.md (heads of 104: 1.23 of the time beside
    attention apart), and such products beside a kernel compiled alone: the same, heads of 80 1.60
    on v5e, of 72 on v5p 1.75 and of 64 on v4 1.94 of it; not products that read heads (1.1 to 1.5)
    or are gradients of weights.
    """
    kernels = [task for task in block.tasks if attends(task)]
    if not kernels:
        return block
    depth, on = kernels[0].k, in_kernel(kernels[0], where)

    def change(task: Task) -> list[Task]:
        by_head = isinstance(task, Compute) and task.purpose == BY_HEAD and task.kind == "matmul"
        if not isinstance(task, Compute) or not by_head or task.of_weights:
            return [task]
        heads = on & np.equal(np.mod(task.n, depth), 0)
        return [replace(task, columns=task.n * np.where(heads, _filled(depth), 1.0))]

    return changed(block, change)


def pad_for_kernels(block: Block, where: Where) -> Block:
    """Pad queries, keys and values for a kernel, and the gradient of what it gives, in passes of
    their own, where tokens or head_dim are no multiples of what it wants; it multiplies padding
    too.

    The emitted program's kernel (`kernel_attention` in `shardsim/ops/attend_kernels.py`; seven
    passes a layer in vit-bigg, heads of 104, in docs/compiled.md; FLOPs of vit-b-16, 197 tokens and
    heads of 64, as compiled on v5e).
    """

    def change(task: Task) -> list[Task]:
        if not attends(task):
            return [task]
        rows = _filled(task.m)
        more = np.where(in_kernel(task, where), rows * _filled(task.k), 1.0)
        if np.all(np.equal(more, 1.0)):
            return [task]
        out = task.m * task.k * task.batch * width(task)
        read = out if task.purpose == ATTENTION_GRADIENT else task.hbm_bytes - out
        count = task.count * np.greater(more, 1.0)
        rows, keys, deep = (
            np.where(count, _filled(size), 1.0) for size in (task.m, task.n, task.k)
        )
        padded = replace(
            task,
            m=task.m * rows,
            n=task.n * keys,
            k=task.k * deep,
            hbm_bytes=task.hbm_bytes * more,
            vector_ops=task.vector_ops * rows * keys,
        )
        return [
            *stream(f"pad for {task.name}", "elementwise", read * (1.0 + more), count),
            padded,
        ]

    return changed(block, change)


def _filled(length: Number) -> Number:
    """Return what a kernel has of a dimension, over its length."""
    return np.ceil(length / KERNEL_MULTIPLE) * KERNEL_MULTIPLE / length


def in_kernel(task: Compute, where: Where) -> Number:
    """Return whether attention runs in the kernel, not in a loop over blocks of keys."""
    part = task.m / np.where(where.layout.striped, 2, 1)
    tiles = np.equal(np.mod(part, KERNEL_MULTIPLE), 0) & (task.ring != WINDOWED)
    kernel = np.equal(task.m, task.n) | tiles
    return kernel & (np.greater(2 * task.n, KERNEL_MULTIPLE) | task.causal)


def two_backward_kernels(block: Block, where: Where) -> Block:
    """Compute the gradients of fused attention in two kernels, for keys and values and for queries,
    unless one block is all.

    Each makes scores, softmax and their gradient for itself: seven products instead of five (JAX's
    splash attention, `splash_mha_dkv` and `splash_mha_dq`, as emitted).
    """

    def change(task: Task) -> list[Task]:
        if not (attends(task) and task.purpose == ATTENTION_GRADIENT):
            return [task]
        fused = in_kernel(task, where) & np.equal(task.matmuls, FUSED_GRADIENT)
        part = task.m / np.where(where.layout.striped & task.causal, 2, 1)
        alone = np.equal(task.m, task.n) | (task.ring == PASSED)
        alone = alone & one_block(np.where(task.ring == PASSED, part, task.n), task.blocks[0])
        fused = fused & np.logical_not(alone)
        return [
            replace(
                task,
                matmuls=task.matmuls + 2 * fused,
                vector_ops=task.vector_ops * (1 + fused),
            )
        ]

    return changed(block, change)


def fetch_blocks(block: Block, where: Where) -> Block:
    """Fetch keys and values anew for each block of queries, for their gradient queries for each
    block of keys, unless one block is all; and write the logarithm of each row's sum in float32 to
    all lanes, of which the gradient takes one, beside the sums of the result times its gradient.

    JAX's splash attention: what its grids go through, as `shardsim.xla.hlo.kernels` reads them in
    compiled programs (ViT-22B on v4: 0.38 s as compiled, 0.38 priced, 0.26 without). A gradient in
    one kernel is taken to move as much as in two, but of one block reads nothing twice.
    """

    def change(task: Task) -> list[Task]:
        if not attends(task) or task.ring:
            return [task]
        back, queries = task.purpose == ATTENTION_GRADIENT, _queries_bytes(task)
        keys = task.hbm_bytes / (2.0 if back else 1.0) - 2.0 * queries
        inside = in_kernel(task, where)
        moved = np.where(inside, _through_grid(task, task.n, keys), task.hbm_bytes)
        return [
            *_row_sums(task, task.count * inside),
            replace(task, hbm_bytes=moved),
        ]

    return changed(block, change)


def attend_piece_by_piece(block: Block, where: Where) -> Block:
    """Run the kernel for each piece of keys that comes round, take one lane of the logarithms of
    its rows' sums, and add its result to float32 sums in passes of their own: so too what it gives
    to gradients of queries, and gradients of keys and values to those that came.

    Where tokens are striped, half of the queries are chosen for early keys, and a half of the keys
    for late queries.

    The emitted program's ring (`shardsim/ops/attend_pieces.py`; rings in docs/compiled.md).
    """
    pieces = where.layout.context.size

    def change(task: Task) -> list[Task]:
        if not attends(task) or task.ring != PASSED:
            return [task]
        on = np.less(task.m, task.n) & in_kernel(task, where)
        if not np.any(on):
            return [task]
        back, queries = task.purpose == ATTENTION_GRADIENT, _queries_bytes(task)
        length = task.n / pieces
        keys = 2.0 * length * width(task) * task.batch * task.k / task.shared
        moved = np.where(on, pieces * _through_grid(task, length, keys), task.hbm_bytes)
        wide = queries * SUM_BYTES / width(task)
        added = (queries + wide) + (pieces - 1.0) * (queries + 2.0 * wide) + (wide + queries)
        if back:
            added = added + 3.0 * (pieces - 1.0) * keys
        else:
            added = added + pieces * _lanes_bytes(task)
        halved = where.layout.striped & task.causal
        chosen = 1.5 * (queries * (1.0 + back) + keys / 2.0)
        added = added + halved * (pieces - 1.0) * chosen
        count = task.count * on
        return [
            *_row_sums(task, count),
            replace(task, hbm_bytes=moved),
            *(
                replace(merged, end_of=task.name)
                for merged in stream(f"pieces of {task.name}", "elementwise", added, count)
            ),
        ]

    return changed(block, change)


def _queries_bytes(task: Compute) -> Number:
    return task.m * width(task) * task.batch * task.k


def _lanes_bytes(task: Compute) -> Number:
    """Return the bytes of the logarithms of rows' sums, as a kernel writes them."""
    return task.m * task.batch * float(LANES * SUM_BYTES)


def _row_sums(task: Compute, count: Number) -> list[Compute]:
    """Return the pass that sums the result times its gradient, for the kernel of a gradient."""
    if task.purpose != ATTENTION_GRADIENT:
        return []
    sums = 2.0 * _queries_bytes(task) + _lanes_bytes(task)
    return stream(f"row sums for {task.name}", "elementwise", sums, count)


def _through_grid(task: Compute, length: Number, pairs: Number) -> Number:
    """Return the bytes that a kernel moves, or those of a gradient, of so many keys: `pairs` are
    the bytes of keys and values."""
    queries, one = _queries_bytes(task), width(task) * task.batch * task.k
    rows, keys = (
        np.ceil(size / float(most))
        for size, most in zip((task.m, length), task.blocks, strict=True)
    )
    fetched = np.where(np.greater(keys, 1), 2.0 * length * one * rows * task.fraction, pairs)
    if task.purpose != ATTENTION_GRADIENT:
        return 2.0 * queries + fetched + _lanes_bytes(task)
    asked = np.where(np.greater(rows, 1), keys * task.fraction, 1.0) * 2.0 * queries
    again = 2.0 * queries + fetched
    again = again * np.logical_not(np.equal(task.matmuls, FUSED_GRADIENT) & (rows * keys == 1))
    return (asked + 2.0 * pairs) + (queries + again)
