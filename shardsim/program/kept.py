"""What layers keep for the backward pass, on the device and in the host's memory."""

from __future__ import annotations

from shardsim.graph.arrays import Array
from shardsim.graph.derive import Derived
from shardsim.plan.layout import Kept, Layout, Number
from shardsim.program.blocks import backward_of, derived_blocks, over_policies
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of

WIDE = 4.0  # bytes of an element that is kept in float32
LAYER_INPUT = "layer_input"  # by which a remat policy calls what a layer starts from


def kept(
    work: Workload, layout: Layout, sizes: Sizes, layer: int, group: Kept
) -> tuple[Number, Number]:
    """Return the bytes that one layer of a kind and a group keeps of one microbatch, on the device
    and in the host's memory.

    What no gradient reads is not kept, whatever a policy says. The layer's input always is.
    """
    derived = derived_blocks(work.model, work.attention, kind_of(work.model, layout)).layers[layer]
    made = {step.op.out.name: step.op.out for step in derived.steps}
    start = derived.steps[0].op.ins[0]

    def total(names: frozenset[str], host: bool) -> Number:
        found = backward_of(work.model, work.attention, layer, names).kept
        arrays = [(LAYER_INPUT, start), *((array.keep, made[array.name]) for array in found)]
        return sum(
            _size(work, sizes, array) for keep, array in arrays if (keep in group.offloaded) == host
        )

    on_host: Number = 0.0
    if group.offloaded:
        on_host = over_policies(group, lambda names: total(names, True))
    return over_policies(group, lambda names: total(names, False)), on_host


def kept_for_products(
    work: Workload, layout: Layout, sizes: Sizes, layer: int, group: Kept
) -> Number:
    """Return the bytes of `kept` that products or kernels read, wherever they lie."""
    derived = derived_blocks(work.model, work.attention, kind_of(work.model, layout)).layers[layer]
    read = read_by_products(derived)

    def total(names: frozenset[str]) -> Number:
        found = backward_of(work.model, work.attention, layer, names).kept
        made = {step.op.out.name: step.op.out for step in derived.steps}
        arrays = [made[array.name] for array in found if array.name in read]
        return sum((_size(work, sizes, array) for array in arrays), 0.0)

    return over_policies(group, total)


def read_by_products(derived: Derived) -> set[str]:
    """Return the arrays that gradients of products and of attention kernels read."""
    return {
        (array.original or array).name
        for step in derived.steps
        if step.op.product or step.op.kernel
        for array in step.op.needs
    }


def _size(work: Workload, sizes: Sizes, array: Array) -> Number:
    return sizes.stored(array) * (WIDE if array.wide else float(work.wire_bytes))
