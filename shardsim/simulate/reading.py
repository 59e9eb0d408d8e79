"""What-ifs as people write them: chips by their place, links by their two ends.

A chip is its coordinates (`3,0,5`), in a machine of several slices with the slice in front
(`1:3,0,5`), or its number (`197`): slice by slice, the last axis fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardsim.errors import HardwareError
from shardsim.machine import Machine, parse_machine
from shardsim.plan.io import PlanOrPath, as_plan
from shardsim.plan.plan import Plan
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.topology import Fault, Topology


def what_if(
    machine: Machine | str,
    *,
    stragglers: Sequence[str] = (),
    dead_links: Sequence[str] = (),
    slow_links: Sequence[str] = (),
    dead_chips: Sequence[str] = (),
    jitter: float = 0.0,
    seed: int = 0,
    slow_dcn: float = 1.0,
) -> Perturbation:
    """Return departures from a healthy machine.

    `stragglers` are CHIP=FACTOR (1.1: 10 % longer for all that it computes), `dead_links` A-B,
    `slow_links` A-B=SHARE of the rate, `jitter` the relative standard deviation of a chip's time
    for a layer, `slow_dcn` the share of its rate that the DCN gives.

    >>> what_if("v4:4x4x4", stragglers=["0,1,0=1.2"]).slowdowns
    ((4, 1.2),)
    """
    machine = parse_machine(machine) if isinstance(machine, str) else machine
    topology = Topology(machine)
    slowdowns = []
    for text in stragglers:
        chip, factor = _assigned(text, "--straggler 3,0,5=1.1")
        slowdowns += [(device, factor) for device in _devices(topology, chip)]
    faults: list[Fault] = []
    for text in dead_links:
        faults += _faults(topology, text, 0.0)
    for text in slow_links:
        link, share = _assigned(text, "--slow-link 0,0,0-1,0,0=0.5")
        if not 0 < share <= 1:
            raise HardwareError(
                f"'{text[:80]}': the share of a link's rate must be above 0 and at most 1"
            )
        faults += _faults(topology, link, share)
    if slow_dcn != 1 and machine.slices == 1:
        raise HardwareError(f"{machine.name} is one slice and uses no DCN")
    if not 0 < slow_dcn <= 1:
        raise HardwareError(
            f"the DCN's share of its rate must be above 0 and at most 1, not {slow_dcn:g}"
        )
    return Perturbation(
        slowdowns=tuple(slowdowns),
        faults=tuple(faults),
        broken=tuple(device for text in dead_chips for device in _devices(topology, text)),
        jitter=jitter,
        seed=seed,
        dcn_congestion=1.0 / slow_dcn,
    )


def twisted(plan: PlanOrPath) -> Plan:
    """Return `plan` on the twisted torus of the same shape."""
    plan = as_plan(plan)
    return replace(plan, machine=replace(plan.machine, twisted=True))


def _assigned(text: str, example: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise HardwareError(f"'{text[:80]}': expected a number after '=', as in {example}")
    return name, number


def _devices(topology: Topology, text: str) -> list[int]:
    """Return the devices of the chip that `text` names."""
    machine = topology.machine
    shape = (machine.slices, *machine.shape)
    number, colon, rest = text.partition(":")
    words = [number if colon else "0", *(rest if colon else text).split(",")]
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        words = []
    places = [int(word) for word in words if len(word.strip()) < 10]
    chip = -1
    if len(places) == 2 and not colon and places[1] < math.prod(shape):
        chip = places[1]
    elif len(places) == len(shape) and all(a < b for a, b in zip(places, shape, strict=True)):
        chip = int(np.ravel_multi_index(places, shape))
    if chip < 0:
        last = ",".join(str(length - 1) for length in machine.shape)
        first = ",".join("0" * len(machine.shape))
        slices = f" (of slice 1: 1:{first})" if machine.slices > 1 else ""
        raise HardwareError(
            f"'{text[:80]}' is no chip of {machine.name}; its chips are {first} to {last}{slices}, "
            f"or 0 to {machine.chips - 1}"
        )
    each = machine.devices // machine.chips
    return list(range(chip * each, (chip + 1) * each))


def _faults(topology: Topology, text: str, factor: float) -> list[Fault]:
    """Return the wire between the two chips that `text` names, for each of their devices."""
    one, dash, other = text.partition("-")
    if not dash:
        raise HardwareError(f"'{text[:80]}': a link is two neighbours, as in 0,0,0-1,0,0")
    ends = zip(_devices(topology, one), _devices(topology, other), strict=True)
    found = []
    for source, target in ends:
        ports = np.nonzero(topology.neighbour[source, : topology.dcn_port] == target)[0]
        if source == target or not len(ports):
            raise HardwareError(f"'{text[:80]}': {topology.machine.name} has no such link")
        found.append(Fault(device=source, port=int(ports[0]), factor=factor))
    return found
