"""Device order: every mesh axis on its torus axes, every ring in steps of one hop."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from shardsim.emit.runtime.config import build_mesh, cycle, device_places, make_group, snake
from shardsim.emit.specs import plan_data
from shardsim.plan import plan_from_data
from shardsim.plan.layout import SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data


@dataclass(frozen=True)
class MockTpu:
    """A device that says where it stands, as those of a TPU slice do."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0


def data_of(machine: str, mesh: dict[str, Any]) -> dict[str, Any]:
    plan = {
        "model": {"base": "vit-22b", "heads": 64, "head_dim": 96},
        "machine": machine,
        "batch": 65536,
        "mesh": mesh,
        "rules": rules_data(["fsdp", "model"], residual=SEQUENCE_SHARDED),
    }
    return plan_data(plan_from_data(plan, "plan"))["plan"]


def hops(a: tuple[int, ...], b: tuple[int, ...], lengths: list[int], wrap: bool) -> int:
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(min(d, length - d) if wrap else d for d, length in zip(apart, lengths, strict=True))


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (4, 4), (4, 3, 5), (2, 2, 2), (8, 16)])
def test_a_cycle_visits_every_cell_in_steps_of_one_and_comes_back(shape: tuple[int, ...]) -> None:
    cells = cycle(shape)
    assert sorted(cells) == list(itertools.product(*map(range, shape)))
    for a, b in zip(cells, cells[1:] + cells[:1], strict=True):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) == 1


def test_a_snake_turns_at_the_end_of_each_row() -> None:
    assert snake((2, 3)) == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]


@pytest.mark.parametrize(
    ("machine", "mesh", "wrap"),
    [
        ("v4:8x8x16", {"fsdp": 128, "model": 8}, True),
        ("v4:4x4x4", {"fsdp": 4, "model": 16}, False),
        ("v4:4x4x4", {"fsdp": 1, "model": 64}, False),
        ("v5e:4x4", {"fsdp": 1, "model": 16}, False),
        ("v5e:4x8", {"fsdp": 2, "model": 16}, False),
    ],
)
def test_neighbours_on_a_ring_are_one_hop_apart(
    machine: str, mesh: dict[str, int], wrap: bool
) -> None:
    plan = data_of(machine, mesh)
    places = device_places(plan)
    lengths = [1, *plan["torus"].values()]
    assert sorted(places) == list(itertools.product(*map(range, lengths)))
    rings = np.arange(len(places)).reshape(mesh["fsdp"], mesh["model"])
    for ring in rings:
        for a, b in itertools.pairwise([*ring, ring[0]]):
            assert hops(places[a], places[b], lengths, wrap) == 1


def test_the_later_of_two_axes_on_one_torus_axis_is_the_inner() -> None:
    torus = {"fsdp": {"size": 16, "torus": {"x": 4, "y": 4}}}
    mesh = torus | {"model": {"size": 4, "torus": {"z": 4}}}
    places = device_places(data_of("v4:4x4x4", mesh))
    assert [place[3] for place in places[:4]] == [0, 1, 2, 3]
    mesh = {
        "fsdp": {"size": 32, "torus": {"x": 4, "y": 4, "z": 2}},
        "model": {"size": 2, "torus": {"z": 2}},
    }
    places = device_places(data_of("v4:4x4x4", mesh))
    assert [place[3] for place in places[:4]] == [0, 1, 2, 3]


def test_devices_with_coordinates_are_put_on_the_torus() -> None:
    plan = data_of("v4:4x4x4", {"fsdp": 4, "model": 16})
    coords = list(itertools.product(range(4), range(4), range(4)))
    devices = [MockTpu(id=i, coords=place) for i, place in enumerate(coords)]
    mesh = build_mesh(plan, devices[::-1])
    found = [(0, *device.coords) for device in mesh.devices.flat]
    assert found == device_places(plan)
    assert mesh.axis_names == ("fsdp", "model")


def test_other_devices_are_taken_in_order_and_counted() -> None:
    plan = data_of("v5e:2x4", {"fsdp": 2, "model": 4})

    @dataclass(frozen=True)
    class Host:
        id: int
        platform: str = "cpu"
        device_kind: str = "cpu"
        process_index: int = 0

    mesh = build_mesh(plan, [Host(i) for i in range(8)])
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    with pytest.raises(ValueError, match="the mesh has 8 devices, but there are 3"):
        build_mesh(plan, [Host(i) for i in range(3)])


def test_a_ring_over_two_mesh_axes_is_a_cycle_of_their_grid() -> None:
    mesh = [("a", 2), ("b", 3), ("c", 1)]
    plan = {"mesh": [{"name": name, "size": size, "torus": {}} for name, size in mesh]}
    group = make_group(plan, ["a", "b", "c"])
    assert group.axes == ("a", "b")
    assert group.size == math.prod((2, 3))
    assert group.ring == (0, 1, 2, 5, 4, 3)
