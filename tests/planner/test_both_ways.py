"""Fused attention or attention apart: one comparison for searches, meshes and explanations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardsim.cost.predict import predict
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.planner.attention import default_attention, other_attention
from shardsim.planner.presets import plan_of_mesh
from shardsim.planner.search import search


@pytest.mark.parametrize(
    ("model", "machine", "batch"),
    [
        pytest.param("dit-b-2", "v5e:2x2", 256, marks=pytest.mark.slow),
        ("vit-s-16", "v4:2x2x1", 512),
    ],
)
def test_the_best_plan_never_loses_to_the_other_attention(model, machine, batch):
    best = search(model, machine, batch).best
    other = predict(replace(best.plan, attention=other_attention(best.plan.attention)))
    assert not other.fits or best.step_time_s <= other.step_time_s


@pytest.mark.slow
def test_what_is_held_is_kept_though_the_other_is_faster():
    held = search("dit-b-2", "v5e:2x2", 256, attention="unfused", top=2)
    free = search("dit-b-2", "v5e:2x2", 256, top=2)
    assert {one.plan.attention for one in held.predictions} == {"unfused"}
    assert free.best.step_time_s < held.best.step_time_s
    assert free.searched > held.searched
    assert free.slices[0].best is free.predictions[0]
    sizes = [tuple((a.name, a.size) for a in one.plan.mesh) for one in free.predictions]
    assert len(set(sizes)) == len(sizes)


def test_a_mesh_attends_as_the_search_does():
    model, machine = load_model("dit-b-2"), parse_machine("v5e:2x2")
    assert default_attention(model, model.sequence) == "unfused"
    plan = plan_of_mesh(model, machine, 256, {"fsdp": 4})
    best = search(model, machine, 256, fix={"mesh.fsdp": 4}).best
    assert plan.attention == best.plan.attention == "flash"


def test_biased_scores_have_no_choice():
    found = search("t5-v1.1-small", "v4:2x2x1", 64, top=3)
    assert {one.plan.attention for one in found.predictions} == {"unfused"}
