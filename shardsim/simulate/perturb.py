"""What is not as it should be: slow chips, jitter, slow and dead links, a busy DCN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shardsim.errors import HardwareError
from shardsim.simulate.topology import Fault, Floats, Topology

LARGEST_FACTOR = 1e6  # of a slowdown, so that times stay finite
LARGEST_JITTER = 10.0  # relative standard deviation


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Departures from a healthy machine. Devices are numbered slice by slice, last axis fastest."""

    slowdowns: tuple[tuple[int, float], ...] = ()  # (device, factor on all its compute time)
    faults: tuple[Fault, ...] = ()
    broken: tuple[int, ...] = ()  # devices out of order, with all their wires
    jitter: float = 0.0  # relative standard deviation of a device's time for one layer
    dcn_congestion: float = 1.0  # what divides every chip's DCN rate
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter <= LARGEST_JITTER:
            raise HardwareError(f"jitter must be 0 to {LARGEST_JITTER:g}, not {self.jitter:g}")
        if not 1 <= self.dcn_congestion <= LARGEST_FACTOR:
            raise HardwareError(
                f"dcn_congestion must be 1 to {LARGEST_FACTOR:,.0f}, not {self.dcn_congestion:g}"
            )
        for device, factor in self.slowdowns:
            if not 1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR:
                raise HardwareError(
                    f"device {device}: the slowdown must be positive and at most "
                    f"{LARGEST_FACTOR:,.0f}, not {factor:g}"
                )

    def also(
        self,
        *,
        straggler: tuple[int, float] | None,
        dead_link: tuple[int, int] | None,
        jitter: float | None,
        seed: int,
    ) -> Perturbation:
        """Return this with a straggler, a dead link or jitter added."""
        result = self
        if straggler is not None:
            result = replace(result, slowdowns=(*result.slowdowns, straggler))
        if dead_link is not None:
            fault = Fault(device=dead_link[0], port=dead_link[1])
            result = replace(result, faults=(*result.faults, fault))
        if jitter is not None:
            result = replace(result, jitter=jitter, seed=seed)
        return result

    def speed(self, topology: Topology) -> Floats:
        """Return the factor on every device's compute time."""
        factors = np.ones(topology.devices)
        for device, factor in self.slowdowns:
            topology.check_device(device)
            factors[device] *= factor
        return factors

    def draws(self, device: int, count: int) -> list[float]:
        """Return `count` factors for one device: 1 + |normal|, as interference only delays."""
        if self.jitter == 0:
            return [1.0] * count
        normal = np.random.default_rng([self.seed, device]).standard_normal(count)
        return [float(value) for value in 1.0 + self.jitter * np.abs(normal)]
