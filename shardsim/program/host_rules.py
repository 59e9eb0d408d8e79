"""Rules for host devices: how XLA runs a planned step on threads of one processor.

As on GPUs nothing is fused into a product (`gpu_rules.py`). Its libraries for products (YNNPACK,
Eigen) want one operand of a gradient of weights transposed, and every weight of a layer by itself.
Read off the compiled steps of six plans of a small ViT (jax 0.10.2, x86-64).
"""

from __future__ import annotations

import numpy as np

from shardsim.program.rules import LAYER_PHASES, Where, changed, copy, width
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import Compute


def lay_out_for_weights(block: Block, where: Where) -> Block:
    """Transpose what a product has made of a gradient for the gradient of its weights."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or not task.of_weights:
            return [task]
        size = task.k * task.n * task.batch * width(task)
        return [*copy(task.name, "transpose", size, task.count), task]

    return changed(block, change)


def copy_weights_out(block: Block, where: Where) -> Block:
    """Copy each matrix of a layer out of the stack of all layers before the product that reads it:
    the shard that is gathered, or all of it. One layer has no stack."""
    several = np.greater(block.trips, 1)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.kind != "matmul" or task.of_weights:
            return [task]
        size = task.k * task.n * task.batch * width(task) / where.layout.fsdp.size
        return [*copy(f"weights of {task.name}", "copy", size, task.count * several), task]

    return changed(block, change) if block.phase in LAYER_PHASES else block
