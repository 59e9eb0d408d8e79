"""The engine of a step: classes of chips as processes, meeting in groups, sharing links."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simpy

from shardsim.cost.network import Links as GroupLinks
from shardsim.cost.predict import CollectiveUse, Prediction, collective_uses
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.simulate.collective import Span, Traveller
from shardsim.simulate.fluid import Links
from shardsim.simulate.folding import Fold, fold
from shardsim.simulate.groups import Groups
from shardsim.simulate.operations import Schedule, Spec
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.schedule import schedule
from shardsim.simulate.stream import Stream
from shardsim.simulate.topology import Floats, Topology
from shardsim.simulate.traffic import Traffic, leg_names

# Contention is reported where one collective loses at least this share of the step to another.
CONTENTION_SHARE = 1e-4


class Clock(simpy.Environment):
    """SimPy's environment, which numbers its events; the number tells how many there were."""

    @property
    def events(self) -> int:
        """Events scheduled so far."""
        return int(repr(self._eid)[6:-1])


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Time that one collective lost to another on a kind of link."""

    collective: str
    other: str
    links: tuple[str, ...]  # "y+", "y-"
    lost_s: float  # on the chips concerned, over the step


class StepEngine:
    """One run: classes of chips as processes, meeting in groups, sharing links."""

    def __init__(
        self,
        machine: Machine,
        layout: Layout,
        analytic: Prediction,
        wanted: Perturbation,
        unfold: bool,
        watch: Callable[[Span], None] | None,
    ) -> None:
        self.machine = machine
        self.layout = layout
        self.wanted = wanted
        self.watch = watch
        self.topology = Topology(machine, wanted.faults)
        self.analytic_links = GroupLinks(machine, layout)
        self.plan: Schedule = schedule(machine, layout, analytic.program, self.analytic_links)
        self.speed = wanted.speed(self.topology)
        if machine.slices > 1:
            dcn = self.topology.rates.reshape(-1, self.topology.ports)[:, self.topology.dcn_port]
            dcn /= wanted.dcn_congestion
        self.groups, legs = self._groups()
        stages = len(self.plan.scripts)
        self.stage = np.zeros(self.topology.devices, dtype=np.int64)
        if stages > 1:
            self.stage = self.groups["pipeline"].places()
        kinds = np.unique(self.speed, return_inverse=True)[1] * stages + self.stage
        self.folded: Fold = fold(
            self.topology, self.groups, legs, kinds, unfold or wanted.jitter > 0
        )
        self.env = Clock()
        self.links = Links(self.env, self.topology.rates[self.folded.links])
        chip = machine.chip
        self.traveller = Traveller(
            self.env,
            self.folded,
            self.links,
            chip.hop_latency_s,
            chip.dcn_hop_latency_s,
            chip.collective_overhead_s,
            watch,
        )
        self.traffic: dict[Spec, Traffic] = {}
        self.waited: dict[Spec | str, float] = defaultdict(float)
        self.flown: dict[Spec | str, float] = defaultdict(float)
        self.counts: dict[Spec | str, float] = defaultdict(float)
        self.step_time_s = 0.0

    def _groups(self) -> tuple[dict[str, Groups], dict[str, tuple[str, ...]]]:
        found: dict[str, Groups] = {}
        legs: dict[str, tuple[str, ...]] = {}
        for role, wanted in self.plan.legs.items():
            item = Groups(self.topology, self.layout.role(role), role)
            names: set[str] = set()
            for entry in wanted:
                kind, at, stage = entry.partition("@")
                if at:
                    names |= leg_names(kind, item, stage)
                else:
                    names.add(entry)
            found[role] = item
            legs[role] = tuple(sorted(names))
        return found, legs

    def run(self) -> None:
        """Simulate the step."""
        self.streams = [Stream(self, number) for number in range(len(self.folded.devices))]
        chips = [self.env.process(stream.run()) for stream in self.streams]
        self.env.run()
        if any(chip.is_alive for chip in chips):
            raise RuntimeError(f"deadlock: chips wait for each other after {self.env.now:g} s")
        self.step_time_s = float(self.env.now)

    # Results.

    def uses(self, analytic: Prediction) -> tuple[CollectiveUse, ...]:
        """Return the collectives, summed as in the analytic prediction."""
        sums: dict[tuple[str, tuple[str, ...], str], Floats] = {}
        for spec, count in self.counts.items():
            if isinstance(spec, str):
                key: tuple[str, tuple[str, ...], str] = ("host-transfer", (), "activations")
                sent = 0.0
            else:
                key = (spec.kind, self.layout.mesh_axes(spec.role), spec.moves)
                sent = spec.sent_bytes
            row = np.array([sent * count, count, self.flown[spec], self.waited[spec]])
            sums[key] = sums.get(key, np.zeros(4)) + row
        for use in analytic.collectives:
            key = (use.kind, use.mesh_axes, use.purpose)
            if use.kind == "host-transfer" and key in sums:
                sums[key][0] = use.bytes_per_chip
        return collective_uses(sums)

    def contention(self) -> tuple[Contention, ...]:
        """Return who lost time to whom, longest first."""
        by_port: dict[tuple[str, str, str], float] = defaultdict(float)
        for (name, other, link), lost in self.links.contention.items():
            port = (name, other, self.link_name(link))
            by_port[port] = max(by_port[port], lost)
        found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for (name, other, link_name), lost in by_port.items():
            if lost >= CONTENTION_SHARE * self.step_time_s:
                found[name, other][link_name] = lost
        rows = [
            Contention(
                collective=name, other=other, links=tuple(sorted(lost)), lost_s=max(lost.values())
            )
            for (name, other), lost in found.items()
        ]
        return tuple(sorted(rows, key=lambda row: (-row.lost_s, row.collective, row.other)))

    def link_name(self, link: int) -> str:
        """Return the port of a class of links."""
        return self.topology.port_name(int(self.folded.links[link]) % self.topology.ports)

    def bubble_s(self) -> float:
        """Return the seconds in which a chip of the last stage waits for other stages."""
        last = [stream for stream in self.streams if stream.stage == len(self.plan.scripts) - 1]
        idle = sum(
            (stream.idle_s + self.step_time_s - stream.ended_s) * stream.weight for stream in last
        )
        return idle / sum(stream.weight for stream in last)

    def utilisation(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return of each port the busiest link's share of the step, and its bytes."""
        shares: dict[str, float] = {}
        carried: dict[str, float] = {}
        busy_s, bytes_off = self.links.busy_s, self.links.bytes_off
        for link in range(len(self.folded.links)):
            name = self.link_name(link)
            share = float(busy_s[link]) / self.step_time_s
            if share >= shares.get(name, 0.0):
                shares[name] = share
                carried[name] = float(bytes_off[link])
        return dict(sorted(shares.items())), dict(sorted(carried.items()))

    def classes(self) -> dict[str, int]:
        """Return how many classes of chips, links and groups were simulated."""
        return {
            "devices": len(self.folded.devices),
            "links": len(self.folded.links),
            "groups": sum(len(first) for first in self.folded.group_first.values()),
        }
