"""The engine of a step: classes of chips as processes, meeting in groups, sharing links."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardsim.machine import Machine
from shardsim.memory import no_collections
from shardsim.simulate.chip import Chip
from shardsim.simulate.clock import Clock
from shardsim.simulate.collective import Course, Span, Traveller
from shardsim.simulate.fluid import Links
from shardsim.simulate.folding import Fold, fold
from shardsim.simulate.groups import Groups
from shardsim.simulate.operations import Spec
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.topology import Ints, Topology
from shardsim.simulate.traffic import traffic

# Contention is reported where one collective loses at least this share of the step to another.
CONTENTION_SHARE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Time that one collective lost to another on a kind of link."""

    collective: str
    other: str
    links: tuple[str, ...]  # "y+", "y-"
    lost_s: float  # on the chips concerned, over the step


class Engine:
    """One run: classes of chips as processes, meeting in groups, sharing links."""

    def __init__(
        self, machine: Machine, wanted: Perturbation, watch: Callable[[Span], None] | None
    ) -> None:
        self.machine = machine
        self.wanted = wanted
        self.watch = watch
        self.topology = Topology(machine, wanted.faults)
        self.speed = wanted.speed(self.topology)
        if machine.slices > 1:
            dcn = self.topology.rates.reshape(-1, self.topology.ports)[:, self.topology.dcn_port]
            dcn /= wanted.dcn_congestion
        self.clock = Clock()
        self._courses: dict[tuple[Spec, int], Course] = {}
        self.waited: dict[Spec | str, float] = defaultdict(float)
        self.flown: dict[Spec | str, float] = defaultdict(float)
        self.counts: dict[Spec | str, float] = defaultdict(float)
        self.step_time_s = 0.0

    def lay(
        self,
        groups: dict[str, Groups],
        legs: dict[str, tuple[str, ...]],
        kinds: Ints,
        unfold: bool,
    ) -> None:
        """Find the classes of chips; those of different `kinds` run different scripts."""
        self.groups = groups
        kinds = np.unique(self.speed, return_inverse=True)[1] * (kinds.max() + 1) + kinds
        self.folded: Fold = fold(
            self.topology, groups, legs, kinds, unfold or self.wanted.jitter > 0
        )
        self.links = Links(self.clock, self.topology.rates[self.folded.links])
        chip = self.machine.chip
        self.traveller = Traveller(
            self.clock,
            self.folded,
            self.links,
            chip.hop_latency_s,
            chip.dcn_hop_latency_s,
            chip.collective_overhead_s,
            chip.permute_gain,
            self.watch,
        )

    def play(self, chips: Sequence[Chip]) -> None:
        """Simulate the step."""
        for chip in chips:
            self.clock.process(chip.run())
        with no_collections():
            self.clock.run()
        if self.clock.unfinished:
            raise RuntimeError(f"deadlock: chips wait for each other after {self.clock.now:g} s")
        # The clock may be later: timers of transfers that went on faster than they began.
        self.step_time_s = max(chip.ended_s for chip in chips)

    def course(self, spec: Spec, group: int) -> Course:
        """Return what a class of groups does for a collective."""
        course = self._courses.get((spec, group))
        if course is None:
            groups = self.groups[spec.role]
            moved = traffic(spec.kind, groups, spec.bytes, spec.stage, spec.shifts)
            alone = self.traveller.collective(
                spec.role, group, spec.name, moved, spec.messages, spec.sent_bytes, spec.repeat
            )
            course = self._courses[spec, group] = replace(alone, queue=spec.queue)
        return course

    def where(self, role: str) -> str:
        """Return the mesh axes of a role's groups in words."""
        raise NotImplementedError

    def layers(self) -> tuple[str, ...]:
        """Return the names of the units that a picture of one layer shows."""
        raise NotImplementedError

    # Results.

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
