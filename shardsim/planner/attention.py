"""How new plans attend: in one fused kernel, or with scores in HBM.

Which is faster depends on chip, heads and sequence, and is asked of the prices that rank plans:
`search` looks for plans with the usual one, and with the other where it would make the best of them
faster; so does the plan of a mesh. `explain` tries the same change.
"""

from __future__ import annotations

from dataclasses import replace

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError
from shardsim.model import Model
from shardsim.ops.attend_kernels import KERNEL_MULTIPLE
from shardsim.plan.plan import Plan


def default_attention(model: Model, sequence: int) -> str:
    """Return the attention that is tried first: fused, but for short images of narrow heads.

    The kernel pads heads to whole lanes, and at a few hundred tokens the scores are small: ViT-22B,
    whose heads fill them, compiled to 12.5 s a step with the kernel and to 12.8 s without.
    """
    narrow = model.head_dim % KERNEL_MULTIPLE != 0
    short = narrow and model.family == "vit" and sequence <= 1024
    return "unfused" if short or not _has_choice(model) else "flash"


def other_attention(attention: str) -> str:
    """Return what may be tried in place of an attention.

    >>> other_attention("flash")
    'unfused'
    """
    return "flash" if attention == "unfused" else "unfused"


def may_gain(model: Model, best: Prediction | None, other: str) -> bool:
    """Return whether plans that attend as `other` may be better than the `best` so far: whether it
    would be faster so, or there is none."""
    if not _has_choice(model):
        return False
    if best is None:
        return True
    try:
        changed = _predicted(replace(best.plan, attention=other))
    except PlanError:  # its keys pass round, or are turned, in a kernel
        return False
    return changed is not None and changed.fits and changed.step_time_s < best.step_time_s


def with_faster(plan: Plan) -> Plan:
    """Return a plan with the attention that makes it faster, where the usual one is in doubt."""
    if plan.attention != "unfused" or not _has_choice(plan.model):
        return plan
    now = _predicted(plan)
    if now is None or not may_gain(plan.model, now, "flash"):
        return plan
    return replace(plan, attention="flash")


def _has_choice(model: Model) -> bool:
    """Return whether a fused kernel can attend: none adds a bias to scores."""
    return all(part.model.positions != "relative" for part in model.parts)


def _predicted(plan: Plan) -> Prediction | None:
    try:
        return predict(plan)
    except PlanError:
        return None
