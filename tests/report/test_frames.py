"""Frames, timelines and moments agree with the predictions that they show."""

from __future__ import annotations

from itertools import pairwise

import pytest
from building import contends
from found import searched, shipped

from shardsim.cost.predict import Prediction, predict
from shardsim.cost.sensitivity import sensitivity
from shardsim.files import read_yaml
from shardsim.plan import load_plan, resolve
from shardsim.planner.whatif import ablate, sweep
from shardsim.report import frames
from shardsim.report.links import axis_use
from shardsim.report.moments import hbm_moments
from shardsim.report.roofline import matmul_points
from shardsim.report.timeline import layer_timelines
from shardsim.validate.runs import PUBLISHED, validate_data

pytestmark = pytest.mark.slow  # loads pandas


@pytest.fixture(scope="module", params=shipped())
def item(request: pytest.FixtureRequest) -> Prediction:
    return predict(load_plan(request.param))


def test_the_timeline_takes_as_long_as_the_layer(item: Prediction) -> None:
    for one in layer_timelines(item):
        trips = float(item.schedule.block(one.block).trips)
        if given := item.plan.stage_layers:  # summed is the mean of all stages
            trips *= sum(given) / len(given) / max(given)
        work_s = sum(float(c.time_s) for c in item.price.computes if c.block == one.block)
        waits = [float(c.exposed_s) for c in item.price.collectives if c.block == one.block]
        # The first and the last trip of a pass wait for what nothing hides; this is one between.
        assert work_s / trips <= one.total_s * (1 + 1e-9)
        if not contends(item.schedule, resolve(item.plan)):  # else the picture shows a queue
            assert one.total_s <= (work_s + sum(waits)) / trips * (1 + 1e-9)
        compute = [span for span in one.spans if span.stream == "compute"]
        assert all(a.end_s == pytest.approx(b.start_s) for a, b in pairwise(compute))
        assert sum(span.duration_s for span in compute) == pytest.approx(one.total_s)


def test_the_moments_reach_the_predicted_peak(item: Prediction) -> None:
    moments = hbm_moments(item)
    assert max(moment.total_bytes for moment in moments) == pytest.approx(item.hbm["peak_bytes"])
    peak = max(moments, key=lambda moment: moment.total_bytes)
    assert peak.name == item.peak_moment


def test_no_matmul_is_above_its_roof(item: Prediction) -> None:
    for point in matmul_points(item):
        assert point.flops_per_s <= point.roof_flops_per_s * (1 + 1e-9)


def test_frames_of_one_plan_add_up(item: Prediction) -> None:
    row = frames.plans_frame([item]).iloc[0]
    assert row.mfu == item.mfu
    computes, collectives = frames.computes_frame(item), frames.collectives_frame(item)
    parts = computes.time_s.sum() + collectives.exposed_s.sum() + item.time["bubble_s"]
    assert parts == pytest.approx(item.step_time_s)
    assert frames.matmuls_frame(item).time_s.sum() <= computes.time_s.sum()
    passes = [text.partition(",")[0] for text in frames.timeline_frame(item)["pass"]]
    backward = set() if item.plan.forward_only else {"layer backward"}
    assert set(passes) == {"layer forward"} | backward
    assert all(0 <= busy <= 1 for busy in axis_use(item).values())


def test_frames_of_what_ifs() -> None:
    item = predict(load_plan("vit-22b-published-tp8"))
    ablations = ablate(item.plan)
    frame = frames.ablation_frame(item, ablations)
    first = ablations[0].prediction
    assert first is not None
    assert frame.step_change[0] == pytest.approx(first.step_time_s / item.step_time_s - 1)
    figures = sensitivity(item.plan)
    assert list(frames.sensitivity_frame(item, figures).elasticity) == [
        f.elasticity for f in figures
    ]
    swept = frames.sweep_frame(sweep(item.plan, [("batch", [65536, 65537])]))
    assert swept.mfu[0] == item.mfu
    assert swept.why_not[1]


def test_frames_of_a_search_and_of_published_runs() -> None:
    result = searched("vit-b-16", "v5e:2x2", 1024, top=3)
    assert list(result.frame().step_time_s) == [one.step_time_s for one in result.predictions]
    assert "v5e:2x2" in result._repr_html_()
    for item in (result, result.best, result.best.plan):
        assert len(repr(item)) < 250
        assert "v5e:2x2" in repr(item)
    validation = validate_data({"runs": read_yaml(PUBLISHED)["runs"][-3:]}, "some")
    assert len(validation.rows) == 3
    assert list(frames.validation_frame(validation)["run"]) == [r.id for r in validation.rows]
