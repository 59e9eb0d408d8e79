"""Groups of devices of a collective: their written forms, and the mesh axes that they lie on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shardsim.xla.hlo.errors import HloError, small_number

Ints = np.ndarray[Any, np.dtype[np.int64]]

_LISTED = re.compile(r"\{((?:\{\d+(?:,\d+)*\},?)*)\}")
_GROUP = re.compile(r"\{([\d,]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?")
_MESH = re.compile(
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True)
class AxisPart:
    """What a group takes of one mesh axis: every `stride`-th device, `members` of them."""

    axis: str
    members: int
    stride: int


@dataclass(frozen=True)
class GroupForm:
    """How the groups of a collective lie on the mesh.

    `parts` has one entry for each mesh axis along which members differ, major to minor. Groups
    are `regular` if all of them are a grid of such parts.
    """

    size: int
    parts: tuple[AxisPart, ...]
    regular: bool

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the mesh axes along which members differ."""
        return tuple(part.axis for part in self.parts)


def parse_groups(text: str, devices: int) -> Ints:
    """Return the groups that `text` writes, one row each; they hold each device once.

    Forms: `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, numbers laid out as [4,2] and transposed;
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`. Nothing, or `{}`, is one group of all.
    """
    groups = _written(text, devices)
    if groups.size != devices or (np.sort(groups, axis=None) != np.arange(devices)).any():
        raise HloError(f"replica groups do not hold each of {devices} devices once: {text[:60]}")
    return groups


def _written(text: str, devices: int) -> Ints:
    if text in ("", "{}", "{{}}"):
        return np.arange(devices)[None, :]
    if listed := _LISTED.fullmatch(text):
        rows = [np.array(_numbers(row)) for row in _GROUP.findall(listed[1])]
        if len({len(row) for row in rows}) != 1:
            raise HloError(f"replica groups of different sizes: {text[:60]}")
        return np.stack(rows)
    if iota := _IOTA.fullmatch(text):
        shape, dims = _numbers(iota[1]), _numbers(iota[2] or iota[1])
        if not math.prod(shape) == math.prod(dims) == devices:
            raise HloError(f"replica groups {text[:60]} are not of {devices} devices")
        return _ids(dims, iota[3]).reshape(shape[0], -1)
    if meshed := _MESH.fullmatch(text):
        return _mesh_groups(meshed[1], meshed[2], meshed[3], meshed[4], devices)
    raise HloError(f"replica groups {text[:60]!r}")


def _numbers(text: str) -> list[int]:
    numbers = [small_number(number, -1) for number in text.split(",")]
    if min(numbers) < 0:
        raise HloError(f"numbers {text[:40]!r}")
    return numbers


def _ids(shape: Sequence[int], order: str | None) -> Ints:
    """Return 0, 1, ... laid out as `shape`, read in the transposed `order`."""
    ids = np.arange(math.prod(shape)).reshape(shape)
    if not order:
        return ids.reshape(-1)
    axes = _numbers(order)
    if sorted(axes) != list(range(len(shape))):
        raise HloError(f"replica groups are transposed by ({order})")
    return ids.transpose(axes).reshape(-1)


def _mesh_groups(mesh: str, dims: str | None, order: str | None, axes: str, devices: int) -> Ints:
    """Return the groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.

    The members of a group differ along the axes in braces; `'b':(2)2` is a part of an axis, of
    size 2 after 2 major ones.
    """
    sizes = {name: small_number(size, 0) for name, size, _, _ in _MESH_AXIS.findall(mesh)}
    shape = _numbers(dims) if dims else [devices]
    if not math.prod(sizes.values()) == math.prod(shape) == devices:
        raise HloError(f"replica groups mesh[{mesh}] are not of {devices} devices")
    ids = _ids(shape, order)
    wanted: dict[str, list[tuple[int, int]]] = {}
    for name, _, before, size in _MESH_AXIS.findall(axes):
        if name not in sizes:
            raise HloError(f"replica groups name '{name}', which mesh[{mesh}] lacks")
        part = (1, sizes[name])
        if size:
            part = (small_number(before, 0), small_number(size, 0))
        if min(part) < 1:
            raise HloError(f"replica groups over no part of '{name}'")
        wanted.setdefault(name, []).append(part)
    lengths: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        done = 1
        for before, length in sorted(wanted.get(name, [])):
            if before % done:
                raise HloError(f"replica groups over parts of '{name}' that overlap")
            lengths += [before // done, length]
            inside.append(len(lengths) - 1)
            done = before * length
        if size % done:
            raise HloError(f"replica groups over a part of '{name}' that does not divide it")
        lengths.append(size // done)
    outside = [place for place in range(len(lengths)) if place not in inside]
    members = math.prod(lengths[place] for place in inside)
    return ids.reshape(lengths).transpose(outside + inside).reshape(-1, members)


def group_form(groups: Ints, mesh: Mapping[str, int]) -> GroupForm:
    """Return how `groups` (rows of device numbers, row-major on `mesh`) lie on the mesh."""
    ordered = np.sort(groups, axis=1)
    places = np.stack(np.unravel_index(ordered, tuple(mesh.values())), axis=-1)
    steps = places - places[:, :1]
    same = bool((steps == steps[:1]).all())
    parts = []
    for axis, name in enumerate(mesh):
        digits = np.unique(steps[..., axis])
        if len(digits) == 1:
            continue
        gaps = np.diff(digits)
        same = same and digits[0] == 0 and bool((gaps == gaps[0]).all())
        parts.append(AxisPart(axis=name, members=len(digits), stride=int(gaps[0])))
    size = groups.shape[1]
    return GroupForm(
        size=size,
        parts=tuple(parts),
        regular=same and math.prod(part.members for part in parts) == size,
    )


def parse_pairs(text: str, devices: int) -> Ints:
    """Return the rows (source, target) of `{{0,1},{1,0}}`."""
    if not _LISTED.fullmatch(text):
        raise HloError(f"source-target pairs {text[:60]!r}")
    rows = [_numbers(row) for row in _GROUP.findall(text[1:-1])]
    if not rows or any(len(row) != 2 for row in rows):
        raise HloError(f"source-target pairs {text[:60]!r}")
    pairs = np.array(rows)
    for column in pairs.T:
        if len(np.unique(column)) != len(column) or column.max() >= devices:
            raise HloError(f"source-target pairs name a device twice: {text[:60]}")
    return pairs


@dataclass(frozen=True)
class Permute:
    """Where a permute sends: the mesh axes that it moves along, and by how many members.

    `shifts` are the distances that occur, negative ones backwards. A permute that moves along
    several axes is taken for one step of a ring over all of them.
    """

    axes: tuple[str, ...]
    shifts: tuple[int, ...]


def permute_form(pairs: Ints, mesh: Mapping[str, int]) -> Permute:
    """Return along which axes and how far `pairs` move their data."""
    sizes = tuple(mesh.values())
    source, target = (np.stack(np.unravel_index(column, sizes), axis=-1) for column in pairs.T)
    names = list(mesh)
    axes = tuple(name for axis, name in enumerate(names) if (source != target)[:, axis].any())
    if len(axes) == 1:
        axis = names.index(axes[0])
        size = sizes[axis]
        ahead = (target[:, axis] - source[:, axis]) % size
        ahead = np.where(2 * ahead > size, ahead - size, ahead)
        return Permute(axes=axes, shifts=tuple(int(d) for d in np.unique(ahead[ahead != 0])))
    # Forwards is where the first device's data go to the lower number of its two neighbours.
    first = pairs[:, 0].min()
    to = pairs[pairs[:, 0] == first, 1]
    back = pairs[pairs[:, 1] == first, 0]
    forwards = not len(back) or bool(to[0] <= back[0])
    return Permute(axes=axes, shifts=(1 if forwards else -1,) if axes else ())


@lru_cache(maxsize=4096)
def _form_of_text(text: str, mesh: tuple[tuple[str, int], ...]) -> GroupForm:
    sizes = dict(mesh)
    return group_form(parse_groups(text, math.prod(sizes.values())), sizes)


@lru_cache(maxsize=4096)
def _permute_of_text(text: str, mesh: tuple[tuple[str, int], ...]) -> Permute:
    sizes = dict(mesh)
    return permute_form(parse_pairs(text, math.prod(sizes.values())), sizes)


def form_of(text: str, mesh: Mapping[str, int]) -> GroupForm:
    """Return how the groups written as `text` lie on `mesh`; equal texts are read once."""
    return _form_of_text(text, tuple(mesh.items()))


def permute_of(text: str, mesh: Mapping[str, int]) -> Permute:
    """Return where the pairs written as `text` send on `mesh`; equal texts are read once."""
    return _permute_of_text(text, tuple(mesh.items()))
