"""Partitioning: from a workload and a layout to the Program of one device."""

from __future__ import annotations

import numpy as np

from shardsim.model import Model
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, Layout, Number
from shardsim.plan.optimizer import state_bytes
from shardsim.plan.remat import Remat
from shardsim.plan.split import stored_elements
from shardsim.program.ends import embedding_and_head
from shardsim.program.layer import LayerWriter
from shardsim.program.reductions import gradient_reductions, update
from shardsim.program.shapes import Shapes, Workload, shapes
from shardsim.program.tasks import Block, Collective, Compute, Memory, Program
from shardsim.program.weights import vocabulary
from shardsim.program.writer import matrices_per_layer

SUM_BYTES = 4.0  # gradients are summed in float32


def partition(work: Workload, layout: Layout, remat: Remat | None = None) -> Program:
    """Return what one device does in a step of `work` under `layout`.

    `remat` is needed only for what it keeps in the host's memory.
    """
    local = shapes(work, layout)
    writer = LayerWriter(work, layout, local)
    trips = local.layers * layout.microbatches
    offloaded = frozenset() if remat is None else remat.offload
    saved = saved_elements(work, layout, local, offloaded)
    forward = Block(
        name="layer forward",
        phase="forward",
        trips=trips,
        tasks=(
            *_weight_tasks(writer, "forward"),
            *writer.forward(),
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
            *_weight_tasks(writer, "backward"),
            *writer.backward(),
            *_gradient_tasks(writer),
        ),
    )
    return Program(
        blocks=(
            embedding_and_head(writer),
            forward,
            backward,
            *_pipeline_sends(writer),
            *gradient_reductions(writer),
            update(writer),
        ),
        memory=memory(work, layout, local, saved),
        bubble=(layout.pipeline.size - 1) / (layout.microbatches * work.pipeline_interleave),
        offload_bytes=offload_elements(work.model, layout, local, offloaded) * work.wire_bytes,
    )


def partition_memory(work: Workload, layout: Layout) -> Memory:
    """Return only the HBM of the program that `partition` writes: a small part of its work."""
    local = shapes(work, layout)
    return memory(work, layout, local, saved_elements(work, layout, local))


def _weight_tasks(writer: LayerWriter, phase: str) -> list[Compute | Collective]:
    """Return the cast of a layer's weights to the compute format, and their gathering."""
    layout, work, local = writer.layout, writer.work, writer.shapes
    stored = local.layer_weights / layout.gather.size
    gathered = layout.gather.size > 1
    return [
        *writer.copy(f"lay out weights {phase}", "copy", local.layer_weights, gathered),
        Compute(
            name=f"cast weights {phase}",
            kind="elementwise",
            hbm_bytes=stored * (work.parameter_bytes + work.wire_bytes),
            count=work.parameter_bytes != work.wire_bytes,
        ),
        Collective(
            name=f"gather weights {phase}",
            kind="all-gather",
            role="gather",
            bytes=local.layer_weights * work.wire_bytes,
            count=gathered,
            messages=matrices_per_layer(work.model, work.fused_projections),
            schedule="behind",
            switch="weights_overlap",
            purpose="weights",
        ),
    ]


def _gradient_tasks(writer: LayerWriter) -> list[Compute | Collective]:
    """Return the reduce-scatter of a layer's gradients and their accumulation."""
    layout, work, local = writer.layout, writer.work, writer.shapes
    stored = local.layer_weights / layout.gather.size
    # One microbatch writes each gradient once; several add to what is there.
    passes = np.where(np.greater(layout.microbatches, 1), 2.0, 1.0)
    # Without a tensor axis half of a layer's gradients come out transposed.
    turned = (layout.gather.size > 1) & np.equal(layout.tensor.size, 1)
    return [
        *writer.copy("lay out gradients", "transpose", local.layer_weights / 2.0, turned),
        Collective(
            name="scatter gradients",
            kind="reduce-scatter",
            role="gather",
            bytes=local.layer_weights * work.reduce_bytes,
            count=layout.gather.size > 1,
            messages=matrices_per_layer(work.model, work.fused_projections),
            schedule="behind",
            switch="gradients_overlap",
            purpose="weights",
        ),
        Compute(
            name="accumulate gradients",
            kind="elementwise",
            hbm_bytes=stored * (passes * work.parameter_bytes + work.reduce_bytes),
        ),
    ]


def _pipeline_sends(writer: LayerWriter) -> tuple[Block, ...]:
    """Return the sends between pipeline stages: once forward and once backward a chunk."""
    layout, work, local = writer.layout, writer.work, writer.shapes
    return (
        Block(
            name="stage boundary",
            phase="forward",
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
    weights = work.model.tensors
    stored = stored_elements(weights, layout)
    in_flight = np.minimum(layout.pipeline.size, layout.microbatches)
    # A branch's weights are gathered together, those of the next while they are in use, and their
    # gradients are there until they are scattered.
    attention = local.embed * (local.qkv + local.q)
    mlp = local.embed * local.hidden * (1.0 + local.gates)
    branch = attention + mlp if work.model.parallel_block else np.maximum(attention, mlp)
    in_use = np.where(
        layout.gather.size > 1, 1.0 + np.asarray(layout.weights_overlap, dtype=float), 1.0
    )
    # Several microbatches add to the gradients of those before, so they are there twice. Of one,
    # those that the data axis reduce-scatters as they come are never whole.
    several = np.greater(layout.microbatches, 1)
    gradients = np.where(several, 2.0 * stored, stored_elements(weights, layout, state=True))
    live = live_elements(work, layout, local)
    logits = local.tokens * local.vocab
    # Gradients take the place of the float32 logits. A ring has them twice: sums of float32, or
    # pieces in the compute format that are put in place.
    ring, embed = rings(layout)
    second_logits = np.where(embed, 4.0, np.where(ring, float(width), 0.0))
    # The TPU compiler scatters the gradients of the vocabulary's tables once, after the last
    # microbatch, and carries float32 sums of whole tables round the loop (seen compiled for v4).
    tables = stored_elements(vocabulary(work.model), layout) * layout.gather.size
    tables_bytes = np.where(layout.gather.size > 1, tables * width, 0.0)
    tables_bytes = tables_bytes + np.where(several, tables * SUM_BYTES, 0.0)
    return Memory(
        parameters=stored * work.parameter_bytes,
        optimizer=state_bytes(work.optimizer, weights, layout),
        gradients=gradients * work.parameter_bytes,
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
