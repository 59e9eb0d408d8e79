"""Why a measured step is not the predicted one: what may be otherwise, each priced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardsim.answers.trials import Keys, set_text
from shardsim.cost.predict import Prediction, predict
from shardsim.errors import ShardsimError
from shardsim.plan.plan import Plan
from shardsim.plan.resolve import resolve
from shardsim.planner.changes import changed

WORTH = 0.05  # of the gap: a cause that explains less is none
BEYOND = 1.5  # times the gap: a cause that explains more is another run
LINK_SHARE = 0.5
HBM_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Something that may be otherwise in a measured run, and the step that it would make."""

    cause: str
    changes: Keys  # as `changed` and --set take them
    implementation: str  # as what the step is done, as in --as
    step_time_s: float
    explains: float  # share of the gap between the predicted and the measured step

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "cause": self.cause,
            "set": set_text(self.changes),
            "as": self.implementation,
            "step_time_s": self.step_time_s,
            "explains": self.explains,
        }


def causes(item: Prediction, measured_s: float) -> list[Cause]:
    """Return what may explain a measured step, that which explains it best first.

    Each is a prediction of the plan with that one thing otherwise. Best is what comes closest to
    the measured step, from below or above; what explains less than a twentieth of the gap, or much
    more than all of it, is left out.
    """
    gap_s = measured_s - item.step_time_s
    found: dict[float, Cause] = {}
    for cause, changes, implementation in _otherwise(item, slower=gap_s > 0):
        try:
            plan = changed(item.plan, changes) if changes else item.plan
            other = predict(plan, costs=item.costs, implementation=implementation)
        except ShardsimError:
            continue
        share = (other.step_time_s - item.step_time_s) / gap_s if gap_s else 0.0
        if WORTH <= share <= BEYOND:
            found.setdefault(
                round(other.step_time_s, 9),
                Cause(
                    cause=cause,
                    changes=changes,
                    implementation=implementation,
                    step_time_s=other.step_time_s,
                    explains=share,
                ),
            )
    return sorted(found.values(), key=lambda one: abs(1.0 - one.explains))


def _otherwise(item: Prediction, slower: bool) -> Iterator[tuple[str, Keys, str]]:
    """Yield (cause, changes, implementation) of what would make a step slower, or faster."""
    plan, usual = item.plan, item.implementation
    for cause, changes in _slower(plan) if slower else _faster(plan):
        yield cause, changes, usual
    for name, cause in (
        ("trainer", "the step is done as a training library does it"),
        ("emitted", "the step is done as the exported code does it"),
        ("ideal", "nothing is done beyond the plan"),
    ):
        if name != usual:
            yield cause, {}, name


def _slower(plan: Plan) -> Iterator[tuple[str, Keys]]:
    names, chip = resolve(plan).names, plan.machine.chip
    if names["tensor"]:
        yield "matmuls wait for what is gathered over the tensor axis", {"overlap.matmul": "off"}
    if names["fsdp"] or names["context"]:
        yield "weights are not gathered ahead", {"overlap.weights": False}
    yield "gradients are reduced after the backward pass", {"overlap.gradients": False}
    yield "layers keep nothing: all is computed again", {"remat": "full"}
    yield "attention is not fused", {"attention": "unfused"}
    yield "gradients travel in float32", {"precision.reduce": "f32"}
    yield "matmuls run in bf16", {"precision.compute": "bf16"}
    link = LINK_SHARE * chip.link_bytes_per_s
    yield (
        "links at half their rate: broken, shared, or an axis that does not wrap",
        {"chip.link_bytes_per_s": link},
    )
    yield "HBM at 80 % of its rate", {"chip.hbm_bytes_per_s": HBM_SHARE * chip.hbm_bytes_per_s}
    if plan.machine.slices > 1:
        dcn = LINK_SHARE * chip.dcn_bytes_per_s
        yield "the network between slices at half its rate", {"chip.dcn_bytes_per_s": dcn}
    off = {"matmul": "off", "weights": False, "gradients": False, "dcn": False}
    yield "no communication runs beside computation", {"overlap": off}
    if plan.microbatches == 1:
        yield "the batch goes through in two microbatches", {"microbatches": 2}


def _faster(plan: Plan) -> Iterator[tuple[str, Keys]]:
    yield "gradients are reduced behind the backward pass", {"overlap.gradients": True}
    yield "weights are gathered ahead", {"overlap.weights": True}
    for policy, words in (
        ("save_attention", "queries, keys, values and attention's result are kept"),
        ("dots", "results of matmuls are kept"),
        ("none", "layers keep everything"),
    ):
        yield words, {"remat": policy}
    yield "attention is fused", {"attention": "flash"}
    yield "attention is not fused", {"attention": "unfused"}
    yield "matmuls run in int8", {"precision.compute": "int8"}
    on = {"matmul": "bidirectional", "weights": True, "gradients": True, "dcn": True}
    yield "all communication that can runs beside computation", {"overlap": on}
    if plan.microbatches > 1:
        yield "the batch goes through at once", {"microbatches": 1}
