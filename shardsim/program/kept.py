"""What layers keep for the backward pass, on the device and in the host's memory."""

from __future__ import annotations

from collections.abc import Callable

from shardsim.graph.arrays import Array
from shardsim.graph.derive import Derived
from shardsim.plan.layout import Kept, Layout, Number
from shardsim.program.blocks import Run, backward_of, derived_blocks, over, over_policies
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of

WIDE = 4.0  # bytes of an element that is kept in float32
LAYER_INPUT = "layer_input"  # by which a remat policy calls what a layer starts from


Fills = Callable[[Array], Number]  # how many times its elements a kept array takes in HBM


def as_it_is(array: Array) -> Number:
    """Return that an array takes its elements, once."""
    return 1.0


def kept(
    work: Workload,
    layout: Layout,
    sizes: Sizes,
    layer: int,
    group: Kept,
    narrow: float = 0.0,
    fills: Fills = as_it_is,
) -> tuple[Number, dict[str, Number]]:
    """Return the bytes that one layer of a kind and a group keeps of one microbatch, on the device
    and, by what remat policies call it, in the host's memory.

    What no gradient reads is not kept, whatever a policy says. The layer's input always is.
    `narrow`: bytes of an element that nothing but products read, which they would round to it.
    In the host's memory there are no tiles to fill.
    """
    derived = derived_blocks(work.model, work.attention, kind_of(work.model, layout)).layers[layer]
    made = {step.op.out.name: step.op.out for step in derived.steps}
    start = derived.start
    rounded = only_products_read(derived) if narrow else set()

    filled: dict[str, Number] = {}  # bytes on the device by name: policies share arrays

    def size(array: Array) -> Number:
        narrowed = array.name in rounded and not array.wide
        return sizes.stored(array) * narrow if narrowed else _size(work, sizes, array)

    def here(array: Array) -> Number:
        if array.name not in filled:
            filled[array.name] = size(array) * fills(array)
        return filled[array.name]

    def total(store: tuple[frozenset[str], frozenset[str]], away: str = "") -> Number:
        names, offloaded = store
        found = backward_of(work.model, work.attention, layer, names).kept
        arrays = [(LAYER_INPUT, start), *((array.keep, made[array.name]) for array in found)]
        if away:
            return sum((size(array) for keep, array in arrays if keep in offloaded & {away}), 0.0)
        return sum((here(array) for keep, array in arrays if keep not in offloaded), 0.0)

    def by_policy(away: str = "") -> Number:
        return over(group.stores, group.shape, lambda store: total(store, away))

    names = sorted(frozenset().union(*group.offloaded))
    return by_policy(), {name: by_policy(name) for name in names}


def entered(work: Workload, sizes: Sizes, start: Array, group: Kept) -> Number:
    """Return the bytes of the input `start` of a layer, of one microbatch, on the device."""
    size = _size(work, sizes, start)
    stores = group.stores
    return over(stores, group.shape, lambda store: size * (LAYER_INPUT not in store[1]))


def kept_by_run(
    run: Run, layout: Layout, sizes: Sizes, narrow: float, fills: Fills
) -> tuple[Number, Number]:
    """Return the bytes of `kept` of all layers of a run, on the device and in the host's memory."""
    here: Number = 0.0
    away: Number = 0.0
    for number, layer in run.layers:
        times = run.rounds * layer.times
        device, host = kept(run.work, layout, sizes, number, run.kept, narrow, fills)
        here, away = here + device * times, away + sum(host.values(), 0.0) * times
    return here, away


def brought_back(run: Run, layout: Layout, sizes: Sizes, narrow: float) -> Number:
    """Return the bytes of a run's stacks that come back from the host's memory whole: of layers'
    inputs and what attention adds to the stream, where both are kept (`Passes.brings_back`)."""
    names = {LAYER_INPUT, "attention_output"}
    if not any(LAYER_INPUT in away and names <= {*all_, *away} for all_, away in run.kept.stores):
        return 0.0
    found: Number = 0.0
    for number, layer in run.layers:
        host = kept(run.work, layout, sizes, number, run.kept, narrow)[1]
        found = found + sum((host[name] for name in names & {*host}), 0.0) * layer.times
    return found * run.rounds


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


def operands_of_weights(
    work: Workload, layout: Layout, sizes: Sizes, layer: int, group: Kept
) -> Number:
    """Return the bytes of what the gradients of one layer's weights multiply, of one microbatch,
    besides what the layer keeps: where they wait, all of it is there."""
    derived = derived_blocks(work.model, work.attention, kind_of(work.model, layout)).layers[layer]
    products = [
        step
        for step in derived.steps
        if step.op.product and any(array.weight and array.trained for array in step.op.ins)
    ]
    wire = float(work.wire_bytes)
    made = {step.op.out.name: sizes.product(step.op.out.dims, step.place) for step in products}
    read = {
        (array.original or array).name: (array, step.place)
        for step in products
        for array in step.op.ins
        if not array.weight
    }

    def total(names: frozenset[str]) -> Number:
        there = {array.name for array in backward_of(work.model, work.attention, layer, names).kept}
        rest = (one for name, one in read.items() if name not in there)
        return sum((sizes.product(array.dims, place) for array, place in rest), 0.0) * wire

    return sum(made.values(), 0.0) * wire + over_policies(group, total)


def read_by_products(derived: Derived) -> set[str]:
    """Return the arrays that gradients of products and of attention kernels read."""
    return {
        (array.original or array).name
        for step in derived.steps
        if step.op.product or step.op.kernel
        for array in step.op.needs
    }


def only_products_read(derived: Derived) -> set[str]:
    """Return the arrays of `read_by_products` that nothing else reads but a softmax, which makes
    its own again."""
    others = {
        (array.original or array).name
        for step in derived.steps
        if not (step.op.product or step.op.kernel or step.op.unit == "attention")
        for array in step.op.needs
    }
    return read_by_products(derived) - others


def _size(work: Workload, sizes: Sizes, array: Array) -> Number:
    return sizes.stored(array) * (WIDE if array.wide else float(work.wire_bytes))
