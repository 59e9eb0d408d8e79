"""Choices that a search holds: it finds the best of what is left, and says what it cannot hold."""

from __future__ import annotations

from typing import Any

import pytest
from building import ALIKE_KEYS, decoder, vit
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.emit import plan_data
from shardsim.errors import PlanError
from shardsim.machine import parse_machine
from shardsim.model import Experts, Model
from shardsim.plan import Plan, Remat, load_plan, resolve, save_plan
from shardsim.plan.io import parse_remat
from shardsim.plan.layout import ROLES
from shardsim.plan.plan import Routing
from shardsim.planner.fixed import ROOM, fixed_of
from shardsim.planner.search import search

MACHINE = parse_machine("v5e:4x4")
MODEL = decoder(layers=4)

CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "mesh.model": st.sampled_from([1, 2, 4]),
        "mesh.fsdp": st.sampled_from([1, 4, 16]),
        "mesh.context": st.just(1),
        "remat": st.sampled_from(["full", "none", {"save": ["qkv"], "offload": ["context"]}]),
        "microbatches": st.sampled_from([1, 2, 3]),
        "overlap.matmul": st.sampled_from(["off", "unidirectional"]),
        "attention": st.sampled_from(["flash", "unfused"]),
        "precision.state": st.just("bf16"),
    },
)


def has(plan: Plan, choices: dict[str, Any]) -> bool:
    """Return whether a plan is as the choices say."""
    layout = resolve(plan)
    sizes = {"model": "tensor"}
    for key, value in choices.items():
        root, _, rest = key.partition(".")
        if root == "mesh" and int(layout.role(sizes.get(rest, rest)).size) != value:
            return False
        if key == "remat" and plan.remat != parse_remat(value, "", 4):
            return False
        if key in ("microbatches", "attention") and getattr(plan, key) != value:
            return False
        if key == "overlap.matmul" and int(layout.tensor.size) > 1 and plan.overlap.matmul != value:
            return False
        if key == "precision.state" and plan.precision.state != value:
            return False
    return True


@given(CHOICES)
@settings(max_examples=20)
def test_every_plan_has_what_is_held(choices: dict[str, Any]) -> None:
    for item in search(MODEL, MACHINE, 48, top=6, max_axes=2, fix=choices).predictions:
        assert has(item.plan, choices), item.plan


@pytest.mark.parametrize(
    "role", [pytest.param(role, marks=pytest.mark.slow) for role in ("model", "fsdp", "data")]
)
def test_holding_each_size_in_turn_is_the_whole_search(role: str) -> None:
    whole, *parts = (
        search(MODEL, MACHINE, 64, top=1, max_axes=2, fix=fix)
        for fix in ({}, *({f"mesh.{role}": size} for size in (1, 2, 4, 8, 16)))
    )
    assert sum(part.searched for part in parts) == whole.searched
    assert sum(part.fit for part in parts) == whole.fit
    best = min(part.best.step_time_s for part in parts if part.predictions)
    assert best == pytest.approx(whole.best.step_time_s, rel=1e-12)


@pytest.mark.parametrize(
    "keys", [pytest.param(k, marks=() if k == "ring" else pytest.mark.slow) for k in ALIKE_KEYS]
)
def test_how_a_context_axis_attends_is_held(keys: str) -> None:
    # Four sequences on sixteen chips: some axis has to split more than the batch.
    whole = search(MODEL, MACHINE, 4, top=1).best.step_time_s
    found = search(MODEL, MACHINE, 4, top=4, fix={"context.keys": keys, "mesh.context": 4})
    for item in found.predictions:
        assert item.plan.context.keys == keys
        # Parts of whole tiles, or none: 128 tokens a member are striped only where halves are too.
        assert not resolve(item.plan).striped
        assert item.step_time_s >= whole * (1 - 1e-12)


def test_tokens_are_striped_under_a_causal_mask() -> None:
    model = decoder(layers=4, sequence=4096)
    fix = {"mesh.context": 4, "context.keys": "gathered"}
    assert search(model, MACHINE, 4, top=1, fix=fix).best.plan.context.order == "striped"
    unmasked = decoder(layers=4, sequence=4096, causal=False)
    assert not resolve(search(unmasked, MACHINE, 4, top=1, fix=fix).best.plan).striped


def test_more_axes_may_be_held_than_are_searched() -> None:
    fix = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.model": 2, "mesh.context": 2}
    item = search(MODEL, MACHINE, 64, top=1, max_axes=2, fix=fix).best
    assert [axis.size for axis in item.plan.mesh] == [2, 2, 2, 2]


def test_what_is_kept_in_the_host_is_held_too() -> None:
    remat = {"save": ["context"], "offload": ["qkv", "layer_input"]}
    item = search(vit(layers=4), MACHINE, 64, top=1, max_axes=1, fix={"remat": remat}).best
    assert item.plan.remat == Remat.of(frozenset({"context"}), frozenset({"qkv", "layer_input"}))


def test_every_role_can_be_held_by_either_name() -> None:
    for role in ROLES:
        assert fixed_of({f"mesh.{role}": 2}).sizes == {role: 2}
    assert fixed_of({"mesh.stage": 2}).sizes == {"pipeline": 2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mesh.modl", 4, "fix: mesh.modl: no role 'modl'; did you mean 'model'?"),
        ("mesh.model", 0, "fix: mesh.model: must be a positive whole number, not 0"),
        ("batch", 8, "fix: a search cannot hold 'batch'"),
        ("microbatch", 8, "fix: a search cannot hold 'microbatch'; did you mean 'microbatches'?"),
        ("remat", "ful", "fix: remat: unknown remat policy 'ful'; did you mean 'full'?"),
        ("remat", [{"layers": 2, "save": []}, {"layers": 2, "save": ["qkv"]}], "one policy"),
        (
            "context.keys",
            "rings",
            "fix: context.keys: 'rings' is not possible; did you mean 'ring'?",
        ),
        ("attention", "flush", "fix: attention: 'flush' is not possible; did you mean 'flash'?"),
        ("overlap.matmul", False, "fix: overlap.matmul: false is not possible"),
        ("precision.compute", "fp8", "precision.compute: v5e has no fp8; choose from: bf16, int8"),
        ("precision.state", "f16", "fix: precision.state: 'f16' is not possible"),
    ],
)
def test_what_cannot_be_held(key: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError) as raised:
        search(MODEL, MACHINE, 48, fix={key: value})
    assert message in str(raised.value)


MIXTURE = decoder(layers=4, embed=256, experts=Experts(number=8, top_k=4, mlp=512))
SMALL = parse_machine("v5e:2x4")


@pytest.mark.slow
def test_found_plans_of_experts_have_programs_at_their_price(tmp_path) -> None:
    found = search(MIXTURE, SMALL, 32, top=20, fix={"mesh.context": 1}).predictions
    routed = [item for item in found if int(resolve(item.plan).expert.size) > 1]
    assert {item.plan.experts.exchange for item in routed} == {"all-to-all", "ring"}
    for item in routed:
        room = plan_data(item.plan)["plan"]["padding"]
        assert room == ROOM
        save_plan(item.plan, tmp_path / "plan.yaml")
        assert predict(load_plan(tmp_path / "plan.yaml")).step_time_s == item.step_time_s


def test_how_tokens_reach_experts_is_held() -> None:
    held = {"mesh.expert": 4, "experts.padding": 3, "experts.exchange": "ring"}
    held |= {"experts.imbalance": 1.5}
    for item in search(MIXTURE, SMALL, 32, top=5, max_axes=2, fix=held).predictions:
        assert item.plan.experts == Routing(exchange="ring", imbalance=1.5, padding=3.0)
    one = {"mesh.expert": 8}
    exact = search(MIXTURE, SMALL, 32, top=1, max_axes=1, fix=one | {"experts.padding": 1})
    room = search(MIXTURE, SMALL, 32, top=1, max_axes=1, fix=one)
    assert exact.best.step_time_s < room.best.step_time_s


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL, "fix: experts: small-decoder has none"),
        (
            decoder(experts=Experts(number=8, top_k=2, mlp=512, capacity=1.25)),
            "leave imbalance and padding out",
        ),
    ],
)
def test_room_for_what_is_not_uneven_cannot_be_held(model: Model, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        search(model, MACHINE, 48, fix={"experts.padding": 2})


def test_passes_forward_are_searched_at_their_price() -> None:
    found = search(MODEL, MACHINE, 48, top=3, max_axes=2, fix={"forward_only": True}).predictions
    for item in found:
        assert item.plan.forward_only
        assert predict(item.plan).step_time_s == item.step_time_s
        assert not [text for text in item.warnings if "changes nothing" in text]
    trained = search(MODEL, MACHINE, 48, top=1, max_axes=2).best
    assert found[0].step_time_s < trained.step_time_s / 2
