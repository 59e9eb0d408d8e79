"""What runs beside collectives over a tensor axis that SparseCores do, in the backward pass.

XLA's scheduler starts them as soon as what they read is there, and awaits them as late as it can.
Of a layer's eleven collectives over the axis, without rings and with all of it computed again, it
hides one behind the gradients of the MLP's weights and parts of two others (llama3-70b, llama3-8b
and qwen3-14b on tpu7x:4x4x4 with four members, docs/compiled.md). Where one follows another nothing
is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardsim.plan.layout import Layout, somewhere
from shardsim.program.rings import parted
from shardsim.program.rules import Where
from shardsim.program.schedule import Await, Block, Start, Task
from shardsim.program.tasks import Collective, Compute, makes_weight_gradient, moves_over_tensor
from shardsim.records import replace


def run_beside_sparse_cores(block: Block, where: Where) -> Block:
    """Run what may run meanwhile beside collectives over a tensor axis in the backward pass, on
    chips whose SparseCores do them, where attention comes before the MLP and nothing is a ring.

    - The MLP's input is gathered again beside the first product of its gradient.
    - The gradient of attention's result is gathered beside gradients of the MLP's weights.
    - The gradient of attention's input is summed beside gradients of attention's weights.

    Seen in llama3-70b, llama3-8b and qwen3-14b on tpu7x, "tensor 4, sequence, no overlap" of
    docs/compiled.md.
    """
    layout = where.layout
    if block.phase != "backward" or not where.machine.chip.offloads_collectives:
        return block
    if layout.partitioned or somewhere(layout.split_backward):
        return block
    computes = {task.name: task for task in block.tasks if isinstance(task, Compute)}
    moves = [task for task in block.tasks if moves_over_tensor(task)]
    gradients = [task for task in moves if _gathers_a_gradient(task, computes)]
    if len(gradients) != 2 or moves[-1].kind != "reduce-scatter":
        return block
    tasks = _input_beside_gradient([*block.tasks], gradients[0], computes, layout)
    return replace(block, tasks=tuple(_beside_weights(tasks, (gradients[1], moves[-1]), layout)))


def _input_beside_gradient(
    tasks: list[Task], gradient: Collective, computes: Mapping[str, Compute], layout: Layout
) -> list[Task]:
    """Return tasks with the last input that is gathered again beside the first product that reads
    the gradient; that is gathered before it."""
    at = tasks.index(gradient)
    before = [n for n, task in enumerate(tasks[:at]) if moves_over_tensor(task) and _gathers(task)]
    readers = [n for n, task in enumerate(tasks) if getattr(task, "name", "") in gradient.partners]
    if not before or not readers:
        return tasks
    place, first = before[-1], readers[0]
    again = tasks[place]
    assert isinstance(again, Collective)
    if not any(computes[name].again for name in again.partners if name in computes):
        return tasks
    start, ring, end = _beside(again, layout)
    moved = [*tasks[at:first], *start, tasks[first], *ring, *end]
    return [*tasks[:place], *moved, *tasks[place + 1 : at], *tasks[first + 1 :]]


def _beside_weights(
    tasks: Sequence[Task], moves: Sequence[Collective], layout: Layout
) -> list[Task]:
    """Return tasks with the gradients of weights that are made before each of some moves beside it;
    those that come after the last of them stay."""
    done: list[Task] = []
    held: list[Task] = []
    last = max(tasks.index(move) for move in moves)
    for task in tasks[: last + 1]:
        if makes_weight_gradient(task):
            held.append(task)
        elif isinstance(task, Collective) and any(task is move for move in moves):
            start, ring, end = _beside(task, layout)
            done += [*start, *held, *ring, *end]
            held = []
        else:
            done.append(task)
    return [*done, *tasks[last + 1 :]]


def _beside(task: Collective, layout: Layout) -> tuple[list[Task], list[Task], list[Task]]:
    """Return the start of a collective, what of it is a ring, and its end."""
    apart, rung = parted(task, layout)
    if not somewhere(apart.count):
        return [], [task], []
    return [Start(task=apart)], rung, [Await(name=task.name)]


def _gathers(task: Collective) -> bool:
    return task.kind == "all-gather"


def _gathers_a_gradient(task: Collective, computes: Mapping[str, Compute]) -> bool:
    """Return whether a gradient is gathered: products read it that make others."""
    readers = [computes[name] for name in task.partners if name in computes]
    return _gathers(task) and any(not one.again and not one.of_weights for one in readers)
