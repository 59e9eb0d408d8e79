"""The mesh: groups of devices, the order of each ring, and which device stands where."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# What the plan, the model and the tables of parameters and activations are: plain data.
Data = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Devices that communicate: the mesh axes they lie on, major to minor.

    `ring[k]` is the member (its index along `axes`) that stands at position k of the ring; `whole`
    says whether all devices of a slice are members.
    """

    axes: tuple[str, ...]
    size: int
    ring: tuple[int, ...]
    whole: bool = False

    def __add__(self, other: Group) -> Group:
        """Return the group of both, this one major."""
        size = self.size * other.size
        return Group(self.axes + other.axes, size, tuple(range(size)))


def make_group(plan: Data, names: list[str]) -> Group:
    """Return the group over the mesh axes `names`; axes of size 1 do not count."""
    sizes = {axis["name"]: axis["size"] for axis in plan["mesh"]}
    axes = tuple(name for name in names if sizes[name] > 1)
    shape = tuple(sizes[name] for name in axes)
    ring = tuple(range(math.prod(shape)))
    if len(shape) > 1:
        index = {cell: i for i, cell in enumerate(itertools.product(*map(range, shape)))}
        ring = tuple(index[cell] for cell in cycle(shape))
    inside = {axis["name"]: axis["size"] // axis["torus"].get("dcn", 1) for axis in plan["mesh"]}
    whole = math.prod(inside[name] for name in axes) == math.prod(inside.values())
    return Group(axes, len(ring), ring, whole)


def cycle(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all cells of a grid as a round trip in steps of one, if its first length is even.

    Cells other than column 0 are walked row by row, there and back; column 0 is the way home.
    The columns of a grid with more than two axes are its other axes, walked as a snake.
    cycle((2, 3)) is (0,0) (0,1) (0,2) (1,2) (1,1) (1,0): six steps of one hop, no wrap needed.
    """
    rows, columns = shape[0], snake(shape[1:])
    walk = [(0, *columns[0])]
    for row in range(rows):
        across = columns[1:] if row % 2 == 0 else columns[:0:-1]
        walk += [(row, *column) for column in across]
    return walk + [(row, *columns[0]) for row in range(rows - 1, 0, -1)]


def snake(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all cells of a grid as a path in steps of one, each row reversing the last."""
    if not shape:
        return [()]
    inner = snake(shape[1:])
    rows = range(shape[0])
    return [(row, *cell) for row in rows for cell in (inner if row % 2 == 0 else inner[::-1])]


def device_places(plan: Data) -> list[tuple[int, ...]]:
    """Return the torus place (slice, x, y, ...) of each device, in the raster order of the mesh.

    Each mesh axis walks its part of the torus axes: a ring axis as a round trip in steps of one
    hop, the others row by row. Where mesh axes share a torus axis, the later one is the inner.
    """
    names = ["dcn", *plan["torus"]]
    rings = plan["roles"]["tensor"] + plan["roles"]["tensor2"]
    rings += plan["roles"]["context"] if plan["keys"] == "ring" else []
    steps: list[
        list[tuple[int, ...]]
    ] = []  # for each mesh axis, what each of its steps adds to the place
    inner = dict.fromkeys(names, 1)
    for axis in reversed(plan["mesh"]):
        parts = [(name, factor) for name, factor in axis["torus"].items() if factor > 1]
        if axis["name"] in rings and len(parts) > 1:
            parts.sort(key=lambda part: part[1] % 2)  # an even one first: the round trip closes
            cells = cycle(tuple(factor for _, factor in parts))
        else:
            cells = list(itertools.product(*(range(factor) for _, factor in parts)))
        stride = dict(inner)
        walk = []
        for cell in cells:
            place = dict.fromkeys(names, 0)
            for (name, _), digit in zip(parts, cell, strict=True):
                place[name] = digit * stride[name]
            walk.append(tuple(place.values()))
        for name, factor in parts:
            inner[name] *= factor
        steps.insert(0, walk)
    return [tuple(map(sum, zip(*cell, strict=True))) for cell in itertools.product(*steps)]


def build_mesh(plan: Data, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """Return the plan's mesh over `devices` (all there are, unless given).

    TPU devices say where they stand on the torus, so each mesh axis is put on its torus axes;
    others are taken in order.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [axis["size"] for axis in plan["mesh"]]
    if len(devices) != math.prod(shape):
        raise ValueError(f"the mesh has {math.prod(shape)} devices, but there are {len(devices)}")
    if all(device.platform == "tpu" for device in devices):
        axes = list(plan["torus"])
        at = {}
        for device in devices:
            place = dict(zip("xyz", device.coords, strict=False))
            place["core"] = getattr(device, "core_on_chip", 0)
            key = (getattr(device, "slice_index", None) or 0, *(place[name] for name in axes))
            at[key] = device
        devices = [at[place] for place in device_places(plan)]
    names = tuple(axis["name"] for axis in plan["mesh"])
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.sharding.Mesh(np.array(devices).reshape(shape), names, axis_types=auto)
