"""What is planned of one device's step, in sums that do not depend on how a program is written.

The tests that count by hand read programs through these functions alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from by_hand import Key

from shardsim.cost.predict import Prediction, predict
from shardsim.machine import with_op_costs
from shardsim.plan import Plan, resolve
from shardsim.program.partition import partition
from shardsim.program.shapes import Workload


def emitted(plan: Plan) -> Plan:
    """Return the plan with the copies, kernels and costs of the TPU compiler."""
    return replace(plan, machine=with_op_costs(plan.machine, "compiler"))


def predict_emitted(plan: Plan) -> Prediction:
    """Return the prediction of the program that shardsim emits, as the TPU compiler makes it."""
    return predict(emitted(plan))


def traffic(plan: Plan, as_emitted: bool = False) -> dict[Key, tuple[float, float]]:
    """Return (HBM bytes, vector operations) of one device in a step, by pass and kind."""
    plan = emitted(plan) if as_emitted else plan
    sums: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for block in partition(Workload.of(plan), resolve(plan), plan.remat).blocks:
        for task in block.computes():
            times = float(task.count) * float(block.trips)
            total = sums[block.phase, task.kind]
            total[0] += float(task.hbm_bytes) * times
            total[1] += float(task.vector_ops) * times
    return {key: (total[0], total[1]) for key, total in sums.items() if any(total)}
