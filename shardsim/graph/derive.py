"""From ops over named dimensions to what one device computes and moves: one rule.

Each mesh axis splits the dimension of an op on which most of its arrays already lie: each array
speaks for the dimension that the axis splits in it and against those that it has and holds whole;
the result counts half more. Operands stored otherwise are gathered, or turned by an all-to-all
where the axis splits another of their dimensions. Sums over a split dimension are partial, stay so
through additions, and settle to where the result is stored. The backward pass is the transpose.

Each axis decides for itself, and on an axis of one device nothing moves. So `derive` is called once
for all meshes on which arrays are stored alike; sizes come later, as numbers or arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shardsim.graph.arrays import Array, Dims, Op, Split, makers, weights_of
from shardsim.graph.place import CONTEXT

NONE: frozenset[str] = frozenset()
OVER_HEADS = frozenset(CONTEXT)  # an axis that may split heads in attention and tokens elsewhere


@dataclass(frozen=True)
class Transfer:
    """A collective over `axes` of an array: `dims`, of which the axes in `by` leave a part.

    Bytes are those of the whole array that the group holds together. A gather is `shared` by all
    ops of a pass that want the same array whole. One that is `passed` never leaves an array whole:
    its pieces come round, for one op.
    """

    kind: str
    array: str
    axes: frozenset[str]
    dims: Dims
    by: tuple[tuple[str, str], ...]  # mesh axis, dimension
    gradient: bool = False
    weight: str = ""
    wide: bool = False
    purpose: str = ""
    passed: bool = False

    @property
    def shared(self) -> bool:
        """Whether one serves all ops of a pass."""
        return self.kind in ("all-gather", "all-to-all", "permute") and not self.passed


@dataclass(frozen=True)
class Summand:
    """A gradient on its way: what splits it, and over which axes it has yet to be summed.

    Over the `late` ones it may be summed later than by the op that made it (see `Op.call`).
    """

    lies: Split
    partial: frozenset[str]
    late: frozenset[str] = field(default=NONE, compare=False)
    call: str = ""
    purpose: str = ""  # what summing it is for, if it is not the array's


@dataclass
class Step:
    """What one device does for one op, forward and backward; `place` is what each axis splits."""

    op: Op
    place: Split
    gathers: list[Transfer] = field(default_factory=list)
    settles: list[Transfer] = field(default_factory=list)
    gradient_settles: list[Transfer] = field(default_factory=list)  # of its result's gradient
    gradient_gathers: list[Transfer] = field(default_factory=list)
    trained: bool = False  # whether anything that is trained depends on it


@dataclass
class Leaf:
    """A weight, or what a block starts from: how its gradient is summed to where it is stored."""

    array: Array
    settles: list[Transfer] = field(default_factory=list)
    partial: frozenset[str] = NONE  # axes over which weights' gradients are summed once a step


@dataclass
class Derived:
    """A block on one device: its ops in order, then what its backward pass leaves."""

    steps: list[Step]
    leaves: list[Leaf] = field(default_factory=list)
    still: list[Leaf] = field(default_factory=list)  # which no gradient reaches

    @property
    def weights(self) -> tuple[Array, ...]:
        """The weights that it uses, trained or not."""
        return weights_of([step.op for step in self.steps])

    @property
    def start(self) -> Array:
        """The stream that enters it, which need not be what its first op reads: blocks of a
        diffusion model read a condition before."""
        read = [array for step in self.steps for array in step.op.ins]
        return next((array for array in read if array.stream), read[0])


def derive(ops: Sequence[Op], axes: Iterable[str]) -> Derived:
    """Return what one device does for `ops` on mesh `axes`, as if each had several members.

    With the sums that implementations make of gradients without need: see `Op.eager`; and a
    weight's gradient is summed over all devices that hold the same part of it.
    """
    last = {numbers[-1] for numbers in makers(ops).values()}
    steps = []
    for number, op in enumerate(ops):
        place = where(op)
        step = Step(op, place)
        step.gathers = brought(op, op.ins, place)
        step.gathers += halos(op, place, op.ins)
        if number in last:
            inside = {axis: d for axis, d in place.items() if d in op.out.dims}
            step.settles = settled(op.out, Summand(inside, frozenset(place) - set(inside)))
        steps.append(step)
    result = Derived(steps)
    _transpose(result, last, frozenset(axes))
    return result


def _transpose(result: Derived, last: set[int], axes: frozenset[str]) -> None:
    """Write the backward pass: gathers become sums, sums become gathers."""
    steps, gradients = result.steps, defaultdict[str, list[Summand]](list)
    calls = {step.op.out.name: step.op.call for step in steps}
    final = steps[-1].op.out
    gradients[final.name] = [Summand(final.split, NONE)]
    for out in (step.op.out for step in steps if step.op.out.handed):
        owed = (frozenset(out.owed) & axes) - set(out.split)
        gradients[out.name] = [Summand(out.split, owed, owed)]
    for number in reversed(range(len(steps))):
        step = steps[number]
        op, place = step.op, step.place
        wanted = any(array.trained for array in (*op.ins, *op.vectors))
        if op.out.name not in gradients or not wanted:
            continue
        step.trained = True
        if number in last:
            # Backward passes are linear: what all of an array's gradients lack stays partial
            # until an op, or the place where the array is stored, uses the axis.
            parts = gradients[op.out.name]
            lazy = frozenset.intersection(*(part.partial for part in parts))
            lazy -= set(op.out.split) | set(place)
            lazy &= frozenset.intersection(*(part.late for part in parts))
            if op.eager and op.relay:  # where it sums all of them, one by one none is
                lazy |= _sliced(op, place) & frozenset().union(*(part.late for part in parts))
            if op.eager:
                step.gradient_settles = [replace(t, gradient=True) for t in step.settles]
            step.gradient_settles += _summed(op.out, parts, lazy)
            gradients[op.out.name] = [Summand(op.out.split, lazy)]
        lazy = gradients[op.out.name][0].partial
        step.gradient_gathers = gathered(op.out, place, gradient=True)
        step.gradient_gathers += brought(op, op.needs, place)
        step.gradient_gathers += halos(op, place, op.needs)
        step.gradient_gathers += halos(op, place, op.ins, gradient=True)
        for array in (*op.ins, *op.vectors):
            # What a call makes for itself is summed as elsewhere, and so is what was gathered once
            # for the projections of several calls. A router gathers for itself.
            inside = op.call == calls.get((array.original or array).name)
            part = _gradient(op, array, place, lazy, late=not op.call or inside)
            if op.eager or array.weight:  # a gather's transpose is a scatter
                moved = frozenset(axis for axis in array.split if axis not in place)
                part = replace(part, partial=part.partial | moved)
            shared = op.product and not op.dtype and part.partial & set(array.split)
            if op.call and not (array.weight or inside or shared):
                part = replace(part, call=op.call, purpose=array.purpose)
            if array.trained and part not in gradients[array.name]:
                gradients[array.name].append(part)
    made = makers([step.op for step in steps])
    arrays = [a.original or a for step in steps for a in (*step.op.ins, *step.op.vectors)]
    for array in {array.name: array for array in arrays}.values():
        if array.name in made:
            continue
        if array.name not in gradients:
            if array.weight and array.trained:
                result.still.append(Leaf(array, partial=axes - set(array.split)))
            continue
        parts = gradients[array.name]
        rest = NONE
        if array.weight:
            rest = axes - set(array.split)  # whether or not members have computed the same
        elif array.handed:
            rest = frozenset(array.owed)
        late = rest if array.weight else NONE
        result.leaves.append(Leaf(array, _summed(array, parts, rest), late))


def _sliced(op: Op, place: Split) -> frozenset[str]:
    """Return the axes over which an op gathers its operands."""
    return frozenset(axis for array in op.ins for axis in array.split if axis not in place)


def _gradient(op: Op, array: Array, place: Split, lazy: frozenset[str], late: bool) -> Summand:
    """Return how the gradient of an operand comes out of an op, which may be summed `late`."""
    inside = {axis: d for axis, d in place.items() if d in array.dims}
    # Padded with zeros, the gradient of a slice is partial too.
    partial = {axis for axis in place if axis not in inside or axis not in array.split}
    if array.original:
        here = {axis for axis, d in inside.items() if array.split.get(axis) == d}
        inside |= {axis: array.original.split[axis] for axis in here}
    all_partial = frozenset(partial) | lazy
    return Summand(inside, all_partial, all_partial if late else lazy)


def where(op: Op) -> dict[str, str]:
    """Return the dimension that each mesh axis splits in an op. Ties go to the result."""
    chosen = {}
    for axis in sorted({axis for array in op.arrays for axis in array.split}):
        votes: dict[str, float] = defaultdict(float)
        for array, voice in (*((array, 1.0) for array in op.ins), (op.out, 1.5)):
            for d in array.dims:
                votes[d] += voice if array.split.get(axis) == d else -1.0
        best = max(votes, key=lambda d: votes[d])
        if votes[best] > 0:
            chosen[axis] = best
    return chosen | dict(op.over)


def brought(op: Op, arrays: Iterable[Array], place: Split) -> list[Transfer]:
    """Return what brings arrays that an op reads to where it wants them."""
    moves = [move for array in arrays for move in gathered(array, place)]
    if not op.passed:
        return moves
    return [
        replace(move, passed=True) if move.kind == "all-gather" and move.axes <= op.passed else move
        for move in moves
    ]


def gathered(array: Array, place: Split, gradient: bool = False) -> list[Transfer]:
    """Return what brings an operand (or a gradient) to where an op wants it."""
    have = array.split
    moved = frozenset(axis for axis, d in have.items() if place.get(axis) != d)
    turned = frozenset(axis for axis in moved if place.get(axis) in array.dims)
    after = {axis: d for axis, d in have.items() if axis not in moved}
    after |= {axis: place[axis] for axis in turned}
    held = dict(have)
    if turned & OVER_HEADS:  # members that share a head are each sent it
        turned |= moved & OVER_HEADS
        there = {axis: d for axis, d in after.items() if axis in OVER_HEADS}
        held = {axis: d for axis, d in have.items() if axis not in OVER_HEADS} | there
    # What an op wants only a slice of is sliced first, unless along a dimension that is moved.
    whole = set(array.dims) - {have[axis] for axis in moved}
    after |= {axis: d for axis, d in place.items() if axis not in have and d in whole}
    return [
        *_move("all-to-all", turned, array, held, gradient),
        *_move("all-gather", moved - turned, array, after, gradient),
    ]


def settled(
    array: Array, sums: Summand, lazy: frozenset[str] = NONE, gradient: bool = False
) -> list[Transfer]:
    """Return what sums a partial array, to where it is stored; over `lazy` it stays partial."""
    lies, partial = sums.lies, sums.partial - lazy
    scattered = frozenset(axis for axis in partial if axis in array.split)
    turned = frozenset(a for a, d in lies.items() if array.split.get(a, d) != d) - partial
    if turned & OVER_HEADS:  # what members that share a head have made is summed on arrival
        shared = scattered & OVER_HEADS
        scattered, partial, turned = scattered - shared, partial - shared, turned | shared
    padded = {array.split[axis] for axis in scattered}  # along these a slice is padded first
    sliced = {a: d for a, d in lies.items() if a not in sums.partial or d not in padded}
    left = {a: d for a, d in lies.items() if a not in partial}
    left |= {axis: array.split[axis] for axis in scattered}
    return [
        *_move("reduce-scatter", scattered, array, sliced, gradient),
        *_move("all-reduce", partial - scattered, array, left, gradient),
        *_move("all-to-all", turned, array, left, gradient),
    ]


def halos(op: Op, place: Split, arrays: Iterable[Array], gradient: bool = False) -> list[Transfer]:
    """Return what comes from neighbours along a split dimension, or goes back to them."""
    if not op.reach:
        return []
    along, reach = op.reach
    axes = frozenset(axis for axis, d in place.items() if d == along)
    moves = []
    for array in (array for array in arrays if array.name in op.reached):
        dims = tuple(reach if d == along else d for d in array.dims)
        rest = {axis: d for axis, d in place.items() if d in dims}
        moves += _move("permute", axes, replace(array, dims=dims), rest, gradient)
    return moves


def _summed(array: Array, parts: Iterable[Summand], lazy: frozenset[str]) -> list[Transfer]:
    return [
        move
        for part in parts
        for move in settled(
            replace(array, purpose=part.purpose or array.purpose), part, lazy, gradient=True
        )
    ]


def _move(
    kind: str, axes: frozenset[str], array: Array, lies: Split, gradient: bool
) -> list[Transfer]:
    if not axes:
        return []
    by = tuple(sorted(lies.items()))
    return [
        Transfer(
            kind=kind,
            array=array.name,
            axes=axes,
            dims=array.dims,
            by=by,
            gradient=gradient,
            weight=array.weight,
            wide=array.wide,
            purpose=array.purpose,
        )
    ]
