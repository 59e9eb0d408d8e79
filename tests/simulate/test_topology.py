"""The torus as a graph: wires, twists, routes, detours."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from shardsim.errors import HardwareError
from shardsim.machine import parse_machine
from shardsim.plan.layout import AxisLayout
from shardsim.simulate.groups import Groups
from shardsim.simulate.topology import Fault, Topology
from shardsim.simulate.walks import exchange_crossings, ring_order


def topology(name: str, *faults: Fault) -> Topology:
    return Topology(parse_machine(name), faults)


@pytest.mark.parametrize(
    ("name", "wires"),
    [
        ("v4:4x4x4", 6 * 64),
        ("v4:4x4x8_twisted", 6 * 128),
        ("v5e:4x4", 2 * 2 * 12),
        ("v5e:8x16", 2 * (7 * 16 + 8 * 16)),
        ("2*v4:2x2x2", 2 * 3 * 8),
        ("tpu7x:4x4x4", 7 * 128),
    ],
)
def test_wires(name: str, wires: int) -> None:
    assert topology(name).graph.number_of_edges() == wires


def test_a_wire_leads_both_ways() -> None:
    for name in ("v4:4x4x8_twisted", "v4:4x8x8_twisted", "v5e:4x8", "v4:8x8x16"):
        made = topology(name)
        for port in range(made.ports - 1):
            there = made.neighbour[:, port]
            linked = there >= 0
            back = made.neighbour[there[linked], port ^ 1]
            assert np.array_equal(back, np.nonzero(linked)[0])


@pytest.mark.parametrize("shape", ["4x4x8", "4x8x8", "8x8x16"])
def test_a_twist_brings_chips_closer(shape: str) -> None:
    straight, twisted = topology(f"v4:{shape}"), topology(f"v4:{shape}_twisted")

    def distances(made: Topology) -> list[int]:
        return sorted(nx.single_source_shortest_path_length(made.graph, 0).values())

    assert sum(distances(twisted)) < sum(distances(straight))
    assert distances(twisted)[-1] < distances(straight)[-1]
    # The same seen from every chip.
    for chip in (1, 17, twisted.devices - 1):
        lengths = nx.single_source_shortest_path_length(twisted.graph, chip).values()
        assert sorted(lengths) == distances(twisted)


def test_routes_go_axis_by_axis_the_shorter_way() -> None:
    made = topology("v4:4x4x4")
    source, target = made.device_at(0, 0, 0, 0), made.device_at(0, 1, 3, 2)
    names = [made.port_name(link % made.ports) for link in made.route(source, target)]
    assert names == ["x+", "y-", "z+", "z+"]


def test_routes_avoid_what_is_dead() -> None:
    made = topology("v4:4x4x4", Fault(device=0, port=0))
    target = made.device_at(0, 1, 0, 0)
    route = made.route(0, target)
    assert len(route) == 3
    assert 0 not in route
    back = made.route(target, 0)
    assert len(back) == 3
    assert not made.dead.intersection(route + back)


def test_no_way_at_all_is_an_error() -> None:
    made = topology("v5e:2x2", Fault(device=0, port=0), Fault(device=0, port=2))
    with pytest.raises(HardwareError, match="no working way"):
        made.route(0, 3)


def test_many_routes_at_once_are_the_single_ones() -> None:
    for name in ("v4:4x4x8_twisted", "v5e:4x8", "2*v4:2x2x2"):
        made = topology(name, Fault(device=1, port=2))
        sources = np.arange(made.devices)
        targets = np.roll(sources, 5)
        links, which, lengths = made.routes(sources, targets)
        for place in range(made.devices):
            single = made.route(int(sources[place]), int(targets[place]))
            assert links[which == place].tolist() == single
            assert lengths[place] == len(single)


def test_members_partition_the_machine() -> None:
    made = topology("2*v4:4x4x4")
    groups = Groups(made, AxisLayout(factors=(2, 1, 4), strides=(2, 1, 1), slices=2), "any")
    assert groups.members.shape == (8, 16)
    assert sorted(groups.members.reshape(-1).tolist()) == list(range(128))
    assert np.array_equal(groups.of_device[groups.members[3]], np.full(16, 3))


@pytest.mark.parametrize("factors", [(1, 4, 4, 1), (1, 8, 2, 1), (1, 3, 4, 1), (1, 4, 4, 4)])
def test_a_ring_over_several_axes_takes_single_steps(factors: tuple[int, ...]) -> None:
    order = ring_order(factors)
    places = np.stack(np.unravel_index(order, factors))
    steps = np.abs(places - np.roll(places, -1, axis=1)).sum(axis=0)
    assert sorted(order.tolist()) == list(range(len(order)))
    assert np.all(steps == 1)


@pytest.mark.parametrize(("n", "ring", "busiest"), [(8, True, 8.0), (8, False, 16.0)])
def test_all_to_all_crosses_the_middle(n: int, ring: bool, busiest: float) -> None:
    """v P / 8 each way on a ring, v P / 4 on a line."""
    assert exchange_crossings(n, ring).max() == busiest
