"""The operations of the compute stream, and the transfers beside it."""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.program.schedule import Copy, Work
from shardsim.xla.hlo.costs import Costs
from shardsim.xla.hlo.kernels import Masks
from shardsim.xla.hlo.matmul import Matmul
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.scopes import phase_of
from shardsim.xla.hlo.shapes import HBM, HOST, Shape
from shardsim.xla.hlo.sources import named, source_of

NO_MATMUL = Matmul(m=0, k=0, n=0, batch=1, products=0)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of the compute stream."""

    name: str
    trips: int  # in a step
    phase: str  # "forward", "recomputation", "backward", "update"
    kind: str  # as `Work.kind`
    matmuls: tuple[Matmul, ...]
    cycles: int | None  # as the compiler estimates, each trip
    hbm_bytes: float  # each trip
    vector_ops: float  # each trip, of kernels whose inside is known; others have cycles
    source: str

    @property
    def flops(self) -> float:
        """FLOPs of the matmuls, each trip."""
        return sum(matmul.flops for matmul in self.matmuls)

    def tasks(self) -> list[Work]:
        """Return the operation as tasks: one, or one for each matmul with its share of the rest."""
        products = self.matmuls or (NO_MATMUL,)
        shares = [one.flops / self.flops for one in self.matmuls] or [1.0]
        return [
            Work(
                name=self.name,
                kind=self.kind,
                m=one.m,
                k=one.k,
                n=one.n,
                batch=one.batch,
                matmuls=one.products,
                fraction=one.fraction,
                hbm_bytes=self.hbm_bytes * share,
                vector_ops=self.vector_ops * share,
                fused="beside" if self.kind == "attention" and self.cycles is None else "",
                cycles=None if self.cycles is None else self.cycles * share,
                source=self.source,
            )
            for one, share in zip(products, shares, strict=True)
        ]


class Works:
    """Reads operations in their order: one without a name belongs to the phase before it."""

    def __init__(self, module: Module, masks: Masks) -> None:
        self.module = module
        self.costs = Costs(module, masks)
        self.phase = "forward"

    def read(self, computation: Computation, item: Instruction, trips: int) -> Operation | None:
        """Return an operation, or None for numbers: the scalar unit does these beside the rest."""
        matmuls = self.costs.matmuls(computation, item)
        if item.cycles is None and not matmuls and _is_number(item.shape):
            return None
        kernel = self.costs.kernel(computation, item)
        told = named(self.module, item)
        self.phase = phase_of(item.op_name or told.op_name, self.phase)
        return Operation(
            name=item.name,
            trips=trips,
            phase=self.phase,
            kind="attention" if kernel else self._kind(item, matmuls),
            matmuls=matmuls,
            cycles=item.cycles,
            hbm_bytes=self.costs.hbm_bytes(computation, item),
            vector_ops=0.0 if kernel is None else kernel.vector_ops,
            source=source_of(self.module, told),
        )

    def _kind(self, item: Instruction, matmuls: tuple[Matmul, ...]) -> str:
        """Return what an operation is: products with a batch dimension are those of attention."""
        if matmuls:
            return "attention" if any(one.batch > 1 for one in matmuls) else "matmul"
        if self.costs.moves_only(item):
            return "copy"
        return "optimizer" if self.phase == "update" else "elementwise"


def transfer_of(module: Module, computation: Computation, item: Instruction) -> Copy:
    """Return a copy between memories that `item` starts."""
    arrays, first = item.shape.arrays, computation.operand(item, 0).shape
    code = item.opcode
    if code == "async-start":  # the long form of the same
        inner = module.called(item)
        code = f"{inner[inner.root].opcode}-start"
    # copy-start: (to, from, ...). A slice is ((operands), to, ...), an update ((to, piece, ...),
    # to, ...): the smaller end is what moves.
    if code == "copy-start":
        ends = arrays[:2]
    elif code == "dynamic-update-slice-start":
        ends = (first, computation.operand(item, 1).shape)
    else:
        ends = (first, arrays[len(item.operands)])
    moved = min(end.padded_bytes for end in ends)
    return Copy(
        name=item.name,
        hbm_bytes=moved * sum(end.memory_space == HBM for end in ends),
        host_bytes=moved if any(end.memory_space == HOST for end in ends) else 0,
        source=source_of(module, item),
    )


def _is_number(shape: Shape) -> bool:
    return all(array.count <= 1 for array in shape.arrays)
