"""What runs over a tensor axis beside gradients of weights, in libraries of GPUs without rings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shardsim.plan.layout import somewhere
from shardsim.program.rings import runs_as_ring
from shardsim.program.rules import Where
from shardsim.program.schedule import Await, Block, Start, Task
from shardsim.program.tasks import Collective, Compute
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
        if isinstance(task, Compute) and task.of_weights and task.kind == "matmul":
            held.append(task)
            continue
        if not isinstance(task, Collective) or task.role != "tensor" or task.purpose != "block":
            if isinstance(task, Compute) and task.kind == "attention":
                yield from waits + held
                waits, held = [], []
            yield task
            continue
        ring = runs_as_ring(task, where.layout)
        apart = replace(task, count=task.count * np.logical_not(ring))
        rung: list[Task] = [replace(task, count=task.count * ring)] if somewhere(ring) else []
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
