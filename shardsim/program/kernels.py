"""Attention in one kernel, or its gradient, on one device."""

from __future__ import annotations

import numpy as np

from shardsim.graph.arrays import Op, Split
from shardsim.plan.layout import Layout, Number
from shardsim.program.rings import SUM_BYTES
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes
from shardsim.program.tasks import ATTENTION, ATTENTION_GRADIENT, PASSED, WINDOWED, Compute
from shardsim.program.uneven import attended


def kernel(
    work: Workload,
    layout: Layout,
    sizes: Sizes,
    name: str,
    op: Op,
    place: Split,
    *,
    gradient: bool,
    count: Number = 1,
) -> Compute:
    """Return a fused attention kernel, or its gradient."""
    made = op.kernel
    assert made is not None
    shape = made.shape
    m, k, n, batch = (
        sizes.product(part, place) for part in (shape.rows, shape.inner, shape.columns, shape.batch)
    )
    moved = sum(sizes.product(array.dims, place) for array in op.arrays) * float(work.wire_bytes)
    moved = moved * (2.0 if gradient else 1.0)
    tokens, mask = work.sequence, made.mask
    if mask and gradient:
        mask = mask.back()
    share = mask.computed(tokens) if mask else 1.0
    last = mask.computed(tokens, m) if mask else 1.0
    by_sequence = attended(work, layout, mask) if mask else None
    whole: Number = 0.0
    if by_sequence is not None:
        share, last, whole = by_sequence, by_sequence, share
    own: Number = 1.0
    if mask and op.passed:  # all wait at every hop for the member with most to do
        own = mask.own(m, layout.striped)
        share = np.where(layout.striped, _of_halves(share, own, layout, mask.causal), last)
        moved = np.where(
            np.greater(layout.context.size, 1),
            _in_blocks(work, sizes, op, place, layout.context.size, gradient),
            moved,
        )
    ops = made.gradient_ops if gradient else made.ops
    keys = sizes.product(op.ins[1].dims, place)
    return Compute(
        name=name,
        kind="attention",
        m=m,
        k=k,
        n=n,
        batch=batch,
        matmuls=made.gradient_products if gradient else made.products,
        fraction=share,
        last_fraction=last,
        own_fraction=own,
        makes=op.out.keep,
        whole_fraction=whole,
        hbm_bytes=moved,
        vector_ops=m * n * batch * share * ops,
        count=count,
        fused="beside" if made.beside else "in turn",
        causal=bool(mask and mask.causal),
        shared=n * k * batch / keys if mask else 1,
        blocks=mask.blocks if mask else (0, 0),
        ring=(WINDOWED if mask and mask.window else PASSED) if op.passed else "",
        purpose=(ATTENTION_GRADIENT if gradient else ATTENTION) if mask else "",
    )


def _of_halves(share: Number, own: Number, layout: Layout, causal: bool) -> Number:
    """Return the share of the pairs that a member of a ring computes of striped tokens: under a
    causal mask half of every piece but its own, however short, and what a window leaves of it."""
    members = layout.context.size
    halves = (own + (members - 1) / 2.0) / members
    return np.where(causal & np.greater(members, 1), np.minimum(halves, share), share)


def _in_blocks(
    work: Workload, sizes: Sizes, op: Op, place: Split, members: Number, gradient: bool
) -> Number:
    """Return the bytes of HBM that attention moves as keys and values come round.

    Every block reads the queries, backward also the gradient of their result, and the piece that is
    there, and adds to float32 sums: of the result, or of the queries' gradient. Gradients of what
    came are written, and added to sums that are read and written.
    """
    q, k, v = (sizes.product(array.dims, place) for array in op.ins)
    result = sizes.product(op.out.dims, place)
    each = q + result * gradient
    once = result + (k + v) + gradient * (result + 3.0 * (k + v))
    sums = 2.0 * (members - 1) * result
    return (members * each + once) * float(work.wire_bytes) + sums * SUM_BYTES
