"""`--op-costs`: the same switch in every command that prices operations."""

from __future__ import annotations

from pathlib import Path

import pytest
from said import Shardsim, data, refused

from shardsim.machine import load_chip
from shardsim.plan import load_plan


def test_predict_takes_the_option_or_the_key(shardsim: Shardsim):
    plan = "vit-22b-published-tp8"
    usual = data(shardsim("predict", plan, "--json"))
    option = data(shardsim("predict", plan, "--op-costs", "compiler", "--json"))
    key = data(shardsim("predict", plan, "--set", "op_costs=compiler", "--json"))
    assert option == key
    assert option["step_time_s"] != usual["step_time_s"]
    # What is held follows from what is done, not from what operations cost.
    assert option["hbm"] == usual["hbm"]
    assert any("fitted to no run" in warning for warning in option["warnings"])
    assert not any("fitted to no run" in warning for warning in usual["warnings"])


@pytest.mark.slow
def test_the_search_ranks_by_the_costs_that_were_asked_for(shardsim: Shardsim):
    words = ("plan", "vit-l", "--on", "v4:2x2x1", "--batch", "256", "--max-axes", "1", "--json")
    physical = data(shardsim(*words, "--op-costs", "physical"))["plans"]
    compiler = data(shardsim(*words, "--op-costs", "compiler"))["plans"]
    usual = data(shardsim(*words, "--op-costs", "calibrated"))["plans"]
    assert data(shardsim(*words))["plans"] == usual
    assert [item["mfu"] for item in compiler] == sorted(
        (item["mfu"] for item in compiler), reverse=True
    )
    assert compiler[0]["mfu"] != physical[0]["mfu"]
    assert [item["plan"].get("op_costs") for item in physical] == ["physical"] * len(physical)
    assert [item["plan"].get("op_costs") for item in compiler] == ["compiler"] * len(compiler)


def test_a_plan_file_says_how_it_is_priced(shardsim: Shardsim, tmp_path: Path):
    out = str(tmp_path / "plan.yaml")
    words = ("plan", "vit-l", "--on", "v4:2x2x1", "--batch", "256", "--max-axes", "1")
    shardsim(*words, "--op-costs", "compiler", "-o", out)
    assert load_plan(out).op_costs == "compiler"
    priced = data(shardsim("predict", out, "--json"))
    assert priced == data(shardsim("predict", out, "--op-costs", "compiler", "--json"))
    physical = data(shardsim("predict", out, "--op-costs", "physical", "--json"))
    assert physical["step_time_s"] != priced["step_time_s"]
    # On another chip what is known of that one's compiler counts.
    moved = data(shardsim("predict", out, "--set", "machine=v5p:2x2x1", "--json"))
    assert any("fitted to no run" in warning for warning in moved["warnings"])


def test_what_is_done_beyond_the_plan_is_chosen_apart(shardsim: Shardsim):
    plan = "vit-22b-published-tp8"
    usual = data(shardsim("predict", plan, "--op-costs", "compiler", "--json"))
    assert (usual["costs"], usual["as"]) == ("compiler", "emitted")
    ideal = data(shardsim("predict", plan, "--op-costs", "compiler", "--as", "ideal", "--json"))
    assert (ideal["costs"], ideal["as"]) == ("compiler", "ideal")
    assert ideal["step_time_s"] < usual["step_time_s"]
    assert "priced as ideal, with compiler costs" in ideal["warnings"]
    plain = data(shardsim("predict", plan, "--json"))
    assert (plain["costs"], plain["as"]) == ("calibrated", "emitted")
    bound = data(shardsim("predict", plan, "--op-costs", "physical", "--json"))
    assert (bound["costs"], bound["as"]) == ("physical", "ideal")
    words = ("--set", "op_costs=compiler", "--as", "ideal", "--json")
    for command in ("ablate", "sensitivity"):
        assert data(shardsim(command, plan, *words))["base"] == ideal
    (row,) = data(shardsim("sweep", plan, "--vary", "microbatches=1", *words))["rows"]
    assert row["prediction"] == ideal
    for name in ("emitted", "trainer"):
        other = data(shardsim("predict", plan, "--as", name, "--json"))
        assert (other["costs"], other["as"]) == ("calibrated", name)
    refused = shardsim("predict", plan, "--as", "ideal", "--fidelity", "compiled")
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1


def test_slices_of_one_table_are_priced_alike(shardsim: Shardsim):
    words = ("--batch", "64", "--max-axes", "1", "--json")
    mixed = data(shardsim("plan", "vit-l", "--on", "v5p:2x2x1,h100:8", *words))["plans"]
    assert {item["costs"] for item in mixed} == {"calibrated"}


@pytest.mark.slow
def test_validate_shows_both_and_says_which(shardsim: Shardsim):
    both = data(shardsim("validate", "--op-costs", "both", "--json"))
    compiler = data(shardsim("validate", "--op-costs", "compiler", "--json"))
    usual = data(shardsim("validate", "--json"))
    assert both.pop("compiler") == compiler
    assert both == usual
    assert (usual["op_costs"], compiler["op_costs"]) == ("calibrated", "compiler")
    pairs = zip(usual["rows"], compiler["rows"], strict=True)
    for one, other in pairs:
        same = one["predicted_tokens_per_s_per_chip"] == other["predicted_tokens_per_s_per_chip"]
        assert same == (load_chip(one["family"]).compiler is None)
        assert same == any("physical op costs" in note for note in other["notes"])
    shown = shardsim("validate", "--op-costs", "both").stdout
    assert "op costs: calibrated" in shown
    assert "op costs: as the TPU compiler estimates them, fitted to no run" in shown


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "vit-22b", "--on", "h100:8", "--batch", "64", "--op-costs", "compiler"),
        ("predict", "vit-22b-published-tp8", "--set", "chip.op_costs=guess"),
        ("predict", "vit-22b-published-tp8", "--set", "op_costs=1"),
        ("predict", "vit-22b-published-tp8", "--set", "op_costs=guess"),
    ],
)
def test_costs_that_are_not_there_are_one_line(shardsim: Shardsim, words):
    result = shardsim(*words)
    assert "op_costs" in refused(result)
