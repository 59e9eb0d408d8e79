"""A slice: chips on a torus (or behind a switch), several slices over the data-centre network.

A slice is named as the TPU compiler names it: `v4:8x8x16`, `v5e:16x16`, `2*v5p:8x8x8` (two
slices); `h100:8` is one node of eight, `16*h100:8` sixteen nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.machine.chip import Chip


@dataclass(frozen=True, kw_only=True)
class TorusAxis:
    """One physical axis of a slice, as seen by one device."""

    name: str  # "x", "y", "z"; "core" for the two devices of a chip; "node" for a switch
    length: int
    wrapped: bool
    bytes_per_s: float  # one direction of one link, divided among the devices of a chip
    hop_latency_s: float
    switched: bool = False  # all-to-all connected: every device sends at bytes_per_s to any other


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`slices` equal slices of `chip`s laid out as `shape`."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each torus axis
    slices: int = 1
    twisted: bool = False

    @property
    def name(self) -> str:
        """The canonical name, for example `2*v5p:8x8x8`."""
        count = f"{self.slices}*" if self.slices > 1 else ""
        twist = "_twisted" if self.twisted else ""
        return f"{count}{self.chip.name}:{'x'.join(map(str, self.shape))}{twist}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        count = self.slices
        for length in self.shape:
            count *= length
        return count

    @property
    def devices(self) -> int:
        """Devices, as the compiler counts them, of all slices."""
        return self.chips * self.chip.devices_per_chip
