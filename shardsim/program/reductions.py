"""What follows the last microbatch: gradients summed over replicas, and the optimizer's update."""

from __future__ import annotations

import numpy as np

from shardsim.model import Tensor
from shardsim.plan.layout import Layout, Number
from shardsim.plan.optimizer import state_bytes
from shardsim.plan.split import state_apart, stored_elements, tensor_splits
from shardsim.program.tasks import Block, Collective, Compute
from shardsim.program.weights import block_matrices, end_matrices, vectors, vocabulary
from shardsim.program.writer import Task, Writer, matrices_per_layer

# Vector operations of one parameter in an update with two moments.
OPS_UPDATE = 16.0

_VECTOR_GRADIENT_BYTES = 4.0  # vectors are summed in float32


def gradient_reductions(writer: Writer) -> tuple[Block, ...]:
    """Return the sums of gradients over devices that hold the same weights.

    They run once a step, after the last microbatch: for each layer, and for what stands before
    and after the layers. Where the data axis splits the optimizer's state (ZeRO-1) each matrix is
    reduce-scattered over it before the update, and the updated parameters are gathered after it
    in the format in which they are stored.
    """
    model, layout, layers = writer.work.model, writer.layout, writer.shapes.layers
    matrices = block_matrices(model)
    ends = vocabulary(model) + end_matrices(model)
    return (
        Block(
            name="gradient reduction",
            phase="reduction",
            trips=layers,
            tasks=_reduction(
                writer,
                stored_elements(matrices, layout) / layers,
                _shared(matrices, layout) / layers,
                matrices_per_layer(model, writer.work.fused_projections),
            ),
        ),
        Block(
            name="end gradient reduction",
            phase="reduction",
            trips=1,
            tasks=(
                *_reduction(
                    writer,
                    stored_elements(ends, layout),
                    _shared(ends, layout),
                    max(len(ends), 1),
                ),
                *_vector_reductions(writer),
            ),
        ),
    )


def _shared(tensors: list[Tensor], layout: Layout) -> Number:
    """Return how many of the stored elements every member of a tensor axis stores too."""
    total: Number = 0.0
    several = layout.tensor.size > 1
    for tensor in tensors:
        whole = several & np.logical_not(tensor_splits(tensor, layout))
        if np.any(whole):
            total = total + whole * stored_elements([tensor], layout)
    return total


def _reduction(writer: Writer, elements: Number, shared: Number, messages: int) -> tuple[Task, ...]:
    """Return the sums of the gradients of `elements` stored elements of matrices.

    `shared` of them are the same on all members of the tensor axis, each of which has computed a
    part of their gradients.
    """
    layout, work = writer.layout, writer.work
    # All matrices have an embed dimension of one width, so the state of all is split or of none.
    zero = np.asarray(state_apart(work.model, layout), dtype=bool)
    by_data = np.where(zero, layout.data.size, 1)
    splits = np.asarray(layout.context_shards_parameters, dtype=bool)

    def gradients(
        kind: str,
        role: str,
        many: Number,
        wanted: Number,
        stage: str = "all",
        switch: str = "gradients_overlap",
        purpose: str = "gradient reduction",
    ) -> Collective:
        return Collective(
            name=f"{kind} {purpose} over {role}, {stage}",
            kind=kind,
            role=role,
            bytes=many * work.reduce_bytes,
            count=wanted & (layout.role(role).size > 1),
            messages=messages,
            schedule="behind",
            switch=switch,
            stage=stage,
            purpose=purpose,
        )

    tasks: list[Task] = []
    for stage, switch in (("torus", "gradients_overlap"), ("dcn", "dcn_overlap")):
        tasks += [
            gradients("all-reduce", "replicas", elements, ~zero, stage, switch),
            gradients("reduce-scatter", "data", elements, zero, stage, switch),
            Collective(
                name=f"gather updated parameters over {stage}",
                kind="all-gather",
                role="data",
                bytes=elements * work.parameter_bytes,
                count=zero & (layout.data.size > 1),
                messages=messages,
                stage=stage,
                purpose="updated parameters",
            ),
        ]
    tasks.append(gradients("all-reduce", "context", elements / by_data, zero & ~splits))
    if np.any(np.greater(shared, 0)):
        wanted = np.greater(shared, 0)
        tasks.append(
            gradients("all-reduce", "tensor", shared / by_data, wanted, purpose="shared gradients")
        )
    return tuple(tasks)


def _vector_reductions(writer: Writer) -> list[Task]:
    """Return the sums of the gradients of vectors: a compiler makes one message of them."""
    layout, model = writer.layout, writer.work.model
    elements: dict[str, Number] = {"tensor_peers": 0.0, "stage": 0.0}
    # Two biases of a parallel block are added to one sum: the compiler sees that their gradients
    # are the same, unless they add up over microbatches first.
    added_together = model.parallel_block and model.biases.attention_output and not model.post_norms
    for tensor in vectors(model):
        stored = stored_elements([tensor], layout)
        if tensor.name == "mlp_out_bias" and added_together:
            stored = stored * np.greater(layout.microbatches, 1)
        divided = tensor_splits(tensor, layout)
        elements["tensor_peers"] += divided * stored
        elements["stage"] += np.logical_not(divided) * stored
    return [
        Collective(
            name=f"sum small gradients over {role}",
            kind="all-reduce",
            role=role,
            bytes=many * _VECTOR_GRADIENT_BYTES,
            count=np.greater(many, 0) & (layout.role(role).size > 1),
            schedule="behind",
            switch="gradients_overlap",
            purpose="small gradients",
        )
        for role, many in elements.items()
    ]


def update(writer: Writer) -> Block:
    """Return the optimizer's update: HBM traffic of parameters, gradients and state."""
    layout, work = writer.layout, writer.work
    weights = work.model.tensors
    elements = stored_elements(weights, layout, state=True)
    state = state_bytes(work.optimizer, weights, layout)
    return Block(
        name="update",
        phase="update",
        trips=1,
        tasks=(
            Compute(
                name="optimizer update",
                kind="optimizer",
                hbm_bytes=3.0 * elements * work.parameter_bytes + 2.0 * state,
                vector_ops=elements * OPS_UPDATE,
            ),
        ),
    )
