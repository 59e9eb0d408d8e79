"""`explain`: single changes are what predicting them says, and known limits come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import LONG
from hypothesis import given, settings
from hypothesis import strategies as st
from said import Shardsim, data

from shardsim.answers.explain import explain
from shardsim.answers.gap import causes
from shardsim.answers.nearest import distance, nearest_runs
from shardsim.answers.trials import candidates, set_text, trials
from shardsim.cost.mfu import least_step_s, mfu_of, step_at_mfu
from shardsim.cost.predict import predict
from shardsim.cost.sensitivity import sensitivity
from shardsim.errors import PlanError, ShardsimError
from shardsim.model import Accounting
from shardsim.plan import load_plan, plan_names
from shardsim.plan.io import plan_from_data, plan_to_data
from shardsim.plan.remat import OFFLOADS
from shardsim.planner.changes import changed, parse_assignment
from shardsim.simulate import simulate_plan
from shardsim.views.explain import explained, helping, measured
from shardsim.views.write import plain

TP8 = "vit-22b-published-tp8"
WIDE = {
    "model": "llama2-13b",
    "machine": "v5e:16x16",
    "batch": 2048,
    "sequence": 2048,
    "mesh": {"fsdp": 256},
    "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
    "remat": "save_qkv",
}


def test_every_change_is_what_predict_says_of_it(shardsim: Shardsim, plan_file) -> None:
    found = data(shardsim("explain", str(plan_file), "--json"))
    assert found["fits"] is True
    base = found["prediction"]
    assert len({row["kind"] for row in found["changes"]}) >= 5
    for row in found["changes"][::6]:
        words = [word for one in row["set"].split(" ") for word in ("--set", one)]
        if "{" in row["set"]:
            words = ["--set", row["set"]]
        code = 0 if row["fits"] else 1
        alone = data(shardsim("predict", str(plan_file), *words, "--json"), code)
        assert alone["step_time_s"] == pytest.approx(row["step_time_s"], rel=1e-12)
        assert alone["hbm"]["peak_bytes"] == pytest.approx(row["hbm_peak_bytes"], rel=1e-12)
        rate = alone["tokens_per_s_per_chip"] * alone["chips"]
        before = base["tokens_per_s_per_chip"] * base["chips"]
        assert row["gain"] == pytest.approx(1 - before / rate, rel=1e-9, abs=1e-12)


@given(st.sampled_from(plan_names()), st.data())
@settings(max_examples=30)
def test_changes_as_they_are_written_are_the_changes_themselves(name: str, drawn) -> None:
    plan = load_plan(name)
    _, changes = drawn.draw(st.sampled_from([*candidates(plan)]))
    (key,) = changes
    read = dict([parse_assignment(set_text(changes))])
    try:
        expected = changed(plan, changes)
    except ShardsimError:
        with pytest.raises(ShardsimError):
            changed(plan, read)
        return
    assert changed(plan, read) == expected
    assert key in read


@pytest.mark.slow
def test_what_fits_comes_first_and_cheapest_first() -> None:
    base = predict(load_plan(TP8))
    found = trials(base)
    assert [one.prediction.fits for one in found] == sorted(
        (one.prediction.fits for one in found), reverse=True
    )
    fit = [one.chip_seconds for one in found if one.has_room]
    assert fit == sorted(fit)
    assert [one.has_room for one in found] == sorted((one.has_room for one in found), reverse=True)
    assert all(one.prediction.costs == base.costs for one in found)


def test_a_plan_without_room_is_told_what_makes_it_fit() -> None:
    plan = changed(load_plan("llama2-70b-published-v6e-1x256"), {"remat": "dots"})
    made = explain(plan)
    assert not made.fits
    assert made.at_peak[0].name == "kept activations"
    first = made.trials[0]
    assert first.prediction.fits
    assert first.kind in ("remat", "offload")
    # Nothing is advised of the host's memory that searches do not try.
    hosts = {one.prediction.plan.remat.groups[0].offload for one in made.trials}
    assert hosts <= {frozenset(), *(policy.offload for policy in OFFLOADS)}
    assert sum(held.size_bytes for held in made.at_peak) == pytest.approx(
        made.prediction.hbm["peak_bytes"], rel=1e-9
    )


def test_what_only_the_compilers_own_recomputing_makes_fit_is_no_advice() -> None:
    plan = changed(load_plan("llama2-70b-published-v6e-1x256"), {"remat": "dots"})
    made = explain(plan, implementation="trainer")
    kept = next(one for one in made.trials if one.text == "remat=none")
    assert kept.prediction.fits  # as its warning says: by recomputing
    assert not kept.has_room
    assert any("by itself recomputes" in text for text in kept.prediction.warnings)
    shown = "\n".join(part if isinstance(part, str) else plain(part) for part in helping(made))
    assert "remat=none" not in shown
    assert made.trials[0].has_room


# What published runs and reports say helped, as a change that is among the first of its kind.
MAXTEXT_70B = plan_to_data(load_plan("llama2-70b-published-v6e-1x256"))
HELPED = (
    # MaxText's recipe of Llama 2 70B on v6e keeps queries, keys and values in the host's memory. Of
    # emitted steps `predict` says that they wait for that as long as it spares (docs/compiled.md).
    (MAXTEXT_70B, {"remat": "full"}, "remat={offload: [qkv]}"),
    # PaLM and ViT-22B: small images need little of a tensor axis on 1,024 chips.
    ("vit-22b-published-tp16", {}, "mesh.fsdp=128"),
    # Two microbatches where one fits only gather weights twice.
    ("llama2-70b-published-v6e-1x256", {"microbatches": 2}, "microbatches=1"),
    # Scores of 4,096 tokens written to HBM: the fused kernel does not.
    ("llama2-70b-published-v6e-1x256", {"attention": "unfused"}, "attention=flash"),
    # A layer that keeps all results of matmuls does not fit; the attention's alone does.
    ("llama2-70b-published-v6e-1x256", {"remat": "dots"}, "remat=save_context"),
    # Long sequences, keys gathered over 16 devices: MaxText's and DeepSpeed's reports of Ulysses.
    (LONG, {}, "context={keys: ulysses, order: contiguous}"),
    # Llama 2 13B on v5e: queries, keys and values on the host make 8 sequences a device fit.
    (WIDE, {}, "remat={offload: [qkv]}"),
)


@pytest.mark.parametrize(
    ("name", "changes", "helped"),
    [pytest.param(*row, marks=() if n < 1 else pytest.mark.slow) for n, row in enumerate(HELPED)],
)
def test_what_public_reports_say_helped_is_among_the_first(name, changes, helped) -> None:
    plan = load_plan(name) if isinstance(name, str) else plan_from_data(name, "plan")
    way = None if isinstance(name, str) else "trainer"
    base = predict(changed(plan, changes), implementation=way)
    fit = [one for one in trials(base) if one.has_room]
    if base.fits:
        fit = [one for one in fit if one.gain > 0]
    assert helped in [one.text for one in fit[:6]]


def test_limits_are_the_one_definition(plan_file) -> None:
    made = explain(plan_file)
    listed = made.to_data()["limited_by"]
    assert made.prediction.limited_by.startswith(listed[0]["what"])
    sizes = [abs(one["elasticity"]) for one in listed]
    assert sizes == sorted(sizes, reverse=True)
    # What is no latency scales with rates alone: all of them 1 % up is a step 1 % shorter.
    assert sum(one.elasticity for one in sensitivity(load_plan(TP8))) == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize(
    "changes",
    [{"overlap.weights": False}, {"attention": "unfused"}, {"chip.link_bytes_per_s": 45e9}],
)
def test_a_step_with_one_thing_otherwise_is_explained_by_that(changes) -> None:
    item = predict(load_plan("llama2-70b-published-v6e-1x256"))
    real = predict(changed(item.plan, changes))
    first = causes(item, real.step_time_s)[0]
    assert first.changes == changes
    assert first.explains == pytest.approx(1.0, rel=1e-6)


def test_a_step_as_predicted_has_no_causes() -> None:
    item = predict(load_plan(TP8))
    assert causes(item, item.step_time_s) == []


@pytest.mark.slow
def test_a_measured_mfu_is_a_measured_step(shardsim: Shardsim, plan_file) -> None:
    words = ("explain", str(plan_file), "--measured-mfu", "41%", "--counted", "six_n", "--json")
    found = data(shardsim(*words))["measured"]
    plan = load_plan(plan_file)
    step_s = step_at_mfu(plan, 0.41, Accounting.SIX_N)
    assert found["step_time_s"] == pytest.approx(step_s, rel=1e-12)
    assert mfu_of(plan, step_s, Accounting.SIX_N) == pytest.approx(0.41, rel=1e-12)
    assert len(found["nearest_runs"]) == 3


@pytest.mark.slow
def test_the_nearest_run_of_a_published_plan_is_itself() -> None:
    for name in ("llama3-8b-published-v6e-1x16", "maxtext-128b-published-v5p-1x128"):
        plan = load_plan(name)
        (first,) = nearest_runs(plan, many=1)
        assert distance(plan, first.run.plans[0]) == 0
        assert distance(plan, plan) == 0
        assert distance(replace(plan, sequence=2 * plan.sequence), plan) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--measured-step", "14", "--measured-mfu", "41%"), "give a step or an MFU, not both"),
        (("--measured-mfu", "41"), "is no fraction, such as 0.41 or 41%"),
        (("--measured-step", "0"), "is no time, such as 14.2 or 850ms"),
        (
            ("--measured-step", "1ms"),
            "a step of 1 ms cannot be: vit-22b's matmuls for 65,536 x 256",
        ),
        (("--measured-mfu", "150%"), "at the peak of v4:8x8x16; is it of this batch, in seconds?"),
        (("--measured-mfu", "0.4", "--counted", "mine"), "unknown accounting 'mine'"),
    ],
)
def test_measurements_that_are_none(shardsim: Shardsim, words, message) -> None:
    result = shardsim("explain", TP8, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [TP8, "llama2-70b-published-v6e-1x256"])
def test_what_a_measured_step_cannot_be(name: str) -> None:
    plan = load_plan(name)
    least_s = least_step_s(plan)
    executed_s = explain(name, measured_step_s=60.0).measured.at_peak_s
    # The plans compute again; nothing is faster than the model's own matmuls at the peak.
    assert least_s < executed_s < predict(plan).step_time_s
    with pytest.raises(PlanError, match="cannot be"):
        explain(name, measured_step_s=0.999 * least_s)
    fast = "\n".join(map(str, measured(explain(name, measured_step_s=0.99 * executed_s).measured)))
    assert "this plan cannot be so fast" in fast
    slow = "\n".join(map(str, measured(explain(name, measured_step_s=100 * executed_s).measured)))
    assert "times what is predicted: is it of one step" in slow


def test_a_measurement_below_zero_is_refused() -> None:
    with pytest.raises(PlanError, match="expected seconds above 0"):
        explain(TP8, measured_step_s=-1.0)
    with pytest.raises(PlanError, match=r"below 1e\+07, found 1e\+300"):
        explain(TP8, measured_step_s=1e300)


@pytest.mark.slow
def test_an_explanation_shows_itself_in_one_line(shardsim: Shardsim, plan_file) -> None:
    assert "\n" not in repr(explain(plan_file))
    shown = shardsim("explain", str(plan_file), "--measured-step", "1s").stdout
    for text in ("HBM at the peak", "limited by: ", "what would", "nearest published run"):
        assert text in shown


HOSTED: dict[str, dict[str, Any]] = {
    "activations": {"remat": {"offload": ["layer_input", "qkv"]}},
    "optimizer state": {"offload_optimizer": True},
    "parameters of layers": {"offload_parameters": True},
}


@pytest.mark.parametrize(
    ("model", "machine"),
    [pytest.param("llama2-7b", "v5p:2x2x2", marks=pytest.mark.slow), ("vit-l-16", "v5e:2x4")],
)
def test_the_host_breaks_even_where_it_is_said(model: str, machine: str) -> None:
    """With all at once, which share the link; and events agree with the closed form."""
    data = {
        "model": model,
        "machine": machine,
        "batch": 64,
        "mesh": {"fsdp": 8},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
    }
    every = {key: value for one in HOSTED.values() for key, value in one.items()}
    plan = plan_from_data({**data, **every}, "all")
    found = explain(plan)
    assert {one.what for one in found.instead_of_host} == HOSTED.keys()
    said = [line for line in explained(found) if isinstance(line, str) and "breaks even" in line]
    for one in found.instead_of_host:
        if one.even_bytes_per_s:
            even = changed(plan, {"chip.pcie_bytes_per_s": one.even_bytes_per_s})
            assert predict(even).step_time_s == pytest.approx(one.step_time_s, rel=0.01)
            assert any(f"{one.even_bytes_per_s / 1e9:.1f} GB/s" in line for line in said)
    alone = plan_from_data(data, "neither")
    assert explain(alone).instead_of_host == ()
    played = simulate_plan(plan)
    assert played.step_time_s == pytest.approx(played.events.analytic_step_time_s, rel=0.005)
