"""For which part of a step the links of each torus axis carry traffic."""

from __future__ import annotations

from shardsim.cost.predict import Prediction
from shardsim.plan import resolve
from shardsim.program.schedule import Copy


def axis_use(item: Prediction) -> dict[str, float]:
    """Return, by torus axis (and "dcn"), the time of its collectives as a fraction of the step.

    A collective keeps the links of all torus axes of its group busy for as long as it takes on its
    own, whether or not it is hidden behind computation. What crosses slices counts for "dcn".
    """
    layout = resolve(item.plan)
    busy = dict.fromkeys((axis.name for axis in item.plan.machine.axes), 0.0)
    if item.plan.machine.slices > 1:
        busy["dcn"] = 0.0
    for cost in item.price.collectives:
        if isinstance(cost.task, Copy) or float(cost.count) == 0:
            continue
        group = layout.role(cost.task.role)
        over_slices = float(group.slices) > 1
        if over_slices and cost.task.stage != "torus":
            busy["dcn"] += float(cost.time_s)
            continue
        for axis, factor in zip(item.plan.machine.axes, group.factors, strict=True):
            if float(factor) > 1:
                busy[axis.name] += float(cost.time_s)
    return {name: min(time_s / item.step_time_s, 1.0) for name, time_s in busy.items()}
