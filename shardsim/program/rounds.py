"""Ring attention: keys and values pass round the context axis, beside the attention of the block
that is there (arXiv 2310.01889).

Of N members each attends to its own keys first, then to those that came. Forward N - 1 hops take
keys and values round. Backward they come round again; the gradients of what came start where it is
attended to first, take up a product at every stop and end, after N - 1 hops, where it is stored. So
a ring sends what the all-gathers and reduce-scatters send that it stands for.

| pass | blocks, each beside a hop of | at last |
| --- | --- | --- |
| forward | keys and values: N - 1 | 1 block |
| backward | keys and values: 2; those and gradients: N - 3; gradients: 1 | 1 hop |

Of two members, backward, the block of the other's keys runs beside nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardsim.graph.place import CONTEXT
from shardsim.ops.towers import BATCH
from shardsim.plan.layout import Layout, Number
from shardsim.program.schedule import Await, Move, Repeat, Start, Task, Work
from shardsim.program.tasks import Collective, Compute

ROUND = "round"
PASSED = frozenset((*CONTEXT, *BATCH))  # axes that something may pass round


def _of_batch(task: Collective) -> bool:
    """Return whether what passes round are a batch's embeddings, not keys."""
    return task.schedule == ROUND and task.role != "context"


def in_hops(task: Collective, layout: Layout) -> Collective:
    """Return a gather, or a scatter, as pieces that neighbours pass on, one after another, with
    nothing beside them."""
    members = layout.role(task.role).size
    beyond = np.maximum(members - 1, 1)
    return replace(
        task,
        kind="permute",
        bytes=task.bytes * beyond / members,
        messages=beyond,
        schedule="exposed",
        partners=(),
    )


def rounds(tasks: Sequence[Task], layout: Layout) -> list[Task]:
    """Return the tasks of a block with its rings of keys as hops beside blocks of attention."""
    moves: dict[str, list[Collective]] = {}
    tasks = [
        in_hops(task, layout) if isinstance(task, Collective) and _of_batch(task) else task
        for task in tasks
    ]
    for task in tasks:
        if isinstance(task, Collective) and task.schedule == ROUND:
            moves.setdefault(task.partners[0], []).append(task)
    if not moves:
        return [*tasks]
    on = np.greater(layout.context.size, 1)
    ends = {task.end_of: task for task in tasks if isinstance(task, Compute)}
    made: list[Task] = []
    for task in tasks:
        if isinstance(task, Collective) and task.schedule == ROUND:
            continue
        if isinstance(task, Compute) and task.end_of in moves:
            continue
        if isinstance(task, Compute) and task.name in moves:
            made += _round(task, ends.get(task.name), moves[task.name], layout, on)
            task = replace(task, count=task.count * np.logical_not(on))
        made.append(task)
    return made


def _round(
    task: Compute, end: Compute | None, moves: Sequence[Collective], layout: Layout, on: Number
) -> list[Task]:
    """Return attention, or its gradient, as blocks beside hops of its `moves`, where `on`; what a
    block makes is merged in its `end`."""
    members = layout.context.size
    beyond = np.maximum(members - 1, 1)
    merged = [] if end is None else [replace(end, hbm_bytes=end.hbm_bytes / members)]
    own: tuple[Work, ...] = (_block(task, members, task.own_fraction), *merged)
    rest = (task.fraction * members - task.own_fraction) / beyond
    other: tuple[Work, ...] = (_block(task, members, rest), *merged)
    keys = [move for move in moves if move.kind == "all-gather"]
    sums = [move for move in moves if move.kind == "reduce-scatter"]

    def hop(what: str, of: Sequence[Collective], stage: str = "all") -> Move:
        return Move(
            name=f"{task.name}, a hop of {what}",
            kind="permute",
            role=of[0].role,
            bytes=sum(move.bytes for move in of) / members,
            count=of[0].count,
            messages=len(of),
            purpose=of[0].purpose,
            stage=stage,
            ways=1,
        )

    def beside(move: Move, times: Number, block: tuple[Work, ...]) -> list[Task]:
        if not np.any(times):
            return []
        if not layout.keys_overlap or any(one.hops_wait for one in moves):
            return [Repeat(times=times, tasks=(move, *block))]
        run: tuple[Task, ...] = (Start(task=move), *block, Await(name=move.name))
        return [Repeat(times=times, tasks=run)]

    # On a line one of the hops behind each other goes all the way back.
    first = beside(hop("keys", keys, "closing"), on * 1, own)
    if not sums:
        return [
            *first,
            *beside(hop("keys", keys), on * (members - 2), other),
            Repeat(times=on * 1, tasks=other),
        ]
    several = on & np.greater(members, 2)
    return [
        *first,
        *beside(hop("keys", keys), several * 1, other),
        *beside(hop("keys and gradients", moves), several * (members - 3), other),
        *beside(hop("gradients", sums), several * 1, other),
        *([] if np.all(several) else [Repeat(times=(on & ~several) * 1, tasks=other)]),
        Repeat(times=on * 1, tasks=(hop("gradients", sums, "closing"),)),
    ]


def _block(task: Compute, members: Number, fraction: Number) -> Work:
    """Return attention to the keys of one of `members`, of which it computes a `fraction`."""
    return replace(
        task,
        n=task.n / members,
        fraction=fraction,
        hbm_bytes=task.hbm_bytes / members,
        vector_ops=task.vector_ops * fraction / (task.fraction * members),
    )
