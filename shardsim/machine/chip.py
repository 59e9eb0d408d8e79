"""One chip: what it computes, holds and moves per second."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from shardsim.errors import HardwareError, shown
from shardsim.machine.kernels import Kernels
from shardsim.machine.op_costs import OpCosts

if TYPE_CHECKING:
    import numpy as np

# What the fields of a chip hold, for checking and for overriding. Numbers are plain SI.
RATES = (
    "vector_flops",
    "clock_hz",
    "hbm_bytes",
    "hbm_usable_bytes",
    "hbm_bytes_per_s",
    "onchip_bytes",
    "link_bytes_per_s",
    "die_to_die_bytes_per_s",
    "pcie_bytes_per_s",
    "host_bytes",
    "dcn_bytes_per_s",
)
TIMES = ("hop_latency_s", "dcn_hop_latency_s", "op_overhead_s", "collective_overhead_s")
EFFICIENCIES = (
    "matmul_efficiency",
    "hbm_efficiency",
    "link_efficiency",
    "permute_efficiency",
    "dcn_efficiency",
)
COUNTS = ("cores_per_chip", "devices_per_chip", "mxu_dim", "torus_dims", "chips_per_host")
OPTIONAL = (
    "clock_hz",
    "die_to_die_bytes_per_s",
    "pcie_bytes_per_s",
    "host_bytes",
    "permute_efficiency",
)
WORDS = {
    "kind": ("tpu", "gpu", "cpu"),
    "names_count": ("cores", "chips"),
    "interconnect": ("torus", "switch"),
    "wrap": ("cube4", "length16", "full", "none"),
}
SWITCHES = ("twistable", "offloads_collectives", "products_apart", "heads_as_columns")
DTYPES = ("bf16", "int8", "fp8", "int4")

# The TPU compiler's option for the on-chip memory that one operation may take.
SCOPED_VMEM_KIB = "xla_tpu_scoped_vmem_limit_kib"


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A figure that was fitted to runs, and what it was fitted to."""

    name: str
    value: float
    fitted_to: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Chip:
    """A chip of one generation. All figures are per chip unless the name says otherwise.

    A chip shows itself to the compiler as `devices_per_chip` devices (v2, v3 and tpu7x: two;
    v4 and v5p join their two cores into one, "megacore"). Rates are peaks; what is sustained is
    the peak times the `*_efficiency` of the same resource.
    """

    name: str  # as in slice names: "v4"
    title: str  # "TPU v4"
    kind: str  # "tpu", "gpu", or "cpu" (host devices)
    aliases: tuple[str, ...] = ()  # vendor's spellings: ("v5litepod", "v5lite")
    cores_per_chip: int
    devices_per_chip: int
    names_count: str  # what vendor names such as v4-128 count: "cores" or "chips"

    # Compute.
    peak_flops: Mapping[str, float] = field(hash=False)
    # ^ matrix unit, FLOP/s by dtype: bf16 always; int8, fp8 or not
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
    max_slice: tuple[int, ...]  # the largest slice, axes ascending; its product is the pod
    twistable: bool  # whether k x k x 2k and k x 2k x 2k slices may be twisted
    chips_per_host: int
    host_shape: tuple[int, ...]
    pcie_bytes_per_s: float | None  # chip to host, one way
    host_bytes: float | None  # memory of a host, which its chips share

    # Network between slices (for GPUs: between nodes), per chip, one way.
    dcn_bytes_per_s: float
    dcn_hop_latency_s: float

    # Sustained fractions of the peaks, and fixed costs.
    matmul_efficiency: float
    hbm_efficiency: float
    link_efficiency: float
    permute_efficiency: float | None  # of links in a permute, where it was measured apart
    dcn_efficiency: float
    op_overhead_s: float  # start of one compiled operation
    collective_overhead_s: float  # start of one collective

    compiler: OpCosts | None = None  # learned from a compiler's estimates
    compilers: tuple[OpCosts, ...] = ()
    # ^ with `scoped_vmem_bytes` for one operation, and with the compiler's own limit
    kernels: Kernels | None = None  # of a GPU: measured

    constants: tuple[Constant, ...] = ()  # the fitted ones among the figures above
    figures: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    # ^ the file as read: name -> {value, source, status, note}, for printing with sources

    def __post_init__(self) -> None:
        """Refuse values that no machine can have; the message names chip and field."""
        for name, problem in _problems(self):
            raise HardwareError(f"chip {self.name}: {name} {problem}")

    @property
    def permute_gain(self) -> float:
        """How much faster links are for a permute to neighbours than for other collectives."""
        return (self.permute_efficiency or self.link_efficiency) / self.link_efficiency

    def __repr__(self) -> str:
        peak, hbm = self.peak_flops["bf16"] / 1e12, self.hbm_bytes / 2**30
        return f"Chip({self.name!r}: {peak:g} TFLOP/s bf16, {hbm:.0f} GiB)"

    def times(self, factors: Mapping[str, np.ndarray[Any, Any]]) -> Chip:
        """Return the chip with figures times arrays: many chips at once, for the cost formulas."""
        other = copy.copy(self)
        for name, factor in factors.items():
            now = getattr(self, name)
            many = isinstance(now, Mapping)
            values = {key: one * factor for key, one in now.items()} if many else now * factor
            object.__setattr__(other, name, values)  # not checked: no file says arrays
        return other

    def peak(self, dtype: str) -> float:
        """Return the matrix unit's FLOP/s for `dtype`; what it lacks runs as bf16.

        float32 inputs run as bf16 too: that is what TPUs do by default.
        """
        return self.peak_flops.get(dtype, self.peak_flops["bf16"])

    @property
    def hbm_usable_bytes_per_device(self) -> float:
        """What the compiler offers one device; on v2, v3 and tpu7x half of the chip's."""
        return self.hbm_usable_bytes / self.devices_per_chip

    @property
    def host_bytes_per_device(self) -> float:
        """A device's share of its host's memory; infinite where that is not known."""
        if self.host_bytes is None:
            return math.inf
        return self.host_bytes / self.chips_per_host / self.devices_per_chip

    @property
    def async_permute_chips(self) -> float | None:
        """The chips of the largest slice on which work may run beside a permute, or None: any."""
        return self._extra("async_permute_chips")

    @property
    def scoped_vmem_bytes(self) -> float | None:
        """What one operation may take of on-chip memory in the emitted step, or None: what the
        compiler gives it by itself."""
        return self._extra("scoped_vmem_bytes")

    def compiled_with(self, options: Mapping[str, str]) -> Chip:
        """Return the chip with its compiler's estimates under `options` (a plan's).

        An `xla_tpu_scoped_vmem_limit_kib` below `scoped_vmem_bytes` brings those that hold for the
        compiler's own limit.
        """
        if not self.compilers:
            return self
        limit = options.get(SCOPED_VMEM_KIB, "")
        small = limit.isdecimal() and float(limit) * 1024 < (self.scoped_vmem_bytes or 0.0)
        found = self.compilers[1 if small else 0]
        return self if found is self.compiler else replace(self, compiler=found)

    @property
    def offloads_collectives(self) -> bool:
        """Whether its compiler hands gathers and scatters to another core (a SparseCore)."""
        return bool(self._extra("offloads_collectives"))

    @property
    def products_apart(self) -> bool:
        """Whether the emitted step keeps its compiler from joining two products into one loop."""
        return bool(self._extra("products_apart"))

    @property
    def heads_as_columns(self) -> bool:
        """Whether the emitted step keeps its compiler from multiplying heads one by one."""
        return bool(self._extra("heads_as_columns"))

    @property
    def sparse_gain(self) -> float:
        """How many times faster it multiplies by a matrix of which two of four numbers in a row are
        zero; 1 where it multiplies zeros as it does others."""
        return self._extra("sparse_gain") or 1.0

    def _extra(self, name: str) -> float | None:
        figure = self.figures.get(name)
        return None if figure is None else float(figure["value"])


def problem_with(name: str, value: object) -> str | None:
    """Return what is wrong with `value` as the figure `name` of a chip, or None.

    >>> problem_with("hbm_efficiency", 1.2)
    'must be above 0 and at most 1, not 1.2'
    """
    if isinstance(value, int) and abs(value) > 10**300:
        return "is too large"
    if name in WORDS:
        words = WORDS[name]
        return None if value in words else f"must be one of {', '.join(words)}, not {shown(value)}"
    if name in SWITCHES:
        return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"
    if name in ("max_slice", "host_shape"):
        good = isinstance(value, (tuple, list)) and value and all(_is_count(item) for item in value)
        return None if good else f"must be a list of positive whole numbers, not {shown(value)}"
    if name in COUNTS:
        return None if _is_count(value) else f"must be a positive whole number, not {shown(value)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"must be a number, not {shown(value)}"
    if name in EFFICIENCIES:
        return None if 0 < value <= 1 else f"must be above 0 and at most 1, not {value:g}"
    if name in TIMES:
        good = 0 <= value < math.inf
        return None if good else f"must be zero or positive and finite, not {value:g}"
    return None if 0 < value < math.inf else f"must be positive and finite, not {value:g}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6


def _problems(chip: Chip) -> list[tuple[str, str]]:
    """Return (field, what is wrong with it) for all that is wrong with `chip`."""
    found = []
    for item in fields(chip):
        value = getattr(chip, item.name)
        checked = item.name in (*RATES, *TIMES, *EFFICIENCIES, *COUNTS, *WORDS)
        if item.name in ("max_slice", "host_shape", "twistable"):
            checked = True
        if not checked or (value is None and item.name in OPTIONAL):
            continue
        problem = problem_with(item.name, value)
        if problem:
            found.append((item.name, problem))
    if "bf16" not in chip.peak_flops:
        found.append(("peak_flops", "must have bf16"))
    for dtype, value in chip.peak_flops.items():
        problem = problem_with("peak_flops", value)
        if problem:
            found.append((f"peak_flops.{dtype}", problem))
    if found:
        return found
    if chip.hbm_usable_bytes > chip.hbm_bytes:
        found.append(("hbm_usable_bytes", "must not exceed hbm_bytes"))
    if chip.interconnect == "switch" and chip.torus_dims != 1:
        found.append(("torus_dims", f"must be 1 behind a switch, not {chip.torus_dims}"))
    if chip.interconnect == "torus" and chip.torus_dims not in (2, 3):
        found.append(("torus_dims", f"must be 2 or 3 for a torus, not {chip.torus_dims}"))
    if len(chip.max_slice) != chip.torus_dims:
        found.append(("max_slice", f"must have {chip.torus_dims} axes, as torus_dims says"))
    if chip.wrap == "cube4" and chip.torus_dims != 3:
        found.append(("wrap", "cube4 needs three torus axes"))
    if chip.devices_per_chip > 2:
        found.append(("devices_per_chip", f"must be 1 or 2, not {chip.devices_per_chip}"))
    if chip.devices_per_chip == 2 and chip.die_to_die_bytes_per_s is None:
        found.append(("die_to_die_bytes_per_s", "must be given for a chip of two devices"))
    return found
