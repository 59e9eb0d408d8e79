"""A slice as the TPU compiler wants it described.

Checked with libtpu 0.0.42.1: `chip_config_name="megacore"` makes one device of the two cores of a
v4 or v5p chip; `num_slices` gives devices a `slice_index`; twisted tori need `wrap` on all axes;
slices smaller than a host need `chips_per_host_bounds`.
"""

from __future__ import annotations

import math
from typing import Any

from shardsim.errors import HardwareError
from shardsim.machine import Machine

HOST_BOUNDS = (2, 2, 1)


def topology_options(machine: Machine) -> dict[str, Any]:
    """Return the arguments of `jax.experimental.topologies.get_topology_desc` for `machine`.

    >>> from shardsim.machine import parse_machine
    >>> topology_options(parse_machine("2*v5p:2x2x4"))
    {'topology_name': 'v5p:2x2x4', 'chip_config_name': 'megacore', 'num_slices': 2}
    """
    chip = machine.chip
    if chip.kind != "tpu":
        raise HardwareError(f"{machine.name}: the TPU compiler knows only TPUs, not {chip.title}")
    twist = "_twisted" if machine.twisted else ""
    options: dict[str, Any] = {
        "topology_name": f"{chip.name}:{'x'.join(map(str, machine.shape))}{twist}"
    }
    if chip.cores_per_chip == 2 and chip.devices_per_chip == 1:
        options["chip_config_name"] = "megacore"
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    if machine.twisted:
        options["wrap"] = [True, True, True]
    if machine.chips_per_slice < math.prod(HOST_BOUNDS):
        options["chips_per_host_bounds"] = [*machine.shape, *[1] * (3 - len(machine.shape))]
    return options
