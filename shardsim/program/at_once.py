"""What is live in HBM where a compiler makes all that a gradient needs before it, as XLA on GPUs.

One moment stands for a layer: what was kept and products read is copied out of its stack, what was
not is made again, and all of it is there together while the gradient runs. Read off the peaks of
the measured steps of docs/gpu.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from shardsim.graph.arrays import Array
from shardsim.graph.derive import Derived
from shardsim.graph.place import Kind
from shardsim.model import Model
from shardsim.program.blocks import backward_of, derived_blocks, graph
from shardsim.program.liveness import WIDE, Ends, stored
from shardsim.program.trace import Live, Size, Trace


@lru_cache(maxsize=4096)
def layer_at_once(
    model: Model,
    attention: str,
    layer: int,
    kind: Kind,
    kept: frozenset[str],
    tables: bool,
    stacked: bool,
) -> Trace:
    """Return what is there while a layer of a kind runs back, with `kept` kept.

    A moment is a branch between the block's input and its result: a serial block has one, a
    parallel block two. `tables`: with the layer's weights in the compute format. `stacked`: what is
    kept lies in stacks of several layers.
    """
    derived = derived_blocks(model, attention, kind).layers[layer]
    waiting = {array.name for array in backward_of(model, attention, layer, kept).kept}
    products = _read_by_products(derived)
    first, last = derived.steps[0].op, derived.steps[-1].op
    start = next(number for number, step in enumerate(derived.steps) if step.op.product)
    made = [step.op.out.name for step in derived.steps]
    sums = [name for name in made if made.count(name) > 1]  # what several branches add to
    ends = (first.ins[0].name, *made[:start], *sums, last.out.name)
    branches = _branches(derived, ends)
    moments = sorted(set(branches.values())) or [0]
    found: list[Live] = []

    def there(name: str, size: Size, array: str = "") -> None:
        one = branches.get(array or name)
        born, gone = (0, len(moments) - 1) if one is None else (moments.index(one),) * 2
        found.append(Live(name, size, born, gone))

    there("x", stored(first.ins[0]))
    there(f"d {last.out.name}", stored(last.out))
    needed: dict[str, Array] = {}
    for step in derived.steps:
        op = step.op
        needed |= {(array.original or array).name: array.original or array for array in op.needs}
        if op.unit == "attention" and not op.product and not op.kernel:
            wide = replace(stored(op.out), width=WIDE)
            there("scores", wide, op.out.name)
            there("d scores", wide, op.out.name)
            there(f"d {op.out.name}", stored(op.out), op.out.name)
        if op.stream.fused:  # an activation: gradients of what a product has made for it
            for array in op.ins:
                there(f"d {array.name}", stored(array), array.name)
    for name, array in needed.items():
        copied = stacked and name in products
        if name != first.ins[0].name and not array.weight and (name not in waiting or copied):
            there(name, stored(array))
    for name, size in _cast(derived).items() if tables else ():
        there(name, size)
    labels = tuple(f"backward pass, branch {number + 1}" for number in range(len(moments)))
    return Trace(labels, tuple(found))


def _branches(derived: Derived, ends: tuple[str, ...]) -> dict[str, int]:
    """Return for every array between `ends` the number of the branch that it is in: arrays that an
    op joins are in one."""
    number: dict[str, int] = {}
    for place, step in enumerate(derived.steps):
        arrays = [array for array in (*step.op.ins, step.op.out) if not array.weight]
        names = [(array.original or array).name for array in arrays]
        names = [name for name in names if name not in ends]
        joined = {number[name] for name in names if name in number}
        one = min(joined, default=place)
        number |= dict.fromkeys(names, one)
        number |= {name: one for name, other in number.items() if other in joined}
    return number


@lru_cache(maxsize=1024)
def ends_at_once(model: Model, attention: str, kind: Kind, tables: bool) -> Ends:
    """Return what is there while the head runs: logits, and their gradient beside them."""
    ends = derived_blocks(model, attention, kind).ends
    steps = ends.steps[len(graph(model, attention).before.ops) :]
    found: dict[str, Size] = {"x": stored(steps[0].op.ins[0])}
    for step in steps:
        found[step.op.out.name] = stored(step.op.out)
        if step.op.product:
            found[f"d {step.op.out.name}"] = replace(stored(step.op.out), width="wire")
    if tables:
        found |= _cast(replace(ends, steps=steps))
    return Ends(Trace(("head",), _live(found)), (), ())


def _read_by_products(derived: Derived) -> set[str]:
    return {
        (array.original or array).name
        for step in derived.steps
        if step.op.product or step.op.kernel
        for array in step.op.needs
    }


def _cast(derived: Derived) -> dict[str, Size]:
    """Return the matrices that products read, in the compute format."""
    return {f"{a.name}, cast": stored(a) for step in derived.steps for a in _matrices(step.op.ins)}


def _matrices(arrays: tuple[Array, ...]) -> list[Array]:
    return [array for array in arrays if array.weight == "matrix"]


def _live(found: dict[str, Size]) -> tuple[Live, ...]:
    return tuple(Live(name, size, 0, 0) for name, size in found.items())
