"""Which shapes a slice of a chip can have, and which of its axes close into rings."""

from __future__ import annotations

import math
from functools import lru_cache

from shardsim.machine.chip import Chip

Shape = tuple[int, ...]

# Whole 4x4x4 cubes join to slices A x B x C, each axis a multiple of 4, while the pod has cubes
# (Cloud TPU documentation, types and topologies). These parts of one cube are offered too; 1x1x1
# and 1x2x1 are parts of one host. MaxText, accelerator_to_spec_map.py (e591f30cb).
_WITHIN_CUBE = ((1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# The vendor's order where it is not ascending.
_VENDOR_ORDER: dict[Shape, Shape] = {(1, 1, 2): (1, 2, 1), (1, 2, 2): (2, 2, 1)}
# The longest axis in MaxText's table of v5p slices is that of 4x4x244, 61 cubes in a row; 67 in a
# row are left out there, so the limit is taken as 64, the cubes of a v4 pod.
_LONGEST_AXIS = 256
# Slices smaller than 4x4 of the chips without optical switches.
_BELOW_4X4: dict[str, tuple[Shape, ...]] = {"length16": ((1, 1), (2, 2), (2, 4)), "full": ((2, 2),)}


def wrapped_axes(chip: Chip, shape: Shape) -> tuple[bool, ...]:
    """Return for each axis of `shape` whether its two ends are joined.

    v4, v5p, tpu7x ("cube4"): all axes, when each is a multiple of 4 (optical switches join the
    faces of 4x4x4 cubes), otherwise none. v5e, v6e ("length16"): an axis of 16 chips. v2, v3
    ("full"): an axis of the pod's full length. Source: MaxText, accelerator_to_spec_map.py.
    """
    if chip.wrap == "cube4":
        return (all(length % 4 == 0 for length in shape),) * len(shape)
    if chip.wrap == "length16":
        return tuple(length == 16 for length in shape)
    if chip.wrap == "full":
        return tuple(length == max(chip.max_slice) for length in shape)
    return (False,) * len(shape)


def can_twist(chip: Chip, shape: Shape) -> bool:
    """Return whether `shape` is k x k x 2k or k x 2k x 2k, k >= 4, on a chip that twists."""
    if not chip.twistable or len(shape) != 3:
        return False
    small, middle, large = sorted(shape)
    return small >= 4 and small % 4 == 0 and large == 2 * small and middle in (small, large)


def is_possible(chip: Chip, shape: Shape) -> bool:
    """Return whether a slice can have this shape, its axes in any order."""
    return tuple(sorted(shape)) in _ascending(chip)


def shapes_of(chip: Chip, chips: int | None = None) -> list[Shape]:
    """Return the shapes of one slice, by number of chips and then the most cubic first.

    The most cubic shape, the one whose axes have the smallest sum, is the vendor's default
    (Cloud TPU documentation, types and topologies; so are the entries of MaxText's tables).
    """
    found = [shape for shape in _ascending(chip) if chips is None or math.prod(shape) == chips]
    found.sort(key=lambda shape: (math.prod(shape), sum(shape), shape))
    return [_VENDOR_ORDER.get(shape, shape) for shape in found]


def nearest_shapes(chip: Chip, shape: Shape) -> list[Shape]:
    """Return the three possible shapes closest to `shape`: in chips first, in form second."""
    axes = chip.torus_dims
    wanted = sorted(length for length in shape if length > 1)[-axes:]
    wanted = [1] * (axes - len(wanted)) + wanted
    chips = math.log(max(1, math.prod(shape)))

    def distance(other: Shape) -> tuple[float, float]:
        pairs = zip(sorted(other), wanted, strict=True)
        form = sum(abs(math.log(a / b)) for a, b in pairs)
        return abs(math.log(math.prod(other)) - chips), form

    return sorted(shapes_of(chip), key=distance)[:3]


def _ascending(chip: Chip) -> frozenset[Shape]:
    return _enumerate(chip.interconnect, chip.wrap, chip.max_slice)


@lru_cache(maxsize=64)
def _enumerate(interconnect: str, wrap: str, largest: Shape) -> frozenset[Shape]:
    """Return all shapes with axes ascending."""
    if interconnect == "switch":
        powers = {2**power for power in range(largest[0].bit_length())}
        return frozenset((chips,) for chips in powers | {largest[0]})
    if len(largest) == 2:
        sides = [2**power for power in range(2, max(largest).bit_length())]
        pairs = [(side, side) for side in sides] + [(side, 2 * side) for side in sides]
        flat = _BELOW_4X4.get(wrap, _BELOW_4X4["length16"]) + tuple(pairs)
        return frozenset(pair for pair in flat if pair[0] <= largest[0] and pair[1] <= largest[1])
    cubes = math.prod(largest) // 64
    found = set(_WITHIN_CUBE)
    for x in range(1, math.isqrt(cubes) + 1):
        for y in range(x, cubes // x + 1):
            for z in range(y, min(cubes // (x * y), _LONGEST_AXIS // 4) + 1):
                found.add((4 * x, 4 * y, 4 * z))
    return frozenset(found)
