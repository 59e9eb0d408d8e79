"""Partitioning: from a workload and a layout to the Program of one device."""

from __future__ import annotations

import numpy as np

from shardsim.model import Model
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, Layout, Number
from shardsim.plan.remat import Remat
from shardsim.program.blocks import derived_blocks, policies
from shardsim.program.lower import Lowering, runs_again
from shardsim.program.reductions import gradient_reductions, update
from shardsim.program.schedule import Block
from shardsim.program.shapes import Shapes, Workload, shapes
from shardsim.program.sizes import Sizes, kind_of
from shardsim.program.tasks import Collective, Compute, Memory, Program
from shardsim.program.weights import parameter_elements, stored_elements, vocabulary

SUM_BYTES = 4.0  # gradients are summed in float32


def partition(work: Workload, layout: Layout, remat: Remat | None = None) -> Program:
    """Return what one device does in a step of `work` under `layout`.

    A layout of many plans is of one kind (`sizes.kind_of`). `remat` is needed only for what it
    keeps in the host's memory.
    """
    local, sizes = shapes(work, layout), Sizes(work, layout)
    derived = derived_blocks(work.model, work.attention, kind_of(work.model, layout))
    stack = derived.stacks[0]
    layer = Lowering(work, layout, sizes, stack)
    found, shape = policies(work.model, work.attention, 0, layout)
    trips = local.layers * layout.microbatches
    offloaded = frozenset() if remat is None else remat.offload
    saved = saved_elements(work, layout, local, offloaded)
    weights = [leaf.array for leaf in stack.leaves if leaf.array.weight == "matrix"]
    stored: Number = sum(sizes.stored(array) for array in weights)
    forward = Block(
        name="layer forward",
        phase="forward",
        trips=trips,
        tasks=(
            _cast(work, stored),
            *layer.forward(),
            Compute(
                name="keep for backward",
                kind="elementwise",
                hbm_bytes=2.0 * saved * work.wire_bytes,
            ),
        ),
    )
    backward = Block(
        name="layer backward",
        phase="backward",
        trips=trips,
        tasks=(
            _cast(work, stored),
            *layer.backward(runs_again(found, shape)),
            _accumulate(work, layout, stored),
        ),
    )
    ends = Block(
        name="embedding and head",
        phase="head",
        trips=layout.microbatches,
        tasks=tuple(Lowering(work, layout, sizes, derived.ends).together()),
    )
    return Program(
        blocks=(
            ends,
            forward,
            backward,
            *_pipeline_sends(work, layout, local),
            *gradient_reductions(work, layout, sizes, stack, derived.ends, local.layers),
            update(work, layout),
        ),
        memory=memory(work, layout, local, saved),
        interleave=work.pipeline_interleave,
        offload_bytes=offload_elements(work.model, layout, local, offloaded) * work.wire_bytes,
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


def partition_memory(work: Workload, layout: Layout) -> Memory:
    """Return only the HBM of the program that `partition` writes: a small part of its work."""
    local = shapes(work, layout)
    return memory(work, layout, local, saved_elements(work, layout, local))


def _pipeline_sends(work: Workload, layout: Layout, local: Shapes) -> tuple[Block, ...]:
    """Return the sends between pipeline stages: once forward and once backward a chunk."""
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
                    bytes=local.residual * work.wire_bytes,
                    count=2 * (layout.pipeline.size > 1),
                    purpose="stage boundary",
                ),
            ),
        ),
    )


def saved_elements(
    work: Workload, layout: Layout, local: Shapes, offloaded: frozenset[str] = frozenset()
) -> Number:
    """Return the activations of one layer kept on the device for the backward pass.

    What no backward pass needs is not kept either: without norms after them the MLP's result, and
    in a parallel block the attention's.
    """
    model = work.model
    wide = local.tokens / local.split2
    total: Number = 0.0 if "layer_input" in offloaded else local.residual
    for name, kept, elements in _kept_tensors(model, layout, local):
        if name not in offloaded:
            total = total + kept * elements
    rest = local.residual * (1 if model.parallel_block else 2) + wide * local.hidden
    if model.qk_norm or model.positions == "rotary":
        rest = rest + wide * (local.q + local.kv / 2.0)
    if work.attention != "flash":
        rest = rest + local.scores
    return total + np.where(layout.keep_rest, rest, 0.0)


def offload_elements(
    model: Model, layout: Layout, local: Shapes, offloaded: frozenset[str]
) -> Number:
    """Return the activations of one layer that are kept in the host's memory."""
    total: Number = local.residual if "layer_input" in offloaded else 0.0
    for name, kept, elements in _kept_tensors(model, layout, local):
        if name in offloaded:
            total = total + kept * elements
    return total


def _kept_tensors(model: Model, layout: Layout, local: Shapes) -> list[tuple[str, Number, Number]]:
    """Return (name, whether kept, elements) of the named tensors that a backward pass needs."""
    wide = local.tokens / local.split2
    tensors = [
        ("qkv", layout.keep_qkv, wide * local.qkv),
        ("context", layout.keep_context, wide * local.q),
        ("mlp_hidden", layout.keep_mlp_hidden, wide * local.mlp_in),
    ]
    if model.post_norms or not model.parallel_block:
        tensors.append(("attention_output", layout.keep_attention_output, local.residual))
    if model.post_norms:
        tensors.append(("mlp_output", layout.keep_mlp_output, local.residual))
    return tensors


def memory(work: Workload, layout: Layout, local: Shapes, saved: Number) -> Memory:
    """Return HBM by use. `saved` is what one layer keeps for one microbatch, in elements."""
    width = work.wire_bytes
    stored = parameter_elements(work.model, layout)
    by_data = np.where(layout.optimizer_over_data, layout.data.size, 1)
    in_flight = np.minimum(layout.pipeline.size, layout.microbatches)
    # A branch's weights are gathered together, those of the next while they are in use, and their
    # gradients are there until they are scattered.
    attention = local.embed * (local.qkv + local.q)
    mlp = local.embed * local.hidden * (1.0 + local.gates)
    branch = attention + mlp if work.model.parallel_block else np.maximum(attention, mlp)
    in_use = np.where(
        layout.gather.size > 1, 1.0 + np.asarray(layout.weights_overlap, dtype=float), 1.0
    )
    # Gradients that the data axis reduce-scatters as they come are never whole, unless several
    # microbatches add to them first.
    whole = np.where(np.equal(layout.microbatches, 1), by_data, 1)
    live = live_elements(work, layout, local)
    logits = local.tokens * local.vocab
    # Gradients take the place of the float32 logits. A ring has them twice: sums of float32, or
    # pieces in the compute format that are put in place.
    ring, embed = rings(layout)
    second_logits = np.where(embed, 4.0, np.where(ring, float(width), 0.0))
    # Several microbatches add to the sums of those before, so the gradients are there twice. The
    # TPU compiler scatters the gradients of the vocabulary's tables once, after the last
    # microbatch, and carries float32 sums of whole tables round the loop (seen compiled for v4).
    several = np.greater(layout.microbatches, 1)
    tables = stored_elements(vocabulary(work.model), layout) * layout.gather.size
    tables_bytes = np.where(layout.gather.size > 1, tables * width, 0.0)
    tables_bytes = tables_bytes + np.where(several, tables * SUM_BYTES, 0.0)
    return Memory(
        parameters=stored * work.parameter_bytes,
        optimizer=stored * work.optimizer_bytes / by_data,
        gradients=stored * work.parameter_bytes * np.where(several, 2.0, 1.0) / whole,
        saved_activations=saved * width * local.layers * in_flight,
        gathered_weights=branch * (in_use * width + work.reduce_bytes) + tables_bytes,
        layer_workspace=live * width,
        head_workspace=logits * (4.0 + second_logits)
        + 2.0 * local.tokens * local.embed * width
        + tables_bytes,
    )


def rings(layout: Layout) -> tuple[Number, Number]:
    """Return whether collective matmuls run, and whether they pass pieces of the embed axis."""
    ring = (
        np.greater(layout.tensor.size, 1)
        & np.greater(layout.matmul_overlap, 0)
        & np.not_equal(layout.residual, REPLICATED)
    )
    return ring, ring & np.equal(layout.residual, EMBED_SHARDED)


def live_elements(work: Workload, layout: Layout, local: Shapes) -> Number:
    """Return what is live at the fullest moment of a layer's backward pass, in elements.

    Counted in compiled programs (docs/compiled.md): input, gradients and partial sums of a branch,
    whole over the tensor axis; its projections; its hidden values and their gradients.
    """
    tensor = layout.tensor.size
    ring, embed = rings(layout)
    wide = local.tokens / local.split2
    heads = wide * (local.qkv + local.q)
    if work.attention != "flash":
        heads = heads + local.scores
    several = np.greater(layout.context.size, 1)
    heads = heads + np.where(several, wide * local.own_kv * layout.context.size, 0.0)
    hidden = 2.0 * wide * local.mlp_in
    inside = heads + hidden if work.model.parallel_block else np.maximum(heads, hidden)
    results = local.tokens * (local.qkv + local.mlp_in)
    # Without a ring sums over the tensor axis are whole before they are scattered, in float32.
    whole = np.where(ring, np.where(embed, 3.0, 4.5), np.where(np.greater(tensor, 1), 6.0, 2.0))
    # Summands of the embed axis are float32 arrays; pieces of the sequence are put in place.
    summands = np.minimum(3.0, tensor / 2.0) * 2.0 * results
    placed = results + local.tokens * (local.q + local.hidden)
    pieces = np.where(embed, summands, np.where(ring, placed, 0.0))
    # What a second tensor axis sums is there in float32, before it is scattered.
    pieces = np.where(np.greater(local.split2, 1), 2.0 * results, pieces)
    return whole * local.tokens * local.embed + 2.0 * local.residual + inside + pieces
