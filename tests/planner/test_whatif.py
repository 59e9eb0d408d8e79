"""A plan with one thing of its model switched off, or larger."""

from __future__ import annotations

from typing import Any

import pytest
from building import build, decoder

from shardsim.cost.predict import predict
from shardsim.machine import parse_machine
from shardsim.model import Experts, Model, load_model
from shardsim.model.lora import Lora
from shardsim.plan import Plan
from shardsim.planner.changes import changed
from shardsim.planner.presets import plan_of_mesh
from shardsim.planner.whatif import ABLATIONS, ablate, model_sensitivity

WHERE = {"fsdp": {"x": 2, "y": 2}, "expert": {"z": 2}}
DROPLESS = Experts(number=8, top_k=2, mlp=1024)
CAPPED = Experts(number=8, top_k=2, mlp=1024, capacity=1.25, shared=1)


def plan_of(model: Model) -> Plan:
    dense = {"fsdp": {"x": 2, "y": 2, "z": 2}}
    return build(model, "v4:2x2x2", 32, WHERE if model.experts else dense)


def without(model: Model) -> dict[str, Any]:
    """Return by technique what is predicted without it, of those that not all models have."""
    found = ablate(plan_of(model))[len(ABLATIONS) :]
    return {item.technique: item.prediction for item in found}


def test_only_what_a_model_has_is_switched_off() -> None:
    assert without(decoder()) == {}
    assert list(without(decoder(experts=DROPLESS))) == ["experts"]
    assert list(without(decoder(experts=CAPPED))) == ["experts", "capacity of experts"]


def test_split_optimizer_state_stays_split_where_parameters_are_not() -> None:
    axes = {"data": {"x": 2}, "fsdp": {"y": 2, "z": 2}}
    plan = build(decoder(), "v4:2x2x2", 32, axes, over_data=True)
    found = {item.technique: item for item in ablate(plan)}["sharded parameters"]
    assert found.prediction is not None, found.why
    assert found.prediction.plan.optimizer_rules["embed"] == ("d", "f")
    assert found.prediction.hbm["optimizer_bytes"] == predict(plan).hbm["optimizer_bytes"]


@pytest.mark.parametrize(
    ("name", "machine", "axes", "so"),
    [
        ("deepseek-v3", "v5p:4x4x8", {"fsdp": 128}, "attention's output, MLPs"),
        ("llama2-7b", "v5p:2x2x2", {"fsdp": 8}, "all projections"),
        ("vit-22b", "v5p:4x4x4", {"fsdp": 64}, "all projections and norms"),
    ],
)
def test_biases_go_where_a_model_may_have_them(
    name: str, machine: str, axes: dict[str, int], so: str
) -> None:
    plan = plan_of_mesh(load_model(name), parse_machine(machine), 512, axes)
    found = {item.technique: item for item in ablate(plan)}["bias removal"]
    assert found.change == f"biases on {so}"
    assert found.prediction is not None, found.why
    assert found.prediction.plan.model.biases != plan.model.biases


def test_dense_mlps_have_the_weights_that_a_token_goes_to() -> None:
    for experts in (DROPLESS, CAPPED):
        model = decoder(experts=experts)
        dense = without(model)["experts"].plan.model
        router = model.layers * model.embed * experts.number
        assert dense.parameters == model.active_parameters - router
    adapted = Lora(rank=8, on=("query", "expert_in", "expert_out", "mlp_in"))
    lora = without(decoder(experts=Experts(number=8, top_k=2, mlp=4096, every=2), lora=adapted))
    assert lora["experts"].plan.model.lora == Lora(rank=8, on=("query", "mlp_in", "mlp_out"))
    layered = decoder(experts=Experts(number=8, top_k=2, mlp=4096, every=2))
    dense = without(layered)["experts"].plan.model
    assert dense.mlp == (2 * 4096 + layered.mlp) / 2


def test_without_a_capacity_nothing_is_dropped_or_padded() -> None:
    plan = plan_of(decoder(experts=CAPPED))
    alone = without(plan.model)["capacity of experts"]
    same = predict(changed(plan, {"model.experts.capacity": 0.0}))
    assert alone.step_time_s == same.step_time_s < predict(plan).step_time_s


def test_without_windows_all_pairs_of_tokens_are_computed() -> None:
    model = decoder(sequence=4096, windows=[512, 0])
    whole = without(model)["windows"]
    assert whole.step_time_s == predict(plan_of(decoder(sequence=4096))).step_time_s
    assert whole.step_time_s > predict(plan_of(model)).step_time_s


@pytest.mark.parametrize(
    ("model", "figures"),
    [
        (decoder(), []),
        (decoder(experts=DROPLESS), ["experts.imbalance"]),
        (decoder(experts=CAPPED), ["experts.capacity"]),
        (decoder(sequence=4096, windows=[512, 0]), ["windows"]),
    ],
)
def test_figures_of_a_model_make_a_step_longer_and_no_more_than_that(
    model: Model, figures: list[str]
) -> None:
    found = model_sensitivity(plan_of(model))
    assert [item.figure for item in found] == figures
    for item in found:
        assert 0.0 < item.elasticity <= 1.0
