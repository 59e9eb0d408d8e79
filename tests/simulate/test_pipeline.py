"""Pipeline stages: the order of work, the bubble, and whole steps against the closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.cost.stages import StageTurns, Took, Turns, waiting_s, walked_s
from shardsim.plan import MeshAxis, Plan, load_plan
from shardsim.program.schedule import Pipeline
from shardsim.program.turns import Turn, one_forward_one_backward, only_forward, zero_bubble
from shardsim.simulate import simulate_plan


def makespan(
    stages: int,
    microbatches: int,
    chunks: int,
    forward: float,
    backward: float,
    head: float = 0.0,
    send: float = 0.0,
) -> float:
    """Return when all stages have done their turns, each as soon as its input is there; the last
    one has the head. A `backward` of 0: there is none."""
    todo = [
        list(
            one_forward_one_backward(stages, stage, microbatches, chunks)
            if backward
            else only_forward(stages, microbatches, chunks)
        )
        for stage in range(stages)
    ]
    free = [0.0] * stages
    done: dict[tuple[bool, int, int], float] = {}  # and there
    last = stages * chunks - 1
    while any(todo):
        moved = False
        for stage in range(stages):
            if not todo[stage]:
                continue
            turn = todo[stage][0]
            place = turn.chunk * stages + stage
            if turn.forward:
                needs = [(True, turn.microbatch, place - 1)] if place else []
            else:
                after = (False, turn.microbatch, place + 1)
                needs = [after] if place < last else [(True, turn.microbatch, place)]
            if not all(need in done for need in needs):
                continue
            begin = max([free[stage], *(done[need] for need in needs)])
            took = (forward if turn.forward else backward) / chunks
            took += head if turn.forward and place == last else 0.0
            took += send if place != (last if turn.forward else 0) else 0.0
            done[turn.forward, turn.microbatch, place] = free[stage] = begin + took
            todo[stage].pop(0)
            moved = True
        assert moved, "stages wait for each other"
    return max(free)


@given(
    st.integers(2, 8),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(0.5, 2.0),
    st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0]),
    st.floats(0.0, 3.0),
    st.floats(0.0, 2.0),
)
# Where the last stage ends last, and where few microbatches come back late; forward alone.
@example(4, 3, 2, 1.0, 0.0, 1.0, 0.5)
@example(6, 1, 2, 1.0, 0.0, 0.0, 2.0)
def test_the_closed_form_is_the_last_of_all_turns(
    stages: int, rounds: int, chunks: int, forward: float, backward: float, head: float, send: float
) -> None:
    """Whole groups of microbatches; `backward` of one forward."""
    many, back = stages * rounds, forward * backward
    pipeline = Pipeline(stages=stages, microbatches=many, chunks=chunks)
    turns = Turns(forward_s=forward, backward_s=back, last_s=0.0, head_s=head, send_s=send)
    sends = chunks - 1 + (chunks if back else 0)
    own = many * (forward + back + head + sends * send)
    found = own + float(waiting_s(pipeline, turns, bool(back)))
    assert found == pytest.approx(makespan(stages, many, chunks, forward, back, head, send))


@given(
    st.integers(2, 6),
    st.integers(1, 3),
    st.floats(0.5, 2.0),
    st.floats(0.5, 2.0),
    st.sampled_from([0.0, 0.5, 1.5]),
    st.sampled_from([0.0, 0.3]),
)
def test_walked_turns_end_as_the_closed_form_says(
    stages: int, rounds: int, forward: float, backward: float, head: float, send: float
) -> None:
    many = stages * rounds

    def took(seconds: float) -> Took:
        return Took(turn_s=seconds, last_turn_s=seconds)

    each = [StageTurns(forward=took(forward), backward=took(backward)) for _ in range(stages)]
    each[-1] = dataclasses.replace(each[-1], head=took(head))
    pipeline = Pipeline(stages=stages, microbatches=many)
    walked = walked_s(pipeline, each, [send] * stages, trained=True)
    assert walked == pytest.approx(makespan(stages, many, 1, forward, backward, head, send))


@pytest.mark.parametrize(("stages", "rounds"), [(2, 1), (3, 2), (4, 3), (8, 3)])
def test_zero_bubble_keeps_no_more_microbatches_than_1f1b_on_its_first_stage(
    stages: int, rounds: int
) -> None:
    for stage in range(stages):
        there, most = 0, 0
        for turn in zero_bubble(stages, stage, stages * rounds):
            there += turn.forward - turn.weights
            most = max(most, there)
        assert most == stages
        # As far ahead as 1F1B before anything comes back.
        turns = zero_bubble(stages, stage, stages * rounds)
        assert [turn.forward for turn in turns].index(False) == stages - stage


@given(st.integers(2, 8), st.integers(1, 3), st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_zero_bubble_idles_as_published(
    stages: int, rounds: int, forward: float, backward: float
) -> None:
    """(P - 1) (F + B - W), where gradients of weights take no longer than the rest (arXiv
    2401.10241, table 2)."""
    many, weights = stages * rounds, min(forward, backward)

    def took(seconds: float) -> Took:
        return Took(turn_s=seconds, last_turn_s=seconds)

    one = StageTurns(forward=took(forward), backward=took(backward), weights=took(weights))
    pipeline = Pipeline(stages=stages, microbatches=many, split_backward=True)
    idle = walked_s(pipeline, [one] * stages, [0.0] * stages, True) - many * (
        forward + backward + weights
    )
    assert idle == pytest.approx((stages - 1) * (forward + backward - weights))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_the_bubble_is_that_of_the_cost_model(stages: int, chunks: int, rounds: int) -> None:
    microbatches = stages * rounds
    busy = microbatches * 3.0
    idle = makespan(stages, microbatches, chunks, 1.0, 2.0) - busy
    assert idle == pytest.approx(busy * (stages - 1) / (microbatches * chunks))


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_no_stage_waits_for_ever(stages: int, chunks: int) -> None:
    """Also where microbatches do not come in whole groups."""
    for microbatches in range(stages, 4 * stages + 1):
        assert makespan(stages, microbatches, chunks, 1.0, 1.0) >= 2.0 * microbatches


@pytest.mark.parametrize(("stage", "most"), [(0, 4), (1, 3), (3, 1)])
def test_no_more_microbatches_in_flight_than_memory_counts(stage: int, most: int) -> None:
    in_flight, highest = 0, 0
    turns = one_forward_one_backward(4, stage, 16)
    for turn in turns:
        in_flight += 1 if turn.forward else -1
        highest = max(highest, in_flight)
    assert highest == most
    assert set(turns) == {
        Turn(forward=way, microbatch=number, chunk=0)
        for way in (True, False)
        for number in range(16)
    }


def piped(name: str, mesh: dict[str, dict[str, int]], microbatches: int, **changes: Any) -> Plan:
    """Return a shipped plan with its layers over the mesh axis `stage`."""
    plan = load_plan(name)
    layers = changes.pop("layers", plan.model.layers)

    def present(rules: Any) -> dict[str, tuple[str, ...]]:
        return {key: tuple(axis for axis in axes if axis in mesh) for key, axes in rules.items()}

    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, layers=layers),
        mesh=tuple(
            MeshAxis(name=axis, size=math.prod(torus.values()), torus=torus)
            for axis, torus in mesh.items()
        ),
        parameters=present(plan.parameters) | {"layers": ("stage",)},
        activations=present(plan.activations),
        microbatches=microbatches,
        **changes,
    )


VIT, PALM, GPT = "vit-22b-published-tp8", "palm-540b-published-two-pods", "maxtext-22b-published-v4"
OUTER = {"stage": {"z": 4}, "fsdp": {"x": 8, "z": 4}, "model": {"y": 8}}
INNER = {"fsdp": {"x": 8, "z": 4}, "stage": {"z": 4}, "model": {"y": 8}}
RING = {"stage": {"z": 16}, "fsdp": {"x": 8}, "model": {"y": 8}}
PODS = {"stage": {"dcn": 2}, "fsdp": {"y": 16, "z": 16}, "model": {"x": 12}}
SLICES = {"stage": {"dcn": 8}, "fsdp": {"x": 4, "y": 4, "z": 4}}
SMALL = {"stage": {"z": 4}, "fsdp": {"x": 4, "y": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(piped(VIT, OUTER, 8, layers=16), id="parts of z"),
        pytest.param(piped(VIT, OUTER, 8, layers=8), id="parts of z, two layers a stage"),
        pytest.param(piped(VIT, INNER, 16, layers=8), id="every fourth of z"),
        pytest.param(piped(VIT, OUTER, 16, pipeline_interleave=3, layers=24), id="chunks"),
        pytest.param(piped(VIT, RING, 32, layers=32), id="whole axis"),
        pytest.param(piped(PALM, PODS, 8, layers=10), id="two pods"),
        pytest.param(piped(f"{GPT}-8x64", SLICES, 8), id="eight slices"),
        pytest.param(piped(f"{GPT}-1x64", SMALL, 6), id="ragged"),
    ],
)
def test_agrees_with_the_closed_form(plan: Plan) -> None:
    found = simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)
    assert sum(found.time.values()) == pytest.approx(found.step_time_s)
    assert found.time["exposed_comm_s"] > 0
    # Stages wait for messages too, and for the head, which only the last one has.
    charged = float(found.price.bubble_s)
    assert charged * 0.99 < found.time["bubble_s"] < charged * 1.2
    sends = [use for use in found.collectives if use.mesh_axes == ("stage",)]
    # The stage with the head, and so the last chunk, passes on only gradients of that.
    each = plan.microbatches * (2 * plan.pipeline_interleave - 1)
    assert [use.count for use in sends] == [pytest.approx(each)]
    assert each == sum(use.count for use in predict(plan).collectives if "stage" in use.mesh_axes)


@pytest.mark.parametrize("options", [{}, {"straggler": (5, 1.2)}, {"dead_link": (5, 4)}], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
def test_folded_equals_unfolded(chunks: int, options: dict[str, Any]) -> None:
    plan = piped(f"{GPT}-1x64", SMALL, 8, pipeline_interleave=chunks, layers=8)
    folded, whole = simulate_plan(plan, **options), simulate_plan(plan, unfold=True, **options)
    assert folded.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
    assert folded.time == pytest.approx(whole.time)
    assert folded.events.utilisation == pytest.approx(whole.events.utilisation)
    assert folded.events.classes["devices"] < whole.events.classes["devices"] == 64


def test_a_slow_chip_slows_its_stage_and_so_all() -> None:
    plan = piped(f"{GPT}-1x64", SMALL, 16, layers=8)
    healthy = simulate_plan(plan)
    slow = simulate_plan(plan, straggler=(0, 1.5))
    assert 1.1 < slow.step_time_s / healthy.step_time_s < 1.5
