"""One collective by itself on the links, as the engine runs it in a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.cost.network import Group, group_of
from shardsim.machine import Machine
from shardsim.plan.layout import AxisLayout
from shardsim.simulate.clock import Clock
from shardsim.simulate.collective import Traveller
from shardsim.simulate.fluid import Links
from shardsim.simulate.folding import Fold, fold
from shardsim.simulate.groups import Groups
from shardsim.simulate.topology import Fault, Topology
from shardsim.simulate.traffic import leg_names, traffic


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One collective of every group at once, with nothing else running."""

    time_s: float
    analytic: Group
    folded: Fold
    links: Links
    events: int


def run_alone(
    machine: Machine,
    layout: AxisLayout,
    kind: str,
    total_bytes: float,
    *,
    messages: int = 1,
    stage: str = "all",
    unfold: bool = False,
    faults: tuple[Fault, ...] = (),
) -> Alone:
    """Simulate one collective of every group of `layout`, all starting together.

    >>> from shardsim.machine import parse_machine
    >>> from shardsim.plan.layout import AxisLayout
    >>> ring = AxisLayout(factors=(1, 1, 16), strides=(1, 1, 1))
    >>> run_alone(parse_machine("v4:8x8x16"), ring, "all-gather", 2**20).folded.devices.tolist()
    [0]
    """
    topology = Topology(machine, faults)
    analytic = group_of(machine, layout)
    groups = {"group": Groups(topology, layout, "group")}
    legs = {"group": tuple(sorted(leg_names(kind, groups["group"], stage)))}
    folded = fold(topology, groups, legs, np.zeros(topology.devices, dtype=np.int64), unfold)
    clock = Clock()
    links = Links(clock, topology.rates[folded.links])
    chip = machine.chip
    traveller = Traveller(
        clock,
        folded,
        links,
        chip.hop_latency_s,
        chip.dcn_hop_latency_s,
        chip.collective_overhead_s,
        chip.permute_gain,
    )
    moved = traffic(kind, groups["group"], total_bytes, stage)
    ends: list[float] = []
    for device in range(len(folded.devices)):
        group = folded.group_of("group", device)
        course = traveller.collective("group", group, kind, moved, messages, total_bytes)
        traveller.meet("group", group, 0, course).then(lambda: ends.append(clock.now))
    clock.run()
    if traveller.meetings or any(links.streams > 0):
        raise RuntimeError(f"deadlock: {kind} stopped after {clock.now:g} s")
    return Alone(
        time_s=max(ends), analytic=analytic, folded=folded, links=links, events=links.transfers
    )
