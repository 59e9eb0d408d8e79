"""What is trained, apart from how it is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.model import Model
from shardsim.plan.plan import DTYPE_BYTES, Plan, Precision


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its batch and formats, and how its implementation computes."""

    model: Model
    batch: int  # sequences per step, over all chips
    sequence: int  # tokens per sequence
    precision: Precision = Precision()
    optimizer: str = "adamw"
    attention: str = "flash"
    fused_projections: bool = False
    pipeline_interleave: int = 1

    @classmethod
    def of(cls, plan: Plan) -> Workload:
        """Return the workload of a plan."""
        return cls(
            model=plan.model,
            batch=plan.batch,
            sequence=plan.sequence,
            precision=plan.precision,
            optimizer=plan.optimizer,
            attention=plan.attention,
            fused_projections=plan.fused_projections,
            pipeline_interleave=plan.pipeline_interleave,
        )

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element in a matmul."""
        return DTYPE_BYTES[self.precision.compute]

    @property
    def wire_bytes(self) -> int:
        """Bytes of one element of a gathered weight or an activation: 8-bit formats are made
        inside the matmul, so what travels has 16 bits."""
        return max(2, self.compute_bytes)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one stored parameter, and of its gradient once reduced."""
        return DTYPE_BYTES[self.precision.parameters]

    @property
    def reduce_bytes(self) -> int:
        """Bytes of one element of a gradient on the wire."""
        return DTYPE_BYTES[self.precision.reduce]
