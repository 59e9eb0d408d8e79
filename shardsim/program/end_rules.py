"""Rules about the ends of products: what a compiler does there and in no pass of its own."""

from __future__ import annotations

import numpy as np

from shardsim.plan.layout import Number
from shardsim.plan.tiles import LANES
from shardsim.program.attention_rules import in_kernel
from shardsim.program.rules import Where, attends, changed, stream, width
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import BY_HEAD, Collective, Compute
from shardsim.records import replace


def join_all_ends(block: Block, where: Where) -> Block:
    """Add to the residual stream, gate a hidden layer and sum up biases' gradients in the end of
    the product that makes what is added, gated or summed: no implementation moves less."""
    return _joined(block, True, True)


def join_ends(block: Block, where: Where) -> Block:
    """Add to the residual stream, gate a hidden layer and sum up biases' gradients in the end of
    the product that makes what is added, gated or summed, unless that product is not run, its
    result is sent before or a ring puts it in place by the piece. What a kernel of attention makes
    is summed apart.

    Compiled plans of ViT-22B on v4 and v5p, maxtext-22b and palm-8b on v4, llama2-70b on v5p and
    vit-bigg on v5e in docs/compiled.md. Matrix units of 256 x 256 have made a tile before such an
    end is done with the last, and it takes as long as a pass (llama3-8b on v6e: 1.7 ms for a gate,
    1.9 as a pass; 1.2 and 1.0 for an addition): those keep it as one.
    """
    if where.machine.chip.mxu_dim > LANES:
        return block
    kernels = [in_kernel(task, where) for task in block.tasks if attends(task)]
    made = np.logical_not(kernels[-1]) if kernels else True
    return _joined(block, np.logical_not(where.sequence_ring), made)


def _joined(block: Block, on: Number, by_head: Number) -> Block:
    """Return the block with the work of ends in products, where `on`, `by_head` that of heads."""
    made: list[Task] = []
    sent: Number = 0  # collectives before
    products: dict[str, tuple[int, Number]] = {}  # their places, and what was sent before them
    for task in block.tasks:
        made.append(task)
        if not isinstance(task, Compute):
            if isinstance(task, Collective) and task.purpose == "block":
                sent = sent + np.greater(task.count, 0)
            continue
        if task.kind == "matmul":
            products[task.name] = len(made) - 1, sent
        if task.end_of not in products:
            continue
        place, before = products[task.end_of]
        product = made[place]
        assert isinstance(product, Compute)
        joins: Number = np.greater(product.count, 0) & np.equal(sent, before) & on
        if task.purpose == BY_HEAD:
            joins = joins & by_head
        made[place] = replace(
            product,
            hbm_bytes=product.hbm_bytes + joins * task.joined_bytes,
            vector_ops=product.vector_ops + joins * task.vector_ops,
        )
        made[-1] = replace(task, count=task.count * np.logical_not(joins))
    return replace(block, tasks=tuple(made))


# Vector operations for an element of two halves that are put together: padded, and the larger.
TOGETHER_OPS = 2.0


def rotate_halves(block: Block, where: Where) -> Block:
    """Rotate queries and keys in halves of a head, and where a half does not fill the lanes put
    them together in a pass of its own, for a kernel and for the products of a gradient; what a
    kernel makes is written in float32 before.

    Compiled plans of llama2-70b on v5p and llama3-8b on v6e (heads of 128), without rings, in
    docs/compiled.md; heads of 256 (maxtext-16b, maxtext-22b, palm-8b) need no such pass forward.
    """
    heads = [task for task in block.tasks if isinstance(task, Compute) and task.kind == "attention"]
    if not heads:
        return block
    # An index of tokens has products in front of its kernel, of other heads.
    one = next((task for task in heads if attends(task)), heads[0])
    kernel = attends(one) & in_kernel(one, where)
    apart = np.less(one.k, 2 * LANES) & np.logical_not(where.ring)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.purpose != BY_HEAD or not task.turns:
            return [task]
        both, gradient = 2.0 * task.pointwise * width(task), task.turns == "gradient"
        name, count = task.name, task.count * apart
        turned = replace(task, hbm_bytes=np.where(apart, both, task.hbm_bytes))
        made = stream(f"put together: {name}", "elementwise", both, count * (gradient | kernel))
        made = [replace(put, vector_ops=TOGETHER_OPS * task.pointwise) for put in made]
        wide = stream(f"widen: {name}", "elementwise", both, count * (gradient & kernel))
        return [*wide, turned, *made]

    return changed(block, change)
