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
from shardsim.program.kept import read_by_products
from shardsim.program.liveness import GATHERED
from shardsim.program.sized import WIDE, stored
from shardsim.program.trace import Live, Size, Trace


@lru_cache(maxsize=4096)
def layer_at_once(
    model: Model,
    attention: str,
    layer: int,
    kind: Kind,
    kept: frozenset[str],
    casts: bool,
    stacked: bool,
) -> Trace:
    """Return what is there while a layer of a kind runs back, with `kept` kept.

    A moment is a branch between the block's input and its result: a serial block has one, a
    parallel block two. `casts`: weights are stored in another format than products read. `stacked`:
    what is kept lies in stacks of several layers.
    """
    derived = derived_blocks(model, attention, kind).layers[layer]
    waiting = {array.name for array in backward_of(model, attention, layer, kept).kept}
    products = read_by_products(derived)
    last = derived.steps[-1].op
    start = next(number for number, step in enumerate(derived.steps) if step.op.product)
    made = [step.op.out.name for step in derived.steps]
    sums = [name for name in made if made.count(name) > 1]  # what several branches add to
    ends = (derived.start.name, *made[:start], *sums, last.out.name)
    branches = _branches(derived, ends)
    moments = sorted(set(branches.values())) or [0]
    found: list[Live] = []

    def there(name: str, size: Size, array: str = "") -> None:
        one = branches.get(array or name)
        born, gone = (0, len(moments) - 1) if one is None else (moments.index(one),) * 2
        found.append(Live(name, size, born, gone))

    there("x", stored(derived.start))
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
        if name != derived.start.name and not array.weight and (name not in waiting or copied):
            there(name, stored(array))
    for name, size in _weights(derived, casts).items():
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
def head_at_once(model: Model, attention: str, kind: Kind, casts: bool) -> Trace:
    """Return what is there while the head runs: logits, and their gradient beside them."""
    ends = derived_blocks(model, attention, kind).ends
    steps = ends.steps[len(graph(model, attention).before.ops) :]
    found: dict[str, Size] = {"x": stored(steps[0].op.ins[0])}
    for step in steps:
        found[step.op.out.name] = stored(step.op.out)
        if step.op.product:
            found[f"d {step.op.out.name}"] = replace(stored(step.op.out), width="wire")
    found |= _weights(replace(ends, steps=steps), casts)
    return Trace(("head",), _live(found))


def _weights(derived: Derived, casts: bool) -> dict[str, Size]:
    """Return the matrices that products read, whole, in the compute format: gathered, or cast."""
    found = {}
    for step in derived.steps:
        for array in step.op.ins:
            if array.weight == "matrix":
                gathered = frozenset(axis for axis in array.split if axis in GATHERED)
                left = {axis: d for axis, d in array.split.items() if axis not in gathered}
                size = stored(replace(array, split=left))
                if casts or gathered:
                    several = frozenset() if casts else gathered
                    found[f"{array.name}, whole"] = replace(size, several=several)
    return found


def _live(found: dict[str, Size]) -> tuple[Live, ...]:
    return tuple(Live(name, size, 0, 0) for name, size in found.items())
