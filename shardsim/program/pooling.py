"""The head of an image model: pooling of the tokens, classifier or features, and the loss.

After pooling there is one vector an image, the same on all members of the tensor and context axes.
"""

from __future__ import annotations

import numpy as np

from shardsim.plan.layout import EMBED_SHARDED
from shardsim.program.tasks import Collective, Compute
from shardsim.program.writer import STATISTIC_BYTES, Task, Writer

_PURPOSE = "pooling"
_NORM_SUMS = 2.0  # the pooling head's norm is a layer norm whatever the blocks have


def image_head(writer: Writer) -> list[Task]:
    """Return pooling, classifier and loss of an image model, forward and backward."""
    model, shapes = writer.work.model, writer.shapes
    tasks = _map_head(writer) if model.pooling == "map" else _mean(writer)
    images = shapes.sequences
    if not model.classes:  # the loss is the squared error of the features
        return [*tasks, writer.total("sum squared errors", "tensor2", images, _PURPOSE)]
    logits = images * model.classes
    return [
        *tasks,
        writer.total("sum class logits", "tensor2", logits, _PURPOSE, 2),  # and their gradients
        writer.matmul("classifier", images / writer.tensor, shapes.embed, model.classes, count=3),
    ]


def _mean(writer: Writer) -> list[Task]:
    """Return the float32 sums over tokens of mean pooling, or of taking the class token."""
    shapes = writer.shapes
    split = np.equal(writer.layout.residual, EMBED_SHARDED) & (writer.tensor > 1)
    vectors = shapes.sequences * shapes.embed
    own = vectors / np.where(split, writer.tensor, 1)
    return [
        writer.total("pooled tokens", "tokens", own, _PURPOSE, 2),
        *(
            Collective(
                name=name,
                kind=kind,
                role="tensor",
                bytes=vectors * STATISTIC_BYTES,
                count=split,
                purpose=_PURPOSE,
            )
            for name, kind in (
                ("gather pooled", "all-gather"),
                ("scatter pooled gradient", "reduce-scatter"),
            )
        ),
    ]


def _map_head(writer: Writer) -> list[Task]:
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
    return tasks + _map_collectives(writer, width)


def _map_collectives(writer: Writer, width: float) -> list[Task]:
    """Return the collectives of the attention-pooling head; `width` is of a member's heads."""
    model, shapes = writer.work.model, writer.shapes
    rows, keys_and_values = shapes.sequences, "pooling keys and values"
    # Over tensor2, inputs of query and MLP are summed and outputs gathered; backward the reverse.
    wide = shapes.tokens * 2.0 * width + rows * 2.0 * (width + shapes.hidden)
    second: list[Task] = [
        Collective(
            name=f"{kind} pooling hidden",
            kind=kind,
            role="tensor2",
            bytes=wide * writer.width,
            count=writer.layout.tensor2.size > 1,
            messages=6,
            purpose=_PURPOSE,
        )
        for kind in ("reduce-scatter", "all-gather")
    ]
    # A softmax over split keys: its maximum, and its values and their weights both ways.
    softmax = rows * shapes.heads * (1.0 + 2.0 + 2.0 * model.head_dim)
    return [
        writer.tensor_collective(
            "gather pooling input", "all-gather", writer.sharded, (keys_and_values,), _PURPOSE
        ),
        writer.tensor_collective(
            "scatter pooling input gradient",
            "reduce-scatter",
            writer.sharded,
            (f"{keys_and_values} dx",),
            _PURPOSE,
        ),
        *second,
        Collective(
            name="sum pooled vectors",  # after attention and after the MLP, both ways
            kind="all-reduce",
            role="tensor",
            bytes=rows * shapes.embed * writer.width,
            count=4 * (writer.tensor > 1),
            purpose=_PURPOSE,
        ),
        writer.total("pooling softmax", "context", softmax, _PURPOSE),
        writer.total("pooling norm", "tensor2", rows * _NORM_SUMS, _PURPOSE, 2),
    ]
