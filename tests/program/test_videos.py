"""Videos: layers within frames and through time, and tokens that are turned between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import VIDEO, build, contends, decoder

from shardsim.cost.predict import predict
from shardsim.errors import ModelError, PlanError
from shardsim.model.flops import attention_flops_per_token
from shardsim.plan import Overlap, Plan, resolve
from shardsim.plan.plan import Context
from shardsim.planner.search import search
from shardsim.program.partition import partition
from shardsim.program.passes import implemented
from shardsim.program.schedule import Work
from shardsim.program.shapes import Workload
from shardsim.simulate import simulate_plan

WHERE = {"context": {"x": 2, "y": 2}, "fsdp": {"z": 4}}
MEMBERS, BATCH = 4, 8


def plan(keys: str, **options: Any) -> Plan:
    return build(VIDEO, "v4:2x2x4", BATCH, WHERE, context=Context(keys=keys), **options)


def turned(one: Plan) -> float:
    """Return the bytes that a device has of what all-to-alls of a step turn."""
    return sum(
        float(task.bytes * task.count * block.trips)
        for block in partition(Workload.of(one), resolve(one)).blocks
        for task in block.collectives()
        if (task.kind, task.role) == ("all-to-all", "context")
    )


def test_dsp_turns_the_residual_stream_and_ulysses_four_arrays() -> None:
    """By hand: B/f sequences of T/c tokens, 2 bytes each, in every other layer; with full remat one
    turn before it forward, one after, the first again, and both back. Ulysses turns queries, keys,
    values and the result, and all but the last again; heads are as wide as embed."""
    piece = BATCH / 4 * VIDEO.sequence / MEMBERS * VIDEO.embed * 2.0
    layers = VIDEO.layers / 2
    assert turned(plan("dsp")) == pytest.approx(layers * piece * (2 + 1 + 2))
    through_time = turned(plan("ulysses"))
    assert through_time == pytest.approx(layers * piece * (4 + 4 + 4))
    # Layers within frames send nothing, however the others do; where they too exchange heads, it is
    # twice as much.
    both = turned(replace(plan("ulysses"), model=replace(VIDEO, attends=())))
    assert both == pytest.approx(2 * through_time)
    assert turned(plan("dsp")) <= 0.25 * both


def test_tokens_see_a_frame_or_a_location() -> None:
    space, time, every = (
        attention_flops_per_token(replace(VIDEO, attends=attends))
        for attends in (("space",), ("time",), ())
    )
    locations = VIDEO.sequence // VIDEO.frames
    assert space * VIDEO.frames == every
    assert time * locations == every


@pytest.mark.parametrize("costs", ["physical", "compiler"])
@pytest.mark.parametrize("keys", ["gathered", "ring", "ulysses", "dsp"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_events_agree_where_nothing_contends(keys: str, costs: str, attention: str) -> None:
    if attention == "unfused" and keys in ("ring", "ulysses"):
        return
    one = plan(keys, attention=attention, overlap=Overlap(gradients=False))
    found = simulate_plan(one, costs=costs)
    assert not contends(found.schedule, resolve(one))
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


@pytest.mark.slow
def test_a_search_switches() -> None:
    longer = replace(VIDEO, image=224, sequence=16 * 256)
    found = search(longer, "v4:2x2x4", 2, top=4)
    assert found.best.plan.context.keys == "dsp"
    others = search(longer, "v4:2x2x4", 2, top=1, fix={"context.keys": "ulysses"})
    assert found.best.step_time_s < others.best.step_time_s
    assert predict(found.best.plan).step_time_s == pytest.approx(found.best.step_time_s)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (decoder(), {"context": Context(keys="dsp")}, "see all tokens; use ulysses"),
        (VIDEO, {"context": Context(order="striped")}, "within whole frames"),
        (VIDEO, {"sequence": 250}, "250 tokens are not 16 frames .* that are: 256"),
    ],
)
def test_what_does_not_go_together_is_refused(model: Any, changes: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        build(model, "v4:2x2x4", BATCH, WHERE, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attends": ("time", "space", "time")}, "not whole rounds of 3; .* is 3"),
        ({"attends": ("depth",)}, r"expected a list of all, space, time"),
        ({"frames": 1}, "needs frames: 2 or more"),
        ({"positions": "rotary"}, "needs positions: fixed, learned or none"),
        ({"pooling": "cls"}, "needs pooling: one without a class token"),
    ],
)
def test_models_that_cannot_be_are_refused(changes: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        replace(VIDEO, **changes)


def test_frames_and_locations_have_to_divide() -> None:
    from shardsim.plan.legality import check

    uneven = replace(VIDEO, frames=6, image=14 * 4, sequence=96)
    one = build(uneven, "v4:2x2x4", BATCH, WHERE, context=Context(keys="dsp"))
    with pytest.raises(PlanError, match="frames over the context axis: 6 does not divide by 4"):
        check(one, resolve(one))


def test_attention_to_few_tokens_has_its_scores_in_hbm() -> None:
    """Three passes over bf16 scores of every pair forward: written, read and written again."""
    one = build(VIDEO, "v4:2x2x4", 16, {"fsdp": {"x": 2, "y": 2, "z": 4}}, remat="none")
    layout, found = resolve(one), {}
    for name in ("ideal", "emitted"):
        program = implemented(partition(Workload.of(one), layout), name, one.machine, layout)
        found[name] = sum(
            float(task.hbm_bytes * task.count * block.trips)
            for block in program.blocks
            for task in block.tasks
            if isinstance(task, Work)
            and block.phase == "forward"
            and task.kind == "attention"
            and float(task.n) == VIDEO.frames
        )
    assert VIDEO.sequence == VIDEO.frames**2  # as many locations as frames: every layer sees 16
    pairs = VIDEO.sequence * VIDEO.frames * VIDEO.heads * VIDEO.layers  # of one video a device
    assert found["emitted"] - found["ideal"] == pytest.approx(3 * 2.0 * pairs)
