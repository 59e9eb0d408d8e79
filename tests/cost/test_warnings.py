"""What a prediction warns of, and that it does so only there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import SMALL_GPT, build, decoder

from shardsim.cost.predict import predict
from shardsim.cost.sensitivity import sensitivity
from shardsim.errors import PlanError
from shardsim.machine import override_chip
from shardsim.plan import Overlap, plan_from_data
from shardsim.planner.changes import changed

REPLICATED = "the residual stream is replicated over the tensor axis"
TENSOR = {"fsdp": {"x": 4}, "tensor": {"y": 4}}


@pytest.mark.parametrize("matmul", ["off", "unidirectional", "bidirectional"])
@pytest.mark.parametrize("residual", ["", "seq", "embed"])
@pytest.mark.parametrize("where", [TENSOR, {"fsdp": {"x": 4, "y": 4}}], ids=["tensor", "fsdp"])
def test_a_ring_that_cannot_be_is_told(matmul, residual, where):
    plan = build(decoder(), "v5e:4x4", 64, where, residual=residual, overlap=Overlap(matmul=matmul))
    told = any(text.startswith(REPLICATED) for text in predict(plan).warnings)
    assert told == (matmul != "off" and residual == "" and "tensor" in where)


@pytest.mark.parametrize("twisted", [False, True])
def test_a_twist_is_told(twisted):
    machine = "v4:4x4x8_twisted" if twisted else "v4:4x4x8"
    where = {"fsdp": {"x": 4, "y": 4, "z": 8}}
    told = predict(build(decoder(), machine, 128, where)).warnings
    assert ("a twisted torus is priced as a straight one" in told) == twisted


@pytest.mark.parametrize("batch", [16, 16384])
def test_what_does_not_fit_says_by_how_much(batch):
    found = predict(build(decoder(), "v5e:4x4", batch, {"data": {"x": 4, "y": 4}}, remat="none"))
    short = (found.hbm["thrifty_bytes"] - found.hbm["capacity_bytes"]) / 2**30
    told = [text for text in found.warnings if text.startswith("does not fit")]
    assert found.fits == (short <= 0) == (not told)
    assert found.fits == (batch == 16)
    if told:
        assert told == [f"does not fit: needs {short:.1f} GiB more HBM than a device of v5e offers"]


@pytest.mark.parametrize("room", [1.2, 1.08, 1.04])
def test_that_nothing_may_be_hidden_is_told_where_hbm_is_nearly_full(room):
    plan = build(decoder(layers=32), "v5p:4x4x4", 256, {"fsdp": {"x": 4, "y": 4, "z": 4}})
    needed = predict(plan, implementation="emitted").hbm["thrifty_bytes"] / 1.014
    chip = override_chip(plan.machine.chip, {"hbm_usable_bytes": needed * room})
    plan = replace(plan, machine=replace(plan.machine, chip=chip))
    found = predict(plan, implementation="emitted")
    assert found.fits
    told = [text for text in found.warnings if "may hide no gather" in text]
    assert bool(told) == (1 / room > 0.92)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_copies_over_an_unknown_link_to_the_host_are_told(known, offload):
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}}, offload_optimizer=offload)
    if not known:
        chip = replace(plan.machine.chip, pcie_bytes_per_s=None)
        plan = replace(plan, machine=replace(plan.machine, chip=chip))
    told = any("has no pcie_bytes_per_s" in text for text in predict(plan).warnings)
    assert told == (offload and not known)


def test_what_the_compiler_computes_again_by_itself_is_priced():
    plan = plan_from_data({**SMALL_GPT, "batch": 512}, "here")
    found = predict(plan, implementation="trainer")
    again = next(text for text in found.warnings if "by itself recomputes" in text)
    assert found.fits
    assert "what 8 of 12 layers keep is priced as computed twice" in again
    chip = override_chip(plan.machine.chip, {"hbm_bytes": 1e12, "hbm_usable_bytes": 1e12})
    roomy = replace(plan, machine=replace(plan.machine, chip=chip))
    kept = predict(roomy, implementation="trainer")
    whole = predict(changed(plan, {"remat": "full"}), implementation="trainer")
    assert kept.step_time_s < found.step_time_s < whole.step_time_s
    assert kept.hfu < found.hfu < whole.hfu
    assert found.mfu < kept.mfu


@pytest.mark.parametrize("asked", [{"implementation": ""}, {"costs": ""}])
@pytest.mark.parametrize("function", [predict, sensitivity])
def test_an_empty_name_is_no_default(function, asked):
    plan = build(decoder(), "v5e:4x4", 16, {"data": {"x": 4, "y": 4}})
    with pytest.raises(PlanError, match="'' is not possible"):
        function(plan, **asked)
