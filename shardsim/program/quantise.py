"""What it takes to cast the operands of 8-bit products."""

from __future__ import annotations

from shardsim.plan.layout import Number
from shardsim.program.shapes import Workload
from shardsim.program.tasks import NARROWED, Compute

OPS = 4.0
# In units of 16 bits: read for its scale, read, written in half of the bytes; fixed scales and
# factors in the model need no reading before.
PASSES = {"dynamic": 2.5, "static": 1.5, "unit": 1.5}


def quantise(work: Workload, name: str, elements: Number, count: Number) -> Compute:
    """Return the cast of an array of so many elements on one device, `count` times."""
    return Compute(
        name=f"quantise {name}",
        kind="elementwise",
        hbm_bytes=elements * PASSES[work.precision.scales] * float(work.wire_bytes),
        vector_ops=elements * OPS,
        count=count,
        purpose=NARROWED,
    )
