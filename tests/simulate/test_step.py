"""Whole steps: against the closed form, folded against unfolded, what-ifs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from building import build, decoder
from found import shipped

from shardsim.errors import HardwareError
from shardsim.plan import Plan, load_plan, resolve
from shardsim.simulate import simulate_plan
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.topology import Fault
from shardsim.views.prediction import prediction_parts

# Plans whose tensor and weight traffic share links: simulated, they come out slower.
CONTENDING = ("512b", "tp2", "tp4", "st-moe")


def small(name: str, layers: int = 3) -> Plan:
    plan = load_plan(name)
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, layers=layers))


@pytest.mark.parametrize("costs", ["physical", "compiler"])
@pytest.mark.parametrize("name", shipped())
def test_agrees_with_the_closed_form_where_nothing_contends(name: str, costs: str) -> None:
    plan = load_plan(name)
    if costs == "compiler" and plan.machine.chip.compiler is None:
        pytest.skip("its compiler's costs are not known")
    chunks = int(resolve(plan).pipeline.size) * plan.pipeline_interleave
    few = -(-8 // chunks) * chunks
    whole = plan.model.experts or plan.stage_layers
    layers = plan.model.layers if whole else min(plan.model.layers, few)
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, layers=layers))
    found = simulate_plan(plan, costs=costs)
    ratio = found.step_time_s / found.events.analytic_step_time_s
    if ratio == pytest.approx(1, abs=0.005):
        return
    assert found.events.contention, ratio
    assert any(word in name for word in CONTENDING) or ratio == pytest.approx(1, abs=0.03)
    assert all(row.links and row.lost_s > 0 for row in found.events.contention)


def test_contention_names_links_and_collectives() -> None:
    """ViT-22B with the model axis on a part of z; weights travel over all axes."""
    plan = dataclasses.replace(small("vit-22b-published-tp2", 4), op_costs="physical")
    found = simulate_plan(plan)
    pairs = {(row.collective, row.other) for row in found.events.contention}
    assert ("gather block input, a hop", "gather weights forward") in pairs
    links = {
        link
        for row in found.events.contention
        if "block input" in row.collective + row.other
        for link in row.links
    }
    assert links
    assert links <= {"z+", "z-"}


WHAT_IFS: list[dict[str, Any]] = [
    {},
    {"straggler": (5, 1.1)},
    {"dead_link": (5, 0)},
    {"dead_link": (5, 3)},
    {"perturbation": Perturbation(faults=(Fault(device=5, port=0, factor=0.5),))},
    {"straggler": (5, 1.1), "dead_link": (7, 0)},
    {"perturbation": Perturbation(slowdowns=((0, 1.05), (9, 1.2)))},
]


def test_what_the_closed_form_queues_for_is_named() -> None:
    """Keys are gathered over links on which a gather of weights is under way: in turn there, both
    at once here."""
    where = {"context": {"x": 2, "y": 2, "z": 2}, "tensor2": {"z": 2}}
    plan = build(decoder(), "v4:2x2x4", 16, where, context_shards=True, attention="unfused")
    plan = dataclasses.replace(plan, microbatches=16, forward_only=True)
    found = simulate_plan(plan)
    assert found.step_time_s < 0.995 * found.events.analytic_step_time_s
    assert found.events.queued[0].collective == "all-gather over c"
    words = "\n".join(map(str, prediction_parts(found)))
    assert "all-gather over c waits" in words
    assert "this is -" in words
    assert not simulate_plan(plan, straggler=(0, 1.1)).events.queued


@pytest.mark.parametrize("options", WHAT_IFS, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "maxtext-32b-published-v5p-1x64",
        pytest.param("maxtext-32b-published-v5p-2x64", marks=pytest.mark.slow),
        "llama3-8b-published-v6e-1x16",
        pytest.param("maxtext-22b-published-v4-1x64", marks=pytest.mark.slow),
    ],
)
def test_folded_equals_unfolded(name: str, options: dict[str, Any]) -> None:
    plan = small(name, 2)
    folded = simulate_plan(plan, **options)
    whole = simulate_plan(plan, unfold=True, **options)
    assert folded.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
    assert folded.events.utilisation == pytest.approx(whole.events.utilisation)
    assert folded.time == pytest.approx(whole.time)
    assert whole.events.classes["devices"] == plan.machine.devices
    assert folded.events.classes["devices"] <= 20


def test_a_healthy_torus_is_one_chip() -> None:
    assert simulate_plan(small("vit-22b-published-tp8")).events.classes["devices"] == 1


def test_a_straggler_splits_only_what_it_touches() -> None:
    """Itself, its model group, its weight group, and all others."""
    found = simulate_plan(small("vit-22b-published-tp8"), straggler=(77, 1.1))
    assert found.events.classes["devices"] == 4


def test_what_ifs_cost_time() -> None:
    plan = small("vit-22b-published-tp8")
    base = simulate_plan(plan)
    slow = simulate_plan(plan, straggler=(0, 1.1))
    assert 1.05 < slow.step_time_s / base.step_time_s < 1.1
    dead = simulate_plan(plan, dead_link=(0, 0))
    assert dead.step_time_s > base.step_time_s
    half = Perturbation(faults=(Fault(device=0, port=0, factor=0.5),))
    assert base.step_time_s < simulate_plan(plan, perturbation=half).step_time_s
    slices = small("maxtext-32b-published-v5p-2x64")
    busy = simulate_plan(slices, perturbation=Perturbation(dcn_congestion=2.0))
    assert busy.step_time_s > simulate_plan(slices).step_time_s


def test_same_seed_same_result_to_the_last_bit() -> None:
    plan = small("llama3-8b-published-v6e-1x16", 4)
    runs = [simulate_plan(plan, jitter=0.02, seed=seed).step_time_s for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0] > simulate_plan(plan).step_time_s


def test_parts_add_up_and_data_is_plain() -> None:
    found = simulate_plan(small("vit-22b-published-tp8"))
    assert sum(found.time.values()) == pytest.approx(found.step_time_s)
    data = found.to_data()
    assert data["fidelity"] == "events"
    assert data["events"]["link_utilisation"].keys() >= {"x+", "y-", "z+"}
    assert all(0 < share <= 1 for share in found.events.utilisation.values())


def test_collectives_as_in_the_closed_form() -> None:
    from shardsim.cost.predict import predict

    plan = small("maxtext-22b-published-v4-8x64", 4)
    found, expected = simulate_plan(plan), predict(plan)
    assert found.step_time_s == pytest.approx(expected.step_time_s, rel=0.01)
    for use in expected.collectives:
        same = [
            other
            for other in found.collectives
            if (other.kind, other.mesh_axes) == (use.kind, use.mesh_axes)
        ]
        assert len(same) == 1, use
        assert same[0].bytes_per_chip == pytest.approx(use.bytes_per_chip)


def test_microbatches_and_offload_agree_too() -> None:
    plan = dataclasses.replace(small("vit-22b-published-tp8", 6), microbatches=2)
    found = simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"straggler": (1024, 1.1)}, "devices 0 to 1023"),
        ({"dead_link": (0, 9)}, "no link"),
        ({"jitter": -1.0}, "jitter"),
    ],
)
def test_impossible_what_ifs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        simulate_plan(small("vit-22b-published-tp8"), **options)
