"""Model FLOPs utilisation of a step."""

from __future__ import annotations

from shardsim.model import model_flops_per_token
from shardsim.plan.plan import Plan


def mfu_of(plan: Plan, step_time_s: float) -> float:
    """Return the MFU of a step that takes `step_time_s`, of the format that the plan uses."""
    tokens_per_s_per_chip = plan.tokens / step_time_s / plan.machine.chips
    flops_per_token = model_flops_per_token(plan.model, plan.sequence)
    return tokens_per_s_per_chip * flops_per_token / plan.machine.chip.peak(plan.precision.compute)
