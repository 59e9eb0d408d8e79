"""What all parts of a program are written with: matmuls, streams and collectives of one device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shardsim.model import Model
from shardsim.plan.layout import REPLICATED, Layout, Number
from shardsim.program.shapes import Shapes, Workload
from shardsim.program.tasks import Collective, Compute

Task = Compute | Collective

# Vector operations per element, counted from the usual polynomial forms: an exponential or a tanh
# is about ten multiply-adds, a norm reads its row twice.
OPS_ACTIVATION = 12.0
OPS_NORM = 8.0
OPS_ADD = 1.0
OPS_QUANTISE = 4.0

STATISTIC_BYTES = 4.0  # sums that cross devices are float32


def matrices_per_layer(model: Model, fused: bool) -> int:
    """Return how many weight matrices of a layer travel as separate arrays."""
    if fused:
        return 2
    return 6 + int(model.gated_mlp)


class Writer:
    """Writes tasks for one workload and layout."""

    def __init__(self, work: Workload, layout: Layout, shapes: Shapes) -> None:
        self.work = work
        self.layout = layout
        self.shapes = shapes
        self.width = work.wire_bytes
        self.tensor = layout.tensor.size
        self.sharded = np.not_equal(layout.residual, REPLICATED) & (self.tensor > 1)
        self.replicated = np.equal(layout.residual, REPLICATED) & (self.tensor > 1)

    def matmul(
        self,
        name: str,
        m: Number,
        k: Number,
        n: Number,
        *,
        count: Number = 1,
        out_bytes: Number | None = None,
        extra_elements: Number = 0,
        pointwise: Number = 0,
        ring: str = "",
    ) -> Compute:
        """Return a matmul; an activation of `pointwise` elements may be fused into its end, which
        reads `extra_elements`."""
        out = self.width if out_bytes is None else out_bytes
        return Compute(
            name=name,
            kind="matmul",
            m=m,
            k=k,
            n=n,
            matmuls=1,
            hbm_bytes=(m * k + k * n + extra_elements) * self.width + m * n * out,
            vector_ops=OPS_ACTIVATION * pointwise,
            dtype=self.work.precision.compute,
            count=count,
            ring=ring,
            pointwise=pointwise,
        )

    def stream(
        self,
        name: str,
        elements: Number,
        passes: float,
        ops: float,
        count: Number = 1,
        purpose: str = "",
    ) -> Compute:
        """Return an elementwise operation that moves `passes` arrays of `elements`."""
        return Compute(
            name=name,
            kind="elementwise",
            hbm_bytes=elements * passes * self.width,
            vector_ops=elements * ops,
            count=count,
            purpose=purpose,
            pointwise=elements,
        )

    def tensor_collective(
        self,
        name: str,
        kind: str,
        count: Number,
        partners: Iterable[str] = (),
        purpose: str = "block",
    ) -> Collective:
        """Return a collective of the residual stream over the tensor axis."""
        partners = tuple(partners)
        return Collective(
            name=name,
            kind=kind,
            role="tensor",
            bytes=self.shapes.tokens * self.shapes.embed * self.width,
            count=count,
            schedule="ring" if partners else "exposed",
            partners=partners,
            purpose=purpose,
        )

    def total(
        self, name: str, role: str, elements: Number, purpose: str, times: Number = 1
    ) -> Collective:
        """Return a float32 sum of `elements` over a role, `times` in a row."""
        return Collective(
            name=name,
            kind="all-reduce",
            role=role,
            bytes=elements * STATISTIC_BYTES,
            count=times * (self.layout.role(role).size > 1),
            purpose=purpose,
        )

    def norm_statistics(self, name: str, times: Number) -> Collective:
        """Return the sums over embed that a norm needs, where embed is split.

        An RMS norm sums squares; a layer norm the values too.
        """
        sums = 1.0 if self.work.model.norm == "rmsnorm" else 2.0
        elements = self.shapes.residual_tokens * sums
        return self.total(f"{name} statistics", "embed", elements, "norm statistics", times)

    def second_axis(self, name: str, kind: str, width: Number, count: Number = 1) -> Collective:
        """Return a collective of the wide side over the second tensor axis."""
        return Collective(
            name=name,
            kind=kind,
            role="tensor2",
            bytes=self.shapes.tokens * width * self.width,
            count=count * (self.layout.tensor2.size > 1),
            purpose="second axis",
        )

    def quantise(self, name: str, elements: Number) -> list[Task]:
        """Return the cast of a matmul's input to 8 bits: read for its scale, read, written."""
        if self.work.compute_bytes > 1:
            return []
        return [self.stream(f"quantise {name}", elements, 2.5, OPS_QUANTISE)]
