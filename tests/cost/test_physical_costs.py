"""Time of one operation: tiles, sustained rates, and what HBM adds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from building import plain_chip

from shardsim.cost.costs import physical
from shardsim.machine import load_chip, override_chip
from shardsim.program.tasks import Compute


def matmul(m: float, k: float, n: float, **options: float) -> Compute:
    moved = options.pop("hbm_bytes", 2 * (m * k + k * n + m * n))
    return Compute(
        name="matmul", kind="matmul", m=m, k=k, n=n, matmuls=1, hbm_bytes=moved, **options
    )


@pytest.mark.parametrize("chip_name", ["v4", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1024, 512, 2048), (1, 1, 1), (100, 130, 300), (8, 128, 257)]
)
def test_the_matrix_unit_works_in_whole_tiles(chip_name, m, k, n):
    chip = plain_chip(chip_name, matmul_efficiency=0.5)
    side = {"v4": 128, "v6e": 256, "tpu7x": 256}[chip_name]
    assert chip.mxu_dim == side
    tiles = math.ceil(m / 8) * math.ceil(k / side) * math.ceil(n / side)
    rate = chip.peak_flops["bf16"] / chip.devices_per_chip * 0.5
    time = physical(chip).operation(matmul(m, k, n))
    assert time.unit_s == pytest.approx(tiles * 2 * 8 * side * side / rate, rel=1e-12)


@pytest.mark.parametrize(("name", "devices"), [("v4", 1), ("tpu7x", 2)])
@pytest.mark.parametrize("flops_a_byte", [0.1, 1.0, 30.0, 1e4])
def test_hbm_adds_what_streaming_cannot_hide(flops_a_byte, name, devices):
    chip = plain_chip(name, hbm_efficiency=0.5, matmul_efficiency=1.0)
    work = 2.0 * 4096**3
    unit_s = work / (chip.peak_flops["bf16"] / devices)
    rate = chip.hbm_bytes_per_s / devices * 0.5
    moved = unit_s * rate / flops_a_byte
    memory_s = unit_s / flops_a_byte
    time = physical(chip).operation(matmul(4096, 4096, 4096, hbm_bytes=moved))
    # Half of the on-chip memory is filled before the first product, or all there is.
    first_s = min(memory_s, chip.onchip_bytes / devices / 2 / rate, unit_s)
    assert time.total_s == pytest.approx(max(unit_s, memory_s) + first_s, rel=1e-12)


def test_an_elementwise_operation_takes_the_longer_of_two():
    chip = plain_chip("v4", hbm_efficiency=0.5, op_overhead_s=1e-6)
    for moved, operations in ((1e9, 1e6), (1e3, 1e12)):
        task = Compute(name="add", kind="elementwise", hbm_bytes=moved, vector_ops=operations)
        longer = max(moved / (0.5 * chip.hbm_bytes_per_s), operations / chip.vector_flops)
        assert physical(chip).operation(task).total_s == pytest.approx(longer + 1e-6, rel=1e-12)


def test_eight_bit_formats_use_their_own_peak():
    chip = plain_chip("v5e")
    task = matmul(2**14, 2**14, 2**14)
    times = [
        physical(chip).operation(replace(task, dtype=dtype)).unit_s
        for dtype in ("bf16", "int8", "f32")
    ]
    assert times[1] == pytest.approx(times[0] * chip.peak("bf16") / chip.peak_flops["int8"])
    assert times[2] == times[0]


@pytest.mark.parametrize(
    ("chip_name", "size", "published", "within"),
    [
        # Square bf16 matmuls of published micro-benchmarks, as fractions of the peak, on a chip
        # whose large ones sustain what theirs do.
        ("v5e", 4096, 0.84, 0.03),
        ("tpu7x", 1024, 0.30, 0.05),
    ],
)
def test_square_matmuls_below_8192(chip_name, size, published, within):
    sustained = {"v5e": 0.95, "tpu7x": 0.83}[chip_name]
    chip = override_chip(load_chip(chip_name), {"matmul_efficiency": sustained})
    rate = 2.0 * size**3 / physical(chip).operation(matmul(size, size, size)).total_s
    fraction = rate / (chip.peak("bf16") / chip.devices_per_chip)
    assert fraction == pytest.approx(published, abs=within)
