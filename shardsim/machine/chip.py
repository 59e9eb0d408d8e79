"""One chip: what it computes, holds and moves per second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A figure that was fitted to runs, and what it was fitted to."""

    name: str
    value: float
    fitted_to: str


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip of one generation. All figures are per chip unless the name says otherwise.

    A chip shows itself to the compiler as `devices_per_chip` devices (v2, v3 and tpu7x: two;
    v4 and v5p join their two cores into one, "megacore"). Rates are peaks; what is sustained is
    the peak times the `*_efficiency` of the same resource.
    """

    name: str  # as in slice names: "v4"
    title: str  # "TPU v4"
    kind: str  # "tpu" or "gpu"
    aliases: tuple[str, ...] = ()  # vendor's spellings: ("v5litepod", "v5lite")
    cores_per_chip: int
    devices_per_chip: int
    names_count: str  # what vendor names such as v4-128 count: "cores" or "chips"

    # Compute.
    peak_flops: Mapping[str, float]  # matrix unit, FLOP/s by dtype: bf16 always; int8, fp8 or not
    mxu_dim: int  # side of the systolic array: 128 or 256
    vector_flops: float  # vector unit, float32 FLOP/s
    clock_hz: float | None

    # Memory.
    hbm_bytes: float  # as sold
    hbm_usable_bytes: float  # as the compiler offers it
    hbm_bytes_per_s: float
    onchip_bytes: float  # software-managed memory that a matmul streams through (VMEM)

    # Links inside a slice. A torus has `torus_dims` axes; a switch joins all chips of a node.
    interconnect: str  # "torus" or "switch"
    torus_dims: int  # 2, 3; 1 for a switch
    link_bytes_per_s: float  # one link, one way; for a switch what one chip sends
    hop_latency_s: float
    die_to_die_bytes_per_s: float | None  # between the two devices of one chip, one way
    wrap: str  # "cube4": every axis from 4x4x4 up; "length16": an axis of 16; "full"; "none"
    max_slice: tuple[int, ...]  # longest allowed length of each axis, sorted ascending
    twistable: bool  # whether k x k x 2k and k x 2k x 2k slices may be twisted
    chips_per_host: int
    host_shape: tuple[int, ...]
    pcie_bytes_per_s: float | None  # chip to host, one way

    # Network between slices (for GPUs: between nodes), per chip, one way.
    dcn_bytes_per_s: float
    dcn_hop_latency_s: float

    # Sustained fractions of the peaks, and fixed costs.
    matmul_efficiency: float
    hbm_efficiency: float
    link_efficiency: float
    dcn_efficiency: float
    op_overhead_s: float  # start of one compiled operation
    collective_overhead_s: float  # start of one collective

    constants: tuple[Constant, ...] = ()  # the fitted ones among the figures above
    figures: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    # ^ the file as read: name -> {value, source, status, note}, for printing with sources

    def peak(self, dtype: str) -> float:
        """Return the matrix unit's FLOP/s for `dtype`; what it lacks runs as bf16.

        float32 inputs run as bf16 too: that is what TPUs do by default.
        """
        return self.peak_flops.get(dtype, self.peak_flops["bf16"])
