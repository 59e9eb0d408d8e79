"""Rules about the ends of products: what a compiler does there and in no pass of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsim.plan.layout import Number
from shardsim.program.array_rules import in_kernel
from shardsim.program.rules import Where, attends, changed, stream, width
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import BY_HEAD, Collective, Compute
from shardsim.program.trace import LANES


def end_products(block: Block, where: Where) -> Block:
    """Add to the residual stream, gate a hidden layer and sum up biases' gradients in the end of
    the product that makes what is added, gated or summed, unless that product is not run or its
    result is sent before. What a kernel of attention makes is summed apart.

    Compiled plans of ViT-22B on v4 and v5p, maxtext-22b and palm-8b on v4, llama2-70b on v5p and
    vit-bigg on v5e in docs/compiled.md. Matrix units of 256 x 256 have made a tile before such an
    end is done with the last, and it takes as long as a pass (llama3-8b on v6e: 1.7 ms for a gate,
    1.9 as a pass; 1.2 and 1.0 for an addition): those keep it as one.
    """
    if where.machine.chip.mxu_dim > LANES:
        return block
    made: list[Task] = []
    last, sent = -1, np.array(False)
    kernel = [in_kernel(task, where) for task in block.tasks if attends(task)]
    for task in block.tasks:
        made.append(task)
        if not isinstance(task, Compute):
            if isinstance(task, Collective) and task.purpose == "block":
                sent = sent | np.greater(task.count, 0)
            continue
        if task.kind == "matmul" and not task.of_weights:
            last, sent = len(made) - 1, np.array(False)
        if task.joined_bytes is None or last < 0:
            continue
        product = made[last]
        assert isinstance(product, Compute)
        joins: Number = np.greater(product.count, 0) & np.logical_not(sent | where.sequence_ring)
        if task.purpose == BY_HEAD and kernel:
            joins = joins & np.logical_not(kernel[-1])
        made[last] = replace(
            product,
            hbm_bytes=product.hbm_bytes + joins * task.joined_bytes,
            vector_ops=product.vector_ops + joins * task.vector_ops,
        )
        made[-1] = replace(task, count=task.count * np.logical_not(joins))
    return replace(block, tasks=tuple(made))


# Vector operations for an element of two halves that are put together: padded, and the larger.
TOGETHER_OPS = 2.0


def rotate_halves(block: Block, where: Where) -> Block:
    """Rotate queries and keys in halves of a head, which take as long as if they filled all lanes,
    and put them together in a pass of its own for a kernel and for the products of a gradient.
    What a kernel makes is written in float32 before.

    Compiled plans of maxtext-16b on v5e, maxtext-22b and palm-8b on v4 (heads of 256) and of
    llama2-70b on v5p (of 128, in a kernel), without rings, in docs/compiled.md.
    """
    heads = [task for task in block.tasks if isinstance(task, Compute) and task.kind == "attention"]
    if not heads:
        return block
    kernel = attends(heads[0]) & in_kernel(heads[0], where)
    filled = np.clip(heads[0].k / 2.0 / LANES, 0.5, 1.0)
    apart = np.logical_not(where.ring)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.purpose != BY_HEAD or not task.turns:
            return [task]
        one = task.pointwise * width(task)
        gradient = task.turns == "gradient"
        share = np.where(apart, 0.5 / filled, 1.0)
        moved = np.where(apart, 2.0 * one, task.hbm_bytes)
        turned = replace(task, hbm_bytes=moved * share, vector_ops=task.vector_ops * share)
        count = task.count * apart
        made = stream(
            f"put together: {task.name}", "elementwise", 2.0 * one, count * (gradient | kernel)
        )
        made = [replace(put, vector_ops=TOGETHER_OPS * task.pointwise) for put in made]
        wide = stream(f"widen: {task.name}", "elementwise", 2.0 * one, count * (gradient & kernel))
        return [*wide, turned, *made]

    return changed(block, change)
