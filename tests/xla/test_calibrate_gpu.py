"""Constants of a GPU: found again in times that they made."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.costs import HEAD_DIM_TILE
from shardsim.errors import HardwareError
from shardsim.machine import Chip, chip_from_text, load_chip, override_chip
from shardsim.machine.kernels import CONSTANTS, Kernels
from shardsim.program.gpu_rules import CUDNN_GRADIENT_PASSES
from shardsim.xla.calibrate_gpu import Sizes, benches, calibrate_gpu, calibrated, matmul_constants

CHIP = load_chip("h100")
PEAK, HBM = CHIP.peak("bf16"), CHIP.hbm_bytes_per_s


def device(chip: Chip) -> Any:
    """Return a device whose kernels take what a chip says."""
    kernels = chip.kernels
    assert kernels is not None

    def attention(batch: int, tokens: int, heads: int, depth: int, gradient: bool) -> float:
        pairs = batch * heads * tokens**2
        wide = -(-depth // HEAD_DIM_TILE) * HEAD_DIM_TILE

        def kernel_s(products: int, share: float, ops: float) -> float:
            return pairs * (2.0 * products * wide / PEAK / share + ops / CHIP.vector_flops)

        forward_s = kernel_s(2, kernels.attention_efficiency, kernels.softmax_ops)
        if not gradient:
            return forward_s
        moved = 2.0 * batch * tokens * heads * depth * CUDNN_GRADIENT_PASSES
        share, ops = kernels.attention_gradient_efficiency, kernels.softmax_gradient_ops
        return forward_s + moved / HBM + kernel_s(5, share, ops)

    def ask(bench: str, **size: Any) -> float:
        if bench == "attention":
            return attention(**size)
        if bench == "matmul":
            m, k, n = size["m"], size["k"], size["n"]
            flops = 2.0 * m * k * n * (1.0 + kernels.contraction_start / k)
            return flops / PEAK / chip.matmul_efficiency + chip.op_overhead_s
        if bench == "scores":
            pairs = size["heads"] * size["tokens"] ** 2
            moved = 8.0 * pairs + 8.0 * size["heads"] * size["tokens"] * size["depth"]
            return moved / HBM / kernels.scores_hbm_efficiency
        elements = size.get("elements") or size["rows"] * size.get("columns", 1)
        elements = elements * size.get("heads", 1) * size.get("depth", 1)
        passes = {"sums": 8.0, "optimizer": 28.0}.get(bench, 4.0)
        if bench == "stream":
            return passes * elements / HBM / chip.hbm_efficiency
        name = {"sums": "sum"}.get(bench, bench)
        return passes * elements / HBM / float(getattr(kernels, f"{name}_hbm_efficiency"))

    return ask


@given(
    shares=st.lists(st.floats(0.3, 0.95), min_size=9, max_size=9),
    start=st.floats(10, 300),
    ops=st.floats(5, 60),
)
@settings(max_examples=30)
def test_constants_are_found_again(shares: list[float], start: float, ops: float) -> None:
    values = dict.fromkeys(CONSTANTS, ops) | {"contraction_start": start}
    names = [name for name in CONSTANTS if name.endswith("_efficiency")]
    kernels = Kernels(**(values | dict(zip(names, shares, strict=False))))
    rates = {"matmul_efficiency": shares[-1], "hbm_efficiency": shares[-2], "op_overhead_s": 3e-6}
    chip = replace(override_chip(CHIP, rates), kernels=kernels)
    found = calibrated(CHIP, device(chip), {}, Sizes()).chip
    for name in CONSTANTS:
        assert getattr(found.kernels, name) == pytest.approx(getattr(kernels, name), rel=1e-3), name
    for name, value in rates.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name


def test_the_file_is_one_that_can_be_read() -> None:
    made = calibrated(CHIP, device(CHIP), {"jax": "0.11.2"}, Sizes())
    chip = chip_from_text(made.text(), "made")
    assert chip.kernels == made.chip.kernels
    assert chip.matmul_efficiency == made.chip.matmul_efficiency
    assert chip.hbm_bytes == CHIP.hbm_bytes
    assert max(abs(error) for error in made.residuals.values()) < 0.35


def test_nothing_becomes_negative() -> None:
    """Times of which a line would start below zero."""
    times = {(1024, 1024, 1024): 1e-6, (8192, 8192, 8192): 2e-3}
    share, start, start_s = matmul_constants(times, PEAK)
    assert 0.0 < share <= 1.0
    assert start >= 0.0 <= start_s


def test_a_processor_is_not_measured_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"platform": "cpu", "kind": "cpu", "count": 8, "versions": {}}
    process = nullcontext(SimpleNamespace(ask=lambda request: here))
    monkeypatch.setattr("shardsim.xla.calibrate_gpu.benches", lambda: process)
    with pytest.raises(HardwareError, match="no GPU here, but 8 x cpu"):
        calibrate_gpu("h100")


@pytest.mark.slow
def test_benches_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("shardsim.xla.kernel_bench.BUDGET_S", 0.01)
    with benches() as bench:
        assert bench.ask({"bench": "devices"})["platform"] == "cpu"
        for request in (
            {"bench": "matmul", "m": 64, "k": 32, "n": 64},
            {"bench": "stream", "elements": 1024},
            {"bench": "sums", "rows": 16, "columns": 64},
            {"bench": "copy", "elements": 1024},
            {"bench": "transpose", "rows": 16, "heads": 4, "depth": 8},
            {"bench": "optimizer", "elements": 1024},
            {"bench": "scores", "heads": 2, "tokens": 16, "depth": 8},
        ):
            assert bench.ask(request)["seconds"] > 0.0
