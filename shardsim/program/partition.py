"""Partitioning: from a workload and a layout to the Program of one device."""

from __future__ import annotations

import numpy as np

from shardsim.plan.layout import Layout, Number
from shardsim.plan.remat import Remat
from shardsim.program.blocks import derived_blocks, graph, policies
from shardsim.program.kept import kept
from shardsim.program.lower import Lowering, runs_again
from shardsim.program.reductions import gradient_reductions, update
from shardsim.program.schedule import Block
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of
from shardsim.program.tasks import Collective, Compute, Program, Task, repeated


def partition(work: Workload, layout: Layout, remat: Remat | None = None) -> Program:
    """Return what one device does in a step of `work` under `layout`.

    A layout of many plans is of one kind (`sizes.kind_of`). `remat` is needed only for what it
    keeps in the host's memory. A trip of "layer forward" and of "layer backward" is a round of the
    model's layers (`model.blocks.Stack`).
    """
    sizes = Sizes(work, layout)
    derived = derived_blocks(work.model, work.attention, kind_of(work.model, layout))
    (stack,) = graph(work.model, work.attention).stacks
    rounds = stack.rounds / layout.pipeline.size
    last = derived.layers[-1].steps[-1]
    offloaded = frozenset() if remat is None else remat.offload
    forward: list[Task] = []
    backward: list[Task] = []
    stored: Number = 0.0
    kept_bytes: Number = 0.0
    offload_bytes: Number = 0.0
    for number, layer in enumerate(stack.layers):
        low = Lowering(work, layout, sizes, derived.layers[number])
        found, shape = policies(work.model, work.attention, number, layout)
        forward += repeated(low.forward(), layer)
        backward = [*repeated(low.backward(runs_again(found, shape)), layer), *backward]
        leaves = derived.layers[number].leaves
        weights = [leaf.array for leaf in leaves if leaf.array.weight == "matrix"]
        stored = stored + layer.times * sum(sizes.stored(array) for array in weights)
        on_device, on_host = kept(work, layout, sizes, number, offloaded)
        kept_bytes = kept_bytes + layer.times * on_device
        offload_bytes = offload_bytes + layer.times * on_host
    keep = Compute(name="keep for backward", kind="elementwise", hbm_bytes=2.0 * kept_bytes)
    blocks = (
        Block(
            name="embedding and head",
            phase="head",
            trips=layout.microbatches,
            tasks=tuple(Lowering(work, layout, sizes, derived.ends).together()),
        ),
        Block(
            name="layer forward",
            phase="forward",
            trips=rounds * layout.microbatches,
            tasks=(_cast(work, stored), *forward, keep),
        ),
        Block(
            name="layer backward",
            phase="backward",
            trips=rounds * layout.microbatches,
            tasks=(_cast(work, stored), *backward, _accumulate(work, layout, stored)),
        ),
    )
    return Program(
        blocks=(
            *blocks,
            *_pipeline_sends(work, layout, sizes.stored(last.op.out)),
            *gradient_reductions(work, layout, sizes, stack, derived, rounds),
            update(work, layout),
        ),
        interleave=work.pipeline_interleave,
        offload_bytes=offload_bytes,
    )


def _cast(work: Workload, stored: Number) -> Compute:
    """Return the cast of a layer's stored weights to the compute format."""
    return Compute(
        name="cast weights",
        kind="elementwise",
        hbm_bytes=stored * (work.parameter_bytes + work.wire_bytes),
        count=work.parameter_bytes != work.wire_bytes,
    )


def _accumulate(work: Workload, layout: Layout, stored: Number) -> Compute:
    """Return the writing of gradients: once, or added to those of the microbatches before."""
    passes = np.where(np.greater(layout.microbatches, 1), 2.0, 1.0)
    return Compute(
        name="accumulate gradients",
        kind="elementwise",
        hbm_bytes=stored * (passes * work.parameter_bytes + work.reduce_bytes),
    )


def _pipeline_sends(work: Workload, layout: Layout, stream: Number) -> tuple[Block, ...]:
    """Return the sends of the residual `stream`: once forward and once backward a chunk."""
    return (
        Block(
            name="stage boundary",
            phase="boundary",
            trips=layout.microbatches * work.pipeline_interleave,
            tasks=(
                Collective(
                    name="send activations and gradients",
                    kind="permute",
                    role="pipeline",
                    bytes=stream * work.wire_bytes,
                    count=2 * (layout.pipeline.size > 1),
                    purpose="stage boundary",
                ),
            ),
        ),
    )
