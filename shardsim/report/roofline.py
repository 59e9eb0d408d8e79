"""Every matmul of a plan against the roofline of its chip."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from shardsim.cost.costs import peak_of
from shardsim.cost.predict import Prediction
from shardsim.machine import Chip
from shardsim.views.table import Column, Table, table


@dataclass(frozen=True, kw_only=True)
class MatmulPoint:
    """One matmul of the step: `count` products `[m, k] x [k, n]` (times `batch`) on one device."""

    name: str
    group: str  # what it belongs to: see `GROUPS`
    shape: str  # "131,072 x 6,144 x 5,376"
    count: float
    time_s: float  # of one, start and waiting for HBM included
    step_s: float  # of all in a step
    flops_per_s: float  # achieved
    flops_per_byte: float  # of HBM
    roof_flops_per_s: float  # what peak and HBM bandwidth allow at that intensity
    peak_flops_per_s: float

    @property
    def of_peak(self) -> float:
        """Achieved rate as a fraction of the matrix unit's peak."""
        return self.flops_per_s / self.peak_flops_per_s

    @property
    def bound(self) -> str:
        """What the roof is at this intensity."""
        return "HBM" if self.roof_flops_per_s < self.peak_flops_per_s else "matrix unit"


GROUPS = (
    "forward",
    "recomputed",
    "input gradients",
    "weight gradients (dW)",
    "attention",
    "embedding and head",
)


def device_peaks(chip: Chip, dtype: str) -> tuple[float, float]:
    """Return peak FLOP/s and HBM bytes/s of one device."""
    devices = chip.devices_per_chip
    return chip.peak(dtype) / devices, chip.hbm_bytes_per_s / devices


def matmul_points(item: Prediction) -> tuple[MatmulPoint, ...]:
    """Return every matmul that the step runs, the longest of all its runs first."""
    points = []
    for cost in item.price.computes:
        task, count = cost.task, float(cost.count)
        if count == 0 or float(task.flops) == 0:
            continue
        chip = item.plan.machine.chip
        bandwidth = device_peaks(chip, task.dtype)[1]
        peak = peak_of(chip, task) / chip.devices_per_chip
        time_s = float(cost.time_s) / count
        moved = float(task.hbm_bytes)
        intensity = float(task.flops) / moved if moved else float("inf")
        shape = " x ".join(f"{float(size):,.0f}" for size in (task.m, task.k, task.n))
        if float(task.batch) > 1:
            shape = f"{float(task.batch):,.0f} of {shape}"
        points.append(
            MatmulPoint(
                name=task.name,
                group=_group(task.name, task.kind, item.schedule.block(cost.block).phase),
                shape=shape,
                count=count,
                time_s=time_s,
                step_s=float(cost.time_s),
                flops_per_s=float(task.flops) / time_s,
                flops_per_byte=intensity,
                roof_flops_per_s=min(peak, intensity * bandwidth),
                peak_flops_per_s=peak,
            )
        )
    return tuple(sorted(points, key=lambda point: -point.step_s))


def _group(name: str, kind: str, phase: str) -> str:
    if phase == "head":
        return "embedding and head"
    if kind == "attention":
        return "attention"
    if name.endswith(" again"):
        return "recomputed"
    if name.endswith(" dW"):
        return "weight gradients (dW)"
    return "input gradients" if phase == "backward" else "forward"


def matmuls(item: Prediction) -> Table:
    """Return every matmul of a step against the roofline of one device."""
    columns = [
        Column("matmul", "matmul", attrgetter("name")),
        Column("group", "group", attrgetter("group")),
        Column("shape", "m x k x n on a device", attrgetter("shape"), right=True),
        Column("count", "times", attrgetter("count"), ",.0f"),
        Column("time_s", "seconds", attrgetter("step_s"), ".4g"),
        Column("share", "step", lambda point: point.step_s / item.step_time_s, ".2f", "%"),
        Column("flops_per_byte", "FLOP/byte", attrgetter("flops_per_byte"), ",.0f"),
        Column("flops_per_s", "rate", attrgetter("flops_per_s"), "FLOP/s"),
        Column("of_peak", "of peak", attrgetter("of_peak"), ".1f", "%"),
        Column("roof", "roof", attrgetter("bound")),
    ]
    return table(columns, matmul_points(item))
