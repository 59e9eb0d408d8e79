"""Real tokens: what a step is worth where sequences have many lengths, and padding counts not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from shardsim.model import Accounting, Model, model_flops_per_token
from shardsim.model.flops import TRAINING
from shardsim.plan.layout import Layout
from shardsim.plan.lengths import Lengths, real_tokens, sampled, sequences_of_row
from shardsim.plan.plan import Plan
from shardsim.program.shapes import Workload
from shardsim.program.uneven import load

KNOTS = 33  # lengths between which FLOPs per token are taken as linear, as they are but for windows
LONG = 2**62


@dataclass(frozen=True, kw_only=True)
class RealTokens:
    """What a step does for real tokens: those of sequences, without padding.

    `mfu_over_real_tokens` counts the model FLOPs of every sequence by itself, `mfu` those of all
    rows as if they were full. `padding_share` is of the tokens computed, `load` the work of the
    fullest device over the mean (of attention alone where rows are packed), `cut_share` what of the
    sequences' tokens is beyond the longest.
    """

    real_tokens_per_s_per_chip: float
    sequences_per_s: float
    mfu_over_real_tokens: float
    padding_share: float
    load: float
    cut_share: float

    def to_data(self) -> dict[str, float]:
        """Return it as plain data."""
        return asdict(self)


def flops_per_token(plan: Plan, accounting: Accounting) -> float:
    """Return the model FLOPs of a token of a step, as MFU counts them: of full rows, or where
    sequences lie without rows, of the sequences; of a forward pass alone a third."""
    share = 1.0 / TRAINING if plan.forward_only else 1.0
    if plan.lengths is None or not plan.lengths.unpadded:
        return share * model_flops_per_token(plan.model, plan.sequence, accounting)
    return share * real_flops_per_token(plan.model, plan.lengths, plan.sequence, accounting)


@lru_cache(maxsize=256)
def real_flops_per_token(
    model: Model, lengths: Lengths, longest: int, accounting: Accounting
) -> float:
    """Return the model FLOPs of a real token on average: each of a sequence by itself."""
    tokens = sampled(lengths, longest).astype(float)
    knots = np.unique(np.geomspace(tokens.min(), tokens.max(), KNOTS).round())
    flops = [model_flops_per_token(model, int(knot), accounting) for knot in knots]
    return float(np.interp(tokens, knots, flops) @ tokens / tokens.sum())


def real_tokens_of(
    plan: Plan, layout: Layout, step_time_s: float, *, by_sequence: bool
) -> RealTokens | None:
    """Return what a step of a plan with `lengths` is worth; None without them.

    `by_sequence`: whether attention leaves out what no sequence reaches.
    """
    lengths = plan.lengths
    if lengths is None:
        return None
    real = plan.batch * real_tokens(lengths, plan.sequence)
    if lengths.unpadded:
        real = float(plan.tokens)
    rate = real / step_time_s / plan.machine.chips
    flops = real_flops_per_token(plan.model, lengths, plan.sequence, Accounting.PALM)
    flops = flops / TRAINING if plan.forward_only else flops
    every, kept = (sampled(lengths, longest).sum() for longest in (LONG, plan.sequence))
    return RealTokens(
        real_tokens_per_s_per_chip=rate,
        sequences_per_s=plan.batch * sequences_of_row(lengths, plan.sequence) / step_time_s,
        mfu_over_real_tokens=rate * flops / plan.machine.chip.peak(plan.precision.compute),
        padding_share=1.0 - real / plan.tokens,
        load=float(load(Workload.of(plan), layout)) if by_sequence else 1.0,
        cut_share=1.0 - float(kept / every),
    )
