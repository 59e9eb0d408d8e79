"""From what a plan wants to a Schedule: what runs beside what, made explicit.

Each pass is one technique. Where its switch is off, everything waits for a task; a switch is a
number or an array, and leaves a task both waited for and started, each for some of the plans. What
a trip through a layer starts ends with it: what crosses from one trip to the next is data, weights
that were gathered and gradients still to be scattered, as in a loop that carries them.

- `gathered_when_made`: keys and values of a context axis, see `program/keys.py`.
- `rings`: collective matmul, see `program/rings.py`, and ring attention, see `program/rounds.py`.
- `prefetch`: a trip gathers the weights of the next one, the last forward those of the head. Those
  of the first trip of a pass over the layers, forward or backward, nothing hides.
- `deferred`: a trip scatters the gradients of the one before, the first backward those of the
  head. Those of the last trip of a pass nothing hides. In the last microbatch a trip also sums
  them over replicas, matrix by matrix as they are scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardsim.plan.layout import Layout, Number, somewhere
from shardsim.program.keys import behind_keys, gathered_when_made, scattered_beside_queries
from shardsim.program.rings import ring, runs_as_ring
from shardsim.program.rounds import rounds
from shardsim.program.schedule import (
    Await,
    Block,
    Copy,
    Loop,
    Pipeline,
    Repeat,
    Schedule,
    Start,
    Task,
    When,
)
from shardsim.program.tasks import GRADIENT_SWITCHES, NEVER, Collective, Compute, Program
from shardsim.program.turns import stages_in_a_row
from shardsim.records import replace

# What turns on the overlap of the collectives that name it in `Collective.switch`.
SWITCHES: dict[str, Callable[[Layout], Number]] = {
    "weights_overlap": lambda layout: layout.weights_overlap,
    "gradients_overlap": lambda layout: layout.gradients_overlap,
    "dcn_overlap": lambda layout: layout.dcn_overlap,
    "always": lambda layout: True,  # whatever the plan says
    NEVER: lambda layout: False,
}


@dataclass
class _Draft:
    """A block while it is written: what is started before and after its own tasks."""

    block: Block
    tasks: list[Task]
    ahead: list[Task] = field(default_factory=list)
    ended: list[Task] = field(default_factory=list)
    closing: list[Task] = field(default_factory=list)  # after the last trip

    def done(self, name: str, trips: Number) -> Block:
        """Return the block as it is by now."""
        tasks = (*behind_keys(self.ahead, self.tasks), *self.ended, *self.closing)
        return replace(self.block, name=name, trips=trips, tasks=tasks)


def overlap(program: Program, layout: Layout) -> Schedule:
    """Return what one device does in a step of `program` under `layout`, and when."""
    split = [part for block in program.blocks for part in _apart(block, layout)]
    drafts = {
        block.name: _Draft(
            block=block,
            tasks=rings(scattered_beside_queries(gathered_when_made(block, layout)), layout),
        )
        for block in split
    }
    forward, (head,), backward = (_of(drafts, phase) for phase in ("forward", "head", "backward"))
    if not backward:
        for there in forward:
            prefetch(there, there, layout, "but last")
        prefetch(head, forward[-1], layout, "before the head")
    pairs = zip(forward, backward, strict=True) if backward else ()
    for there, back in pairs:
        prefetch(there, there, layout, "but last")
        if there is forward[-1]:
            prefetch(head, there, layout, "before the head")
        prefetch(back, back, layout, "but last")
        if back is backward[-1]:
            deferred(head, [back], layout, "after the head")
        deferred(back, [back], layout, "but first")
    weights = _of(drafts, "weights")
    for draft in weights:
        deferred(draft, [draft], layout, "but first")
    # The last microbatch completes the gradients.
    backward = weights or backward
    final = [
        replace(
            draft,
            ahead=list(draft.ahead),
            ended=list(draft.ended),
            closing=list(draft.closing),
        )
        for draft in backward
    ]
    for draft in _of(drafts, "reduction"):
        if draft.block.of:
            deferred(draft, [final[number] for number in draft.block.of], layout, "but first")
        else:
            deferred(draft, final[-1:], layout, "first" if weights else "after the head")
    several = bool(final) and len(final[-1].ahead) > len(backward[-1].ahead)
    return _ordered(program, layout, drafts, final if several else [])


def _apart(block: Block, layout: Layout) -> tuple[Block, ...]:
    """Return a block of the way back as two, gradients of weights apart, where a plan says so."""
    on = np.asarray(layout.split_backward, dtype=bool)
    if block.phase != "backward" or not somewhere(on):
        return (block,)
    back: list[Task] = []
    weights: list[Task] = []
    makers = {task.name for task in block.tasks if isinstance(task, Compute) and task.of_weights}
    for task in block.tasks:
        own = isinstance(task, Compute) and task.of_weights
        if isinstance(task, Collective):
            own = task.switch in GRADIENT_SWITCHES
            own |= bool(task.partners) and makers.issuperset(task.partners)
        if not own or isinstance(task, Start | Await | Repeat | Copy):
            back.append(task)
            continue
        weights.append(replace(task, count=task.count * on))
        if not np.all(on):
            back.append(replace(task, count=task.count * np.logical_not(on)))
    name = f"{block.name}, gradients of weights"
    apart = replace(block, name=name, phase="weights", tasks=tuple(weights))
    return replace(block, tasks=tuple(back)), apart


def _of(drafts: dict[str, _Draft], phase: str) -> list[_Draft]:
    return [draft for draft in drafts.values() if draft.block.phase == phase]


def rings(tasks: Sequence[Task], layout: Layout) -> list[Task]:
    """Return the tasks of a block with its collective matmuls as hops beside blocks of matmuls.

    A gather's ring runs where its first matmul was, a scatter's where its last was.
    """
    tasks = rounds(tasks, layout)
    wanted = [
        (task, on)
        for task in tasks
        if isinstance(task, Collective) and somewhere(on := runs_as_ring(task, layout))
    ]
    for task, on in wanted:
        partners = [
            other
            for other in tasks
            if isinstance(other, Compute) and other.name in task.partners and somewhere(other.count)
        ]
        if not partners:
            continue
        here = partners[0 if task.kind == "all-gather" else -1]
        cut = {id(one) for one in (task, *partners)}
        placed: list[Task] = []
        for other in tasks:
            if other is here:
                placed += ring(task, partners, layout, on)
            if id(other) in cut and isinstance(other, Compute | Collective):
                other = replace(other, count=other.count * np.logical_not(on))
            placed.append(other)
        tasks = placed
    return [task for task in tasks if not _never(task)]


def prefetch(draft: _Draft, where: _Draft, layout: Layout, when: When) -> None:
    """Gather weights that may overlap in the block `where`, a trip ahead of their use.

    Where they may not, a trip begins with its own, before anything else is on the way. So does the
    first one.
    """
    here, started = _split(draft, layout, "all-gather")
    draft.ahead += here
    for gather in started:
        if draft is where:
            where.ahead += [Start(task=gather, when="first"), Await(name=gather.name, when="first")]
    for gather in started:
        where.ahead.append(Start(task=gather, when=when))
        where.ended.append(Await(name=gather.name))


def deferred(draft: _Draft, where: Sequence[_Draft], layout: Layout, when: When) -> None:
    """Scatter or sum gradients that may overlap in the blocks `where`, in the trip after theirs."""
    here, started = _split(draft, layout, "")
    draft.tasks += here
    for task in started:
        # Layers and head are summed alike, and may be so at the same time.
        name = f"{draft.block.name}: {task.name}" if draft.block.phase == "reduction" else task.name
        one = replace(task, name=name)
        for other in where:
            other.ahead.append(Start(task=one, when=when))
            other.ended.append(Await(name=one.name))
            if when == "but first":
                other.closing += [Start(task=one, when="last"), Await(name=one.name, when="last")]


def _split(draft: _Draft, layout: Layout, kind: str) -> tuple[list[Collective], list[Collective]]:
    """Take out what may run behind other work, of a `kind` or of all.

    Return it as it is in the plans where it is waited for, and as it is in the others.
    """
    tasks, draft.tasks = draft.tasks, []
    waited: list[Collective] = []
    started: list[Collective] = []
    for task in tasks:
        behind = isinstance(task, Collective) and task.schedule == "behind"
        if not isinstance(task, Collective) or not behind or kind not in task.kind:
            draft.tasks.append(task)
            continue
        on = np.asarray(SWITCHES[task.switch](layout), dtype=bool)
        for where, found in ((np.logical_not(on), waited), (on, started)):
            one = replace(task, count=task.count * where)
            found += [one] if somewhere(one.count) else []
    return waited, started


def _ordered(
    program: Program, layout: Layout, drafts: dict[str, _Draft], final: Sequence[_Draft]
) -> Schedule:
    """Return the blocks and the order of a step, of a stage that has the head."""
    stages, lockstep = layout.pipeline.size, layout.lockstep
    heads = np.where(layout.layered, layout.microbatches, 1)  # in a row
    microbatches = layout.microbatches / heads
    chunks = np.where(np.greater(stages, 1), program.interleave, 1)
    blocks: list[Block] = []
    place: dict[str, list[int]] = {}  # by phase, those of layers by group

    def put(phase: str, block: Block) -> None:
        place.setdefault(phase, []).append(len(blocks))
        blocks.append(block)

    finals = "weights" if _of(drafts, "weights") else "backward"
    for name, draft in drafts.items():
        phase, trips = draft.block.phase, draft.block.trips
        if phase == "boundary" and not somewhere(np.greater(stages, 1)):
            continue
        if phase == finals and final:
            last_trips = trips / microbatches
            trips = trips - last_trips
            several = somewhere(trips)
            title = f"{name}, last microbatch" if several else name
            put("final", final[draft.block.group].done(title, last_trips))
            if not several:
                place.setdefault(phase, []).append(place["final"][-1])
                continue
        put(phase, draft.done(name, trips))
    head: tuple[int | Loop, ...] = tuple(place["head"])
    if somewhere(layout.layered):
        head = tuple(Loop(times=heads, body=(number,)) for number in place["head"])
    layers = [draft.block.trips / (microbatches * chunks) for draft in _of(drafts, "forward")]

    def passes(phase: str) -> tuple[Loop, ...]:
        loops = zip(layers, place.get(phase, ()), strict=phase in place)
        found = tuple(Loop(times=times, body=(number,)) for times, number in loops)
        return found if phase == "forward" else found[::-1]

    def microbatch(last: str) -> tuple[int | Loop, ...]:
        back = [last] if finals == "backward" else ["backward", last]
        steps: list[int | Loop] = [*passes("forward"), *head]
        steps += [loop for phase in back for loop in passes(phase)]
        if somewhere(np.greater(chunks, 1)):
            without_head = (*passes("forward"), *passes(last))
            steps.insert(0, Loop(times=chunks - 1, body=without_head))
        for number in place.get("boundary", ()):
            times = blocks[number].trips / (microbatches * heads)
            steps.append(Loop(times=times, body=(number,)))
        return tuple(steps)

    def at(*phases: str) -> tuple[Loop, ...]:
        return tuple(
            Loop(times=block.trips, body=(number,))
            for number, block in enumerate(blocks)
            if block.phase in phases
        )

    rounds = [Loop(times=microbatches, body=microbatch(finals))]
    if final:
        rounds = [
            Loop(times=microbatches - 1, body=microbatch(finals)),
            Loop(times=1, body=microbatch("final")),
        ]
    return Schedule(
        blocks=tuple(blocks),
        order=(*at("opening"), *rounds, *at("reduction", "update")),
        pipeline=Pipeline(
            stages=stages,
            microbatches=microbatches,
            chunks=chunks,
            lockstep=lockstep,
            in_turns=layout.in_turns,
            split_backward=layout.split_backward,
            in_a_row=stages_in_a_row(layout),
            shares=tuple(many / max(layout.stage_layers) for many in layout.stage_layers),
        ),
    )


def _never(task: Task) -> bool:
    """Return whether a task runs in none of the plans."""
    if not isinstance(task, Compute | Collective):
        return False
    return not somewhere(task.count)
