"""What of a whole step's communication is hidden: all, nothing, or what a count by hand says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import build, decoder, plans, vit
from hypothesis import given
from planned import predict_emitted

from shardsim.cost.predict import Prediction, predict
from shardsim.machine import override_chip
from shardsim.plan import Overlap, Plan, Remat

NOTHING = Overlap(matmul="off", weights=False, gradients=False, dcn=False)
IDEAL = {
    "hop_latency_s": 0.0,
    "collective_overhead_s": 0.0,
    "op_overhead_s": 0.0,
    "link_efficiency": 1.0,
}


def with_figures(plan: Plan, **figures: float) -> Plan:
    chip = override_chip(plan.machine.chip, IDEAL | figures)
    return replace(plan, machine=replace(plan.machine, chip=chip))


def waited_for(prediction: Prediction, axis: str) -> float:
    """Return the exposed seconds of all communication over one mesh axis, but for sums."""
    uses = [use for use in prediction.collectives if use.mesh_axes == (axis,)]
    return sum(use.exposed_s for use in uses if use.kind != "all-reduce")


@given(plans())
def test_without_overlap_everything_is_waited_for(plan):
    ring = plan.context.keys == "ring"
    apart = replace(plan.context, overlap=False) if ring else plan.context
    prediction = predict(replace(plan, overlap=NOTHING, context=apart))
    for use in prediction.collectives:
        assert use.exposed_s == pytest.approx(use.time_s, rel=1e-9)


@given(plans())
def test_the_parts_of_single_operations_add_up(plan):
    price = predict(plan).price
    for name, of_one in (
        ("compute_s", [cost.unit_s for cost in price.computes]),
        ("hbm_bound_s", [cost.memory_s for cost in price.computes]),
        ("flops", [cost.flops for cost in price.computes]),
    ):
        whole = float(getattr(price, name))
        assert float(sum(of_one)) == pytest.approx(whole, rel=1e-9, abs=1e-15), name


@pytest.mark.parametrize("matmul", ["unidirectional", "bidirectional"])
@pytest.mark.parametrize("fused", [False, True])
def test_on_fast_links_a_ring_costs_what_its_blocks_cost(matmul, fused):
    # Eight members on a closed axis. While a block is multiplied the next one arrives, from one
    # side or from both: a member begins with its own piece and ends with the last to arrive.
    where = {"data": {"x": 8, "y": 8}, "tensor": {"z": 8}}
    model = vit(final_norm=False)
    times = {}
    for name in ("off", matmul):
        plan = build(
            model,
            "v4:8x8x8",
            4096,
            where,
            remat="none",
            overlap=Overlap(matmul=name),
            fused_projections=fused,
        )
        fast = with_figures(plan, link_bytes_per_s=1e12)
        times[name] = waited_for(predict(fast), "t")
    off, ring = times["off"], times[matmul]
    assert off > 0
    assert ring == pytest.approx(0.0, abs=1e-9 * off)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize(
    ("machine", "half", "rest"),
    [("v5e:4x4", {"x": 4}, {"y": 4}), ("v4:2x2x4", {"x": 2, "y": 2}, {"z": 4})],
)
def test_a_whole_slice_scatters_as_it_sums(microbatches, machine, half, rest):
    # The TPU compiler makes an all-reduce of a reduce-scatter over a whole slice, and in three
    # dimensions of a gather that is not to run beside other work; over part of a slice it does as
    # the plan says.
    whole = half | rest
    half = build(decoder(), machine, 64, {"data": half, "fsdp": rest}, overlap=NOTHING)
    parts = [
        sum(
            use.bytes_per_chip
            for use in price(half).collectives
            if use.mesh_axes == ("f",) and use.purpose == "parameters"
        )
        for price in (predict, predict_emitted)
    ]
    assert parts[0] == pytest.approx(parts[1], rel=1e-12)
    found = {}
    for costs, price in (("physical", predict), ("compiler", predict_emitted)):
        for weights in (False, True):
            plan = build(
                decoder(),
                machine,
                64,
                {"fsdp": whole},
                microbatches=microbatches,
                overlap=replace(NOTHING, weights=weights),
            )
            for use in price(plan).collectives:
                if use.purpose == "parameters":
                    found[costs, weights, use.kind] = use.bytes_per_chip

    def sent(costs: str, weights: bool, *kinds: str) -> float:
        return sum(
            sent_bytes
            for (priced, prefetched, kind), sent_bytes in found.items()
            if (priced, prefetched) == (costs, weights) and kind in kinds
        )

    every = ("all-gather", "reduce-scatter", "all-reduce")
    for weights in (False, True):
        more = sent("compiler", weights, *every) - sent("physical", weights, *every)
        expected = sent("physical", weights, "reduce-scatter")
        if not weights and len(whole) == 3:
            expected += sent("physical", weights, "all-gather")
        assert expected > 0
        assert more == pytest.approx(expected, rel=1e-9)
        assert sent("compiler", weights, "reduce-scatter") == 0


def test_of_a_whole_slice_sums_of_gradients_and_gathers_that_are_not_ahead_wait():
    # Whatever the plan says of gradients: no compiler option makes their sums asynchronous.
    plan = build(
        decoder(), "v4:2x2x4", 64, {"fsdp": {"x": 2, "y": 2, "z": 4}},
        overlap=replace(NOTHING, gradients=True),
    )  # fmt: skip
    moves = [
        cost
        for cost in predict_emitted(with_figures(plan, link_bytes_per_s=1e12)).price.collectives
        if cost.task.name.endswith("all-reduced") and float(cost.count)
    ]
    gathers = [cost for cost in moves if "gather" in cost.task.name]
    assert {cost.block for cost in gathers} >= {"layer forward", "layer backward"}
    assert all(cost.exposed_s == pytest.approx(cost.time_s) for cost in gathers)
    layers = [cost for cost in moves if cost not in gathers and cost.block.startswith("layer")]
    assert layers
    assert all(cost.exposed_s == pytest.approx(cost.time_s) for cost in layers)


def test_copies_to_the_host_hide_behind_the_layer_that_they_leave():
    model = decoder(layers=4)
    plan = build(model, "v5e:4x4", 64, {"data": {"x": 4, "y": 4}}, overlap=NOTHING)
    plan = replace(plan, remat=Remat.of(save=frozenset(), offload=frozenset({"layer_input"})))
    bytes_of_a_layer = 64 * 512 / 16 * 1024 * 2

    def layers(prediction: Prediction) -> dict[str, float]:
        """Return the seconds of a pass but for the copies."""
        busy: dict[str, float] = {}
        for cost in prediction.price.computes:
            busy[cost.block] = busy.get(cost.block, 0.0) + float(cost.time_s)
        return busy

    for pcie in (1e8, 1e9, 1e12):
        prediction = predict(with_figures(plan, pcie_bytes_per_s=pcie))
        copies = [use for use in prediction.collectives if use.kind == "host-transfer"]
        alone = 4 * bytes_of_a_layer / pcie
        busy = layers(prediction)
        names = {
            cost.block: cost.task.name
            for cost in prediction.price.collectives
            if cost.block.startswith("layer")
        }
        assert names["layer forward"] == "offload activations, layer_input"
        assert names["layer backward"] == "fetch activations"
        expected = sum(
            max(alone - busy[block], 0.0) for block in ("layer forward", "layer backward")
        )
        assert sum(use.time_s for use in copies) == pytest.approx(2 * alone, rel=1e-9)
        assert sum(use.exposed_s for use in copies) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("parallel", "offloaded", "first", "last"),
    [
        (False, "qkv", "cast weights", "attention input"),
        (False, "mlp_hidden", "cast weights", "mlp input"),
        (True, "qkv", "mlp_in", "mlp_out"),
        (True, "mlp_hidden", "cast weights", "attention_output"),
    ],
)
def test_emitted_copies_run_until_the_next_layer_makes_the_same(parallel, offloaded, first, last):
    # A parallel block makes first what does not come from it, a serial one has nothing else.
    model = decoder(layers=4, parallel_block=parallel)
    plan = build(model, "v5e:4x4", 64, {"data": {"x": 4, "y": 4}}, overlap=NOTHING)
    plan = replace(plan, remat=Remat.of(offload=frozenset({offloaded})))
    prediction = predict_emitted(with_figures(plan, pcie_bytes_per_s=1e9))
    works = [cost for cost in prediction.price.computes if cost.block == "layer forward"]
    names = [cost.task.name for cost in works]
    beside = works[names.index(first) : names.index(last) + 1]
    (copy,) = (
        cost
        for cost in prediction.price.collectives
        if cost.task.name == f"offload activations, {offloaded}"
    )
    spared = sum(float(cost.time_s) for cost in beside)
    assert float(copy.exposed_s) == pytest.approx(float(copy.time_s) - spared, rel=1e-9)


def test_what_a_host_has_no_room_for_does_not_fit():
    plan = build(decoder(layers=4), "v5e:4x4", 64, {"data": {"x": 4, "y": 4}})
    away = replace(plan, remat=Remat.of(offload=frozenset({"qkv"})))
    need = float(predict(away).use.host_bytes)
    assert need == pytest.approx(4 * 64 * 512 / 16 * 3 * 1024 * 2)
    chip = plan.machine.chip
    for room, fits in ((need, True), (need * (1 - 1e-9), False)):
        item = predict(with_figures(away, host_bytes=room * chip.chips_per_host))
        assert item.fits is fits
        assert any("host's memory" in line for line in item.warnings) is not fits
        assert predict(with_figures(plan, host_bytes=1.0)).fits
