"""What-if: a plan with one thing switched off, varied, or nudged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log, prod
from typing import Any

from shardsim.cost.costs import costs_of
from shardsim.cost.predict import Prediction, mfu_of, predict
from shardsim.cost.price import step_time_s
from shardsim.errors import PlanError, ShardsimError
from shardsim.model import override_model
from shardsim.plan.plan import Overlap, Plan
from shardsim.plan.remat import POLICIES, Remat
from shardsim.plan.resolve import resolve
from shardsim.planner.changes import changed, check_root
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.shapes import Workload

MOST_COMBINATIONS = 100_000  # of a sweep; about a millisecond each


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A plan without one technique."""

    technique: str
    change: str
    published: str  # what was published about its effect, or ""
    prediction: Prediction | None  # None if the plan does not use it
    why: str = ""


def _without_sharding(plan: Plan) -> Plan:
    """Return the plan with parameters replicated over the axes that split the batch."""
    gathered = [
        axis
        for axis in plan.parameters.get("embed", ())
        if axis in plan.activations.get("batch", ()) or axis in plan.activations.get("seq", ())
    ]
    if not gathered:
        raise PlanError("parameters are not sharded over data axes")
    kept = tuple(axis for axis in plan.parameters["embed"] if axis not in gathered)
    parameters = {**plan.parameters, "embed": kept}
    return replace(plan, parameters={key: axes for key, axes in parameters.items() if axes})


def _serial(plan: Plan) -> Plan:
    if not plan.model.parallel_block:
        raise PlanError("layers are serial already")
    model = override_model(plan.model, {"parallel_block": False})
    return replace(plan, model=model, fused_projections=False)


def _biases(plan: Plan) -> Plan:
    names = [name for name in ("qkv", "attention_output", "mlp", "norm")]
    if all(getattr(plan.model.biases, name) for name in names):
        raise PlanError("all biases are there already")
    changes = {f"biases.{name}": True for name in names}
    if plan.model.norm == "rmsnorm":
        changes.pop("biases.norm")
    return replace(plan, model=override_model(plan.model, changes))


def _no_overlap(plan: Plan) -> Plan:
    off = Overlap(matmul="off", weights=False, gradients=False, dcn=False)
    if plan.overlap == off:
        raise PlanError("nothing overlaps already")
    return replace(plan, overlap=off)


def _no_remat(plan: Plan) -> Plan:
    if plan.remat.save == POLICIES["none"]:
        raise PlanError("nothing is recomputed already")
    return replace(plan, remat=Remat(save=POLICIES["none"]))


ABLATIONS: tuple[tuple[str, str, str, Callable[[Plan], Plan]], ...] = (
    (
        "parallel layers",
        "serial layers",
        "about 15 % faster training at large scale (PaLM, arXiv 2204.02311; ViT-22B announcement)",
        _serial,
    ),
    (
        "bias removal",
        "biases on all projections and norms",
        "+3 % utilisation without biases on QKV and norms (ViT-22B announcement)",
        _biases,
    ),
    (
        "asynchronous overlap",
        "no collective matmul, no prefetch, no overlapped reduction",
        "1.14x to 1.38x from collective matmul (ASPLOS 2023, TPU v4)",
        _no_overlap,
    ),
    ("sharded parameters", "parameters replicated over the data axes", "", _without_sharding),
    ("rematerialisation", "every activation kept", "", _no_remat),
)


def ablate(plan: Plan, implementation: str | None = None) -> list[Ablation]:
    """Return the plan with each technique switched off alone, all done as `implementation`."""
    results = []
    for technique, change, published, switch in ABLATIONS:
        prediction, why = None, ""
        try:
            without = switch(plan)
            prediction = predict(without, implementation=implementation)
        except ShardsimError as error:
            why = str(error)
        results.append(
            Ablation(
                technique=technique,
                change=change,
                published=published,
                prediction=prediction,
                why=why,
            )
        )
    return results


def sweep(
    plan: Plan, vary: Sequence[tuple[str, Sequence[Any]]], implementation: str | None = None
) -> Iterator[tuple[dict[str, Any], Prediction | None, str]]:
    """Yield (changes, prediction, why not) for every combination of the varied keys' values.

    A combination that makes no legal plan comes with the reason; an unknown key is an error.
    """
    keys = [key for key, _ in vary]
    for key in keys:
        check_root(key)
        if keys.count(key) > 1:
            raise PlanError(f"{key}: varied twice; give all its values at once")
    if (count := prod(len(values) for _, values in vary)) > MOST_COMBINATIONS:
        raise PlanError(f"{count:,} combinations are too many; at most {MOST_COMBINATIONS:,}")
    for values in product(*(values for _, values in vary)):
        changes = {key: copy.copy(value) for (key, _), value in zip(vary, values, strict=True)}
        try:
            yield changes, predict(changed(plan, changes), implementation=implementation), ""
        except ShardsimError as error:
            yield changes, None, str(error).removeprefix(f"{plan.name}: ")


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How the step time answers to one figure of the chip."""

    figure: str
    elasticity: float  # d log(step time) / d log(figure)
    step_time_s_at_110: float  # with the figure 10 % larger
    mfu_at_110: float


FIGURES = (
    "peak_flops",
    "vector_flops",
    "hbm_bytes_per_s",
    "link_bytes_per_s",
    "hop_latency_s",
    "collective_overhead_s",
    "dcn_bytes_per_s",
    "dcn_hop_latency_s",
    "pcie_bytes_per_s",
)
NUDGE = 0.01


def sensitivity(plan: Plan, implementation: str | None = None) -> list[Sensitivity]:
    """Return the elasticity of the step time to each figure, the largest first.

    Central differences of 1 % on the same formulas; -0.8 for the peak means that 1 % more of it
    saves 0.8 % of the step.
    """
    layout = resolve(plan)
    program = implemented(
        partition(Workload.of(plan), layout, plan.remat),
        implementation or USUAL[plan.op_costs],
        plan.machine,
        layout,
    )
    schedule = overlap(program, layout)

    def scaled(figure: str, factor: float) -> tuple[float, Plan]:
        """Return the step time with one figure scaled, and the plan on that chip."""
        chip = plan.machine.chip
        if figure == "peak_flops":
            peaks = {dtype: rate * factor for dtype, rate in chip.peak_flops.items()}
            chip = replace(chip, peak_flops=peaks)
        else:
            chip = replace(chip, **{figure: getattr(chip, figure) * factor})
        nudged = replace(plan, machine=replace(plan.machine, chip=chip))
        costs = costs_of(plan.op_costs, chip)
        return float(step_time_s(nudged.machine, layout, schedule, costs)), nudged

    results = []
    for figure in FIGURES:
        if figure != "peak_flops" and not getattr(plan.machine.chip, figure):
            continue
        (above_s, _), (below_s, _) = scaled(figure, 1 + NUDGE), scaled(figure, 1 - NUDGE)
        more_s, more = scaled(figure, 1.1)
        change = log(above_s / below_s) / log((1 + NUDGE) / (1 - NUDGE))
        results.append(
            Sensitivity(
                figure=figure,
                elasticity=change,
                step_time_s_at_110=more_s,
                mfu_at_110=mfu_of(more, more_s),
            )
        )
    return sorted(results, key=lambda item: -abs(item.elasticity))
