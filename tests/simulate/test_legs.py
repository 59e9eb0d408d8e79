"""Legs of groups: what a gather and the scatter that undoes it put on the links."""

from __future__ import annotations

import numpy as np
import pytest

from shardsim.machine import parse_machine
from shardsim.plan.layout import AxisLayout
from shardsim.simulate.groups import Groups
from shardsim.simulate.topology import Topology


@pytest.mark.parametrize(
    ("name", "factors", "strides"),
    [
        pytest.param("v4:4x4x8", (4, 4, 8), (1, 1, 1), id="all rings"),
        pytest.param("v4:4x4x8", (4, 1, 4), (1, 1, 1), id="a ring and a line"),
        pytest.param("v4:4x4x8", (1, 1, 4), (1, 1, 2), id="a ring of every second chip"),
        pytest.param("v4:4x4x8", (1, 2, 2), (1, 2, 4), id="lines of distant chips"),
        pytest.param("v4:2x2x4", (2, 2, 4), (1, 1, 1), id="an open torus"),
        pytest.param("v5e:4x8", (4, 8), (1, 1), id="an open grid"),
        pytest.param("v4:4x4x8_twisted", (4, 4, 8), (1, 1, 1), id="twisted"),
    ],
)
def test_a_scatter_loads_each_wire_as_a_gather_loads_it_the_other_way(
    name: str, factors: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    topology = Topology(parse_machine(name))
    groups = Groups(topology, AxisLayout(factors=factors, strides=strides), "group")
    gather, scatter = (groups.table(f"{kind}:torus") for kind in ("gather", "scatter"))
    device, port = np.divmod(gather.links, topology.ports)
    back = topology.neighbour[device, port] * topology.ports + (port ^ 1)
    order = np.lexsort((back, gather.owners))
    np.testing.assert_array_equal(gather.owners[order], scatter.owners)
    np.testing.assert_array_equal(back[order], scatter.links)
    np.testing.assert_allclose(gather.shards[order], scatter.shards)
    np.testing.assert_allclose(gather.moved[order], scatter.moved)
    np.testing.assert_array_equal(gather.hops, scatter.hops)
