"""What sequences of many lengths cost: padded, packed and without rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.ops.attend_mask import BLOCKS, Mask
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.plan.lengths import fullest, sampled
from shardsim.plan.resolve import rules_data
from shardsim.planner.search import search
from shardsim.program.partition import partition
from shardsim.program.shapes import Workload
from shardsim.simulate import simulate_plan


def plan_of(held: str = "", **lengths: Any) -> Plan:
    data: dict[str, Any] = {
        "model": {"base": "llama2-7b", "name": "small", "layers": 2},
        "machine": "v5p:2x2x2",
        "batch": 64,
        "sequence": 4096,
        "mesh": {"fsdp": 8},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
    }
    if held:
        given = lengths or {"distribution": "log_normal", "mean": 900, "deviation": 700}
        data["lengths"] = {**given, "as": held}
    return plan_from_data(data, "plan")


def flops(plan: Plan, kind: str) -> float:
    program = partition(Workload.of(plan), resolve(plan))
    return sum(
        float(task.flops * task.count * block.trips)
        for block in program.blocks
        for task in block.computes()
        if task.kind == kind
    )


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.integers(1, 1500), min_size=1, max_size=12),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 512, 513, 1500]),
)
def test_blocks_of_packed_rows_are_those_that_some_pair_needs(
    row: list[int], causal: bool, window: int
) -> None:
    """The rule for many sequences beside a mask of every pair, token by token."""
    tokens = -(-sum(row) // BLOCKS[0]) * BLOCKS[0]
    mask = Mask(causal=causal, window=window if causal else 0)
    number = np.repeat(np.arange(len(row)), row)
    number = np.concatenate([number, -1 - np.arange(tokens - len(number))])
    counts = (number[:, None] == number) & (number[:, None] >= 0)
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    if causal:
        counts &= back >= 0
    if mask.window:
        counts &= back < mask.window
    side = tokens // BLOCKS[0]
    blocks = counts.reshape(side, BLOCKS[0], side, BLOCKS[0]).any((1, 3)).sum()
    found = mask.packed(tokens, [row])[0]
    expected = blocks / side**2 if tokens > BLOCKS[0] else 1.0
    if not mask.window or tokens <= BLOCKS[0]:
        assert found == pytest.approx(expected)
    else:  # blocks that a window leaves by a part of their tokens count as whole
        assert expected <= found * (1 + 1e-9)
        assert found <= Mask(causal=True).packed(tokens, [row])[0] * (1 + 1e-9)


def test_padding_costs_what_tokens_cost_and_packing_saves_it() -> None:
    full, padded, packed = (predict(plan_of(held)) for held in ("", "padded", "packed_masked"))
    assert padded.step_time_s == full.step_time_s == packed.step_time_s
    assert padded.hbm == full.hbm
    assert full.real is None
    assert padded.real is not None
    assert packed.real is not None
    lengths = plan_of("padded").lengths
    assert lengths is not None
    mean = float(sampled(lengths, 4096).mean())
    assert padded.real.padding_share == pytest.approx(1 - mean / 4096)
    assert packed.real.padding_share < 0.03  # rows are 4.5 sequences long
    rate = packed.real.real_tokens_per_s_per_chip / padded.real.real_tokens_per_s_per_chip
    assert rate == pytest.approx((1 - packed.real.padding_share) * 4096 / mean)
    # Each sequence by itself has fewer pairs than a row of several.
    assert packed.real.mfu_over_real_tokens < packed.mfu


def test_without_rows_products_are_those_of_real_tokens_alone() -> None:
    even = {"distribution": "constant", "mean": 1024}
    padded, unpadded = plan_of("padded", **even), plan_of("unpadded", **even)
    assert flops(unpadded, "matmul") == pytest.approx(flops(padded, "matmul") / 4, rel=1e-6)
    # Attention of 1,024 tokens by itself: (1 + 512 / 1024) / 2 of its pairs.
    row = Mask(causal=True).computed(4096) * 4096**2
    alone = Mask(causal=True).computed(1024) * 1024**2
    assert flops(unpadded, "attention") / flops(padded, "attention") == pytest.approx(alone / row)
    assert predict(unpadded).hbm["peak_bytes"] < predict(padded).hbm["peak_bytes"]


def test_all_wait_for_the_fullest_device() -> None:
    plan = plan_of("unpadded")
    assert plan.lengths is not None
    load = fullest(sampled(plan.lengths, 4096), 64 / 8, 8)
    item = predict(plan)
    assert item.real is not None
    assert item.real.load == pytest.approx(load)
    assert load > 1.2
    mean = round(float(sampled(plan.lengths, 4096).mean()))
    even = plan_of("unpadded", distribution="constant", mean=mean)
    assert flops(plan, "matmul") == pytest.approx(flops(even, "matmul") * load, rel=1e-3)


def test_only_a_kernel_that_skips_gains_by_packing_by_sequence() -> None:
    times = {
        (held, how): predict(plan_of(held), implementation=how).step_time_s
        for held in ("packed_masked", "packed")
        for how in ("ideal", "emitted", "trainer")
    }
    assert times["packed", "ideal"] < times["packed_masked", "ideal"]
    for how in ("emitted", "trainer"):
        assert times["packed", how] == times["packed_masked", how]


@pytest.mark.parametrize("held", ["padded", "packed", "unpadded"])
def test_events_agree_with_the_closed_form(held: str) -> None:
    plan = plan_of(held)
    played = simulate_plan(plan).step_time_s
    assert played == pytest.approx(predict(plan).step_time_s, rel=5e-3)


@pytest.mark.parametrize("held", ["packed", pytest.param("unpadded", marks=pytest.mark.slow)])
def test_the_search_prices_rows_as_the_plan_does(held: str) -> None:
    lengths = {"distribution": "log_normal", "mean": 900, "deviation": 700}
    fix = {"lengths": {**lengths, "as": held}}
    found = search("llama2-7b", "v5p:2x2x2", 64, sequence=4096, top=3, fix=fix)
    times = [one.step_time_s for one in found.predictions]
    for one in found.predictions:
        assert one.plan.lengths is not None
        assert one.plan.lengths.held == held
        assert predict(one.plan).step_time_s == pytest.approx(one.step_time_s)
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times))


def test_sequences_that_are_skipped_are_not_split_over_a_context_axis() -> None:
    data: dict[str, Any] = {
        "model": "llama2-7b",
        "machine": "v5p:2x2x2",
        "batch": 16,
        "mesh": {"fsdp": 4, "context": 2},
        "rules": rules_data(["fsdp", "context"]),
        "lengths": {"mean": 500, "as": "packed"},
    }
    with pytest.raises(PlanError, match=r"lengths.as: packed sequences are not split over a con"):
        plan_from_data(data, "plan")
    plan_from_data({**data, "lengths": {"mean": 500, "as": "packed_masked"}}, "plan")
