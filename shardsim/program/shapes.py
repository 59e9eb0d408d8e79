"""What is trained, apart from how it is sharded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardsim.model import Model
from shardsim.plan.lengths import Lengths
from shardsim.plan.plan import Plan
from shardsim.plan.precision import DTYPE_BYTES, Precision

_ASYNCHRONOUS = ("v5e",)  # chips for which the compiler does so without a flag


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its batch and formats, and how its implementation computes."""

    model: Model
    batch: int  # sequences per step, over all chips
    sequence: int  # tokens per row, or where there are no rows, of a sequence on average
    lengths: Lengths | None = None  # of sequences, where those are not all alike
    longest: int = 0  # of `lengths`: what a sequence has at most
    precision: Precision = Precision()
    optimizer: str = "adamw"
    attention: str = "flash"
    fused_projections: bool = False
    pipeline_interleave: int = 1
    vocab_tiles: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    forward_only: bool = False
    imbalance: float = 1.0  # tokens of the fullest device of an expert axis over the mean
    padding: float = 1.0  # what all-to-alls of experts' tokens have room for, over what comes
    # Whether a trainer's program is scheduled to hide latencies, and whether those of gathers.
    asynchronous: bool = False
    gathers_asynchronous: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Workload:
        """Return the workload of a plan."""
        return cls(
            model=plan.model,
            batch=plan.batch,
            sequence=plan.row,
            lengths=plan.lengths,
            longest=plan.sequence,
            precision=plan.precision,
            optimizer=plan.optimizer,
            attention=plan.attention,
            fused_projections=plan.fused_projections,
            pipeline_interleave=plan.pipeline_interleave,
            vocab_tiles=plan.vocab_tiles,
            offload_optimizer=plan.offload_optimizer,
            offload_parameters=plan.offload_parameters,
            forward_only=plan.forward_only,
            imbalance=plan.experts.imbalance,
            padding=plan.experts.padding,
            asynchronous=_gathers_asynchronous(plan)
            or any(one.offload for one in plan.remat.groups),
            gathers_asynchronous=_gathers_asynchronous(plan),
        )

    @property
    def parts(self) -> tuple[Workload, ...]:
        """The work of each stack of the model, in order: all but the last have sequences of their
        own."""
        *read, _ = self.model.parts
        own = (replace(self, model=one.model, sequence=one.model.sequence) for one in read)
        return (*own, self)

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
    def weight_wire_bytes(self) -> int:
        """Bytes of one element of a layer's weight as it is gathered."""
        return DTYPE_BYTES[self.precision.weights] if self.precision.weights else self.wire_bytes

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one stored parameter."""
        return DTYPE_BYTES[self.precision.parameters]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one parameter's gradient once reduced."""
        return DTYPE_BYTES[self.precision.gradients or self.precision.parameters]

    @property
    def state_element_bytes(self) -> int:
        """Bytes that one element of a moment takes at most."""
        return DTYPE_BYTES[self.precision.state or "f32"]

    @property
    def master_bytes(self) -> int:
        """Bytes of one of the weights that the optimizer keeps beside the parameters."""
        return DTYPE_BYTES[self.precision.master] if self.precision.master else 0

    @property
    def reduce_bytes(self) -> int:
        """Bytes of one element of a gradient on the wire."""
        return DTYPE_BYTES[self.precision.reduce]


def _gathers_asynchronous(plan: Plan) -> bool:
    """Return whether the TPU compiler hides latencies of gathers: with their flag, or by itself.
    (It also does of copies to and from the host.)

    Counted in MaxText's programs (shardsim/xla/trainers/programs.json).
    """
    chip = plan.machine.chip
    asked = plan.compiler_options.get("xla_enable_async_all_gather") == "true"
    return asked or chip.name in _ASYNCHRONOUS
