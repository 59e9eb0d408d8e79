"""Model FLOPs utilisation of a step."""

from __future__ import annotations

from shardsim.cost.real import flops_per_token
from shardsim.model import Accounting
from shardsim.plan.plan import Plan

VISIBLE = 1.01  # times HFU: a smaller excess is none to a reader


def mfu_of(plan: Plan, step_time_s: float, accounting: Accounting = Accounting.PALM) -> float:
    """Return the MFU of a step that takes `step_time_s`, of the format that the plan uses."""
    rate = plan.tokens / step_time_s / plan.machine.chips
    return mfu_at_rate(plan, rate, accounting)


def mfu_at_rate(
    plan: Plan, tokens_per_s_per_chip: float, accounting: Accounting = Accounting.PALM
) -> float:
    """Return the MFU at which a plan's chips train on so many tokens."""
    peak = plan.machine.chip.peak(plan.precision.compute)
    return tokens_per_s_per_chip * flops_per_token(plan, accounting) / peak


def step_at_mfu(plan: Plan, mfu: float, accounting: Accounting = Accounting.PALM) -> float:
    """Return the seconds of a step at an MFU: `mfu_of` inverted, as it is linear in 1/seconds."""
    return mfu_of(plan, 1.0, accounting) / mfu


def least_step_s(plan: Plan) -> float:
    """Return the time below which no step of the plan's model and batch is: the matmuls that every
    way to count finds, at the peak of the fastest format that the chip multiplies."""
    chip = plan.machine.chip
    fastest = max(chip.peak_flops.values()) / chip.peak(plan.precision.compute)
    return min(mfu_of(plan, 1.0, accounting) for accounting in Accounting) / fastest


def beyond(plan: Plan, step_time_s: float, hfu: float) -> list[str]:
    """Return what explains an MFU above 100 %, or above HFU, which says what is executed."""
    mfu = mfu_of(plan, step_time_s)
    if mfu <= min(1.0, hfu * VISIBLE):
        return []
    above = "100 %" if mfu > 1.0 else "HFU"
    if not plan.model.causal or len(plan.model.parts) > 1:
        return [
            f"MFU is above {above} because PaLM's count charges every weight six FLOPs a token, "
            "even those that are used once an image or only looked up"
        ]
    halved = mfu_of(plan, step_time_s, Accounting.PALM_CAUSAL)
    return [
        f"MFU is above {above} because PaLM's count has all of attention, even what the mask "
        f"skips; with attention halved it is {100 * halved:.1f} %"
    ]
