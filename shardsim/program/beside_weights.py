"""What runs over a tensor axis beside gradients of weights, in libraries of GPUs without rings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shardsim.plan.layout import somewhere
from shardsim.program.rings import parted
from shardsim.program.rules import Where
from shardsim.program.schedule import Await, Block, Start, Task
from shardsim.program.tasks import Compute, makes_weight_gradient, moves_over_tensor
from shardsim.records import replace

SETTLING = ("reduce-scatter", "all-reduce")


def settle_beside_weights(block: Block, where: Where) -> Block:
    """Back, sum gradients of what a tensor axis reads while gradients of weights are made, and
    gather again what those read while the others are (`LinearWithGradAccumulationAndAsync
    Communication` in megatron/core/tensor_parallel/layers.py, NVIDIA/Megatron-LM at d98e8a64, which
    starts the one before the product of the gradient that is sent, the other before that of
    weights), where nothing runs as a ring."""
    layout = where.layout
    if block.phase != "backward" or somewhere(layout.split_backward):
        return block
    if not somewhere(np.greater(layout.tensor.size, 1)):
        return block
    return replace(block, tasks=tuple(_beside(block, where)))


def _beside(block: Block, where: Where) -> Iterator[Task]:
    """Yield the tasks of a block with gradients of weights behind what is sent meanwhile."""
    makers = {task.name for task in block.tasks if isinstance(task, Compute) and task.of_weights}
    waits: list[Task] = []  # for what the products held back read
    held: list[Task] = []
    for task in block.tasks:
        if makes_weight_gradient(task):
            held.append(task)
            continue
        if not moves_over_tensor(task):
            if isinstance(task, Compute) and task.kind == "attention":
                yield from waits + held
                waits, held = [], []
            yield task
            continue
        apart, rung = parted(task, where.layout)
        if task.kind in SETTLING:
            yield from [*waits, *rung, Start(task=apart), *held, Await(name=task.name)]
            waits, held = [], []
            continue
        yield from waits + held
        waits, held = [], []
        if task.partners and makers.issuperset(task.partners):
            yield from [*rung, Start(task=apart)]
            waits = [Await(name=task.name)]
        else:
            yield task
    yield from waits + held
