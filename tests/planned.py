"""What is planned of one device's step, in sums that do not depend on how a program is written.

The tests that count by hand read programs through these functions alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from by_hand import Key

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan, resolve
from shardsim.program.end_rules import join_ends, rotate_halves
from shardsim.program.partition import partition
from shardsim.program.passes import IMPLEMENTATIONS, Where
from shardsim.program.shapes import Workload


def predict_emitted(plan: Plan) -> Prediction:
    """Return the prediction of the program that shardsim emits, as the TPU compiler makes it."""
    return predict(plan, costs="compiler")


def traffic(plan: Plan, as_emitted: bool = False) -> dict[Key, tuple[float, float]]:
    """Return (HBM bytes, vector operations) of one device in a step, by pass and kind: of the plan
    as written or with what is emitted beyond it, but for ends of products and halves of heads."""
    layout = resolve(plan)
    program = partition(Workload.of(plan), layout)
    where = Where(machine=plan.machine, layout=layout)
    for rule in IMPLEMENTATIONS["emitted"] if as_emitted else ():
        if rule not in (join_ends, rotate_halves):
            program = replace(program, blocks=tuple(rule(block, where) for block in program.blocks))
    sums: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for block in program.blocks:
        for task in block.computes():
            times = float(task.count) * float(block.trips)
            total = sums[block.phase, task.kind]
            total[0] += float(task.hbm_bytes) * times
            total[1] += float(task.vector_ops) * times
    return {key: (total[0], total[1]) for key, total in sums.items() if any(total)}
