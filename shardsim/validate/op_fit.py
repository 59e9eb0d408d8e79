"""Where a chip's compiler constants come from: `python -m shardsim.validate.op_fit` prints them.

The points are the TPU compiler's estimated cycles of single operations (`data/op_cycles.csv`).
Each class of operations has constants of its own, found by a search along one constant after
another that lowers the mean of |log(fitted / estimated)|: an error of a factor counts the same for
small and large operations, and one odd shape does not pull the others. Matmuls come first and give
the fixed cycles of all.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shardsim.cost.costs import compiler, compiler_clock_hz
from shardsim.errors import FileError, ShardsimError
from shardsim.files import write_text
from shardsim.machine import Chip, load_chip
from shardsim.machine.op_costs import CONSTANTS, SHARES, OpCosts, Residual
from shardsim.plan.layout import Number
from shardsim.program.tasks import Compute
from shardsim.validate.op_file import hardware_path, hardware_text, without_section
from shardsim.validate.ops import CLASSES, Op, parse_op

POINTS = Path(__file__).with_name("data") / "op_cycles.csv"
DIGITS = 4  # of a fitted constant
STEPS = (1.5, 1.2, 1.08, 1.03, 1.01, 1.003)

START = OpCosts(
    matmul_efficiency=0.95,
    results_per_cycle=150.0,
    resident_contraction=1500.0,
    matmul_hbm_efficiency=0.75,
    prologue_bytes=4e6,
    elementwise_hbm_efficiency=0.5,
    vector_ops_per_cycle=1000.0,
    attention_hbm_efficiency=0.5,
    optimizer_hbm_efficiency=0.7,
    copy_hbm_efficiency=0.4,
    transpose_hbm_efficiency=0.3,
    fixed_cycles=2000.0,
)
OF_CLASS: Mapping[str, tuple[str, ...]] = {
    "matmul": (
        "matmul_efficiency",
        "results_per_cycle",
        "matmul_hbm_efficiency",
        "prologue_bytes",
        "fixed_cycles",
        "resident_contraction",
    ),
    "elementwise": ("elementwise_hbm_efficiency", "vector_ops_per_cycle"),
    "attention": ("attention_hbm_efficiency",),
    "optimizer": ("optimizer_hbm_efficiency",),
    "copy": ("copy_hbm_efficiency",),
    "transpose": ("transpose_hbm_efficiency",),
}


# What a chip's name ends in where operations have the compiler's own limit of on-chip memory.
OWN = ", own limit"


@dataclass(frozen=True, kw_only=True)
class Points:
    """Estimated cycles of operations, by chip, and the compiler that they come from.

    With the compiler's own limit of on-chip memory, where emitted steps have another, a chip's name
    ends in `OWN`.
    """

    cycles: Mapping[str, Mapping[Op, int]]
    versions: Mapping[str, str]
    dates: Mapping[str, str]  # by chip


def read_points(path: Path = POINTS) -> Points:
    """Read a file of points: `# name: value` lines, then a table with one row per operation."""
    lines = path.read_text(encoding="utf-8").splitlines()
    heads = dict(line[1:].strip().split(": ", 1) for line in lines if line.startswith("#"))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not rows:
        raise FileError(f"{path}: no operations")
    chips = [name for name in rows[0] if name != "op"]
    cycles = {
        chip: {parse_op(row["op"]): int(row[chip]) for row in rows if row[chip]} for chip in chips
    }
    dates = {chip: heads.pop(f"date of {chip}") for chip in chips}
    return Points(cycles=cycles, dates=dates, versions=heads)


def points_text(points: Points) -> str:
    """Return points as `read_points` reads them."""
    chips = list(points.cycles)
    ops = list(dict.fromkeys(op for chip in chips for op in points.cycles[chip]))
    lines = [f"# {name}: {value}" for name, value in points.versions.items()]
    heads = [f'"{chip}"' if "," in chip else chip for chip in chips]
    lines += [f"# date of {chip}: {date}" for chip, date in points.dates.items()]
    lines.append(",".join(["op", *heads]))
    for op in ops:
        cells = [str(points.cycles[chip].get(op, "")) for chip in chips]
        lines.append(",".join([f'"{op.text}"', *cells]))
    return "\n".join(lines) + "\n"


def points_with(points: Points, chip: str, more: Points) -> Points:
    """Return `points` with the cycles of `chip` from `more`, by the same compiler."""
    if more.versions != points.versions:
        old, new = (", ".join(map(" ".join, x.versions.items())) for x in (points, more))
        raise ShardsimError(f"points: estimated with {old}; they cannot be mixed with {new}")
    return replace(
        points,
        cycles={**points.cycles, chip: more.cycles[chip]},
        dates={**points.dates, chip: more.dates[chip]},
    )


class Estimates:
    """The operations of one class as tasks of arrays, and their cycles on one chip."""

    def __init__(self, chip: Chip, cycles: Mapping[Op, int]) -> None:
        self.ops = tuple(cycles)
        self.cycles = np.array([cycles[op] for op in self.ops], dtype=float)
        self._chip = chip
        tasks = [op.tasks() for op in self.ops]
        self._parts = [_together(part) for part in zip(*tasks, strict=True)]

    def logs(self, costs: OpCosts) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return log(fitted / estimated) of each operation."""
        chip = replace(self._chip, compiler=costs)
        times = [compiler(chip).operation(part) for part in self._parts]
        # However many tasks a plan makes of it, the operation starts once.
        seconds = sum(time.unit_s + time.memory_s for time in times) + times[0].overhead_s
        apart: np.ndarray[Any, np.dtype[np.float64]]
        apart = np.log(seconds * compiler_clock_hz(chip) / self.cycles)
        return apart

    def loss(self, costs: OpCosts) -> float:
        """Return the mean absolute error, as a logarithm."""
        return float(np.mean(np.abs(self.logs(costs))))

    def residual(self, costs: OpCosts) -> Residual:
        """Return how far `costs` are from the estimates."""
        apart = np.abs(self.logs(costs))
        worst = int(np.argmax(apart))
        return Residual(
            ops=len(self.ops),
            median=round(float(np.median(apart)), DIGITS),
            p90=round(float(np.percentile(apart, 90)), DIGITS),
            worst=round(float(apart[worst]), DIGITS),
            worst_op=self.ops[worst].text,
        )


def _together(tasks: Sequence[Compute]) -> Compute:
    """Return tasks of one kind as one task of arrays."""

    def values(name: str) -> Number:
        return np.array([float(getattr(task, name)) for task in tasks])

    first = tasks[0]
    names = ("m", "k", "n", "batch", "hbm_bytes", "vector_ops")
    return replace(first, **{name: values(name) for name in names})


def fit(chip: Chip, cycles: Mapping[Op, int]) -> OpCosts:
    """Return the constants that fit the estimated `cycles` of `chip` best, with residuals."""
    groups = {name: {op: n for op, n in cycles.items() if op.group == name} for name in CLASSES}
    for name, group in groups.items():
        if len(group) < len(OF_CLASS[name]):
            raise ShardsimError(
                f"chip {chip.name}: the compiler estimated {len(group)} operations of the class "
                f"{name}, too few for {len(OF_CLASS[name])} constants"
            )
    costs = START
    estimates = {name: Estimates(chip, group) for name, group in groups.items()}
    for name, mine in estimates.items():
        costs = _search(mine, costs, OF_CLASS[name])
    residuals = {name: mine.residual(costs) for name, mine in estimates.items()}
    return replace(costs, residuals=residuals)


def _search(estimates: Estimates, costs: OpCosts, names: Sequence[str]) -> OpCosts:
    """Return `costs` with the constants `names` moved to where the loss is least."""
    best = estimates.loss(costs)
    for step in STEPS:
        better = True
        while better:
            better = False
            for name in names:
                for factor in (step, 1 / step):
                    value = float(f"{getattr(costs, name) * factor:.{DIGITS}g}")
                    value = min(value, 1.0) if name in SHARES else value
                    changes: dict[str, Any] = {name: value}
                    tried = replace(costs, **changes)
                    loss = estimates.loss(tried)
                    if loss < best - 1e-7:
                        best, costs, better = loss, tried, True
    return costs


def fitted_cycles(chip: Chip, op: Op) -> float:
    """Return the cycles of one operation as the constants of `chip` have them."""
    if chip.compiler is None:
        raise ShardsimError(f"chip {chip.name}: its compiler's op costs are not known")
    return float(np.exp(Estimates(chip, {op: 1}).logs(chip.compiler)[0]))


def refit(name: str, points: Points) -> OpCosts:
    """Return the constants of the chip called `name`, which may end in `OWN`, from points."""
    costs = fit(load_chip(name.removesuffix(OWN)), points.cycles[name])
    return replace(
        costs,
        fitted_to=f"libtpu's estimated cycles of {len(points.cycles[name])} operations",
        date=points.dates[name],
        versions=points.versions,
    )


def constants_lines(chips: Mapping[str, OpCosts]) -> list[str]:
    """Return a Markdown table of constants, one column per chip."""
    lines = ["| constant |" + "".join(f" {name} |" for name in chips)]
    lines.append("| --- |" + " --- |" * len(chips))
    for name in CONSTANTS:
        values = [f" {getattr(costs, name):g} |" for costs in chips.values()]
        lines.append(f"| `{name}` |" + "".join(values))
    return lines


def residuals_lines(chips: Mapping[str, OpCosts]) -> list[str]:
    """Return a Markdown table of residuals by chip and class of operations."""
    lines = [
        "| chip | operations | number | median % | 90th percentile % | worst % | worst at |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for chip, costs in chips.items():
        for name, one in costs.residuals.items():
            shares = " | ".join(f"{100 * x:.1f}" for x in (one.median, one.p90, one.worst))
            lines.append(f"| {chip} | {name} | {one.ops} | {shares} | `{one.worst_op}` |")
    return lines


def main() -> None:
    """Fit all chips again and print constants and residuals; `--write` into hardware files too."""
    points = read_points()
    write = "--write" in sys.argv[1:]
    bare = [name for name in points.cycles if not name.endswith(OWN)]
    if write:
        for name in bare:
            # First without the section, which may lack a constant that is new.
            write_text(hardware_path(name), without_section(name))
    chips = {name: refit(name, points) for name in points.cycles}
    if write:
        for name in bare:
            own = chips.get(name + OWN)
            write_text(hardware_path(name), hardware_text(name, chips[name], own))
    print("\n".join(constants_lines(chips)))
    print()
    print("\n".join(residuals_lines(chips)))


if __name__ == "__main__":
    main()
