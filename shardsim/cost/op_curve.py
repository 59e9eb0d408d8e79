"""Time of an operation as the TPU compiler estimates it, with constants fitted to its cycles.

The constants (`shardsim/machine/op_costs.py`) are learned from single operations by
`shardsim calibrate --against tpu-compiler`. A matmul's results leave the matrix unit at a rate of
their own: behind the next tile's products while the whole contraction stays on the chip (the two
overlap as the cube root of the sum of their cubes), after them where the contraction is longer.
"""

from __future__ import annotations

import numpy as np

from shardsim.errors import HardwareError
from shardsim.machine import Chip
from shardsim.machine.op_costs import OpCosts
from shardsim.plan.layout import Number
from shardsim.program.tasks import Compute

OVERLAP_POWER = 3.0


def compiler_clock_hz(chip: Chip) -> float:
    """Return the clock that the compiler counts its estimated cycles in."""
    if chip.clock_hz is None:
        raise HardwareError(f"chip {chip.name}: clock_hz is not known, so cycles have no time")
    return chip.clock_hz


def estimated_s(
    chip: Chip, task: Compute, mxu_s: Number, vector_s: Number
) -> tuple[Number, Number, Number]:
    """Return (unit, memory beyond it, start) seconds of an operation.

    `mxu_s` is the matrix unit's time at its peak, sizes rounded up to tiles; `vector_s` the vector
    unit's at its peak.
    """
    costs = chip.compiler
    if costs is None:
        raise HardwareError(
            f"chip {chip.name}: its compiler's op costs are not known; use op_costs physical"
        )
    second = compiler_clock_hz(chip)
    start_s = costs.fixed_cycles / second
    hbm_s = task.hbm_bytes * chip.devices_per_chip / chip.hbm_bytes_per_s
    if task.kind == "matmul":
        results_s = task.m * task.n * task.batch * task.matmuls / costs.results_per_cycle / second
        unit_s, memory_s = _matmul(costs, task, hbm_s, mxu_s, results_s, vector_s)
        # What of the shorter is not hidden: the first tiles and the last.
        share = costs.matmul_hbm_efficiency
        first_s = costs.prologue_bytes * chip.devices_per_chip / chip.hbm_bytes_per_s / share
        edge_s = np.minimum(np.minimum(unit_s, memory_s), first_s)
        return unit_s, np.maximum(memory_s - unit_s, 0.0) + edge_s, start_s
    shares = {
        "attention": costs.attention_hbm_efficiency,
        "optimizer": costs.optimizer_hbm_efficiency,
        "copy": costs.copy_hbm_efficiency,
        "transpose": costs.transpose_hbm_efficiency,
    }
    memory_s = hbm_s / shares.get(task.kind, costs.elementwise_hbm_efficiency)
    if task.kind in shares:
        unit_s = np.maximum(mxu_s / costs.matmul_efficiency, vector_s)
        return unit_s, np.maximum(memory_s - unit_s, 0.0), start_s
    return task.vector_ops / costs.vector_ops_per_cycle / second, memory_s, start_s


def _matmul(
    costs: OpCosts,
    task: Compute,
    hbm_s: Number,
    mxu_s: Number,
    results_s: Number,
    vector_s: Number,
) -> tuple[Number, Number]:
    """Return the seconds of a matmul's units and of its bytes."""
    product_s = mxu_s / costs.matmul_efficiency
    power = OVERLAP_POWER
    hidden_s = (product_s**power + results_s**power) ** (1.0 / power)
    resident = np.less_equal(task.k, costs.resident_contraction)
    unit_s = np.where(resident, hidden_s, product_s + results_s)
    return np.maximum(unit_s, vector_s), hbm_s / costs.matmul_hbm_efficiency
