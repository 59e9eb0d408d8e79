"""Groups of layers that keep different things: sums over groups of what each policy has alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import in_groups, plans, quiet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Overlap, Plan, Remat
from shardsim.plan.remat import Policy
from shardsim.simulate import simulate_plan

CLOSE = 1e-12
MACHINES = ("v4:2x2x4", "v4:4x4x4", "v5e:4x4", "2*v4:2x2x4")
RELAXED = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def pure(plan: Plan, group: Policy) -> Plan:
    """Return a plan all of whose layers keep what a group does."""
    return replace(plan, remat=Remat((replace(group, layers=0),)))


def alone(plan: Plan) -> list[tuple[float, Prediction]]:
    """Return, for each group, its share of the layers and a plan that has no other."""
    return [
        (group.layers / plan.model.layers, predict(pure(plan, group)))
        for group in plan.remat.groups
    ]


def backwards(plan: Plan) -> Plan:
    """Return a plan with its groups in the other order."""
    return replace(plan, remat=Remat(plan.remat.groups[::-1]))


@given(in_groups(plans(machines=MACHINES)), st.sampled_from([True, False]))
@RELAXED
def test_work_and_kept_bytes_are_means_over_the_layers(plan: Plan, waits: bool) -> None:
    if waits:  # then nothing is beside anything, and so are the seconds
        plan = replace(plan, overlap=Overlap(matmul="off", weights=False, gradients=False))
    mixed, parts = predict(plan), alone(plan)

    def mean(of: str) -> float:
        return sum(share * one.hbm[of] for share, one in parts)

    assert mixed.hbm["activations_bytes"] == pytest.approx(mean("activations_bytes"), rel=CLOSE)
    flops = sum(share * float(one.price.flops) for share, one in parts)
    assert float(mixed.price.flops) == pytest.approx(flops, rel=CLOSE)
    operations_s = sum(share * one.operations_s for share, one in parts)
    assert mixed.operations_s == pytest.approx(operations_s, rel=1e-9)
    turned = predict(backwards(plan))
    assert float(turned.price.flops) == pytest.approx(flops, rel=CLOSE)
    assert turned.operations_s == pytest.approx(operations_s, rel=1e-9)
    if waits:
        step_s = sum(share * one.step_time_s for share, one in parts)
        assert mixed.step_time_s == pytest.approx(step_s, rel=CLOSE)
        assert turned.step_time_s == pytest.approx(step_s, rel=CLOSE)
    else:
        # A pass over a group begins and ends with nothing under way.
        least = min(one.time["exposed_comm_s"] for _, one in parts)
        assert mixed.time["exposed_comm_s"] >= least * (1 - CLOSE)


@given(in_groups(plans(machines=MACHINES), most=2))
@RELAXED
def test_hbm_is_no_more_than_that_of_the_policy_that_keeps_more(plan: Plan) -> None:
    less, more = (predict(pure(plan, group)) for group in plan.remat.groups)
    if less.hbm["activations_bytes"] > more.hbm["activations_bytes"]:
        plan, less, more = backwards(plan), more, less
    mixed = predict(plan)
    peaks = [one.hbm["peak_bytes"] for one in (less, mixed, more)]
    assert peaks[1] <= max(peaks[0], peaks[2]) * (1 + CLOSE)
    # Besides what is kept a layer needs no less than in one of both.
    kept = [
        one.hbm["activations_bytes"] + one.use.account.unfilled_kept_bytes
        for one in (less, mixed, more)
    ]
    rest = [peak - here for peak, here in zip(peaks, kept, strict=True)]
    assert rest[1] >= min(rest[0], rest[2]) * (1 - CLOSE)
    assert sum(held.size_bytes for held in mixed.use.at_peak) == pytest.approx(peaks[1], rel=CLOSE)


@given(in_groups(plans(machines=MACHINES)), st.sampled_from(["physical", "compiler"]))
@RELAXED
def test_events_of_groups_agree_with_the_closed_form(plan: Plan, costs: str) -> None:
    quiet(plan, costs)
    found = simulate_plan(plan, costs=costs)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


@given(in_groups(plans(machines=MACHINES)))
@RELAXED
def test_the_schedule_runs_every_layer_once_each_way_in_a_microbatch(plan: Plan) -> None:
    schedule = predict(plan).schedule
    trips = [schedule.blocks[trip.block] for trip in schedule.trips()]
    passes = [(block.phase, block.group) for block in trips if block.phase != "reduction"]
    forward = [
        ("forward", number)
        for number, group in enumerate(plan.remat.groups)
        for _ in range(group.layers)
    ]
    backward = [("backward", number) for _, number in forward[::-1]]
    expected = [*forward, ("head", 0), *backward] * plan.microbatches
    assert passes == [*expected, ("update", 0)]
