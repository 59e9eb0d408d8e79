"""Latent attention on a mesh: what moves, what is computed, what is held, against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import LATENTS, build, plans, quiet, sent
from hypothesis import HealthCheck, assume, given, settings

from shardsim.cost.predict import predict
from shardsim.emit import FORMS, export_plan, shrink
from shardsim.errors import PlanError
from shardsim.model import Latent, forward_matmul_flops_per_token, load_model
from shardsim.plan import Plan, resolve
from shardsim.plan.io import plan_from_data, plan_to_data
from shardsim.plan.legality import check
from shardsim.planner.search import search
from shardsim.program.kept import kept
from shardsim.program.partition import partition
from shardsim.program.schedule import Move, Work
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes
from shardsim.simulate import simulate_plan

MODEL = LATENTS[0]
BATCH, TOKENS = 64, MODEL.sequence
EMBED, HEADS, LAYERS = MODEL.embed, MODEL.heads, MODEL.layers
QUERY, KEY_VALUE, ROTARY, NOPE, VALUE = 256, 128, 16, 48, 32
UP = QUERY * HEADS * (NOPE + ROTARY) + KEY_VALUE * HEADS * (NOPE + VALUE)
DOWN = EMBED * (QUERY + KEY_VALUE + ROTARY)
FSDP_TENSOR = {"fsdp": {"x": 4}, "tensor": {"y": 4}}


def plan_of(where: dict[str, dict[str, int]], **options: Any) -> Plan:
    options.setdefault("residual", "")
    return build(options.pop("model", MODEL), "v5e:4x4", BATCH, where, **options)


def tasks(plan: Plan, *phases: str) -> list[tuple[Any, float]]:
    program = partition(Workload.of(plan), resolve(plan))
    return [
        (task, float(task.count) * float(block.trips))
        for block in program.blocks
        if block.phase in phases
        for task in block.tasks
        if float(getattr(task, "count", 0))
    ]


@pytest.mark.parametrize("residual", ["", "seq", "embed"])
def test_latents_are_whole_over_tensor_and_their_gradients_summed_over_it(residual: str) -> None:
    plan = plan_of(FSDP_TENSOR, residual=residual, remat="none")
    found = tasks(plan, "forward", "backward", "reduction")
    moves = [(task, count) for task, count in found if isinstance(task, Move)]
    shared = [task for task, _ in moves if "shared gradients" in task.name]
    assert sum(float(task.bytes) for task in shared) == 2 * DOWN / 4  # what fsdp leaves
    # What heads make is never moved, and the stream is as for any attention.
    stream = 2 * BATCH / 4 * TOKENS * EMBED
    over_tensor = [task for task, _ in moves if task.role == "tensor" and task not in shared]
    assert {float(task.bytes) for task in over_tensor} == {stream}
    rows = {task.name: float(task.m) for task, _ in found if isinstance(task, Work)}
    for name in ("query_down", "key_value_down", "shared_key", "query", "key", "value"):
        assert rows[name] == BATCH / 4 * TOKENS
    columns = {task.name: float(task.n) for task, _ in found if isinstance(task, Work)}
    assert (columns["query_down"], columns["shared_key"]) == (QUERY, ROTARY)
    assert columns["key"] == HEADS / 4 * NOPE


def test_fsdp_gathers_and_scatters_every_weight() -> None:
    plan = plan_of({"fsdp": {"x": 4, "y": 4}}, remat="full")
    layer = UP + DOWN + HEADS * VALUE * EMBED + 2 * EMBED * MODEL.mlp
    for phase, kinds in (("forward", {"all-gather"}), ("backward", {"all-gather"})):
        moved = {
            task.kind: float(task.bytes)
            for task, _ in tasks(plan, phase)
            if isinstance(task, Move) and task.role == "fsdp"
        }
        assert moved["all-gather"] == 2 * layer
        assert set(moved) - {"reduce-scatter"} == kinds


def test_a_context_axis_gathers_keys_and_values_as_wide_as_they_are() -> None:
    plan = plan_of({"fsdp": {"x": 4}, "context": {"y": 4}}, remat="full")
    widths = {"keys": NOPE + ROTARY, "v": VALUE}
    found = [
        (task.name, float(task.bytes))
        for task, _ in tasks(plan, "forward")
        if isinstance(task, Move) and task.role == "context"
    ]
    rows = BATCH / 4 * TOKENS * HEADS
    assert found == [(f"gather {name}", 2 * rows * widths[name]) for name in ("v", "keys")]


@pytest.mark.parametrize("latents", [LATENTS[0].latent, LATENTS[1].latent])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_a_kernel_pads_values_and_nothing_else_is_computed_twice(
    latents: Latent, attention: str
) -> None:
    model = replace(MODEL, latent=latents)
    where = {"data": {"x": 4, "y": 4}}
    plan = plan_of(where, model=model, remat="none", attention=attention)
    done = sum(
        2.0 * float(task.m) * float(task.k) * float(task.n) * float(task.batch) * task.matmuls
        for task, _ in tasks(plan, "forward")
        if isinstance(task, Work)
    )
    counted = forward_matmul_flops_per_token(model, halved=False) - 2 * EMBED * model.vocab
    padding = 64 - latents.values if attention == "flash" else 0
    padded = 2 * LAYERS * TOKENS * HEADS * padding
    assert done * LAYERS * 16 / (BATCH * TOKENS) == pytest.approx(counted + padded, rel=1e-12)


WIDTHS = {
    "full": 0,
    "save_qkv": QUERY + KEY_VALUE + ROTARY + HEADS * (NOPE + ROTARY + NOPE + VALUE),
    "save_context": HEADS * (NOPE + ROTARY),  # as wide as the kernel makes it
    "save_attention": QUERY
    + KEY_VALUE
    + ROTARY
    + HEADS * (NOPE + ROTARY + NOPE + VALUE)
    + HEADS * (NOPE + ROTARY),
}


@pytest.mark.parametrize("policy", WIDTHS)
def test_a_policy_keeps_latents_with_queries_keys_and_values(policy: str) -> None:
    plan = plan_of({"data": {"x": 4, "y": 4}}, remat=policy)
    layout, work = resolve(plan), Workload.of(plan)
    device, host = kept(work, layout, Sizes(work, layout), 0, layout.kept[0])
    tokens = BATCH / 16 * TOKENS
    assert (float(device), host) == (2 * tokens * (EMBED + WIDTHS[policy]), {})


@given(plans(models=LATENTS, machines=("v4:2x2x4", "v4:4x4x4", "v5e:4x4", "2*v4:2x2x4")))
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_events_run_latents_as_the_closed_form_does(plan: Plan) -> None:
    assume(int(resolve(plan).pipeline.size) == 1)
    plan = replace(plan, model=replace(plan.model, layers=4))
    assert plan_from_data(plan_to_data(plan), "again", plan.name) == plan
    closed, found = quiet(plan), simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)
    assert sent(found) == pytest.approx(sent(closed), rel=1e-9)


def test_search_plans_them_without_a_second_tensor_axis() -> None:
    found = search(MODEL, "v5e:2x4", BATCH, max_axes=2)
    assert found.predictions
    for prediction in found.predictions:
        assert int(resolve(prediction.plan).tensor2.size) == 1
        assert predict(prediction.plan).step_time_s == pytest.approx(prediction.step_time_s)


@pytest.mark.parametrize(
    ("where", "options", "words"),
    [
        (
            {"fsdp": {"x": 4}, "tensor": {"y": 4}},
            {"model": replace(MODEL, heads=6, kv_heads=6)},
            "mesh: attention heads over the tensor axes: 6 does not divide by 4",
        ),
        (
            {"fsdp": {"x": 4, "y": 4}},
            {"model": replace(MODEL, latent=replace(MODEL.latent, keys=24))},
            "mesh: width of latents over the axes that shard parameters: 24 does not divide by 16",
        ),
        (
            {"tensor2": {"x": 4}, "tensor": {"y": 4}},
            {},
            "mesh: latent attention is not spread over a second tensor axis; name one axis",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    where: dict[str, dict[str, int]], options: dict[str, Any], words: str
) -> None:
    def checked() -> None:
        plan = plan_of(where, **options)
        check(plan, resolve(plan))

    with pytest.raises(PlanError) as caught:
        checked()
    assert words in str(caught.value)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_only_the_projects_own_forms_hold_latents(form: str) -> None:
    plan = plan_of({"fsdp": {"x": 4, "y": 4}})
    if form == "specs":
        assert "'query_down', [" in export_plan(plan, form)
        return
    if form in ("jax", "json", "yaml"):
        assert "query_down" in export_plan(plan, form)
        partitioned, why = replace(plan, execution="partitioned"), "latent attention as partitioned"
        if form == "jax":
            with pytest.raises(PlanError, match=f"{why} is not supported"):
                export_plan(partitioned, form)
        else:  # a description, which says so
            assert why in export_plan(partitioned, form)
        return
    with pytest.raises(PlanError, match=f"export to {form}: latents of small-decoder are not"):
        export_plan(plan, form)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_a_tiny_copy_keeps_its_latents(name: str) -> None:
    model = load_model(name)
    where = {"fsdp": {"x": 4}, "tensor": {"y": 4}}
    small, lost = shrink(plan_of(where, model=model, residual="seq"))
    latent = small.model.latent
    assert not lost
    assert latent is not None
    assert bool(latent.queries) == bool(model.latent and model.latent.queries)
    assert small.model.head_dim > max(latent.rotary, latent.values)
