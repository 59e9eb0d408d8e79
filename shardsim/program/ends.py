"""What stands before and after the layers: embedding, final norm, head and loss."""

from __future__ import annotations

from shardsim.model import Tensor
from shardsim.plan.layout import Number
from shardsim.plan.split import stored_elements
from shardsim.program.pooling import image_head
from shardsim.program.tasks import Block, Collective, Compute
from shardsim.program.weights import end_matrices, vocabulary
from shardsim.program.writer import OPS_NORM, Task, Writer

# The loss reads float32 logits for the maximum and for the sum, backward reads them again and
# writes their gradient in the compute format.
LOSS_PASSES_BYTES = 4.0 + 4.0 + 4.0 + 2.0
OPS_LOSS = 30.0
OPS_LOOKUP = 1.0


def embedding_and_head(writer: Writer) -> Block:
    """Return embedding, output head and loss, forward and backward, of one microbatch."""
    model, shapes = writer.work.model, writer.shapes
    gathers, scatters = _weights(writer, "end weights", end_matrices(model), "ends")
    tasks: list[Task] = [*gathers]
    if model.patch:
        pixels = model.patch**2 * model.channels
        rows = shapes.tokens / writer.tensor
        tasks += [
            writer.matmul("patch embedding", rows, pixels, shapes.embed),
            writer.matmul("patch embedding dW", pixels, rows, shapes.embed),
        ]
    if model.final_norm:
        tasks += [
            writer.stream("final norm", shapes.residual, 6.0, OPS_NORM),
            writer.norm_statistics("final norm", 2),
        ]
    if model.vocab:
        tasks += _vocabulary(writer)
    else:
        tasks += image_head(writer)
    return Block(
        name="embedding and head",
        phase="head",
        trips=writer.layout.microbatches,
        tasks=(*tasks, *scatters),
    )


def _weights(
    writer: Writer, what: str, tensors: list[Tensor], purpose: str
) -> tuple[list[Task], list[Task]]:
    """Return the gathering of weights, once a microbatch, and the scatter of their gradients."""
    if not tensors:
        return [], []
    layout, work = writer.layout, writer.work
    elements = stored_elements(tensors, layout) * layout.gather.size
    made: list[list[Task]] = []
    for name, kind, width, switch in (
        (f"gather {what}", "all-gather", work.wire_bytes, "weights_overlap"),
        (f"scatter {what} gradients", "reduce-scatter", work.reduce_bytes, "gradients_overlap"),
    ):
        made.append(
            [
                Collective(
                    name=name,
                    kind=kind,
                    role="gather",
                    bytes=elements * width,
                    count=layout.gather.size > 1,
                    messages=len(tensors),
                    schedule="behind",
                    switch=switch,
                    purpose=purpose,
                )
            ]
        )
    return made[0], made[1]


def _vocabulary(writer: Writer) -> list[Task]:
    shapes, work = writer.shapes, writer.work
    logits = shapes.tokens * shapes.vocab
    gathers, scatters = _weights(writer, "embedding tables", vocabulary(work.model), "tables")

    def stream(name: str, kind: str, count: Number, partners: tuple[str, ...] = ()) -> Collective:
        return writer.tensor_collective(name, kind, count, partners, "vocabulary")

    return [
        *gathers,
        writer.stream("look up tokens", shapes.residual, 2.0, OPS_LOOKUP),
        # Each member looks up its part of the vocabulary; the others' rows are zero.
        stream("scatter looked-up tokens", "reduce-scatter", writer.sharded),
        stream("sum looked-up tokens", "all-reduce", writer.replicated),
        stream("gather head input", "all-gather", writer.sharded, ("logits",)),
        writer.matmul(
            "logits", shapes.tokens, shapes.embed, shapes.vocab, out_bytes=4.0, ring="gathered"
        ),
        writer.total("sum logits", "tensor2", logits, "vocabulary"),
        Compute(
            name="loss",
            kind="elementwise",
            hbm_bytes=logits * LOSS_PASSES_BYTES,
            vector_ops=logits * OPS_LOSS,
        ),
        # The maximum of each row, and the sum of its exponentials beside the target's logit.
        writer.total("loss maximum", "tensor", shapes.tokens, "loss statistics"),
        writer.total("loss sums", "tensor", 2.0 * shapes.tokens, "loss statistics"),
        writer.matmul("logits dx", shapes.tokens, shapes.vocab, shapes.embed, ring="scattered"),
        stream("scatter head gradient", "reduce-scatter", writer.sharded, ("logits dx",)),
        writer.matmul(
            "logits dW", shapes.embed, shapes.tokens, shapes.vocab, out_bytes=work.reduce_bytes
        ),
        stream("gather token gradients", "all-gather", writer.sharded),
        stream("sum token gradients", "all-reduce", writer.replicated),
        writer.stream("token gradients", shapes.tokens * shapes.embed, 3.0, OPS_LOOKUP),
        *scatters,
    ]
