"""What is planned of one device's step, in sums that do not depend on how a program is written.

The tests that count by hand read programs through these functions alone.
"""

from __future__ import annotations

from collections import defaultdict

from by_hand import Key

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan, resolve
from shardsim.program.partition import partition
from shardsim.program.passes import implemented
from shardsim.program.shapes import Workload


def predict_emitted(plan: Plan) -> Prediction:
    """Return the prediction of the program that shardsim emits, as the TPU compiler makes it."""
    return predict(plan, costs="compiler")


def traffic(plan: Plan, as_emitted: bool = False) -> dict[Key, tuple[float, float]]:
    """Return (HBM bytes, vector operations) of one device in a step, by pass and kind."""
    layout, name = resolve(plan), "emitted" if as_emitted else "ideal"
    written = partition(Workload.of(plan), layout)
    program = implemented(written, name, plan.machine, layout)
    sums: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for block in program.blocks:
        for task in block.computes():
            times = float(task.count) * float(block.trips)
            total = sums[block.phase, task.kind]
            total[0] += float(task.hbm_bytes) * times
            total[1] += float(task.vector_ops) * times
    return {key: (total[0], total[1]) for key, total in sums.items() if any(total)}
