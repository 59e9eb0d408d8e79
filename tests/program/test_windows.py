"""Attention to a window of the last tokens, and rounds of layers that differ in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from building import build, decoder
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import ModelError, PlanError
from shardsim.model import load_model
from shardsim.model.flops import attention_flops_per_token
from shardsim.ops.attend_mask import BLOCKS, Mask
from shardsim.plan import Overlap, Plan, resolve
from shardsim.plan.legality import check
from shardsim.simulate import simulate_plan

WHERE = {"fsdp": {"x": 2, "y": 2}, "data": {"z": 2}}


def seen(tokens: int, window: int) -> np.ndarray:
    """Return which keys each query sees, one by one."""
    at = np.arange(tokens)
    back = at[:, None] - at
    return (back >= 0) & (back < window) if window else back >= 0


@given(st.integers(2, 6), st.integers(0, 6 * BLOCKS[0]))
def test_a_kernel_computes_the_blocks_that_have_a_pair(blocks: int, window: int) -> None:
    tokens = blocks * BLOCKS[0]
    pairs = seen(tokens, window).reshape(blocks, BLOCKS[0], blocks, BLOCKS[0]).any((1, 3))
    assert Mask(True, window).computed(tokens) == pytest.approx(pairs.mean(), rel=1e-12)
    for last in range(1, blocks + 1):
        share = Mask(True, window).computed(tokens, last * BLOCKS[0])
        assert share == pytest.approx(pairs[-last:].mean(), rel=1e-12)
    for parts in (2, 8, 64):  # a part of the last block sees what the block sees
        share = Mask(True, window).computed(tokens, BLOCKS[0] // parts)
        assert share == pytest.approx(pairs[-1].mean(), rel=1e-12)


@given(st.integers(2, 6), st.integers(1, 6 * BLOCKS[0]))
def test_a_kernel_computes_the_blocks_of_a_chunk_that_have_a_pair(blocks: int, chunk: int) -> None:
    tokens = blocks * BLOCKS[0]
    at = np.arange(tokens)
    pairs = (at[:, None] >= at) & (at[:, None] // chunk == at // chunk)
    there = pairs.reshape(blocks, BLOCKS[0], blocks, BLOCKS[0]).any((1, 3))
    mask = Mask(True, chunk, chunked=True)
    assert mask.computed(tokens) == pytest.approx(there.mean(), rel=1e-12)
    for last in range(1, blocks + 1):
        share = mask.computed(tokens, last * BLOCKS[0])
        assert share == pytest.approx(there[-last:].mean(), rel=1e-12)
    assert abs(mask.counted(tokens, halved=True) - pairs.sum()) <= tokens / 2 + 1
    assert mask.counted(tokens, halved=False) == (pairs | pairs.T).sum()


def test_chunks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ModelError, match="chunked: needs windows, the tokens of a chunk"):
        decoder(chunked=True)
    model = decoder(layers=4, windows=[512, 0], chunked=True)
    plan = build(model, "v4:2x2x2", 32, {"context": {"x": 2}, "data": {"y": 2, "z": 2}})
    with pytest.raises(PlanError, match="attention in chunks over a context axis"):
        check(plan, resolve(plan))


@given(st.integers(1, 300), st.integers(0, 300))
def test_model_flops_count_the_pairs_of_a_window(tokens: int, window: int) -> None:
    mask = Mask(True, window)
    pairs = int(seen(tokens, window).sum())
    assert abs(mask.counted(tokens, halved=True) - pairs) <= tokens / 2 + 1  # half of the diagonal
    assert mask.counted(tokens, halved=False) == tokens * min(window or tokens, tokens)


@given(st.lists(st.sampled_from([0, 512, 1024, 4096]), min_size=1, max_size=4))
def test_a_round_computes_what_its_layers_would_alone(windows: list[int]) -> None:
    def plan(windows: list[int]) -> Plan:
        model = decoder(layers=12, sequence=2048, windows=windows)
        return build(model, "v4:2x2x2", 32, WHERE)

    whole = predict(plan(windows))
    alone = [predict(plan([window])) for window in windows]
    flops = [float(item.price.flops) for item in alone]
    assert float(whole.price.flops) == pytest.approx(np.mean(flops), rel=1e-12)
    assert whole.hbm["activations_bytes"] == pytest.approx(alone[0].hbm["activations_bytes"])
    moved = [sum(use.bytes_per_chip for use in item.collectives) for item in (whole, alone[0])]
    assert moved[0] == pytest.approx(moved[1], rel=1e-12)
    assert whole.plan.model.parameters_all == alone[0].plan.model.parameters_all


@pytest.mark.parametrize("costs", ["physical", "compiler"])
def test_events_run_rounds_as_the_closed_form_does(costs: str) -> None:
    model = decoder(layers=6, sequence=2048, windows=[512, 512, 0])
    alone = Overlap(weights=False, gradients=False)  # else gathers of two kinds share their links
    plan = build(model, "v4:2x2x2", 32, WHERE, overlap=alone)
    found = simulate_plan(plan, costs=costs)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


def test_gemma_2_counts_less_attention_than_if_all_were_global() -> None:
    model = load_model("gemma2-9b")
    every = replace(model, windows=())
    assert model.parameters_all == 9_241_705_984  # google/gemma-2-9b
    pairs = [4096 / 8192, 1.0]
    assert attention_flops_per_token(model) == attention_flops_per_token(every) * np.mean(pairs)


def test_windows_that_cannot_be_are_refused_with_what_can() -> None:
    with pytest.raises(ModelError, match=r"8 layers are not whole rounds of 3; .* is 9"):
        decoder(windows=[512, 512, 0])
    with pytest.raises(ModelError, match="windows: expected a list, as \\[4096, 0\\], found 4096"):
        decoder(windows=4096)
    with pytest.raises(ModelError, match="windows: need causal attention"):
        decoder(windows=[512, 0], causal=False)
    model = decoder(layers=4, windows=[512, 0])
    where = {"pipeline": {"x": 2, "y": 2}, "data": {"z": 2}}
    plan = build(model, "v4:2x2x2", 32, where, microbatches=4)
    with pytest.raises(PlanError, match="layers over pipeline stages: 4 does not divide by 8"):
        check(plan, resolve(plan))


def test_larger_blocks_compute_more_of_what_a_mask_leaves_out() -> None:
    """Of 4,096 tokens: 36 of 64 blocks of 512, 10 of 16 of 1,024 forward, 3 of 4 of 2,048 back; of
    a window of 128 the block of a query and the one before."""
    small, large = Mask(causal=True), Mask(causal=True, blocks=(1024, 2048))
    assert small.computed(4096) == small.back().computed(4096) == 36 / 64
    assert (large.computed(4096), large.back().computed(4096)) == (10 / 16, 3 / 4)
    assert replace(large, window=128).computed(8192) == 15 / 64
