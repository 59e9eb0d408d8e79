"""What is said beside a step: its least time, MFU above what is executed, turns of stages."""

from __future__ import annotations

import numpy as np
import pytest
from building import build, decoder

from shardsim.cost.mfu import Accounting, least_step_s, mfu_of
from shardsim.cost.predict import predict
from shardsim.cost.stages import Took
from shardsim.plan.lengths import Lengths


def test_the_least_step_is_that_of_the_fastest_format() -> None:
    plan = build(decoder(), "v5e:2x2", 16, {"fsdp": {"x": 2, "y": 2}})
    peaks = plan.machine.chip.peak_flops
    assert peaks["int8"] > peaks["bf16"]
    at_peak_s = min(mfu_of(plan, 1.0, accounting) for accounting in Accounting)  # in bf16
    faster = max(peaks.values()) / peaks["bf16"]
    assert least_step_s(plan) == pytest.approx(at_peak_s / faster)


def test_mfu_above_what_is_executed_is_explained() -> None:
    """A causal kernel skips half of what PaLM's count of attention has."""
    long = decoder(sequence=65536)
    plan = build(long, "v5p:2x2x2", 8, {"fsdp": {"x": 2, "y": 2, "z": 2}}, remat="none")
    item = predict(plan)
    assert item.mfu > item.hfu
    assert any("MFU is above HFU" in text for text in item.warnings)
    short = predict(build(decoder(), "v5p:2x2x2", 8, {"fsdp": {"x": 2, "y": 2, "z": 2}}))
    assert not any("MFU is above" in text for text in short.warnings)


def test_turns_close_after_each_microbatch() -> None:
    took = Took(turn_s=2.0, closing_s=0.5, last_turn_s=3.0, last_closing_s=1.0)
    assert took.total_s(4) == 3 * 2.5 + 4.0
    assert took.total_s(1) == 4.0


def test_stages_keep_what_is_under_way_of_their_own_layers() -> None:
    """Two are under way on the first stage, one on the last."""

    def kept(layers: tuple[int, int]) -> float:
        where = {"pipeline": {"x": 2}}
        plan = build(
            decoder(layers=8),
            "v5p:2x1x1",
            16,
            where,
            remat="none",
            microbatches=8,
            stage_layers=layers,
        )
        return float(predict(plan).hbm["activations_bytes"])

    assert kept((6, 2)) == pytest.approx(2 * kept((2, 6)))


def test_what_rows_cut_off_is_a_share_of_all_tokens() -> None:
    lengths = Lengths(distribution="log_normal", mean=400.0, deviation=300.0)
    plan = build(decoder(), "v5e:2x2", 16, {"fsdp": {"x": 2, "y": 2}}, lengths=lengths)
    real = predict(plan).real
    assert real is not None
    drawn = np.random.default_rng(0).lognormal(*_of(400.0, 300.0), 200_000)
    kept = np.minimum(drawn, plan.sequence).sum() / drawn.sum()
    assert real.cut_share == pytest.approx(1.0 - kept, rel=0.05)


def _of(mean: float, deviation: float) -> tuple[float, float]:
    """Return mean and deviation of the logarithm."""
    spread = np.log(1.0 + (deviation / mean) ** 2)
    return float(np.log(mean) - spread / 2), float(np.sqrt(spread))


def test_mfu_over_real_tokens_counts_each_as_in_its_own_sequence() -> None:
    """Rows half full: 6 FLOPs a weight and 12 a layer, head and key (PaLM, appendix B) of half of
    the tokens, each seeing half as many keys."""
    model = decoder()
    whole = model.sequence
    half = Lengths(distribution="constant", mean=whole / 2)
    plan = build(model, "v5e:2x2", 16, {"fsdp": {"x": 2, "y": 2}}, lengths=half)
    found = predict(plan)
    assert found.real is not None
    weights = sum(one.size for one in model.tensors if one.kind == "matrix")

    def flops(keys: float) -> float:
        return 6 * weights + 12 * model.layers * model.heads * model.head_dim * keys

    share = 0.5 * flops(whole / 2) / flops(whole)
    assert found.real.mfu_over_real_tokens == pytest.approx(share * found.mfu, rel=1e-3)
