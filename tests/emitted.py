"""Predictions of the program that shardsim emits, as the TPU compiler makes it."""

from __future__ import annotations

from dataclasses import replace

from shardsim.cost.predict import Prediction, predict
from shardsim.machine import with_op_costs
from shardsim.plan import Plan


def predict_emitted(plan: Plan) -> Prediction:
    """Return the prediction with the copies, kernels and costs of the TPU compiler."""
    return predict(replace(plan, machine=with_op_costs(plan.machine, "compiler")))
