"""The blocks of a matmul that runs beside a ring over the tensor axis.

What a block moves through HBM depends on what the ring cuts (`emit/runtime/collectives.py` has
the loops): pieces of the sequence are rows, and every block reads the weights again; pieces of
the embed axis are summands of the whole result, which is read and written in float32 for every
block but the first; sums that travel are read as they arrive and written as they leave.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsim.plan.layout import Number
from shardsim.plan.plan import DTYPE_BYTES
from shardsim.program.tasks import Compute

SUM_BYTES = 4.0  # sums of products are float32


def ring_block(task: Compute, members: Number, embed: Number) -> Compute:
    """Return one block (the mean of `members` blocks) of a matmul that a ring cuts.

    `embed` says whether the ring passes pieces of the embed axis, else of the sequence.
    """
    wire = max(2.0, float(DTYPE_BYTES[task.dtype]))
    m, k, n = task.m, task.k, task.n
    rows: Number
    deep: Number
    wide: Number
    rest = task.hbm_bytes - (m * k + k * n + m * n) * wire  # what is fused into its end reads
    if task.ring == "gathered":
        # A piece of embed gives a summand: the first is written, the others are added to it.
        rows, deep, wide = np.where(embed, 1, members), np.where(embed, members, 1), 1
        summed = 2.0 * SUM_BYTES - (2.0 * SUM_BYTES - wire) / members
        result = m * n / rows * np.where(embed, summed, wire)
    elif task.ring == "scattered":
        # A product joins the sum that arrived, through a float32 array of its own.
        rows, deep, wide = np.where(embed, 1, members), 1, np.where(embed, members, 1)
        result = m * n / members * (2.0 * wire + 2.0 * SUM_BYTES)
    else:
        return replace(
            task,
            m=m / members,
            hbm_bytes=task.hbm_bytes / members,
            vector_ops=task.vector_ops / members,
        )
    operands = (m / rows * k / deep + k / deep * n / wide) * wire
    return replace(
        task,
        m=m / rows,
        k=k / deep,
        n=n / wide,
        hbm_bytes=operands + result + rest / members,
        vector_ops=task.vector_ops / members,
    )
