"""Time of one compiled operation: matrix unit, vector unit and HBM, whichever is last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.cost.op_curve import compiler_clock_hz, estimated_s
from shardsim.machine import Chip
from shardsim.plan.layout import Number
from shardsim.program.tasks import Compute

# Rows stream through the systolic array eight at a time (the sublanes of a vector register).
SUBLANES = 8


@dataclass(frozen=True, kw_only=True)
class ComputeTime:
    """Seconds of one operation, by what takes them; they add up to `total_s`."""

    unit_s: Number  # matrix or vector unit, whichever is longer
    memory_s: Number  # what HBM adds on top
    overhead_s: Number  # starting the operation

    @property
    def total_s(self) -> Number:
        """Seconds of one operation."""
        return self.unit_s + self.memory_s + self.overhead_s


def _tiles(size: Number, tile: int) -> Number:
    return np.ceil(size / tile) * tile


def matmul_unit_s(chip: Chip, task: Compute) -> Number:
    """Return the matrix unit's time at its peak, for sizes rounded up to its tiles.

    The contraction and the output columns fill the systolic array (128 or 256 a side), the rows
    its eight sublanes.
    """
    side = chip.mxu_dim
    padded = (
        2.0
        * _tiles(task.m, SUBLANES)
        * _tiles(task.k, side)
        * _tiles(task.n, side)
        * task.batch
        * task.matmuls
        * task.fraction
    )
    return padded / (chip.peak(task.dtype) / chip.devices_per_chip)


def compute_time(chip: Chip, task: Compute) -> ComputeTime:
    """Return the time of one operation on one device.

    A matmul streams its operands through on-chip memory while it computes, but cannot start
    before the first tiles have arrived nor end before the last have left: what fills half of the
    on-chip memory (the other half is the second buffer) is not hidden. This reproduces the sizes
    below 8192 of published square-matmul measurements (v5e 4096: 84 %; tpu7x 1024: 30 %).
    Where a compiler has counted the cycles of an operation, they stand for the units' time; with
    the chip's `op_costs` "compiler" what was learned from such cycles stands for all of it.
    """
    devices = chip.devices_per_chip
    hbm = chip.hbm_bytes_per_s / devices * chip.hbm_efficiency
    vector_s = task.vector_ops / (chip.vector_flops / devices)
    memory_s = task.hbm_bytes / hbm
    if task.cycles is not None:
        unit_s: Number = task.cycles / compiler_clock_hz(chip)
        extra = np.maximum(memory_s - unit_s, 0.0)
    elif chip.op_costs == "compiler":
        mxu_s = matmul_unit_s(chip, task)
        unit_s, extra, start_s = estimated_s(chip, task, mxu_s, vector_s)
        return ComputeTime(unit_s=unit_s, memory_s=extra, overhead_s=start_s)
    elif isinstance(task.matmuls, int) and task.matmuls == 0:
        unit_s = vector_s
        extra = np.maximum(memory_s - vector_s, 0.0)
    else:
        matrix_s = matmul_unit_s(chip, task) / chip.matmul_efficiency
        unit_s = np.maximum(matrix_s, vector_s)
        first_s = np.minimum(memory_s, chip.onchip_bytes / devices / 2.0 / hbm)
        extra = np.maximum(memory_s - unit_s, 0.0) + np.minimum(first_s, unit_s)
    return ComputeTime(unit_s=unit_s, memory_s=extra, overhead_s=chip.op_overhead_s)
