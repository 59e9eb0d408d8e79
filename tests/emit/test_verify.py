"""`verify --against host`: its answer, and that it can say no."""

from __future__ import annotations

import json

import pytest

from plans import PLANS
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError, ShardsimError
from shardsim.plan import load_plan
from shardsim.xla import HostDevices, verify_host

KEYS = {
    *("ok", "against", "loss_rel_error", "grad_rel_error", "hbm", "compute", "step"),
    *("collectives", "unplanned"),
}
ROW = {"kind", "mesh_axes", "planned_bytes", "compiled_bytes", "planned_count", "compiled_count"}


def test_a_published_plan_verifies() -> None:
    said: list[str] = []
    answer = verify_host(load_plan("llama2-70b-published-v6e-1x256"), progress=said.append)
    assert set(answer) == KEYS
    assert answer["against"] == "host"
    assert answer["loss_rel_error"] < 1e-5
    assert answer["grad_rel_error"] < 1e-5
    assert json.loads(json.dumps(answer)) == answer
    assert all(set(row) == ROW for row in answer["collectives"])
    kinds = {(row["kind"], *row["mesh_axes"]) for row in answer["collectives"]}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")} <= kinds
    for row in answer["unplanned"]:
        assert set(row) == {"kind", "mesh_axes", "bytes", "time_s", "source"}
        assert row["bytes"] > 0
        assert row["source"]
    assert any("8 host devices: fsdp 8" in text for text in said)


def test_wrong_code_does_not_verify(host: HostDevices) -> None:
    """A batch that no axis splits is counted once for every device."""
    data = plan_data(PLANS["data"])
    right = host.ask({"data": data, "steps": 1})
    assert right["grad_rel_error"] < 1e-5
    data["plan"]["roles"]["data"] = []
    wrong = host.ask({"data": data, "steps": 1})
    assert wrong["loss_rel_error"] > 1e-2


def test_what_goes_wrong_in_the_other_process_is_an_error_here(host: HostDevices) -> None:
    data = plan_data(PLANS["data"])
    data["plan"]["optimizer"] = "unheard-of"
    with pytest.raises(ShardsimError, match="unheard-of"):
        host.ask({"data": data, "steps": 1})


def test_unknown_scales_and_too_many_devices_are_refused() -> None:
    plan = load_plan("llama2-70b-published-v6e-1x256")
    with pytest.raises(PlanError, match="scale"):
        verify_host(plan, scale="small")
    with pytest.raises(PlanError, match="256 devices"):
        verify_host(plan, scale="full")
