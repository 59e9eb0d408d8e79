"""Partitioning: from a workload and a layout to the Program of one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shardsim.plan.layout import Layout, Number
from shardsim.program.blocks import Run, backward_of, runs, runs_again
from shardsim.program.kept import entered, kept, kept_for_products, operands_of_weights
from shardsim.program.lower import Lowering
from shardsim.program.members import PartOf, parts_of
from shardsim.program.once import ends_once, once, repeated_work
from shardsim.program.reductions import gradient_reductions, update
from shardsim.program.schedule import Await, Block, Copy, Start
from shardsim.program.shapes import Workload
from shardsim.program.tasks import KEEP, TAKE, Collective, Compute, Program, Task, repeated
from shardsim.program.turns import stages_in_a_row


def partition(work: Workload, layout: Layout) -> Program:
    """Return what one device does in a step of `work` under `layout`.

    A layout of many plans is of one kind (`sizes.kind_of`). A trip of a block of layers, forward
    or backward, is a round of the model's layers (`model.blocks.Stack`); layers that keep
    different things for the backward pass are in blocks of their own.
    """
    parts = parts_of(work, layout)
    every = runs(work, layout)
    last = parts[-1].derived.layers[-1].steps[-1]
    ends = [
        task
        for part in parts
        for task in repeated(
            _ends(Lowering(part.work, layout, part.sizes, part.derived.ends)), part.as_layer
        )
    ]
    head, ends_apart = once(
        Block(
            name="embedding and head", phase="head", trips=layout.microbatches, tasks=tuple(ends)
        ),
        ends_once(layout),
        ends_once(layout) & np.logical_not(layout.scattered),
        1,
    )
    made = [
        _layers(layout, parts[run.part], run, number if len(every) > 1 else None)
        for number, run in enumerate(every)
    ]
    if work.forward_only:
        forwards = tuple(_forward_only(forward) for forward, *_ in made)
        sends = _pipeline_sends(work, layout, parts[-1].sizes.stored(last.op.out))
        return Program(blocks=(head, *forwards, *sends), interleave=work.pipeline_interleave)
    return Program(
        blocks=(
            head,
            *(forward for forward, _, _ in made),
            *(backward for _, backward, _ in made),
            *_pipeline_sends(work, layout, parts[-1].sizes.stored(last.op.out)),
            *ends_apart,
            *(block for _, _, apart in made for block in apart),
            *gradient_reductions(layout, parts, every),
            update(work, layout),
        ),
        interleave=work.pipeline_interleave,
    )


def _ends(low: Lowering) -> list[Task]:
    return low.forward() if low.work.forward_only else low.together()


def _forward_only(block: Block) -> Block:
    """Return a forward pass that nothing follows: nothing is kept for it."""
    kept = (
        task for task in block.tasks if not (isinstance(task, Compute) and task.purpose == KEEP)
    )
    return replace(block, tasks=tuple(kept))


@dataclass
class _Round:
    """What a round of layers does on one device: its tasks, elements of its matrices, and bytes."""

    forward: list[Task] = field(default_factory=list)
    backward: list[Task] = field(default_factory=list)
    stored: Number = 0.0  # elements of its matrices
    trained: Number = 0.0  # of those, that have gradients
    whole: Number = 0.0  # of the same, gathered
    kept_bytes: Number = 0.0  # for the backward pass, on the device
    entered_bytes: Number = 0.0  # of that, the inputs of layers
    taken_bytes: Number = 0.0  # that products read of it
    waiting_bytes: Number = 0.0  # for gradients of weights that are made later
    away: dict[str, Number] = field(default_factory=dict)  # bytes kept in the host's memory


def _round(layout: Layout, part: PartOf, run: Run) -> _Round:
    """Return what a round of layers does, each kind of them as many times as it is there."""
    policy, work, sizes = run.kept, run.work, part.sizes
    made = _Round()
    for number, layer in run.layers:
        one, times = part.derived.layers[number], layer.times
        low = Lowering(work, layout, sizes, one)
        made.forward += repeated(low.forward(), layer)
        matrices = [array for array in one.weights if array.weight == "matrix"]
        made.stored = made.stored + times * sum(sizes.stored(array) for array in matrices)
        matrices = [leaf.array for leaf in one.leaves if leaf.array.weight == "matrix"]
        made.trained = made.trained + times * sum(sizes.stored(array) for array in matrices)
        made.whole = made.whole + times * sum(sizes.gathered(array) for array in matrices)
        if not run.trained:
            continue
        found = [backward_of(work.model, work.attention, number, names) for names in policy.names]
        again = runs_again(found, policy.shape)
        made.backward = [*repeated(low.backward(again), layer), *made.backward]
        on_device, on_host = kept(work, layout, sizes, number, policy)
        made.kept_bytes = made.kept_bytes + times * on_device
        of_input = entered(work, sizes, one.start, policy)
        made.entered_bytes = made.entered_bytes + times * of_input
        for name, size in on_host.items():
            made.away[name] = made.away.get(name, 0.0) + times * size
        taken = kept_for_products(work, layout, sizes, number, policy)
        made.taken_bytes = made.taken_bytes + times * taken
        if np.any(_weights_wait(layout)):
            own = operands_of_weights(work, layout, sizes, number, policy)
            made.waiting_bytes = made.waiting_bytes + times * own
    return made


def _weights_wait(layout: Layout) -> Number:
    """Return whether gradients of weights are made ticks after those of activations."""
    return layout.split_backward & layout.lockstep


def _layers(
    layout: Layout, part: PartOf, run: Run, group: int | None
) -> tuple[Block, Block, tuple[Block, ...]]:
    """Return the passes over layers in a row, one of several groups of them or all, and what they
    do once a step.

    What their policy keeps in the host's memory is copied there and back beside the layer that it
    is of.
    """
    work, made = run.work, _round(layout, part, run)
    wait = _weights_wait(layout)
    keep = _copied(
        "keep for backward", KEEP, made.kept_bytes, copied_bytes=2.0 * made.entered_bytes
    )
    take = _copied("take what was kept", TAKE, made.taken_bytes, count=0)
    later = _copied("keep for gradients of weights", KEEP, made.waiting_bytes, count=wait * 1)
    many = np.where(layout.layered, layout.microbatches, 1)
    forward = repeated_work([*made.forward, *([keep] if run.trained else [])], many)
    summed = _accumulate(work, layout, made.trained, made.whole)
    waits = [later] if np.any(wait) else []
    backward = repeated_work([take, *made.backward, *waits, summed], many)

    def block(phase: str, tasks: Sequence[Task]) -> tuple[Block, tuple[Block, ...]]:
        title = "" if group is None else f", group {group + 1}"
        trips = run.rounds * layout.microbatches / many
        whole = Block(
            name=f"layer {phase}{title}",
            phase=phase,
            group=group or 0,
            trips=trips,
            tasks=tuple(tasks),
        )
        return once(whole, layout.gathered, layout.summed_whole, run.rounds)

    cast = _cast(work, made.stored)
    there, of_forward = block("forward", [cast, *forward])
    back, of_backward = block("backward", [cast, *backward] if run.trained else [])
    away = {name: size * many for name, size in made.away.items()}
    out = [_copy(f"offload activations, {name}", size, name) for name, size in away.items()]
    home = [_copy("fetch activations", sum(away.values()))]
    there, back = _beside(there, out), _beside(back, home)
    if work.offload_parameters:
        there = _fetched_ahead(there, made.stored * work.parameter_bytes)
        back = _fetched_ahead(back, made.stored * work.parameter_bytes) if run.trained else back
    return there, back, (*of_forward, *of_backward)


def _copied(name: str, purpose: str, size: Number, **more: Any) -> Compute:
    """Return a copy of `size` bytes inside HBM, which reads and writes them."""
    return Compute(name=name, kind="elementwise", hbm_bytes=2.0 * size, purpose=purpose, **more)


def _copy(name: str, size: Number, keeps: str = "") -> Copy:
    return Copy(name=name, host_bytes=size, keeps=keeps)


def _beside(block: Block, copies: Sequence[Copy]) -> Block:
    """Return a block beside whose tasks something is copied to or from the host."""
    copies = [copy for copy in copies if np.any(copy.host_bytes)]
    begun = (Start(task=copy) for copy in copies)
    ended = (Await(name=copy.name) for copy in copies)
    return replace(block, tasks=(*begun, *block.tasks, *ended))


def _fetched_ahead(block: Block, size: Number) -> Block:
    """Return a block of layers whose matrices lie in the host's memory: beside one layer the next
    one's are fetched, and those of the first before anything else."""
    copy = Copy(name="fetch weights", host_bytes=size, moves="parameters")
    return replace(
        block,
        tasks=(
            Start(task=copy, when="first"),
            Await(name=copy.name, when="first"),
            Start(task=copy, when="but last"),
            *block.tasks,
            Await(name=copy.name),
        ),
    )


def _cast(work: Workload, stored: Number) -> Compute:
    """Return the cast of a layer's stored weights to the compute format."""
    read = work.parameter_bytes * (2 if work.precision.weights and _scaled(work) else 1)
    return Compute(
        name="cast weights",
        kind="elementwise",
        hbm_bytes=stored * (read + work.weight_wire_bytes),
        count=work.parameter_bytes != work.weight_wire_bytes,
    )


def _scaled(work: Workload) -> bool:
    """Return whether what is cast is read for its scale first."""
    return work.precision.scales == "dynamic"


def _accumulate(work: Workload, layout: Layout, stored: Number, whole: Number) -> Compute:
    """Return the writing of gradients: once, or added to those of the microbatches before.

    `stored` are a device's elements of weights, `whole` those that are summed where they are
    scattered only after the last microbatch.
    """
    passes = np.where(np.greater(layout.microbatches, 1), 2.0, 1.0)
    stored = np.where(layout.summed_whole | layout.layered, whole, stored)
    return Compute(
        name="accumulate gradients",
        of_weights=True,
        kind="elementwise",
        hbm_bytes=stored * (passes * work.gradient_bytes + work.reduce_bytes),
    )


def _pipeline_sends(work: Workload, layout: Layout, stream: Number) -> tuple[Block, ...]:
    """Return the sends of the residual `stream` from chunk to chunk, of the stage with the head.

    The last chunk hands its microbatches to no other, but gets their gradients back first. In ticks
    a ring closes, and all stages send alike; else the stage before the last one, to which gradients
    go, may lie in its slice where others do not.
    """
    forward = work.pipeline_interleave - np.logical_not(layout.lockstep)
    backward = 0 if work.forward_only else work.pipeline_interleave
    inside = np.greater(stages_in_a_row(layout), 1) * backward / np.maximum(forward + backward, 1)
    send = Collective(
        name="send activations and gradients",
        kind="permute",
        role="pipeline",
        bytes=stream * work.wire_bytes,
        count=np.greater(layout.pipeline.size, 1) * (1 - inside),
        purpose="stage boundary",
    )
    near = replace(send, name="send to the stage beside", stage="torus", count=inside)
    return (
        Block(
            name="stage boundary",
            phase="boundary",
            trips=layout.microbatches * (forward + backward),
            tasks=tuple(replace(task, count=task.count * 1) for task in (send, near)),
        ),
    )
