"""Which figure of the chip limits a plan: elasticities of its step time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.mfu import mfu_of
from shardsim.cost.price import step_time_s
from shardsim.cost.words import FIGURES
from shardsim.plan.io import PlanOrPath, as_plan
from shardsim.plan.layout import Layout
from shardsim.plan.resolve import resolve
from shardsim.program.holds import held_by
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.schedule import Schedule
from shardsim.program.shapes import Workload

NUDGE = 0.01
FACTORS = (1 + NUDGE, 1 - NUDGE, 1.1)  # of one figure after the other


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How the step time answers to one figure of the chip."""

    figure: str
    elasticity: float  # d log(step time) / d log(figure)
    step_time_s_at_110: float  # with the figure 10 % larger
    mfu_at_110: float


def sensitivity(
    plan: PlanOrPath,
    implementation: str | None = None,
    *,
    costs: str | None = None,
    made: tuple[Layout, Schedule] | None = None,
) -> list[Sensitivity]:
    """Return the elasticity of the step time to each figure, the largest first.

    Central differences of 1 % on the same formulas; -0.8 for the peak means that 1 % more of it
    saves 0.8 % of the step. All changed chips are priced at once, as arrays. `costs` and
    `implementation` are those of `predict`; what it `made` of the plan need not be made again.
    """
    plan = as_plan(plan)
    costs = plan.op_costs if costs is None else costs
    chip = plan.machine.chip
    figures = [name for name in FIGURES if name == "peak_flops" or getattr(chip, name)]
    factors = np.ones((len(figures), len(figures), len(FACTORS)))
    for index in range(len(figures)):
        factors[index, index] = FACTORS
    many = chip.times(dict(zip(figures, factors.reshape(len(figures), -1), strict=True)))
    if made is None:
        name = USUAL.get(costs, "ideal") if implementation is None else implementation
        held_by(name, chip)  # refuses what is not possible
        layout = resolve(plan)
        program = partition(Workload.of(plan), layout)
        made = layout, overlap(implemented(program, name, plan.machine, layout), layout)
    machine = replace(plan.machine, chip=many)
    took_s: Any = step_time_s(machine, *made, costs_of(costs, many))
    times = np.broadcast_to(took_s, len(figures) * len(FACTORS)).reshape(-1, len(FACTORS))
    results = []
    for figure, (above_s, below_s, more_s) in zip(figures, times.tolist(), strict=True):
        mfu = mfu_of(plan, more_s) / (1.1 if figure == "peak_flops" else 1.0)
        results.append(
            Sensitivity(
                figure=figure,
                elasticity=float(np.log(above_s / below_s) / np.log(FACTORS[0] / FACTORS[1])),
                step_time_s_at_110=more_s,
                mfu_at_110=mfu,
            )
        )
    return sorted(results, key=lambda item: -abs(item.elasticity))
