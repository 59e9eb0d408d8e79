"""Attention on one device: fused into one kernel ("flash") or with its scores in HBM."""

from __future__ import annotations

import numpy as np

from shardsim.plan.layout import Layout, Number
from shardsim.program.shapes import Shapes, Workload
from shardsim.program.tasks import ATTENTION, ATTENTION_GRADIENT, Collective, Compute

Task = Compute | Collective

# Vector operations per query-key pair. Softmax: mask, maximum, difference, exponential (about
# eight multiply-adds), sum, cast. Its gradient: the exponential again, a product and a difference.
OPS_SOFTMAX = 13.0
OPS_SOFTMAX_GRADIENT = 14.0

# Bytes per query-key pair that cross HBM when scores are kept there in bf16, matmuls apart: the
# softmax reads them for the maximum and again for the exponential and its sum, and writes the
# probabilities. Backward reads probabilities and their gradient twice and writes once.
SOFTMAX_PASSES = 3.0
SOFTMAX_GRADIENT_PASSES = 5.0


def attention_forward(
    work: Workload,
    layout: Layout,
    shapes: Shapes,
    suffix: str,
    kept: Number,
    probabilities_kept: Number = False,
) -> list[Task]:
    """Return softmax(QK^T)V for the local heads, unless its result is `kept`.

    An unfused attention needs its probabilities in the backward pass: where they were not kept,
    the first half runs again even if the result was.
    """
    redo = np.logical_not(kept)
    # Gathered keys and values are never kept; backward needs them even if it has the result.
    tasks: list[Task] = [
        _keys(f"gather keys and values{suffix}", "all-gather", work, layout, shapes)
    ]
    if work.attention == "flash":
        io = shapes.tokens * (2 * shapes.q + shapes.kv) / shapes.split2 * work.wire_bytes
        return [
            *tasks,
            Compute(
                name=f"attention{suffix}",
                kind="attention",
                matmuls=2,
                hbm_bytes=io,
                vector_ops=shapes.scores * work.attention_fraction * OPS_SOFTMAX,
                count=redo,
                purpose=ATTENTION,
                **_pairs(work, shapes),
            ),
        ]
    first_half = redo if not suffix else np.logical_not(probabilities_kept)
    return [
        *tasks,
        _scores_matmul(f"scores{suffix}", work, shapes, 1, first_half),
        _softmax(f"softmax{suffix}", shapes, work, SOFTMAX_PASSES, OPS_SOFTMAX, first_half),
        _scores_matmul(f"weighted values{suffix}", work, shapes, 1, redo),
    ]


def attention_backward(work: Workload, layout: Layout, shapes: Shapes) -> list[Task]:
    """Return the gradients of queries, keys and values."""
    tasks: list[Task] = [
        _keys("scatter key and value gradients", "reduce-scatter", work, layout, shapes)
    ]
    if work.attention == "flash":
        io = shapes.tokens * (4 * shapes.q + 2 * shapes.kv) / shapes.split2 * work.wire_bytes
        return [
            *tasks,
            Compute(
                name="attention gradient",
                kind="attention",
                matmuls=5,  # the scores again, and dV, dP, dQ, dK
                hbm_bytes=io,
                vector_ops=shapes.scores * work.attention_fraction * OPS_SOFTMAX_GRADIENT,
                purpose=ATTENTION_GRADIENT,
                **_pairs(work, shapes),
            ),
        ]
    return [
        *tasks,
        _scores_matmul("attention gradients", work, shapes, 4, 1),
        _softmax(
            "softmax gradient", shapes, work, SOFTMAX_GRADIENT_PASSES, OPS_SOFTMAX_GRADIENT, 1
        ),
    ]


def _pairs(work: Workload, shapes: Shapes) -> dict[str, Number]:
    """Return the matmul shape of one head's scores, for all local heads and sequences.

    Scores stay in bf16 where projections run in 8 bits: so do published 8-bit recipes.
    """
    return {
        "m": shapes.queries,
        "k": float(work.model.head_dim),
        "n": shapes.keys,
        "batch": shapes.sequences * shapes.heads,
        "fraction": work.attention_fraction,
        "dtype": "bf16",
    }


def _scores_matmul(
    name: str, work: Workload, shapes: Shapes, matmuls: int, count: Number
) -> Compute:
    """Return matmuls between scores in HBM and queries, keys or values."""
    small = (shapes.queries + shapes.keys) * work.model.head_dim * shapes.sequences * shapes.heads
    return Compute(
        name=name,
        kind="attention",
        matmuls=matmuls,
        hbm_bytes=matmuls * (shapes.scores + small) * work.wire_bytes,
        count=count,
        **_pairs(work, shapes),
    )


def _softmax(
    name: str, shapes: Shapes, work: Workload, passes: float, ops: float, count: Number
) -> Compute:
    return Compute(
        name=name,
        kind="attention",
        hbm_bytes=shapes.scores * passes * work.wire_bytes,
        vector_ops=shapes.scores * ops,
        count=count,
    )


def _keys(name: str, kind: str, work: Workload, layout: Layout, shapes: Shapes) -> Collective:
    """Return a collective of keys and values (one message each) over a split sequence."""
    return Collective(
        name=name,
        kind=kind,
        role="context",
        bytes=shapes.tokens * shapes.own_kv * layout.context.size * work.wire_bytes,
        count=layout.context.size > 1,
        messages=2,
        purpose="keys and values",
    )
