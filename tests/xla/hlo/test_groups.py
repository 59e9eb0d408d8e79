"""Groups of devices: every written form, and the mesh axes that they lie on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.xla.hlo import HloError
from shardsim.xla.hlo.groups import AxisPart, form_of, group_form, parse_groups, permute_of

MESHES = st.lists(st.integers(2, 5), min_size=1, max_size=4).map(
    lambda sizes: {"abcd"[i]: size for i, size in enumerate(sizes)}
)


def along(mesh: dict[str, int], axes: tuple[str, ...]) -> list[list[int]]:
    """Return the groups over whole axes, by counting through the mesh."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for device, cell in enumerate(itertools.product(*map(range, mesh.values()))):
        key = tuple(digit for digit, name in zip(cell, mesh, strict=True) if name not in axes)
        groups.setdefault(key, []).append(device)
    return list(groups.values())


def listed(groups: list[list[int]]) -> str:
    """Return groups as XLA lists them."""
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


@given(mesh=MESHES, data=st.data())
def test_all_forms_are_the_groups_that_counting_gives(
    mesh: dict[str, int], data: st.DataObject
) -> None:
    names = tuple(mesh)
    axes = data.draw(
        st.sets(st.sampled_from(names), min_size=1).map(
            lambda chosen: tuple(name for name in names if name in chosen)
        )
    )
    expected = along(mesh, axes)
    devices = math.prod(mesh.values())
    sizes = ",".join(map(str, mesh.values()))
    order = [i for i, name in enumerate(names) if name not in axes]
    order += [i for i, name in enumerate(names) if name in axes]
    shape = f"[{len(expected)},{len(expected[0])}]"
    written = ",".join(f"'{name}'={size}" for name, size in mesh.items())
    quoted = ",".join(f"'{name}'" for name in axes)
    for text in (
        listed(expected),
        f"{shape}<=[{sizes}]T({','.join(map(str, order))})",
        f"mesh[{written}] {{{quoted}}}",
        f"mesh[{written}], device_ids=([{devices}]) {{{quoted}}}",
    ):
        assert np.array_equal(parse_groups(text, devices), np.array(expected))
        form = form_of(text, mesh)
        assert form.axes == axes
        assert form.regular
        assert form.parts == tuple(AxisPart(name, mesh[name], 1) for name in axes)


@given(factors=st.tuples(*[st.integers(2, 4)] * 3), outer=st.integers(1, 3))
def test_a_part_of_an_axis_is_said(factors: tuple[int, int, int], outer: int) -> None:
    major, members, minor = factors
    size = math.prod(factors)
    mesh = {"a": outer, "b": size}
    ids = np.arange(outer * size).reshape(outer * major, members, minor)
    groups = ids.transpose(0, 2, 1).reshape(-1, members)
    form = group_form(groups, mesh)
    assert form.parts == (AxisPart("b", members, minor),)
    assert form.regular
    text = f"mesh['a'={outer},'b'={size}] {{'b':({major}){members}}}"
    assert form_of(text, mesh) == form


def test_groups_that_are_no_grid_are_not_regular() -> None:
    mesh = {"a": 2, "b": 4}
    for groups in ([[0, 5], [1, 4], [2, 7], [3, 6]], [[0, 1, 3], [2, 4, 5], [6, 7, 0]]):
        assert not group_form(np.array(groups), mesh).regular
    ring = group_form(np.array([[3, 0], [1, 2], [7, 4], [5, 6]]), mesh)
    assert ring.axes == ("b",)
    assert not ring.regular


@pytest.mark.parametrize(
    "text",
    [
        *("{{0,1},{2,3,4}}", "{{0,1},{1,2}}", "{{0,1},{2,4}}", "{{0,1}}", "[2,3]<=[4]"),
        *("[2,2]<=[4]T(1)", "[2,2]<=[2,2]T(1,1)", "mesh['a'=2] {'a'}", "mesh['a'=2,'b'=2] {'c'}"),
        *("mesh['a'=4] {'a':(1)3}", "{{0,1},{2,x}}", "nothing"),
    ],
)
def test_bad_groups_are_an_error(text: str) -> None:
    with pytest.raises(HloError):
        parse_groups(text, 4)


@given(size=st.integers(3, 9), inner=st.integers(1, 3), shift=st.integers(-4, 4))
def test_a_permute_moves_along_its_axis(size: int, inner: int, shift: int) -> None:
    mesh = {"a": size, "b": inner}
    if shift % size == 0 or 2 * (shift % size) == size:
        return
    pairs = [
        (i * inner + j, (i + shift) % size * inner + j) for i in range(size) for j in range(inner)
    ]
    form = permute_of(listed([list(pair) for pair in pairs]), mesh)
    assert form.axes == ("a",)
    (found,) = form.shifts
    assert (found - shift) % size == 0
    assert abs(found) == min(shift % size, -shift % size)


def test_a_permute_on_a_ring_over_two_axes_has_a_direction() -> None:
    mesh = {"a": 2, "b": 3}
    ring = [0, 1, 2, 5, 4, 3]
    steps = [[ring[i], ring[(i + 1) % 6]] for i in range(6)]
    assert permute_of(listed(steps), mesh).shifts == (1,)
    assert permute_of(listed([[b, a] for a, b in steps]), mesh).shifts == (-1,)
    assert permute_of(listed(steps), mesh).axes == ("a", "b")


@pytest.mark.parametrize("text", ["{{0,1},{0,2}}", "{{0,1},{2,1}}", "{{0,4}}", "{{0}}", "{}"])
def test_bad_pairs_are_an_error(text: str) -> None:
    with pytest.raises(HloError):
        permute_of(text, {"a": 4})
