"""What the page is told is what the command line says, and no request names a file."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import Shardsim, shardsim
from small_plan import PLAN

from shardsim.errors import ShardsimError
from shardsim.files import parse_yaml
from shardsim.machine import load_chip, parse_machine
from shardsim.plan import load_plan, plan_from_data, plan_names
from shardsim.plan.io import KEYS as KEYS_OF_PLANS
from shardsim.serve.asked import read
from shardsim.serve.desk import Desk
from shardsim.views.write import json_text

SMALL = plan_from_data(parse_yaml(PLAN, "small"), "small")


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk({"small": SMALL})


def ask(**more: Any) -> dict[str, Any]:
    return {"plan": "small", **more}


def test_a_prediction_is_that_of_the_command_that_it_names(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "plan file.yaml"
    path.write_text(PLAN, encoding="utf-8")
    own = Desk({str(path): load_plan(path)})
    answer = own.predict(
        {
            **{"plan": str(path), "set": ["batch=2k", "remat=dots"], "mesh": {"model": 2}},
            **{"rest": "data", "chip": {"link_bytes_per_s": 1.5}, "costs": "physical"},
            "as": "trainer",
        }
    )
    words = shlex.split(answer["command"])
    said = shardsim(*words[1:], "--json")
    assert json.loads(said.stdout) == answer["prediction"]


def test_a_pinned_plan_is_priced_as_the_other_one(desk: Desk) -> None:
    for costs in (None, "physical", "compiler"):
        answer = desk.predict(ask(costs=costs, pinned=ask(set=["op_costs=physical"])))
        assert answer["pinned"]["costs"] == answer["prediction"]["costs"]
        assert costs in (None, answer["prediction"]["costs"])
    columns = [one["label"] for one in answer["tables"]["beside"]["columns"]]
    assert columns == ["", "pinned", "this plan"]
    assert [row[0] for row in answer["tables"]["differs"]["rows"]] == ["op_costs"]


@settings(max_examples=40)
@given(
    data=st.sampled_from([1, 2, 4, 8, 16, 64]),
    model=st.sampled_from([1, 2, 4, 8, 16]),
    rest=st.sampled_from(["fsdp", "context", "pipeline"]),
)
def test_the_axis_that_takes_the_rest_fills_the_slice(data: int, model: int, rest: str) -> None:
    asked = read(
        ask(mesh={"data": data, "model": model}, rest=rest), lambda name: SMALL, ("vit-l-16",)
    )
    left = asked.changes.get(f"mesh.{rest}")
    if 64 % (data * model) or rest == "fsdp":  # which is what `data` does in this plan
        assert left is None
    else:
        assert left * data * model == 64


def test_sliders_of_the_chip_scale_the_figures_of_the_slice_that_was_chosen(desk: Desk) -> None:
    answer = desk.predict(ask(set=["machine=v5p:4x4x4"], chip={"hbm_bytes": 2.0}))
    usable = load_chip("v5p").hbm_usable_bytes_per_device
    assert answer["prediction"]["hbm"]["capacity_bytes"] == pytest.approx(2 * usable, rel=1e-5)


def test_a_search_puts_plans_on_the_desk_for_the_chip_as_it_is(desk: Desk) -> None:
    chip = {"hbm_bytes": 4.0}
    found = desk.search(ask(set=["machine=v4:2x2x1", "batch=256"], chip=chip))
    assert len(found["plans"]) == len(found["table"]["rows"]) > 1
    best = desk.predict({"plan": found["plans"][0], "chip": chip})
    assert best["prediction"]["hbm"]["capacity_bytes"] == pytest.approx(
        4 * parse_machine("v4:2x2x1").chip.hbm_usable_bytes, rel=1e-5
    )
    headings = [one["key"] for one in found["table"]["columns"]]
    mfu = found["table"]["rows"][0][headings.index("mfu")]
    assert mfu == format(100 * best["prediction"]["mfu"], ".1f")
    assert best["controls"]["values"]["machine"] == "v4:2x2x1"


@pytest.mark.parametrize(
    ("on", "batch"), [pytest.param("v4:1x1x1", 8, marks=pytest.mark.slow), ("v4:2x2x2", 1001)]
)
@pytest.mark.slow
def test_where_no_plan_is_found_the_reason_is_that_of_the_command(
    desk: Desk, shardsim: Shardsim, on: str, batch: int
) -> None:
    sets = [f"machine={on}", f"batch={batch}"]
    with pytest.raises(ShardsimError) as caught:
        desk.search({"plan": "vit-22b-published-tp8", "set": sets})
    words = ("plan", "vit-22b", "--on", on, "--batch", str(batch), "--optimizer", "adafactor")
    assert str(caught.value) in shardsim(*words).stderr


def test_a_search_does_not_ask_whether_the_mesh_suits_the_slice(desk: Desk) -> None:
    asked = ask(set=["machine=v5e:2x2", "batch=64", "mesh.model=3"])
    with pytest.raises(ShardsimError):
        desk.predict(asked)
    best = desk.predict({"plan": desk.search(asked)["plans"][0]})
    assert best["controls"]["values"]["machine"] == "v5e:2x2"
    with pytest.raises(ShardsimError, match="batch: must be a positive whole number"):
        desk.search(ask(set=["batch=many"]))


def test_each_change_that_would_help_can_be_made(desk: Desk) -> None:
    made = desk.explain(ask())
    headings = [one["key"] for one in made["table"]["columns"]]
    assert made["sets"]
    for texts, row in zip(made["sets"][:3], made["table"]["rows"], strict=False):
        step_s = desk.predict(ask(set=texts))["prediction"]["step_time_s"]
        assert format(step_s, ".4g") == row[headings.index("step_time_s")]


def test_one_long_piece_of_work_at_a_time(desk: Desk) -> None:
    with desk._alone(), pytest.raises(ShardsimError, match="already"):
        desk.search(ask())
    assert desk.explain(ask())["sets"]


def test_exports_are_those_of_the_command(desk: Desk) -> None:
    made = desk.export(ask(set=["microbatches=2"]))
    again = plan_from_data(parse_yaml(made["text"], "made"), "made")
    assert (made["name"], again.microbatches) == ("small.yaml", 2)
    assert desk.export(ask(form="jax"))["name"] == "small-jax.py"
    assert "names a chip as it is" in desk.export(ask(chip={"hbm_bytes": 2}))["says"]


SECRET = "top-secret"


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "plan: '' is not on the desk"),
        ([], "request: expected a mapping"),
        ({"plan": ["small"]}, "plan: expected a name"),
        ({"plan": "smal"}, "did you mean 'small'"),
        ({"plan": "small", "sett": []}, "unknown key 'sett'; did you mean 'set'"),
        (ask(set="batch=4"), "expected a list of texts"),
        (ask(set=["batch"]), "expected key=value"),
        (ask(set=["batch=4"] * 101), "at most 100"),
        (ask(set=["batch=-3"]), "batch"),
        (ask(set=["remat=fulll"]), "did you mean 'full'"),
        (ask(set=["machine=v4:3x3x3"]), "v4"),
        (ask(mesh={"model": 3}, rest="data"), "devices"),
        (ask(mesh={"model": "x"}), "positive whole number"),
        (ask(mesh={"what": 2}, rest="data"), "no such mesh axis"),
        (ask(chip={"hbm_bytes": 1e9}), "expected a factor"),
        (ask(chip={"hbm_bytes": True}), "expected a factor"),
        (ask(chip={"name": 2}), "has no slider"),
        (ask(costs="free"), "costs: 'free' is not possible"),
        (ask(**{"as": "magic"}), "as: 'magic' is not possible"),
        (ask(pinned=3), "request: expected a mapping"),
    ],
)
def test_bad_input_is_told_in_one_line(desk: Desk, request_: Any, said: str) -> None:
    with pytest.raises(ShardsimError) as caught:
        desk.predict(request_)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["plan", "model", "machine", "model.base", "base"])
def test_no_file_is_read(desk: Desk, tmp_path: Path, key: str) -> None:
    for name in ("config.json", "plan.yaml"):
        path = tmp_path / name
        path.write_text(f"{SECRET}: {SECRET}\n", encoding="utf-8")
        for text in (str(path), f"{{base: {path}}}", str(tmp_path)):
            asked = {"plan": text} if key == "plan" else ask(set=[f"{key}={text}"])
            for call in (desk.predict, desk.export, desk.search, desk.explain):
                with pytest.raises(ShardsimError) as caught:
                    call(asked)
                assert SECRET not in str(caught.value)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
PAIRS = st.builds(
    lambda key, value: f"{key}={value}",
    st.sampled_from(
        [
            *KEYS_OF_PLANS,
            "mesh.data",
            "mesh.context",
            "chip.hbm_bytes",
            "model.layers",
            "remat.save",
        ]
    ),
    st.one_of(
        ANYTHING.map(str), st.sampled_from(["full", "64k", "v5p:2x2x2", "{a: [b]}", "1e400"])
    ),
)
REQUESTS = st.fixed_dictionaries(
    {"plan": st.just("small")},
    optional={
        "set": st.one_of(st.lists(PAIRS, max_size=3), ANYTHING),
        "mesh": st.one_of(
            st.dictionaries(st.sampled_from(["data", "model", "tensor", "x"]), ANYTHING), ANYTHING
        ),
        "rest": st.one_of(st.sampled_from(["data", "stage", "x"]), ANYTHING),
        "chip": st.one_of(
            st.dictionaries(st.sampled_from(["hbm_bytes", "peak_flops"]), ANYTHING), ANYTHING
        ),
        "costs": st.one_of(st.sampled_from(["physical", "compiler"]), ANYTHING),
        "as": st.one_of(st.sampled_from(["ideal", "trainer"]), ANYTHING),
        "form": ANYTHING,
        "pinned": ANYTHING,
    },
)


FUZZED = Desk({"small": SMALL})


@settings(max_examples=150)
@given(request=st.one_of(REQUESTS, ANYTHING))
def test_whatever_is_asked_is_answered_or_refused(request: Any) -> None:
    for call in (FUZZED.predict, FUZZED.export):
        with suppress(ShardsimError):
            json_text(call(request))


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_names())
def test_every_shipped_plan_is_shown_as_it_is(name: str) -> None:
    desk = Desk({})
    answer = desk.predict({"plan": name})
    assert answer["controls"] == answer["base"]
    assert prod(one["size"] for one in answer["controls"]["mesh"]) == answer["controls"]["devices"]
    same = [f"{key}={value}" for key, value in answer["controls"]["values"].items()
            if key not in ("model", "remat")]  # fmt: skip
    again = desk.predict({"plan": name, "set": same})
    assert again["prediction"] == answer["prediction"]
