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
from shardsim.simulate.collective import Span, Steps, Traveller
from shardsim.simulate.fluid import Links
from shardsim.simulate.folding import Fold, fold
from shardsim.simulate.groups import Groups
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.schedule import Host, Ring, Schedule, Spec, Start, Sync, Work, schedule
from shardsim.simulate.topology import Floats, Topology
from shardsim.simulate.traffic import Traffic, leg_names, traffic

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
        self.folded: Fold = fold(
            self.topology, self.groups, legs, self.speed, unfold or wanted.jitter > 0
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
                    names |= leg_names(kind, item, self.analytic_links[role], stage)
                else:
                    names.add(entry)
            found[role] = item
            legs[role] = tuple(sorted(names))
        return found, legs

    def run(self) -> None:
        """Simulate the step."""
        chips = [self.env.process(self._chip(n)) for n in range(len(self.folded.devices))]
        self.env.run()
        if any(chip.is_alive for chip in chips):
            raise RuntimeError(f"deadlock: chips wait for each other after {self.env.now:g} s")
        self.step_time_s = float(self.env.now)

    def _chip(self, number: int) -> Steps:
        """Run the whole schedule on one class of chips."""
        device = int(self.folded.devices[number])
        weight = float(self.folded.device_counts[number]) / self.topology.devices
        jitter = self.wanted.draws(device, len(self.plan.order))
        stream = _Stream(self, number, weight)
        gathers: dict[int, list[tuple[Spec, simpy.Event]]] = {}
        scatters: list[tuple[Spec, simpy.Event]] = []
        reductions: list[tuple[Spec, simpy.Event]] = []
        reduce_next: tuple[Spec, ...] = ()
        for place, which in enumerate(self.plan.order):
            unit = self.plan.units[which]
            unit_began = float(self.env.now)
            stream.slow = float(self.speed[device]) * jitter[place]
            issued = self.plan.issue.get(place, ())
            for later in issued:
                if later == place:
                    gathers[place] = [stream.start(spec) for spec in unit.prefetch]
            for spec, done in gathers.pop(place, ()):
                yield from stream.wait(spec, done)
            for later in issued:
                if later != place:
                    ahead = self.plan.units[self.plan.order[later]]
                    gathers[later] = [stream.start(spec) for spec in ahead.prefetch]
            if unit.phase in ("reduction", "update"):
                for spec, done in scatters:
                    yield from stream.wait(spec, done)
                scatters = []
                reductions += [stream.start(spec) for spec in reduce_next]
                reduce_next = ()
            if unit.phase == "update":
                for spec, done in reductions:
                    yield from stream.wait(spec, done)
            started: list[tuple[Spec, simpy.Event]] = []
            host: tuple[Host, simpy.Event] | None = None
            for op in unit.ops:
                if isinstance(op, Work):
                    yield from stream.work(op)
                elif isinstance(op, Sync):
                    yield from stream.wait(*stream.start(op.spec))
                elif isinstance(op, Start):
                    started.append(stream.start(op.spec))
                elif isinstance(op, Ring):
                    yield from stream.ring(op)
                else:
                    host = (op, self.env.timeout(op.time_s))
            if host is not None:
                yield from stream.wait(host[0].name, host[1], host[0].time_s)
            if unit.phase in ("forward", "backward"):
                for spec, done in scatters:
                    yield from stream.wait(spec, done)
                scatters = started
                reductions += [stream.start(spec) for spec in reduce_next]
                reduce_next = ()
            else:
                scatters += started
            reduce_next = (*reduce_next, *unit.reduce)
            if self.watch is not None:
                stream.note("unit", unit.name, unit_began, float(self.env.now))

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


class _Stream:
    """The compute stream of one class of chips."""

    def __init__(self, engine: StepEngine, number: int, weight: float) -> None:
        self.engine = engine
        self.env = engine.env
        self.number = number
        self.weight = weight
        self.slow = 1.0
        self.met = 0
        self.group = {role: engine.folded.group_of(role, number) for role in engine.groups}

    def work(self, op: Work) -> Steps:
        """Compute."""
        if self.engine.watch is not None:
            begin = float(self.env.now)
            for name, seconds in op.parts:
                self.note("compute", name, begin, begin + seconds * self.slow)
                begin += seconds * self.slow
        yield self.env.timeout(op.time_s * self.slow)

    def start(self, spec: Spec) -> tuple[Spec, simpy.Event]:
        """Meet the group for a collective."""
        engine, group = self.engine, self.group[spec.role]
        moved = engine.traffic.get(spec)
        if moved is None:
            moved = traffic(
                spec.kind,
                engine.groups[spec.role],
                engine.analytic_links[spec.role],
                spec.bytes,
                spec.stage,
            )
            engine.traffic[spec] = moved
        go = engine.traveller.collective(
            spec.role, group, spec.name, moved, spec.messages, spec.sent_bytes, spec.repeat
        )
        began = float(self.env.now)
        done = engine.traveller.meet(spec.role, group, self._key(), go)
        engine.counts[spec] += self.weight * spec.repeat

        def landed(_: simpy.Event) -> None:
            engine.flown[spec] += (float(self.env.now) - began) * self.weight

        assert done.callbacks is not None
        done.callbacks.append(landed)
        return spec, done

    def wait(self, spec: Spec | str, done: simpy.Event, flown_s: float | None = None) -> Steps:
        """Wait for what was started."""
        before = float(self.env.now)
        yield done
        self.engine.waited[spec] += (float(self.env.now) - before) * self.weight
        if flown_s is not None:
            self.engine.flown[spec] += flown_s * self.weight
            self.engine.counts[spec] += self.weight

    def ring(self, op: Ring) -> Steps:
        """Run a collective matmul: hops beside blocks."""
        engine = self.engine
        begin = float(self.env.now)
        role, group, name = op.spec.role, self.group[op.spec.role], op.spec.name
        both = engine.traveller.hop(role, group, name, op.leg, op.hop_bytes)
        one = engine.traveller.hop(role, group, name, "ring+", op.hop_bytes)
        if op.before:
            yield engine.traveller.meet(role, group, self._key(), one)
        blocks_s = op.block_s * op.blocks * self.slow
        for number in range(op.rounds):
            hop = None
            if op.beside_last or number < op.rounds - 1:
                hop = engine.traveller.meet(role, group, self._key(), both)
            if engine.watch is not None:
                now = float(self.env.now)
                self.note("compute", f"{op.partners}, blocks", now, now + blocks_s)
            yield self.env.timeout(blocks_s)
            if hop is not None:
                yield hop
        if op.after:
            yield engine.traveller.meet(role, group, self._key(), one)
        passed = float(self.env.now) - begin
        if engine.watch is not None:
            self.note(role, name, begin, begin + passed, group)
        engine.waited[op.spec] += (passed - op.whole_s * self.slow) * self.weight
        engine.flown[op.spec] += passed * self.weight
        engine.counts[op.spec] += self.weight

    def _key(self) -> int:
        self.met += 1
        return self.met

    def note(
        self, role: str, name: str, start_s: float, end_s: float, group: int | None = None
    ) -> None:
        """Tell who watches."""
        if self.engine.watch is not None:
            number = self.number if group is None else group
            span = Span(name=name, role=role, group=number, start_s=start_s, end_s=end_s, bytes=0.0)
            self.engine.watch(span)
