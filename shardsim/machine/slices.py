"""A slice: chips on a torus (or behind a switch), several slices over the data-centre network.

A slice is named as the TPU compiler names it: `v4:8x8x16`, `v5e:16x16`, `2*v5p:8x8x8` (two
slices); `h100:8` is one node of eight, `16*h100:8` sixteen nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardsim.errors import HardwareError
from shardsim.machine.chip import Chip
from shardsim.machine.shapes import can_twist, wrapped_axes
from shardsim.units import show_bytes


@dataclass(frozen=True, kw_only=True)
class TorusAxis:
    """One physical axis of a slice, as seen by one device."""

    name: str  # "x", "y", "z"; "core" for the two devices of a chip; "node" for a switch
    length: int
    wrapped: bool
    bytes_per_s: float  # one direction of one link, divided among the devices of a chip
    hop_latency_s: float
    switched: bool = False  # all-to-all connected: every device sends at bytes_per_s to any other


@dataclass(frozen=True, kw_only=True, repr=False)
class Machine:
    """`slices` equal slices of `chip`s laid out as `shape`."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each torus axis
    slices: int = 1
    twisted: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no slice at all; `parse_machine` also refuses what no vendor offers."""
        axes = self.chip.torus_dims
        if len(self.shape) != axes:
            what = f"{axes} axes" if axes > 1 else "one number, the chips of a node"
            raise HardwareError(f"{self.name}: a slice of {self.chip.name} has {what}")
        if self.slices < 1 or any(length < 1 for length in self.shape):
            raise HardwareError(f"{self.name}: every axis and the number of slices must be >= 1")
        if self.twisted and not can_twist(self.chip, self.shape):
            raise HardwareError(
                f"{self.name}: only k x k x 2k and k x 2k x 2k slices (k = 4, 8, ...) of chips with"
                " optical switches can be twisted, as in v4:8x8x16_twisted"
            )

    def __repr__(self) -> str:
        return f"Machine({self.name!r}: {self.chips:,} chips)"

    @property
    def name(self) -> str:
        """The canonical name, for example `2*v5p:8x8x8`."""
        count = f"{self.slices}*" if self.slices != 1 else ""
        twist = "_twisted" if self.twisted else ""
        return f"{count}{self.chip.name}:{'x'.join(map(str, self.shape))}{twist}"

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def devices_per_slice(self) -> int:
        """Devices, as the compiler counts them, of one slice."""
        return self.chips_per_slice * self.chip.devices_per_chip

    @property
    def permutes_wait(self) -> bool:
        """Whether the compiler makes no permute asynchronous."""
        most = self.chip.async_permute_chips
        return most is not None and self.chips_per_slice > most

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.chips_per_slice

    @property
    def devices(self) -> int:
        """Devices, as the compiler counts them, of all slices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Host machines of all slices."""
        return self.slices * math.ceil(self.chips_per_slice / self.chip.chips_per_host)

    @property
    def axes(self) -> tuple[TorusAxis, ...]:
        """The physical axes of one slice in order; their lengths multiply to its devices.

        A chip of two devices (v2, v3, tpu7x) adds a last axis `core` of length 2. Its devices
        share the chip's links, so each gets half of them.
        """
        chip = self.chip
        switched = chip.interconnect == "switch"
        names = ["node"] if switched else ["x", "y", "z"][: len(self.shape)]
        wraps = wrapped_axes(chip, self.shape)
        axes = [
            TorusAxis(
                name=name,
                length=length,
                wrapped=wrapped,
                bytes_per_s=chip.link_bytes_per_s / chip.devices_per_chip,
                hop_latency_s=chip.hop_latency_s,
                switched=switched,
            )
            for name, length, wrapped in zip(names, self.shape, wraps, strict=True)
        ]
        if chip.devices_per_chip == 2 and chip.die_to_die_bytes_per_s is not None:
            core = TorusAxis(
                name="core",
                length=2,
                wrapped=False,
                bytes_per_s=chip.die_to_die_bytes_per_s,
                hop_latency_s=chip.hop_latency_s,
            )
            axes.append(core)
        return tuple(axes)

    def describe(self) -> str:
        """Return one line that says what the machine is.

        >>> from shardsim.machine import parse_machine
        >>> parse_machine("v5e:8x16").describe()
        'v5e:8x16: 128 TPU v5e chips, 16 hosts, torus 8x16 (y wraps), 15.75 GiB HBM per device'
        """
        chip = self.chip
        devices = f" ({self.devices:,} devices)" if self.devices != self.chips else ""
        each = f" in {self.slices:,} slices" if self.slices > 1 else ""
        if chip.interconnect == "switch":
            each = ""
            form = f"{self.chips_per_slice} to a switch"
            hosts = f"{self.slices:,} node{'s' if self.slices > 1 else ''}"
        else:
            ring = [axis.name for axis in self.axes if axis.wrapped]
            torus = [axis.name for axis in self.axes if axis.name != "core"]
            wraps = " and ".join(ring) + (" wrap" if len(ring) > 1 else " wraps")
            wraps = "no axis wraps" if not ring else "all axes wrap" if ring == torus else wraps
            twist = "twisted torus" if self.twisted else "torus"
            form = f"{twist} {'x'.join(map(str, self.shape))} ({wraps})"
            hosts = f"{self.hosts:,} host{'s' if self.hosts > 1 else ''}"
        noun = {"tpu": "chip", "gpu": "GPU", "cpu": "device"}[chip.kind]
        plural = "s" if self.chips > 1 else ""
        return (
            f"{self.name}: {self.chips:,} {chip.title} {noun}{plural}{devices}{each}, {hosts}, "
            f"{form}, {show_bytes(chip.hbm_usable_bytes_per_device)} HBM per device"
        )
