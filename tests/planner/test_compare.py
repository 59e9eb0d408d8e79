"""Plans side by side: priced alike, with what differs in their files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from found import shipped
from said import shardsim

from shardsim.cost.predict import predict
from shardsim.cost.sensitivity import sensitivity
from shardsim.cost.words import FIGURES
from shardsim.errors import PlanError
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.plan import load_plan, plan_names
from shardsim.planner.changes import changed
from shardsim.planner.compare import differences, priced_alike
from shardsim.planner.presets import plan_of_mesh
from shardsim.simulate import simulate_plan
from shardsim.views.plans import beyond, differing, found, side_by_side
from shardsim.views.prediction import prediction_parts
from shardsim.views.step import parts, step_columns

TP8 = load_plan("vit-22b-published-tp8")
COMPILER = replace(TP8, op_costs="compiler")


def test_plans_of_different_costs_are_priced_alike() -> None:
    plans, costs = priced_alike([COMPILER, TP8])
    assert costs == "calibrated"
    assert predict(plans[0]).step_time_s == predict(plans[1]).step_time_s
    assert priced_alike([COMPILER, COMPILER])[1] == "compiler"
    assert priced_alike([COMPILER, TP8], "calibrated")[0] == [TP8, TP8]
    gpu = replace(TP8, machine=parse_machine("v4:8x8x16"))
    gpu = replace(gpu, machine=replace(gpu.machine, chip=replace(gpu.machine.chip, compiler=None)))
    with pytest.raises(PlanError, match="has none of its compiler"):
        priced_alike([COMPILER, gpu], "compiler")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("batch", 32768, [65536, 32768]),
        ("overlap.weights", False, [True, False]),
        ("remat", "dots", ["full", "dots"]),
        ("microbatches", 2, [1, 2]),
    ],
)
def test_what_was_changed_is_all_that_differs(key: str, value: object, shown: list[object]) -> None:
    rows = differences([TP8, changed(TP8, {key: value})])
    assert [(row.key, list(row.values)) for row in rows] == [(key, shown)]
    assert differences([TP8, TP8]) == []


def test_the_command_says_how_it_prices(tmp_path: object) -> None:
    words = ["compare", "vit-22b-published-tp2", "vit-22b-published-tp8"]
    data = json.loads(shardsim(*words, "--json").stdout)
    assert data["costs"] == "calibrated"
    for name, item in zip(words[1:], data["plans"], strict=True):
        assert item["path"] == name
        assert item["step_time_s"] == predict(load_plan(name)).step_time_s
    keys = {row["key"]: row["values"] for row in data["differences"]}
    assert keys["mesh.model.size"] == [2, 8]
    text = shardsim(*words, "--op-costs", "compiler")
    assert text.exit_code == 0
    assert text.stdout.startswith("all priced as the TPU compiler estimates")
    alone = shardsim(*words[:2])
    assert (alone.exit_code, alone.stderr.count("\n")) == (2, 1)


def test_a_table_of_plans_names_their_costs_where_they_differ() -> None:
    alike, mixed = predict(TP8), predict(COMPILER)
    assert "costs" not in found([alike, alike]).keys
    assert [row["costs"] for row in found([alike, mixed]).data()] == ["calibrated", "compiler"]


@pytest.mark.parametrize("name", shipped())
def test_one_figure_limits_wherever_it_is_said(name: str) -> None:
    plan = load_plan(name)
    costs = ("calibrated", "physical", "compiler")[plan_names().index(name) % 3]
    if plan.machine.chip.compiler is not None:
        plan = changed(plan, {"op_costs": costs})
    item, first = predict(plan), sensitivity(plan)[0]
    assert item.limited_by.startswith(FIGURES[first.figure])
    assert dict(side_by_side([item], [name]).rows)["limited by"] == item.limited_by


def test_elasticities_are_those_of_one_changed_chip_after_the_other() -> None:
    """All chips are priced at once, as arrays; each must be what it is alone."""
    for plan in (TP8, load_plan("palm-540b-published-two-pods")):
        for figure in sensitivity(plan):
            key = "peak_flops.bf16" if figure.figure == "peak_flops" else figure.figure
            chip = plan.machine.chip
            now = chip.peak("bf16") if figure.figure == "peak_flops" else getattr(chip, key)
            alone = predict(changed(plan, {f"chip.{key}": 1.1 * now}))
            assert figure.step_time_s_at_110 == pytest.approx(alone.step_time_s, rel=1e-12)
            assert figure.mfu_at_110 == pytest.approx(alone.mfu, rel=1e-12)


class Kept:
    """The part of a prediction that says it was compiled."""

    def to_data(self) -> dict[str, object]:
        return {}


def test_beside_a_compiled_step_operations_are_one_part() -> None:
    planned = predict(TP8)
    made = replace(planned, fidelity="compiled", compiled=Kept())
    for items in ([planned, made], [made]):
        columns = step_columns(items)
        assert [one.key for one in columns] == ["operations_s", "exposed_comm_s", "bubble_s"]
        for item in items:
            assert sum(one.get(item) for one in columns) == pytest.approx(item.step_time_s)
    whole = sum(row["time_s"] for row in parts(planned).data())
    assert whole == pytest.approx(planned.step_time_s)
    assert len(parts(planned).rows) == 5


def test_a_list_of_nothing_is_said_and_a_mapping_beside_a_name_is_one_value() -> None:
    moved = changed(TP8, {"remat": {"save": [], "offload": ["layer_input"]}})
    kept = changed(TP8, {"remat": {"save": ["context"], "offload": ["layer_input"]}})
    cells = [differing(differences([one, moved]), ["one", "other"]).cells for one in (kept, TP8)]
    assert cells == [[["remat.save", "context", "nothing"]],
                     [["remat", "full", "offload layer_input"]]]  # fmt: skip


def test_a_footnote_says_all_rows_that_it_is_for() -> None:
    plan = plan_of_mesh(load_model("llama3-8b"), parse_machine("v5p:4x4x4"), 256, {"fsdp": 64})
    above = predict(changed(plan, {"remat": "none"}))
    (said,) = (text for text in above.warnings if text.startswith("MFU is above"))
    assert beyond([predict(TP8), above, above]) == [f"rows 2, 3: {said} in row 2"]
    assert beyond([above]) == [f"row 1: {said}"]
    assert beyond([above, above]) == [f"all rows: {said} in row 1"]


def test_a_simulated_step_says_so_also_where_nothing_contends() -> None:
    played = prediction_parts(simulate_plan(TP8))
    said = "simulated on the torus; the closed form gives the same step"
    assert said in played
    assert said not in prediction_parts(predict(TP8))
