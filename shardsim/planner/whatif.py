"""What-if: a plan with one thing switched off, or varied; nudged by `cost.sensitivity`."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import product
from math import log, prod
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.cost.sensitivity import Sensitivity
from shardsim.errors import PlanError, ShardsimError, expect
from shardsim.executors import outcomes
from shardsim.model import Model, override_model
from shardsim.plan.io import PlanOrPath, as_plan
from shardsim.plan.plan import Overlap, Plan, Routing
from shardsim.plan.remat import POLICIES, Remat
from shardsim.plan.resolve import resolve
from shardsim.planner.changes import changed, check_root

MOST_COMBINATIONS = 100_000  # of a sweep
MORE = 1.1  # of a model's figure
LANES = 128  # what a width is a multiple of


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
    optimizer = dict(plan.optimizer_rules)
    if optimizer.get("embed"):  # state that is split over data axes stays split over all of them
        by_expert = plan.parameters.get("expert", ())
        data = [
            axis
            for axis in gathered
            if axis in plan.activations.get("batch", ()) and axis not in by_expert
        ]
        optimizer["embed"] = tuple(dict.fromkeys((*optimizer["embed"], *data)))
    return replace(
        plan,
        parameters={key: axes for key, axes in parameters.items() if axes},
        optimizer_rules=optimizer,
    )


def _serial(plan: Plan) -> Plan:
    if not plan.model.parallel_block:
        raise PlanError("layers are serial already")
    model = override_model(plan.model, {"parallel_block": False})
    return replace(plan, model=model, fused_projections=False)


def _possible_biases(model: Model) -> dict[str, str]:
    """Return what a model may have biases on; RMSNorm and latents have none."""
    found = {"qkv": "queries, keys and values", "attention_output": "attention's output"}
    found |= {"mlp": "MLPs", "norm": "norms"}
    none = {"qkv"} if model.latent else set()
    none |= {"norm"} if model.norm == "rmsnorm" else set()
    return {name: words for name, words in found.items() if name not in none}


def _biases(plan: Plan) -> Plan:
    names = _possible_biases(plan.model)
    if all(getattr(plan.model.biases, name) for name in names):
        raise PlanError("all biases are there already")
    changes = {f"biases.{name}": True for name in names}
    return replace(plan, model=override_model(plan.model, changes))


def _biases_words(plan: Plan) -> str:
    found = _possible_biases(plan.model)
    if "qkv" in found:
        return f"biases on all projections{' and norms' if 'norm' in found else ''}"
    return f"biases on {', '.join(found.values())}"


def _no_overlap(plan: Plan) -> Plan:
    off = Overlap(matmul="off", weights=False, gradients=False, dcn=False)
    hops = plan.context.keys == "ring" and plan.context.overlap
    if plan.overlap == off and not hops:
        raise PlanError("nothing overlaps already")
    context = replace(plan.context, overlap=False) if hops else plan.context
    return replace(plan, overlap=off, context=context)


def _no_remat(plan: Plan) -> Plan:
    if plan.remat == (kept := Remat.of(save=POLICIES["none"])):
        raise PlanError("nothing is recomputed already")
    return replace(plan, remat=kept)


def _dense(plan: Plan) -> Plan:
    """Return the plan with MLPs as wide as what a token goes to, layer by layer or, where not all
    have experts, on average; its expert axis splits data alone."""
    experts, layers = plan.model.experts, plan.model.layers
    assert experts is not None
    width = experts.top_k * experts.mlp + experts.shared_width
    width += plan.model.mlp if experts.beside else 0
    routed = sum(map(experts.has, range(layers)))
    if routed < layers:
        mean = (routed * width + (layers - routed) * plan.model.mlp) / layers
        width = max(1, round(mean / LANES)) * LANES
    parameters, activations = (
        {key: axes for key, axes in rules.items() if key != "expert"}
        for rules in (plan.parameters, plan.activations)
    )
    changes: dict[str, Any] = {"experts": None, "mlp": width}
    if lora := plan.model.lora:  # of experts, then of the MLP
        on = [re.sub("^(expert|shared)_", "mlp_", name) for name in lora.on]
        changes["lora"] = {"rank": lora.rank, "on": [*dict.fromkeys(on)]}
    model = override_model(plan.model, changes)
    return replace(
        plan, model=model, parameters=parameters, activations=activations, experts=Routing()
    )


def _sorted(plan: Plan) -> Plan:
    model = override_model(plan.model, {"experts.capacity": 0.0, "experts.group": 0})
    return replace(plan, model=model)


def _all_seen(plan: Plan) -> Plan:
    model = override_model(plan.model, {"windows": [], "chunked": False})
    return replace(plan, model=model)


def _without_index(plan: Plan) -> Plan:
    return replace(plan, model=override_model(plan.model, {"index": None}))


Words = str | Callable[[Plan], str]  # what a plan is then

ABLATIONS: tuple[tuple[str, Words, str, Callable[[Plan], Plan]], ...] = (
    (
        "parallel layers",
        "serial layers",
        "about 15 % faster training at large scale (PaLM, arXiv 2204.02311; ViT-22B announcement)",
        _serial,
    ),
    (
        "bias removal",
        _biases_words,
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


# What some models have: whether one does, and the rest as above.
OF_MODELS: tuple[tuple[Callable[[Model], bool], str, str, Callable[[Plan], Plan]], ...] = (
    (
        lambda model: model.experts is not None,
        "experts",
        "an MLP as wide as those of a token",
        _dense,
    ),
    (
        lambda model: model.experts is not None and model.experts.capacity > 0,
        "capacity of experts",
        "no token dropped, copies sorted by expert",
        _sorted,
    ),
    (lambda model: any(model.windows), "windows", "every layer sees all tokens", _all_seen),
    (
        lambda model: model.index is not None,
        "index of tokens",
        "every query sees all tokens",
        _without_index,
    ),
)


def ablate(plan: PlanOrPath, implementation: str | None = None) -> list[Ablation]:
    """Return the plan with each technique switched off alone, all done as `implementation`."""
    plan, results = as_plan(plan), []
    more = [(name, so, "", switch) for has, name, so, switch in OF_MODELS if has(plan.model)]
    for technique, change, published, switch in (*ABLATIONS, *more):
        prediction, why = None, ""
        try:
            without = switch(plan)
            prediction = predict(without, implementation=implementation)
        except ShardsimError as error:
            why = str(error)
        results.append(
            Ablation(
                technique=technique,
                change=change if isinstance(change, str) else change(plan),
                published=published,
                prediction=prediction,
                why=why,
            )
        )
    return results


def model_sensitivity(plan: PlanOrPath, implementation: str | None = None) -> list[Sensitivity]:
    """Return how the step time answers to what a model's experts and windows have for figures.

    Each is 10 % larger, alone: the capacity of experts, the load of their fullest device over the
    mean, windows (whose kernels do whole blocks). Where it matters to no plan it is left out.
    """
    plan = as_plan(plan)
    experts, windows = plan.model.experts, plan.model.windows
    changes: dict[str, dict[str, Any]] = {}
    if experts is not None and experts.capacity:
        changes["experts.capacity"] = {"model.experts.capacity": experts.capacity * MORE}
    elif experts is not None and experts.dropless and int(resolve(plan).expert.size) > 1:
        changes["experts.imbalance"] = {"experts.imbalance": plan.experts.imbalance * MORE}
    if any(windows):
        changes["windows"] = {"model.windows": [round(window * MORE) for window in windows]}
    if not changes:
        return []
    base = predict(plan, implementation=implementation)
    found = []
    for figure, change in changes.items():
        more = predict(changed(plan, change), implementation=implementation)
        found.append(
            Sensitivity(
                figure=figure,
                elasticity=log(more.step_time_s / base.step_time_s) / log(MORE),
                step_time_s_at_110=more.step_time_s,
                mfu_at_110=more.mfu,
            )
        )
    return found


def sweep(
    plan: PlanOrPath,
    vary: Mapping[str, Sequence[Any]] | Sequence[tuple[str, Sequence[Any]]],
    implementation: str | None = None,
    *,
    run: Callable[..., Prediction] = predict,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[dict[str, Any], Prediction | None, str]]:
    """Yield (changes, prediction, why not) for every combination of the varied keys' values.

    A combination that makes no legal plan comes with the reason; an unknown key is an error. `run`
    predicts one plan (`simulate_plan` does, too), with an `executor` each in a call of its own;
    `progress(done, total)` is called after each. An interrupt ends the sweep with what is done.
    """
    expect(vary, Mapping | list | tuple, "vary: expected keys, each with its values")
    vary = list(vary.items()) if isinstance(vary, Mapping) else vary
    for pair in vary:
        expect(pair, tuple | list, "vary: expected (key, values)")
        expect(pair[-1], tuple | list | range, f"vary: expected a list of values for {pair[0]}")
    plan, keys = as_plan(plan), [key for key, _ in vary]
    for key in keys:
        check_root(key)
        if keys.count(key) > 1:
            raise PlanError(f"{key}: varied twice; give all its values at once")
    if (count := prod(len(values) for _, values in vary)) > MOST_COMBINATIONS:
        raise PlanError(f"{count:,} combinations are too many; at most {MOST_COMBINATIONS:,}")
    every = [
        {key: copy.copy(value) for (key, _), value in zip(vary, values, strict=True)}
        for values in product(*(values for _, values in vary))
    ]
    calls = [(run, plan, changes, implementation) for changes in every]
    done: dict[int, tuple[Prediction | None, str]] = {}
    with contextlib.suppress(KeyboardInterrupt):
        every_call = ((index, _changed_run(*call)) for index, call in enumerate(calls))
        for index, made in outcomes(executor, _changed_run, calls) if executor else every_call:
            done[index] = made
            if progress is not None:
                progress(len(done), len(calls))
    for index in sorted(done):
        yield every[index], *done[index]


def _changed_run(
    run: Callable[..., Prediction], plan: Plan, changes: dict[str, Any], implementation: str | None
) -> tuple[Prediction | None, str]:
    """Return the prediction of a plan with changes, or why there is none."""
    try:
        return run(changed(plan, changes), implementation=implementation), ""
    except ShardsimError as error:
        return None, str(error).removeprefix(f"{plan.name}: ")
