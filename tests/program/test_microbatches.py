"""How microbatches follow each other: over stages, with weights that stay whole, by layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from building import build, decoder, is_legal, plans, quiet
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.plan import Plan, resolve
from shardsim.plan.io import plan_from_data, plan_to_data
from shardsim.plan.plan import ACCUMULATION
from shardsim.planner.search import search
from shardsim.simulate import simulate_plan
from shardsim.xla.compare import planned

DEEP = decoder(layers=16)
FSDP = {"fsdp": {"x": 4}, "tensor": {"y": 4}}
STAGES = {"pipeline": {"x": 4}, "fsdp": {"y": 4}}


def sent(plan: Plan, purpose: str) -> dict[str, tuple[float, float]]:
    """Return bytes and number of the collectives of a step for a purpose, by kind."""
    return {
        one.kind: (one.planned_bytes, one.planned_count)
        for one in planned(plan)
        if one.purpose == purpose
    }


@pytest.mark.parametrize("microbatches", [2, 8])
def test_weights_are_gathered_in_every_microbatch_or_once(microbatches: int) -> None:
    plan = build(DEEP, "v5e:4x4", 96, FSDP, microbatches=microbatches)
    found = {
        how: sent(replace(plan, accumulation=how), "weights")
        for how in ("repeated", "gathered", "scattered", "layered")
    }
    # Forward and again backward in each microbatch; once; once; forward and again backward.
    gathers = {how: bytes["all-gather"][0] for how, bytes in found.items()}
    once = gathers["gathered"]
    assert gathers == pytest.approx(
        {
            "repeated": 2 * microbatches * once,
            "gathered": once,
            "scattered": once,
            "layered": 2 * once,
        }
    )
    scatters = {how: bytes["reduce-scatter"][0] for how, bytes in found.items()}
    assert scatters == pytest.approx(
        {
            "repeated": microbatches * scatters["layered"],
            "gathered": scatters["layered"],
            "scattered": microbatches * scatters["layered"],
            "layered": scatters["layered"],
        }
    )
    tables = sent(replace(plan, accumulation="layered"), "tables")
    each = sent(plan, "tables")
    assert each["all-gather"][0] == pytest.approx(microbatches * tables["all-gather"][0])
    # Of the tables too: gathered once, and scattered where the gradients of layers are.
    for how, times in {"repeated": microbatches, "gathered": 1, "scattered": microbatches}.items():
        found_bytes = sent(replace(plan, accumulation=how), "tables")["reduce-scatter"][0]
        assert found_bytes == pytest.approx(times * tables["reduce-scatter"][0]), how


def test_layers_that_run_all_microbatches_keep_those_of_all() -> None:
    plan = build(DEEP, "v5e:4x4", 96, FSDP, microbatches=8)
    usual, layered = (predict(replace(plan, accumulation=how)) for how in ("repeated", "layered"))
    assert layered.hbm["activations_bytes"] == pytest.approx(8 * usual.hbm["activations_bytes"])
    # No second copy of gradients, which are added up before they are scattered.
    assert layered.hbm["gradients_bytes"] < usual.hbm["gradients_bytes"]
    # As much is computed.
    assert layered.time["compute_s"] == pytest.approx(usual.time["compute_s"])
    assert layered.hfu * layered.step_time_s == pytest.approx(usual.hfu * usual.step_time_s)


def test_whole_weights_and_sums_of_whole_gradients_are_in_hbm() -> None:
    plan = build(DEEP, "v5e:4x4", 96, FSDP, microbatches=8)
    split = {"heads", "kv_heads", "mlp", "vocab"}  # by the tensor axis of 4
    whole = sum(
        math.prod(t.shape) * (t.stack if t.part == "block" else 1) / (4 if split & {*t.axes} else 1)
        for t in plan.model.tensors
    )
    for how, shards, added in (("gathered", 1, 2), ("scattered", 4, 4)):
        peak = predict(replace(plan, accumulation=how)).hbm["gradients_bytes"]
        # Sums in float32, and what is added to them: whole as it comes, shards in the sums' format.
        assert peak == pytest.approx((4 + added) * whole / shards, rel=0.01)
    held = predict(replace(plan, accumulation="gathered")).use.at_peak
    sizes = {one.name: one.size_bytes for one in held}
    assert sizes["weights gathered for the step"] == pytest.approx(2 * whole, rel=0.01)


@pytest.mark.parametrize(("microbatches", "chunks"), [(4, 1), (4, 2), (8, 4)])
def test_a_loop_of_ticks_sends_and_keeps_what_it_runs_on_nothing(
    microbatches: int, chunks: int
) -> None:
    options = {"microbatches": microbatches, "pipeline_interleave": chunks}
    usual = build(DEEP, "v5e:4x4", 96, STAGES, **options)
    ticks = replace(usual, pipeline_schedule="gpipe")
    every = microbatches * chunks + 3
    assert sent(ticks, "stage boundary")["permute"][1] == pytest.approx(2 * every)
    # The stage with the head, and so the last chunk, passes on only gradients of that.
    assert sent(usual, "stage boundary")["permute"][1] == microbatches * (2 * chunks - 1)
    more = every / (microbatches * chunks)
    gathers, usually = sent(ticks, "weights"), sent(usual, "weights")
    assert gathers["all-gather"][0] == pytest.approx(more * usually["all-gather"][0])
    # Embedding and head are gathered once, and one stage has their gradients.
    assert sent(ticks, "tables")["all-gather"][1] == len(
        [t for t in DEEP.tensors if "vocab" in t.axes]
    )
    assert sent(ticks, "shared gradients").keys() == {"all-reduce"}
    assert "all-reduce" not in sent(usual, "shared gradients")
    # Microbatches in flight, of a stage's layers: all and the idle ticks, or as many as 1F1B has.
    kept = [predict(plan).hbm["activations_bytes"] for plan in (ticks, usual)]
    flying = min(microbatches, 4 + (3 / chunks if chunks > 1 else 0))
    assert kept[0] / kept[1] == pytest.approx((microbatches + 3 / chunks) / flying)
    if chunks == 1:  # in turns: those on their way to the last stage and back, and a tick's own
        turns = predict(replace(usual, pipeline_schedule="1f1b-ticks"))
        assert turns.hbm["activations_bytes"] / kept[1] == pytest.approx(2 * 4 / flying)
        assert turns.step_time_s == pytest.approx(predict(ticks).step_time_s)
        assert sent(replace(usual, pipeline_schedule="1f1b-ticks"), "weights") == gathers
        # Gradients of weights apart: in as many ticks as there are microbatches, on all stages.
        apart = replace(usual, pipeline_schedule="zb-h1-ticks")
        assert sent(apart, "weights")["all-gather"] == gathers["all-gather"]
        assert sent(apart, "weights")["reduce-scatter"] == usually["reduce-scatter"]
        found = predict(apart).price
        computed = [cost for cost in found.computes if "gradients of weights" in cost.block]
        moved = [cost for cost in found.collectives if "gradients of weights" in cost.block]
        made_s = sum(cost.unit_s + cost.memory_s + cost.overhead_s for cost in computed)
        made_s += sum(cost.exposed_s for cost in moved)
        saved_s = turns.step_time_s - found.step_time_s
        # What they multiply is copied to where it waits, in every tick that runs something back.
        (put,) = (cost for cost in found.computes if "keep for gradients" in cost.task.name)
        put_s = (put.unit_s + put.memory_s + put.overhead_s) * (1 + 3 / microbatches)
        assert put_s > 0
        assert saved_s == pytest.approx(3 / microbatches * made_s - put_s, rel=1e-6)
    # Both idle equally, but that in a loop the sends are part of a tick.
    bubbles = [predict(plan).time["bubble_s"] for plan in (ticks, usual)]
    assert bubbles[0] > bubbles[1] > 0.8 * bubbles[0]


@pytest.mark.parametrize("microbatches", [4, 7, 8])
def test_turns_add_to_the_sums_of_a_chunk_at_a_time(microbatches: int) -> None:
    """Microbatches that are one group all come back through a chunk before the next one; of two
    groups, the first come back through both."""

    def gradients(chunks: int, **options: str) -> float:
        more = {"pipeline_interleave": chunks, "accumulation": "gathered", **options}
        plan = build(DEEP, "v5e:4x4", 4 * 96, STAGES, microbatches=microbatches, **more)
        return float(predict(plan, implementation="ideal").hbm["gradients_bytes"])

    layers = sum(t.size_of_one * 16 for t in DEEP.tensors if t.stack == 16)  # float32, of 4 stages
    less = gradients(1) - gradients(2)
    assert less == pytest.approx(layers / 2 if microbatches < 8 else 0, rel=0.01)
    # In a loop of ticks a microbatch's gradients of all layers are there beside the sums.
    beside = gradients(1, pipeline_schedule="gpipe") - gradients(1)
    assert beside == pytest.approx(gradients(1) / 2, rel=0.01)


@settings(max_examples=25, deadline=None)
@given(plans(), st.sampled_from(ACCUMULATION[1:]))
def test_events_agree_with_the_closed_form(plan: Plan, how: str) -> None:
    """On generated plans, where nothing contends."""
    stages = int(resolve(plan).pipeline.size)
    how = "gathered" if stages > 1 else how
    plan = replace(plan, accumulation=how, pipeline_schedule="gpipe")
    assume(is_legal(plan) and plan.machine.chip.kind == "tpu")
    quiet(plan)
    found = simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)
    parts = found.time
    assert sum(parts.values()) == pytest.approx(found.step_time_s)
    assert min(parts.values()) > -1e-9


@pytest.mark.parametrize(
    ("machine", "where", "options"),
    [
        ("v5e:4x4", {"pipeline": {"x": 4}, "data": {"y": 4}}, {}),
        ("v5e:4x4", STAGES, {"pipeline_interleave": 4}),
        ("v5e:4x4", {"pipeline": {"x": 4}, "tensor": {"y": 4}}, {}),
        (
            "2*v5e:4x4",
            {"pipeline": {"dcn": 2}, "fsdp": {"x": 4}, "tensor": {"y": 4}},
            {"pipeline_interleave": 2},
        ),
        ("v5e:4x4", STAGES, {"accumulation": "gathered"}),
    ],
)
def test_ticks_as_events_take_as_long(machine: str, where: dict, options: dict) -> None:
    plan = build(DEEP, machine, 96, where, microbatches=8, pipeline_schedule="gpipe", **options)
    found = simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


@pytest.mark.parametrize("key", ["layered", "scattered"])
def test_what_stages_cannot_do_is_refused(key: str) -> None:
    data = plan_to_data(build(DEEP, "v5e:4x4", 96, STAGES, microbatches=8))
    with pytest.raises(PlanError, match=f"accumulation: {key} is not possible over pipeline"):
        plan_from_data({**data, "accumulation": key}, "plan")
    with pytest.raises(PlanError, match=r"pipeline_schedule: 'gpip' is not possible.*gpipe"):
        plan_from_data({**data, "pipeline_schedule": "gpip"}, "plan")
    ticks = {"pipeline_schedule": "1f1b-ticks", "pipeline_interleave": 2}
    with pytest.raises(PlanError, match="pipeline_schedule: 1f1b-ticks has one chunk"):
        plan_from_data({**data, **ticks}, "plan")


def test_a_plan_file_says_it_only_where_it_is_not_the_usual() -> None:
    plan = build(DEEP, "v5e:4x4", 96, STAGES, microbatches=8)
    keys = {"accumulation", "pipeline_schedule"}
    assert not keys & plan_to_data(plan).keys()
    other = replace(plan, accumulation="gathered", pipeline_schedule="gpipe")
    data = plan_to_data(other)
    assert keys <= data.keys()
    assert plan_from_data(data, "plan") == replace(other, model=plan.model)


@pytest.mark.parametrize(
    "fix",
    [
        {"accumulation": "layered", "microbatches": 4},
        {"accumulation": "gathered", "microbatches": 2},
        {"pipeline_schedule": "gpipe", "pipeline_interleave": 2, "mesh.stage": 2},
        pytest.param({"pipeline_schedule": "1f1b-ticks", "mesh.stage": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_search_holds_it_and_prices_what_it_finds(fix: dict) -> None:
    found = search(DEEP, "v5e:4x4", 64, top=3, fix=fix, costs="physical")
    assert found.predictions
    for one in found.predictions:
        again = predict(one.plan)
        assert again.step_time_s == pytest.approx(one.step_time_s, rel=1e-9)
        data = plan_to_data(one.plan)
        for key, value in fix.items():
            if "." not in key:
                assert data[key] == value
