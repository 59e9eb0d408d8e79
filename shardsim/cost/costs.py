"""Costs: what one operation takes on one device, and the rates of its memories.

Costs are an argument of everything that prices a Schedule, never a property of the hardware or of
the plan's program, and they never decide which tasks there are (`shardsim/program/passes.py` does).

- `physical`: matrix unit, vector unit and HBM by the chip's figures, whichever is last.
- `compiler`: what the TPU compiler estimates, with constants fitted to its cycles for single
  operations (`shardsim/machine/op_costs.py`; `shardsim calibrate --against tpu-compiler`).
- `calibrated`, what is taken where nothing is said: matmuls at the share of the peak that published
  runs reached, all else as the compiler estimates; on GPUs what kernels were measured to take
  (`shardsim/machine/kernels.py`).

Where a compiler has counted the cycles of an operation, they stand for the units' time in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shardsim.errors import HardwareError, PlanError, nearest
from shardsim.machine import Chip
from shardsim.machine.kernels import Kernels
from shardsim.machine.op_costs import OpCosts
from shardsim.plan.layout import Number
from shardsim.program.schedule import Grid, Work

# Rows stream through the systolic array eight at a time (the sublanes of a vector register).
SUBLANES = 8
# How the products of a matmul and its results' way out of the matrix unit overlap, as estimated.
OVERLAP_POWER = 3.0
# A step of a kernel's grid takes so long besides: with it 98 timings of Tokamax's grouped products
# on tpu7x are met in the median (shardsim/validate/data/tokamax_grouped.csv).
STEP_S = 0.35e-6
# The contraction, over `resident_contraction`, from which all results wait for the products.
STREAMED = 2.25


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


@dataclass(frozen=True)
class Costs(ABC):
    """The time of operations on one device of `chip`; sizes are numbers or arrays."""

    chip: Chip
    name: ClassVar[str]

    def operation(self, task: Work) -> ComputeTime:
        """Return the time of one operation, by the compiler's count of its cycles if it has one."""
        if task.cycles is None:
            found = self.estimate(task)
            return found if task.grid is None else self._by_steps(task.grid, found.unit_s)
        unit_s = task.cycles / compiler_clock_hz(self.chip)
        extra_s = np.maximum(task.hbm_bytes / self.hbm_bytes_per_s - unit_s, 0.0)
        return ComputeTime(unit_s=unit_s, memory_s=extra_s, overhead_s=self.chip.op_overhead_s)

    def _by_steps(self, grid: Grid, unit_s: Number) -> ComputeTime:
        """Return the time of a kernel of many steps that takes the matrix unit so long in all."""
        hbm, unit_s = self.hbm_bytes_per_s, unit_s * grid.slower
        step_s = unit_s / grid.steps + STEP_S
        busy_s = np.maximum(step_s, grid.step_bytes / hbm)
        waits_s = grid.groups * np.maximum(grid.group_bytes / hbm - busy_s, 0.0)
        memory_s = grid.steps * (busy_s - step_s) + waits_s
        return ComputeTime(unit_s=unit_s, memory_s=memory_s, overhead_s=grid.steps * STEP_S)

    @abstractmethod
    def estimate(self, task: Work) -> ComputeTime:
        """Return the time of one operation whose cycles nobody has counted."""

    @property
    def hbm_bytes_per_s(self) -> float:
        """What one device sustains between HBM and the chip."""
        chip = self.chip
        return chip.hbm_bytes_per_s / chip.devices_per_chip * chip.hbm_efficiency

    @property
    def host_bytes_per_s(self) -> float:
        """What one device moves to or from its host, one way; infinite where it is not known."""
        chip = self.chip
        rate = chip.pcie_bytes_per_s
        return (float("inf") if rate is None else rate) / chip.devices_per_chip

    def vector_s(self, task: Work) -> Number:
        """Return the vector unit's time at its peak."""
        return task.vector_ops / (self.chip.vector_flops / self.chip.devices_per_chip)


class PhysicalCosts(Costs):
    """Matrix unit, vector unit and HBM by the chip's figures, whichever is last.

    A matmul streams its operands through on-chip memory while it computes, but cannot start
    before the first tiles have arrived nor end before the last have left: what fills half of the
    on-chip memory (the other half is the second buffer) is not hidden. This reproduces the sizes
    below 8192 of published square-matmul measurements (v5e 4096: 84 %; tpu7x 1024: 30 %).
    """

    name = "physical"

    def estimate(self, task: Work) -> ComputeTime:
        chip, hbm = self.chip, self.hbm_bytes_per_s
        vector_s = self.vector_s(task)
        memory_s = task.hbm_bytes / hbm
        if isinstance(task.matmuls, int) and task.matmuls == 0:
            unit_s = vector_s
            extra_s = np.maximum(memory_s - vector_s, 0.0)
        else:
            product_s = matmul_unit_s(chip, task) / chip.matmul_efficiency
            unit_s = _together(task, product_s, vector_s)
            first_s = np.minimum(memory_s, chip.onchip_bytes / chip.devices_per_chip / 2.0 / hbm)
            extra_s = np.maximum(memory_s - unit_s, 0.0) + np.minimum(first_s, unit_s)
        return ComputeTime(unit_s=unit_s, memory_s=extra_s, overhead_s=chip.op_overhead_s)


class CompilerCosts(Costs):
    """What the TPU compiler estimates for an operation, with constants fitted to its cycles.

    A matmul's results leave the matrix unit at a rate of their own: behind the next tile's products
    while the whole contraction stays on the chip (the two overlap as the cube root of the sum of
    their cubes), after them where the contraction is much longer, part of each between.
    """

    name = "compiler"

    @property
    def fitted(self) -> OpCosts:
        """The fitted constants of the chip."""
        if self.chip.compiler is None:
            raise HardwareError(
                f"chip {self.chip.name}: its compiler's op costs are not known; use op_costs "
                "physical"
            )
        return self.chip.compiler

    def estimate(self, task: Work) -> ComputeTime:
        fitted, chip = self.fitted, self.chip
        if task.fused:
            return PhysicalCosts(chip).estimate(task)
        second = compiler_clock_hz(chip)
        start_s = fitted.fixed_cycles / second
        hbm_s = task.hbm_bytes * chip.devices_per_chip / chip.hbm_bytes_per_s
        if task.kind == "matmul":
            unit_s, memory_s = self._matmul(task, hbm_s)
            # What of the shorter is not hidden: the first tiles and the last.
            share = fitted.matmul_hbm_efficiency
            first_s = fitted.prologue_bytes * chip.devices_per_chip / chip.hbm_bytes_per_s / share
            edge_s = np.minimum(np.minimum(unit_s, memory_s), first_s)
            extra_s = np.maximum(memory_s - unit_s, 0.0) + edge_s
            return ComputeTime(unit_s=unit_s, memory_s=extra_s, overhead_s=start_s)
        shares = {
            "attention": fitted.attention_hbm_efficiency,
            "optimizer": fitted.optimizer_hbm_efficiency,
            "copy": fitted.copy_hbm_efficiency,
            "transpose": fitted.transpose_hbm_efficiency,
        }
        memory_s = hbm_s / shares.get(task.kind, fitted.elementwise_hbm_efficiency)
        if task.kind in shares:
            product_s = matmul_unit_s(chip, task) / fitted.matmul_efficiency
            unit_s = _together(task, product_s, self.vector_s(task))
            memory_s = np.maximum(memory_s - unit_s, 0.0)
        else:
            unit_s = task.vector_ops / fitted.vector_ops_per_cycle / second
        return ComputeTime(unit_s=unit_s, memory_s=memory_s, overhead_s=start_s)

    def _matmul(self, task: Work, hbm_s: Number) -> tuple[Number, Number]:
        """Return the seconds of a matmul's units and of its bytes."""
        fitted = self.fitted
        product_s = matmul_unit_s(self.chip, task) / fitted.matmul_efficiency
        results = task.m * made_columns(task) * task.batch * task.matmuls
        results_s = results / fitted.results_per_cycle / compiler_clock_hz(self.chip)
        power = OVERLAP_POWER
        hidden_s = (product_s**power + results_s**power) ** (1.0 / power)
        longer = task.k / fitted.resident_contraction - 1.0
        after = np.clip(longer / (STREAMED - 1.0), 0.0, 1.0)
        unit_s = hidden_s + after * (product_s + results_s - hidden_s)
        return np.maximum(unit_s, self.vector_s(task)), hbm_s / fitted.matmul_hbm_efficiency


class CalibratedCosts(CompilerCosts):
    """Rates that published runs reached, and what the compiler estimates for the rest.

    Matmuls go by the chip's figures; what moves through HBM between them takes as long as the
    compiler says: a share of the peak that depends on what is done (copies, softmax, norms). On a
    chip of whose compiler nothing is known all goes by its figures.
    """

    name = "calibrated"

    def estimate(self, task: Work) -> ComputeTime:
        if self.chip.compiler is None or task.kind == "matmul":
            return PhysicalCosts(self.chip).estimate(task)
        return super().estimate(task)


class KernelCosts(Costs):
    """What a GPU's kernels were measured to take (`machine.kernels.Kernels`).

    A large matmul runs at what the power limit allows, a short contraction as if it were longer;
    cuDNN's attention does its softmax in turn with its products, for a head_dim rounded up to 64;
    all else is a stream through HBM at a share of its peak that depends on what is done.
    """

    name = "calibrated"

    @property
    def kernels(self) -> Kernels:
        """The measured constants of the chip."""
        if self.chip.kernels is None:
            raise HardwareError(f"chip {self.chip.name}: its kernels were not measured")
        return self.chip.kernels

    def estimate(self, task: Work) -> ComputeTime:
        kernels, chip = self.kernels, self.chip
        share = {
            "sum": kernels.sum_hbm_efficiency,
            "copy": kernels.copy_hbm_efficiency,
            "transpose": kernels.transpose_hbm_efficiency,
            "optimizer": kernels.optimizer_hbm_efficiency,
        }.get(task.kind, chip.hbm_efficiency)
        if task.kind == "attention" and task.matmuls == 1:
            share = kernels.scores_hbm_efficiency
        memory_s = task.hbm_bytes / (chip.hbm_bytes_per_s * share)
        if task.fused:
            return self._attention(task, memory_s)
        longer = 1.0 + kernels.contraction_start / np.maximum(task.k, 1)
        product_s = task.flops * longer / (peak_of(chip, task) * chip.matmul_efficiency)
        unit_s = np.maximum(product_s, self.vector_s(task))
        extra_s = np.maximum(memory_s - unit_s, 0.0)
        return ComputeTime(unit_s=unit_s, memory_s=extra_s, overhead_s=self.chip.op_overhead_s)

    def _attention(self, task: Work, memory_s: Number) -> ComputeTime:
        """Return the time of a kernel that holds no scores; its gradient sums in float32 apart."""
        kernels = self.kernels
        share, ops = kernels.attention_efficiency, kernels.softmax_ops
        gradient = task.matmuls > FORWARD_PRODUCTS
        if gradient:
            share, ops = kernels.attention_gradient_efficiency, kernels.softmax_gradient_ops
        if task.fused == "in turn":
            share, ops = share * FLASH_2[0], ops * FLASH_2[1]
        wide = _tiles(task.k, HEAD_DIM_TILE) / task.k
        unit_s = task.flops * wide / (self.chip.peak(task.dtype) * share)
        pairs = task.m * task.n * task.batch * task.fraction
        unit_s = unit_s + ops * pairs / self.chip.vector_flops
        extra_s = memory_s if gradient else np.maximum(memory_s - unit_s, 0.0)
        return ComputeTime(unit_s=unit_s, memory_s=extra_s, overhead_s=self.chip.op_overhead_s)


# FlashAttention-2 (arXiv 2307.08691) as PyTorch has it, beside cuDNN's kernel: the share of its
# products' rate, and of its vector operations (heads of 64 and 128 at 4,096 and 8,192 tokens on an
# H100: shardsim/validate/data/gpu_micro.csv).
FLASH_2 = (0.47, 0.76)
FORWARD_PRODUCTS = 2  # of fused attention; its gradient has more
HEAD_DIM_TILE = 64


def physical(chip: Chip) -> Costs:
    """Return the costs that the figures of `chip` say."""
    return PhysicalCosts(chip)


def compiler(chip: Chip) -> Costs:
    """Return the costs that the compiler of `chip` estimates; asked, they raise `HardwareError`
    where the chip's file has none."""
    return CompilerCosts(chip)


def calibrated(chip: Chip) -> Costs:
    """Return the costs that published runs and the compiler of `chip` say together."""
    return CalibratedCosts(chip) if chip.kernels is None else KernelCosts(chip)


COSTS = {"calibrated": calibrated, "compiler": compiler, "physical": physical}


def costs_of(name: str, chip: Chip) -> Costs:
    """Return the costs called `name` on `chip`."""
    if name not in COSTS:
        raise PlanError(f"op_costs: '{name}' is not possible{nearest(name, COSTS)}")
    return COSTS[name](chip)


def compiler_clock_hz(chip: Chip) -> float:
    """Return the clock that the compiler counts its estimated cycles in."""
    if chip.clock_hz is None:
        raise HardwareError(f"chip {chip.name}: clock_hz is not known, so cycles have no time")
    return chip.clock_hz


def matmul_unit_s(chip: Chip, task: Work) -> Number:
    """Return the matrix unit's time at its peak, for sizes rounded up to its tiles.

    The contraction and the output columns fill the systolic array (128 or 256 a side), the rows
    its eight sublanes.
    """
    side = chip.mxu_dim
    padded = (
        2.0
        * _tiles(task.m, SUBLANES)
        * _tiles(task.k, side)
        * _tiles(made_columns(task), side)
        * task.batch
        * task.matmuls
        * task.fraction
    )
    return padded / (peak_of(chip, task) / chip.devices_per_chip)


def made_columns(task: Work) -> Number:
    """Return the columns that a product makes, padding counted."""
    return np.maximum(task.n, task.columns)


def peak_of(chip: Chip, task: Work) -> float:
    """Return the FLOP/s of a chip in a product's format, zeros of a sparse operand counted."""
    return chip.peak(task.dtype) * (chip.sparse_gain if task.sparse else 1.0)


def _together(task: Work, product_s: Number, vector_s: Number) -> Number:
    """Return the time of both units, of which one waits for the other in some kernels."""
    return product_s + vector_s if task.fused == "in turn" else np.maximum(product_s, vector_s)


def _tiles(size: Number, tile: int) -> Number:
    return np.ceil(size / tile) * tile
