"""Every picture: labelled with units, nothing cut off, nothing on top of other text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import matplotlib
import pytest
from looking import cut_off, overlapping
from matplotlib.figure import Figure

from shardsim.cost.predict import Prediction, predict
from shardsim.cost.sensitivity import sensitivity
from shardsim.errors import ShardsimError
from shardsim.plan import load_plan
from shardsim.planner.changes import changed
from shardsim.planner.search import search
from shardsim.planner.whatif import ablate, sweep
from shardsim.report import plots_events, plots_evidence, plots_plan, plots_search
from shardsim.report.plots_roofline import roofline
from shardsim.report.plots_timeline import layer_timeline, series_of
from shardsim.report.plots_torus import mesh_on_torus
from shardsim.report.style import to_png, to_svg
from shardsim.report.timeline import layer_timelines
from shardsim.simulate import simulate_plan
from shardsim.validate.runs import validate
from shardsim.views.colours import COLOURS
from shardsim.xla.tpu.agreement import pairs

pytestmark = pytest.mark.slow  # draws pictures

PLANS = (
    "vit-22b-published-tp8",
    "palm-540b-published-two-pods",
    "maxtext-16b-published-v5e-32x256",
    "llama3-70b-published-tpu7x-1x64",
)
OF_A_PLAN: dict[str, Callable[[Prediction], Figure]] = {
    "step": plots_plan.step_breakdown,
    "hbm": plots_plan.hbm_over_step,
    "roofline": roofline,
    "torus": mesh_on_torus,
    "timeline": layer_timeline,
    "sensitivity": lambda item: plots_evidence.sensitivity_bars(item, sensitivity(item.plan)),
    "ablation": lambda item: plots_evidence.ablation_bars(item, ablate(item.plan)),
}


def look(figure: Figure) -> None:
    """Assert what holds for every picture."""
    assert cut_off(figure) == []
    assert overlapping(figure) == []
    assert any(axes.get_xlabel() for axes in figure.axes)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("picture", OF_A_PLAN)
def test_pictures_of_a_plan(picture: str, name: str) -> None:
    look(OF_A_PLAN[picture](predict(load_plan(name))))


def test_axes_carry_units() -> None:
    item = predict(load_plan("vit-22b-published-tp8"))
    assert plots_plan.step_breakdown(item).axes[0].get_xlabel() == "step time (s)"
    assert "(GiB)" in plots_plan.hbm_over_step(item).axes[0].get_ylabel()
    axes = roofline(item).axes[0]
    assert "FLOP per byte" in axes.get_xlabel()
    assert "(TFLOP/s)" in axes.get_ylabel()
    assert all("(ms)" in axes.get_xlabel() for axes in layer_timeline(item).axes)


def test_only_what_is_on_a_link_has_the_colour_of_communication() -> None:
    seen = set()
    for one in layer_timelines(predict(load_plan("vit-22b-published-tp8"))):
        for span in one.spans:
            seen.add(span.kind)
            assert (series_of(span) == 2) == (span.stream != "compute"), span
    assert seen >= {"copy", "transpose", "permute", "wait"}


def test_pictures_of_a_search() -> None:
    result = search("vit-b-16", ["v5e:4x4", "v5e:4x8"], 4096, top=40)
    figure = plots_search.pareto_front(result)
    look(figure)
    assert "(GiB)" in figure.axes[0].get_xlabel()
    assert "(%)" in figure.axes[0].get_ylabel()


def test_cost_against_days() -> None:
    result = search("vit-b-16", ["v5e:4x4", "v5e:4x8", "v5e:8x8"], 4096, top=20)
    figure = plots_search.cost_front(result, 1.2, 1e12)
    look(figure)
    assert "days" in figure.axes[0].get_xlabel()
    days, costs = figure.axes[0].lines[0].get_data()
    assert sorted(days) == list(days)
    assert sorted(costs, reverse=True) == list(costs)


def test_the_front_has_no_plan_that_another_beats() -> None:
    items = search("vit-b-16", "v5e:4x4", 4096, top=40).predictions
    front = plots_search.front_of(items)
    assert front[0].mfu == max(item.mfu for item in items)
    for one in front:
        free = plots_search.headroom_gib(one)
        assert not any(
            other.mfu >= one.mfu and plots_search.headroom_gib(other) > free for other in items
        )


@pytest.mark.parametrize(
    "vary",
    [
        [("batch", [8192, 16384, 32768, 65536, 131072])],
        [("chip.link_bytes_per_s", [22.5e9, 45e9, 90e9]), ("mesh.model", [2, 4, 8])],
        [("remat", ["full", "dots", "none", "save_attention"])],
        [("machine", ["v4:8x8x16", "v5p:8x8x16"])],
    ],
)
@pytest.mark.parametrize("metric", ["mfu", "step_time_s"])
def test_sweeps(vary: list[tuple[str, list[object]]], metric: str) -> None:
    plan = load_plan("vit-22b-published-tp8")
    look(plots_search.sweep_curves(sweep(plan, vary), metric))


def test_pictures_of_published_runs() -> None:
    result = validate()
    for picture in (plots_evidence.predicted_against_published, plots_evidence.published_scatter):
        figure = picture(result)
        look(figure)
        assert "tokens/s/chip" in figure.axes[0].get_xlabel()


def test_pictures_of_pairs() -> None:
    found = pairs()
    figure = plots_evidence.predicted_against_compiled(found)
    look(figure)
    drawn = sum(len(dots.get_offsets()) for dots in figure.axes[0].collections)
    assert drawn == sum("mfu" in pair.row for pair in found) > 0
    look(plots_evidence.predicted_against_compiled([]))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("vit-22b-published-tp8", 2),
        ("vit-22b-published-tp8", 4),
        ("maxtext-16b-published-v5e-8x256", 0),
        ("llama3-70b-published-tpu7x-1x64", 4),
    ],
)
def test_pictures_of_events(name: str, link: int) -> None:
    plan = load_plan(name)
    plan = replace(plan, model=replace(plan.model, layers=2))
    healthy = simulate_plan(plan)
    broken = simulate_plan(plan, dead_link=(0, link))
    for item in (healthy, broken):
        look(plots_events.link_loads(item))
    look(plots_events.what_if_bars({"as it should be": healthy, "a dead wire": broken}))


def test_equal_planes_are_drawn_once() -> None:
    plan = load_plan("vit-22b-published-tp8")
    plan = replace(plan, model=replace(plan.model, layers=2))
    healthy = plots_events.link_loads(simulate_plan(plan))
    assert [axes.get_title(loc="left") for axes in healthy.axes[:-1]] == ["z = 0 to 15"]
    broken = plots_events.link_loads(simulate_plan(plan, dead_link=(2, 2)))
    titles = [axes.get_title(loc="left") for axes in broken.axes[:-1]]
    assert titles == ["z = 2", "z = 0, 1, 3 to 15"]


def test_a_switch_has_no_wires() -> None:
    plan = load_plan("llama3-8b-published-v6e-1x16")
    plan = changed(plan, {"machine": "h100:8", "model.layers": 2})
    with pytest.raises(ShardsimError, match="no torus"):
        plots_events.link_loads(simulate_plan(plan))


def test_drawing_leaves_no_settings_behind() -> None:
    before = dict(matplotlib.rcParams)
    figure = mesh_on_torus(load_plan("vit-22b-published-tp8"))
    assert to_png(figure).startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


def test_svg_is_small_the_same_every_time_and_coloured_by_the_page() -> None:
    item = predict(load_plan("vit-22b-published-tp8"))
    once = to_svg(mesh_on_torus(item), "a")
    assert once == to_svg(mesh_on_torus(item), "a")
    assert len(once) < 300_000
    assert "var(--ink)" in once
    assert not any(light in once for light, _ in COLOURS.values())
    assert "http" not in once


def test_colours_differ_in_grey() -> None:
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for which in (0, 1):
        shades = [grey(COLOURS[f"c{index}"][which]) for index in range(4)]
        gaps = [abs(a - b) for i, a in enumerate(shades) for b in shades[i + 1 :]]
        assert min(gaps) > 8
