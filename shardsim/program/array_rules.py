"""Rules about arrays: what a compiler lays out anew, passes through HBM again or does otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsim.ops.vocabulary import LOSS_APART_OPS
from shardsim.plan.layout import Number
from shardsim.plan.tiles import LANES
from shardsim.program.rules import (
    Where,
    changed,
    copy,
    of_layer_weights,
    stream,
    sums_to_gather,
)
from shardsim.program.schedule import Block, Task
from shardsim.program.sizes import SUBLANES
from shardsim.program.tasks import (
    KEYS,
    LOSS,
    LOSS_GRADIENT,
    QUERY_KEY_NORM,
    Collective,
    Compute,
)

# Sublanes of a tile in which the partitioner's gathers leave columns that are no whole tiles.
COLUMN_SUBLANES = 2


def lay_out_gathered_weights(block: Block, where: Where) -> Block:
    """Copy a layer's gathered weights into the layout that matmuls read: those with heads, and all
    where pieces are no whole tiles and travel cut into lanes.

    Seen in every fully sharded program of docs/compiled.md, also left to the partitioner, but not
    in what it makes of rings. Columns that it gathers come as rows, in tiles of two sublanes, and
    are turned a quarter as fast as whole tiles are (ViT-22B on v4, maxtext-16b and vit-bigg on v5e,
    "partitioned, fsdp": 7 % of what HBM moves); other odd pieces products read as slowly as a copy
    would take. Heads that an all-reduce gathers come as they are read.
    """
    partitioned = where.layout.partitioned
    lanes = np.logical_not(where.ring & partitioned)

    def change(task: Task) -> list[Task]:
        if not of_layer_weights(task, "all-gather"):
            return [task]
        columns = task.odd_columns_bytes * (lanes & partitioned)
        odd = task.odd_bytes * lanes - columns
        heads = np.logical_not(where.ring | sums_to_gather(task, where))
        size = np.maximum(task.by_head_bytes * heads, odd)
        copied = copy(task.name, "copy", size, task.count * np.greater(size, 0))
        slow = columns * (SUBLANES / COLUMN_SUBLANES)
        count = task.count * np.greater(slow, 0)
        return [*copied, *copy(f"{task.name}, turned", "transpose", slow, count), task]

    return changed(block, change)


def lay_out_turned_gradients(block: Block, where: Where) -> Block:
    """Copy the gradients of queries', keys' and values' weights before they are scattered: as made
    they are laid out so that the compiler would make an all-reduce.

    Seen in the fully sharded programs of docs/compiled.md, without rings.
    """
    count = np.logical_not(where.ring | where.layout.partitioned)

    def change(task: Task) -> list[Task]:
        if not of_layer_weights(task, "reduce-scatter"):
            return [task]
        return [*copy(task.name, "copy", task.by_head_bytes, task.count * count), task]

    return changed(block, change)


def turn_short_parts(block: Block, where: Where) -> Block:
    """Turn keys and values that a context axis gathers, and their gradients before they are
    scattered, where queries are fewer than lanes and attention's products run apart: sequences
    become the densest dimension instead. What a norm makes of keys is turned before it is gathered.

    Compiled plans "context 4" of ViT-22B on v4 and v5p and vit-bigg on v5e, 64 of 256 tokens, in
    docs/compiled.md; none of those with 256 or more tokens a device has such copies.
    """
    apart = (
        task
        for task in block.tasks
        if isinstance(task, Compute) and task.kind == "attention" and not task.purpose
    )
    first = next(apart, None)
    if first is None:
        return block
    normed = any(getattr(task, "purpose", "") == QUERY_KEY_NORM for task in block.tasks)
    own = where.layout.context.size if normed else 1

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.purpose != KEYS:
            return [task]
        gathers = task.kind == "all-gather"
        size = task.bytes / own if gathers else task.bytes
        turned = copy(task.name, "transpose", size, task.count * np.less(first.m, LANES))
        return [*turned, task]

    return changed(block, change)


def fill_stacks(block: Block, where: Where) -> Block:
    """Fill the stacks of what layers keep with zeros, in each microbatch, as slowly as a transpose
    turns as much; copy layers' inputs there, and let what makes the rest write it there. One layer
    has no stack.

    Compiled plans of ViT-22B on v4 and v5p and of vit-bigg on v5e, also in microbatches and with
    hidden layers kept, and of Llama 3 70B on v5p, in docs/compiled.md (ViT-22B in two microbatches
    on v4: zeros 0.20 s, priced 0.23; copies 0.04, 0.04).
    """
    layout = where.layout
    several = np.greater(block.trips, np.where(layout.layered, 1, layout.microbatches))
    apart = np.less_equal(layout.pipeline.size, 1)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.copied_bytes is None:
            return [task]
        zeros = stream(f"zeros: {task.name}", "transpose", task.hbm_bytes, several & apart)
        moved = np.where(apart, task.copied_bytes, task.hbm_bytes)
        return [*zeros, replace(task, hbm_bytes=moved, copied_bytes=None)]

    return changed(block, change)


def put_turned_pieces_in_order(block: Block, where: Where) -> Block:
    """Copy what an all-to-all over a context axis brings into order: it comes by sender, and is
    read by token and head.

    Compiled plans with ulysses and with frames and locations switched, in docs/compiled.md.
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.kind != "all-to-all":
            return [task]
        if "context" not in task.role.split("+"):
            return [task]
        return [task, *copy(task.name, "copy", task.bytes, task.count)]

    return changed(block, change)


def pass_logits_where_rings_cut(block: Block, where: Where) -> Block:
    """Read logits apart from the products that make them and read their gradient, where rings cut
    these; elsewhere one pass is left, for sums of exponentials.

    Seen in all programs of docs/compiled.md that were looked at: maxtext-16b on v5e, llama2-70b and
    the techniques on v5p (2.1 ms a pass of 2.1 GB on v5p, 2.1 priced; 4.8 of 1.6 GB on v5e, 6.4).
    """
    return _logits_apart(block, where.ring)


def pass_logits_apart(block: Block, where: Where) -> Block:
    """Read logits for their maximum, for the sum of exponentials and for their gradient, which is
    written: losses of libraries with gradients of their own (`cross_entropy_with_logits` of
    maxtext).
    """
    return _logits_apart(block, True)


def _logits_apart(block: Block, on: Number) -> Block:
    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.purpose not in (LOSS, LOSS_GRADIENT):
            return [task]
        return [
            replace(
                task,
                hbm_bytes=np.where(on, task.apart_bytes, task.hbm_bytes),
                vector_ops=np.where(on, LOSS_APART_OPS * task.pointwise, task.vector_ops),
            )
        ]

    return changed(block, change)


def lay_copies_side_by_side(block: Block, where: Where) -> Block:
    """Repeat tokens for their experts, and add what those make, where copies of a token lie side by
    side, in sublanes of which the rest is empty.

    `permute` and `unpermute` of MaxText (AI-Hypercomputer/maxtext at e591f30cb, layers/moe.py),
    compiled on their own for tpu7x, v5p and v6e (docs/compiled.md).
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or not np.any(task.beside_bytes):
            return [task]
        return [replace(task, hbm_bytes=task.hbm_bytes + task.beside_bytes, beside_bytes=0)]

    return changed(block, change)
