"""What stands before and after the layers: embedding, head and loss, reduction, update."""

from __future__ import annotations

import numpy as np

from shardsim.model import Model
from shardsim.plan.layout import Number
from shardsim.program.layer import Branch, LayerWriter, Task
from shardsim.program.shapes import parameter_elements
from shardsim.program.tasks import Block, Collective, Compute

# The loss reads float32 logits for the maximum and for the sum, backward reads them again and
# writes their gradient in the compute format.
LOSS_PASSES_BYTES = 4.0 + 4.0 + 4.0 + 2.0
OPS_LOSS = 30.0
OPS_LOOKUP = 1.0

_FINAL = Branch(name="final", attention=False, mlp=False, norms=1)


def matrices_per_layer(model: Model, fused: bool) -> int:
    """Return how many weight matrices of a layer travel as separate arrays."""
    if fused:
        return 2
    return 6 + int(model.gated_mlp)


def embedding_and_head(writer: LayerWriter) -> Block:
    """Return embedding, output head and loss, forward and backward, of one microbatch."""
    model, shapes = writer.work.model, writer.shapes
    tasks: list[Task] = []
    if model.patch:
        pixels = model.patch**2 * model.channels
        rows = shapes.tokens / writer.tensor
        tasks += [
            writer.matmul("patch embedding", rows, pixels, shapes.embed),
            writer.matmul("patch embedding dW", pixels, rows, shapes.embed),
        ]
    if model.vocab:
        tasks += _vocabulary(writer)
    if model.pooling == "map":
        tasks += _map_head(writer)
    if model.classes:
        rows = shapes.sequences / writer.tensor
        tasks.append(writer.matmul("classifier", rows, shapes.embed, model.classes, count=3))
    return Block(
        name="embedding and head",
        phase="head",
        trips=writer.layout.microbatches,
        tasks=tuple(tasks),
    )


def _vocabulary(writer: LayerWriter) -> list[Task]:
    shapes, work = writer.shapes, writer.work
    logits = shapes.tokens * shapes.vocab
    split_table = writer.tensor > 1
    tables = 1 if work.model.tied_embeddings else 2
    table = shapes.embed * shapes.vocab * work.wire_bytes * tables
    grouped = writer.layout.gather.size > 1
    return [
        Collective(
            name="gather embedding tables",
            kind="all-gather",
            role="gather",
            bytes=table,
            count=2 * grouped,
            messages=tables,
            schedule="behind",
            switch="weights_overlap",
        ),
        writer.stream("look up tokens", shapes.residual, 2.0, OPS_LOOKUP),
        writer.tensor_collective("sum looked-up tokens", "reduce-scatter", split_table),
        *writer.norm("final norm", _FINAL, 6.0),
        writer.tensor_collective("gather head input", "all-gather", writer.sharded, ("logits",)),
        writer.matmul("logits", shapes.tokens, shapes.embed, shapes.vocab, out_bytes=4.0),
        Compute(
            name="loss",
            kind="elementwise",
            hbm_bytes=logits * LOSS_PASSES_BYTES,
            vector_ops=logits * OPS_LOSS,
        ),
        writer.matmul("logits dx", shapes.tokens, shapes.vocab, shapes.embed),
        writer.tensor_collective(
            "scatter head gradient", "reduce-scatter", writer.sharded, ("logits dx",)
        ),
        writer.tensor_collective("sum head gradient", "all-reduce", writer.replicated),
        writer.matmul(
            "logits dW", shapes.embed, shapes.tokens, shapes.vocab, out_bytes=work.reduce_bytes
        ),
        writer.tensor_collective("gather token gradients", "all-gather", split_table),
        writer.stream("token gradients", shapes.tokens * shapes.embed, 3.0, OPS_LOOKUP),
        Collective(
            name="scatter embedding gradients",
            kind="reduce-scatter",
            role="gather",
            bytes=shapes.embed * shapes.vocab * work.reduce_bytes * tables,
            count=grouped,
            messages=tables,
            schedule="behind",
            switch="gradients_overlap",
        ),
    ]


def _map_head(writer: LayerWriter) -> list[Task]:
    """Return the attention-pooling head: keys and values of all tokens, one query an image.

    Every head has its own key and value, however many the blocks have.
    """
    shapes, work = writer.shapes, writer.work
    model = work.model
    width = float(model.attention_width) / writer.tensor
    rows = shapes.sequences
    # Scores and weighted values, and their four gradients: each crosses all keys or all values.
    products = 6
    pairs = Compute(
        name="pooling attention",
        kind="attention",
        m=1.0,
        k=float(model.head_dim),
        n=shapes.queries,
        batch=rows * shapes.heads,
        matmuls=products,
        hbm_bytes=products * rows * shapes.heads * shapes.queries * model.head_dim * writer.width,
        dtype=work.precision.compute,
    )
    tasks: list[Task] = [pairs]
    for name, m, k, n in (
        ("pooling query", rows, shapes.embed, width),
        ("pooling keys and values", shapes.tokens, shapes.embed, 2.0 * width),
        ("pooling output", rows, width, shapes.embed),
        ("pooling mlp in", rows, shapes.embed, shapes.hidden),
        ("pooling mlp out", rows, shapes.hidden, shapes.embed),
    ):
        tasks += [
            writer.matmul(name, m, k, n),
            writer.matmul(f"{name} dx", m, n, k),
            writer.matmul(f"{name} dW", k, m, n),
        ]
    return tasks


def gradient_reductions(writer: LayerWriter) -> tuple[Block, ...]:
    """Return the all-reduce of gradients over devices that hold the same weights.

    Runs once a step, after the last microbatch, for each layer and for the embedding tables. With
    the optimizer's state split over the data axis it is a reduce-scatter before the update and an
    all-gather after it: the same traffic.
    """
    model, shapes = writer.work.model, writer.shapes
    matrices = matrices_per_layer(model, writer.work.fused_projections)
    blocks = [
        Block(
            name="gradient reduction",
            phase="reduction",
            trips=shapes.layers,
            tasks=_reduction(writer, shapes.layer_weights, matrices),
        )
    ]
    if model.vocab:
        tables = 1 if model.tied_embeddings else 2
        blocks.append(
            Block(
                name="embedding gradient reduction",
                phase="reduction",
                trips=1,
                tasks=_reduction(writer, shapes.embed * shapes.vocab * tables, tables),
            )
        )
    return tuple(blocks)


def _reduction(writer: LayerWriter, elements: Number, messages: int) -> tuple[Task, ...]:
    """Return the reduction over all replicas of the gradients of `elements` gathered weights."""
    layout, work = writer.layout, writer.work
    per_group = elements / layout.gather.size
    many = layout.replicas.size > 1
    sharded = np.asarray(layout.optimizer_over_data, dtype=bool)
    tasks: list[Task] = []
    for stage, switch in (("torus", "gradients_overlap"), ("dcn", "dcn_overlap")):
        for kind, count in (
            ("all-reduce", many & ~sharded),
            ("reduce-scatter", many & sharded),
        ):
            tasks.append(
                Collective(
                    name=f"reduce gradients over {stage}",
                    kind=kind,
                    role="replicas",
                    bytes=per_group * work.reduce_bytes,
                    count=count,
                    messages=messages,
                    schedule="behind",
                    switch=switch,
                    stage=stage,
                )
            )
        tasks.append(
            Collective(
                name=f"gather updated parameters over {stage}",
                kind="all-gather",
                role="replicas",
                bytes=per_group * work.wire_bytes,
                count=many & sharded,
                messages=messages,
                stage=stage,
            )
        )
    return tuple(tasks)


def update(writer: LayerWriter) -> Block:
    """Return the optimizer's update: HBM traffic of parameters, gradients and state."""
    layout, work = writer.layout, writer.work
    by_data = np.where(layout.optimizer_over_data, layout.data.size, 1)
    elements = parameter_elements(work.model, layout) / by_data
    stored: Number = work.parameter_bytes
    moved = 3.0 * stored + 2.0 * work.optimizer_bytes
    return Block(
        name="update",
        phase="update",
        trips=1,
        tasks=(
            Compute(
                name="optimizer update",
                kind="optimizer",
                hbm_bytes=elements * moved,
                vector_ops=elements * 16.0,
            ),
        ),
    )
