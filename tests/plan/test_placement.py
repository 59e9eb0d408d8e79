"""Mesh axes on the torus: every factor is used up, and JAX lays them the same way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardsim.errors import PlanError
from shardsim.machine import Machine, parse_machine
from shardsim.plan import MeshAxis
from shardsim.plan.placement import place

SLICES = (
    *("v4:4x4x4", "v4:8x8x16", "v4:4x8x8", "v5p:4x4x12", "v4:2x2x4", "v5e:16x16", "v5e:8x16"),
    *("2*v4:4x4x4", "6*v5e:4x8", "tpu7x:4x4x4", "h100:8", "16*h100:8"),
)


@st.composite
def sizes(draw: st.DrawFn, machine: Machine, most: int = 4) -> dict[str, int]:
    """Draw mesh sizes that multiply to the devices of `machine`."""
    left = machine.devices
    found = {}
    for name in "abcd"[: draw(st.integers(1, most)) - 1]:
        size = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
        found[name] = size
        left //= size
    return {**found, "last": left}


@given(st.data(), st.sampled_from(SLICES))
def test_factors_multiply_to_sizes_and_to_the_torus(data, name):
    machine = parse_machine(name)
    wanted = data.draw(sizes(machine))
    refused = ""
    try:
        mesh = place(wanted, machine)
    except PlanError as error:
        refused = str(error)
    if refused:
        # A greedy split can be left with what it cannot use, where a length is no power of two.
        assert "not a product of what is left" in refused
        assert machine.devices & (machine.devices - 1)
        return
    assert {axis.name: axis.size for axis in mesh} == wanted
    assert [axis.name for axis in mesh] == list(wanted)
    used = {axis.name: 1 for axis in machine.axes} | {"dcn": 1}
    for axis in mesh:
        assert math.prod(axis.torus.values()) == axis.size
        for torus, factor in axis.torus.items():
            assert factor > 1
            used[torus] *= factor
    assert used == {axis.name: axis.length for axis in machine.axes} | {"dcn": machine.slices}


@given(st.data(), st.sampled_from(SLICES))
def test_powers_of_two_always_find_a_place(data, name):
    machine = parse_machine(name)
    assume(machine.devices & (machine.devices - 1) == 0)
    place(data.draw(sizes(machine)), machine)


@pytest.mark.parametrize("product", [{"a": 8, "b": 4}, {"a": 128}, {"a": 3, "b": 21}])
def test_sizes_must_multiply_to_the_devices(product):
    with pytest.raises(PlanError, match=r"multiply to \d+, but v4:4x4x4 has 64"):
        place(product, parse_machine("v4:4x4x4"))


@dataclass(frozen=True)
class Device:
    """What JAX asks of a TPU device when it builds a mesh."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"
    process_index: int = 0


def jax_lengths(machine: Machine, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """Return the lengths of the torus axes behind each mesh axis of JAX; None if it refuses."""
    pytest.importorskip("jax")
    mesh_utils: Any = pytest.importorskip("jax.experimental.mesh_utils")
    lengths = (*machine.shape, 1)[:3]
    kind = {"v4": "TPU v4", "v5p": "TPU v5p", "v5e": "TPU v5 lite"}[machine.chip.name]
    places = [(x, y, z) for z, y, x in np.ndindex(lengths[2], lengths[1], lengths[0])]
    devices = [Device(index, place, kind) for index, place in enumerate(places)]
    try:
        mesh = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return None
    found = []
    for axis in range(len(shape)):
        line = np.moveaxis(mesh, axis, 0).reshape(shape[axis], -1)[:, 0]
        coords = np.array([device.coords for device in line])
        varied = [len(set(column.tolist())) for column in coords.T]
        assert math.prod(varied) == shape[axis]
        found.append(tuple(sorted(length for length in varied if length > 1)))
    return found


def our_lengths(mesh: tuple[MeshAxis, ...]) -> list[tuple[int, ...]]:
    return [tuple(sorted(axis.torus.values())) for axis in mesh]


@given(st.data(), st.sampled_from(["v4:4x4x4", "v4:4x4x8", "v4:4x8x8", "v5p:4x4x12", "v5e:8x16"]))
def test_as_jax_lays_it_where_whole_axes_do(data, name):
    machine = parse_machine(name)
    wanted = data.draw(sizes(machine, most=3))
    lengths = jax_lengths(machine, tuple(wanted.values()))
    assume(lengths is not None)
    # Axes of the same length are alike, so that their lengths say it all.
    assert our_lengths(place(wanted, machine)) == lengths


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("v4:8x8x16", {"data": 128, "model": 8}, [(8, 16), (8,)]),
        ("v4:4x4x16", {"data": 16, "model": 16}, [(16,), (4, 4)]),
        ("v5p:4x4x8", {"data": 8, "model": 16}, [(8,), (4, 4)]),
        ("v5e:16x16", {"data": 16, "model": 16}, [(16,), (16,)]),
        # Split, with the last mesh axis inside.
        ("v5e:16x16", {"data": 32, "model": 8}, [(2, 16), (8,)]),
        ("v4:4x4x4", {"data": 32, "model": 2}, [(2, 4, 4), (2,)]),
        # Slices go to the first mesh axes.
        ("4*v4:4x4x4", {"data": 4, "fsdp": 64}, [(4,), (4, 4, 4)]),
        ("4*v4:4x4x4", {"data": 2, "fsdp": 128}, [(2,), (2, 4, 4, 4)]),
    ],
)
def test_known_placements(name, wanted, expected):
    assert our_lengths(place(wanted, parse_machine(name))) == expected


def test_slices_are_split_from_the_outside():
    mesh = place({"data": 8, "fsdp": 32}, parse_machine("4*v4:4x4x4"))
    assert mesh[0].torus["dcn"] == 4
    assert "dcn" not in mesh[1].torus
