"""The tasks of one op on one device: products, elementwise work in streams, and transfers."""

from __future__ import annotations

from functools import partial

from shardsim.graph.arrays import Array, Matmul, Op, Split
from shardsim.graph.derive import Derived, Transfer
from shardsim.plan.layout import Layout, Number, somewhere
from shardsim.plan.precision import DTYPE_BYTES, WEIGHT_GRADIENTS
from shardsim.program.kernels import kernel
from shardsim.program.purposes import (
    ENDS,
    product_of,
    product_of_dims,
    purpose_of,
    purpose_of_transfer,
    sums_heads,
)
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, role_of
from shardsim.program.tasks import Collective, Compute

SUM_BYTES = 4.0  # what is summed in float32


class OpTasks:
    """Makes the tasks of single ops of one derived block."""

    def __init__(self, work: Workload, layout: Layout, sizes: Sizes, derived: Derived) -> None:
        self.work = work
        self.layout = layout
        self.sizes = sizes
        self.derived = derived
        self.wire = float(work.wire_bytes)
        self.kernel = partial(kernel, work, layout, sizes)

    def elements(self, array: Array, place: Split) -> Number:
        """Return the elements of an array on one device of an op placed so."""
        return self.sizes.product(array.dims, place)

    def weight_width(self, transfer: Transfer) -> float:
        """Return the bytes of an element of a gathered weight."""
        precision = self.work.precision
        if transfer.purpose in ENDS or product_of_dims(transfer.dims) in precision.bf16:
            return self.wire
        return float(self.work.weight_wire_bytes)

    def width(self, array: Array) -> float:
        """Return the bytes of an element."""
        return SUM_BYTES if array.wide else self.wire

    def matmul(
        self,
        name: str,
        op: Op,
        place: Split,
        dims: Matmul,
        out_bytes: float,
        made: Array,
        count: Number = 1,
    ) -> Compute:
        """Return a product of two arrays in HBM, which makes an array."""
        m, k, n, batch = (
            self.sizes.product(part, place)
            for part in (dims.rows, dims.inner, dims.columns, dims.batch)
        )
        groups = "m" if "slot" in dims.rows else "k" if "slot" in dims.inner else ""
        gradient = bool(made.weight)
        return Compute(
            of_weights=gradient,
            name=name,
            kind=op.unit,
            m=m,
            k=k,
            n=n,
            batch=batch,
            matmuls=1,
            hbm_bytes=((m * k + k * n) * self.wire + m * n * out_bytes) * batch,
            dtype=self.format(op, gradient),
            sparse=self.sparse(op, gradient),
            count=count,
            purpose=purpose_of(op, made),
            makes=made.keep,
            groups=groups if op.tile else "",
            sums_heads=sums_heads(op, dims.inner),
        )

    def format(self, op: Op, gradient: bool = False) -> str:
        """Return the format of a product's operands; `gradient`: of one that makes a weight's."""
        precision = self.work.precision
        if op.unit == "attention":
            return "bf16" if DTYPE_BYTES[precision.compute] == 1 else precision.compute
        stays = gradient and WEIGHT_GRADIENTS in precision.bf16
        if op.dtype or not (stays or product_of(op) in precision.bf16):
            return op.dtype or precision.compute
        return "bf16"

    def sparse(self, op: Op, gradient: bool) -> bool:
        """Return whether a product reads a weight of which two of four numbers are zero."""
        of_layer = product_of(op) in ("attention", "mlp", "experts")
        return self.work.precision.sparsity == "2:4" and of_layer and not gradient

    def stream(
        self,
        name: str,
        op: Op,
        place: Split,
        passes: Number,
        ops: float,
        count: Number = 1,
        apart: Number | None = None,
        beside: float = 0.0,
        end_of: str = "",
        joined: float = 0.0,
    ) -> list[Compute]:
        """Return an elementwise operation, or a gradient, in units of the result's elements."""
        if not somewhere(passes) and not ops and not somewhere(apart):
            return []
        elements = self.elements(op.out, place)
        widest = op.ins[0] if op.ins and op.ins[0].wide and not op.product else op.out
        if widest is not op.out:  # a loss: what it reads is larger than what it makes
            elements = self.elements(widest, place)
        return [
            Compute(
                name=name,
                kind=op.unit if op.unit == "attention" else "elementwise",
                dtype=self.work.precision.compute,
                hbm_bytes=elements * passes * self.width(widest),
                vector_ops=elements * ops,
                count=count,
                purpose=purpose_of(op, op.out),
                pointwise=elements,
                apart_bytes=None if apart is None else elements * apart * self.width(widest),
                beside_bytes=elements * beside * self.width(widest),
                end_of=end_of,
                joined_bytes=elements * joined * self.width(widest),
                sums=op.stream.apart is not None and op.stream.apart.sums,
            )
        ]

    def collective(
        self,
        transfer: Transfer,
        name: str,
        width: float,
        count: Number = 1,
        *,
        purpose: str = "block",
        schedule: str = "exposed",
        switch: str = "",
    ) -> Collective:
        """Return a transfer as a collective, for `purpose` unless it says another."""
        size, whole, chosen = self.sizes.moved(transfer.dims, transfer.by) * width, "", (0, 0)
        if transfer.kind == "all-to-all" and "expert" in transfer.axes:
            split, experts = dict(transfer.by), self.work.model.experts
            chosen = (experts.number, experts.top_k) if experts else chosen
            size = size * (1.0 if split.get("expert") == "expert" else self.sizes.room)
            if "embed" in transfer.dims and "tensor" not in split:
                whole = "summed" if transfer.gradient else "gathered"
        return Collective(
            name=name,
            kind=transfer.kind,
            role=role_of(transfer.axes),
            bytes=size,
            count=count * self.sizes.several(transfer.axes),
            purpose=purpose_of_transfer(transfer) or purpose,
            schedule=schedule,
            switch=switch,
            whole=whole,
            chosen=chosen,
        )
