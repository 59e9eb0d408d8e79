"""Model FLOPs utilisation of a step."""

from __future__ import annotations

from shardsim.model import Accounting, model_flops_per_token
from shardsim.plan.plan import Plan


def mfu_of(plan: Plan, step_time_s: float, accounting: Accounting = Accounting.PALM) -> float:
    """Return the MFU of a step that takes `step_time_s`, of the format that the plan uses."""
    rate = plan.tokens / step_time_s / plan.machine.chips
    return mfu_at_rate(plan, rate, accounting)


def mfu_at_rate(
    plan: Plan, tokens_per_s_per_chip: float, accounting: Accounting = Accounting.PALM
) -> float:
    """Return the MFU at which a plan's chips train on so many tokens."""
    flops_per_token = model_flops_per_token(plan.model, plan.sequence, accounting)
    return tokens_per_s_per_chip * flops_per_token / plan.machine.chip.peak(plan.precision.compute)


def step_at_mfu(plan: Plan, mfu: float, accounting: Accounting = Accounting.PALM) -> float:
    """Return the seconds of a step at an MFU: `mfu_of` inverted, as it is linear in 1/seconds."""
    return mfu_of(plan, 1.0, accounting) / mfu
