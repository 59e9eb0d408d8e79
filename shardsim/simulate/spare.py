"""What is left of a slice with broken chips: the largest part that is a slice of its own.

XLA runs one program on a whole torus, so a job cannot leave a chip out. What an operator can do is
run it on a part of the slice without the broken chip, or on another slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from shardsim.errors import HardwareError
from shardsim.machine import Machine
from shardsim.machine.shapes import is_possible
from shardsim.simulate.topology import Floats, Topology

CUBE = 4  # chips on a side of what a slice is built from; smaller parts lie inside one


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of healthy chips that is offered as a slice of its own."""

    shape: tuple[int, ...]
    first: tuple[int, ...]  # the chip at its corner
    slice: int

    @property
    def chips(self) -> int:
        """How many chips it has."""
        return math.prod(self.shape)


def largest_part(machine: Machine, broken: Iterable[int]) -> Part | None:
    """Return the largest box without the broken devices; None where there is none.

    >>> from shardsim.machine import parse_machine
    >>> part = largest_part(parse_machine("v4:8x8x16"), [0])
    >>> part.shape, part.first
    ((8, 8, 12), (0, 0, 4))
    """
    dims = len(machine.shape)
    holes = np.zeros((machine.slices, *machine.shape))
    per_chip = machine.devices // machine.chips
    for device in broken:
        holes[np.unravel_index(device // per_chip, holes.shape)] = 1
    for axis in range(1, dims + 1):
        holes = np.cumsum(holes, axis=axis)
    counts = np.pad(holes, [(0, 0), *[(1, 0)] * dims])
    for shape in _shapes(machine):
        for number in range(machine.slices):
            for first in _corners(machine.shape, shape):
                if _inside(counts[number], first, shape) == 0:
                    return Part(shape=shape, first=first, slice=number)
    return None


def _shapes(machine: Machine) -> list[tuple[int, ...]]:
    """Return the shapes of slices that fit into one of `machine`, largest first."""
    sides = product(*(range(1, length + 1) for length in machine.shape))
    found = [shape for shape in sides if is_possible(machine.chip, shape)]
    return sorted(found, key=lambda shape: (-math.prod(shape), sum(shape), shape))


def _corners(whole: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    steps = (
        range(0, length - side + 1, min(CUBE, side))
        for length, side in zip(whole, shape, strict=True)
    )
    return product(*steps)


def _inside(counts: Floats, first: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """Return how many broken chips a box has, from sums over boxes that start at the origin."""
    total = 0.0
    for ends in product((0, 1), repeat=len(shape)):
        corner = tuple(
            place + side * end for place, side, end in zip(first, shape, ends, strict=True)
        )
        total += (-1) ** (len(shape) - sum(ends)) * float(counts[corner])
    return total


def refuse_broken(machine: Machine, broken: tuple[int, ...]) -> None:
    """Raise `HardwareError` if chips are broken: a plan needs every chip of its slice."""
    if not broken:
        return
    topology = Topology(machine, broken=broken)
    chips = sorted({topology.coordinates(device)[: len(machine.shape) + 1] for device in broken})
    first, *place = chips[0]
    which = f"chip {','.join(map(str, place))}"
    if machine.slices > 1:
        which += f" of slice {first}"
    which += f" and {len(chips) - 1} more are" if len(chips) > 1 else " is"
    raise HardwareError(
        f"{machine.name}: {which} broken, and a plan runs on all chips of its slice; use "
        f"{_instead(machine, broken, len({chip[0] for chip in chips}))}another slice"
    )


def _instead(machine: Machine, broken: tuple[int, ...], hit: int) -> str:
    """Return what of the machine can be used while `hit` slices have a broken chip."""
    whole = machine.slices - hit
    if whole > 0:
        return f"--set machine={replace(machine, slices=whole).name} (the other slices), or "
    part = largest_part(machine, broken)
    if part is None:
        return ""
    name = Machine(chip=machine.chip, shape=part.shape).name
    corner = ",".join(map(str, part.first))
    return f"--set machine={name} (the part from chip {corner}), or "
