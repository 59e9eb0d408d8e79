"""Operations as a compiler estimates them: closed forms, bounds, and monotony."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from building import plain_chip
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.costs import compiler
from shardsim.machine import Chip, chip_names, load_chip
from shardsim.machine.op_costs import OpCosts
from shardsim.program.rules import in_two
from shardsim.program.tasks import Compute
from shardsim.validate.op_fit import read_points
from shardsim.validate.ops import parse_op

COSTS = OpCosts(
    matmul_efficiency=0.5,
    results_per_cycle=100.0,
    resident_contraction=1000.0,
    matmul_hbm_efficiency=0.5,
    prologue_bytes=1e6,
    elementwise_hbm_efficiency=0.25,
    vector_ops_per_cycle=200.0,
    attention_hbm_efficiency=0.4,
    optimizer_hbm_efficiency=0.8,
    copy_hbm_efficiency=0.2,
    transpose_hbm_efficiency=0.1,
    fixed_cycles=0.0,
)
LEARNED = [name for name in chip_names() if load_chip(name).compiler]
sizes = st.integers(1, 2**15)


def chip_with(name: str = "v4", **changes: float) -> Chip:
    return replace(plain_chip(name), compiler=replace(COSTS, **changes))


def matmul(m, k, n, **options) -> Compute:
    moved = 2.0 * (m * k + k * n + m * n)
    task = Compute(name="matmul", kind="matmul", m=m, k=k, n=n, matmuls=1, hbm_bytes=moved)
    return replace(task, **options)


def test_results_leave_behind_the_products_of_a_short_contraction():
    chip = chip_with()
    task = matmul(4096, 512, 4096, hbm_bytes=0)
    product_s = 2.0 * 4096 * 512 * 4096 / (0.5 * chip.peak("bf16"))
    results_s = 4096 * 4096 / 100.0 / chip.clock_hz
    both = (product_s**3 + results_s**3) ** (1 / 3)
    assert compiler(chip).operation(task).total_s == pytest.approx(both, rel=1e-12)


def test_results_leave_after_the_products_of_a_long_contraction():
    chip = chip_with()
    task = matmul(4096, 4096, 4096, hbm_bytes=0)
    product_s = 2.0 * 4096 * 4096 * 4096 / (0.5 * chip.peak("bf16"))
    results_s = 4096 * 4096 / 100.0 / chip.clock_hz
    assert compiler(chip).operation(task).total_s == pytest.approx(product_s + results_s, rel=1e-12)


def test_between_results_leave_partly_behind_the_products():
    """From `resident_contraction` on, on a line to 2.25 times that; never a step."""
    chip = chip_with(resident_contraction=1024.0)
    results_s = 4096 * 4096 / 100.0 / chip.clock_hz
    shares = []
    for k in (1024, 1664, 2304):
        product_s = 2.0 * 4096 * k * 4096 / (0.5 * chip.peak("bf16"))
        hidden_s = (product_s**3 + results_s**3) ** (1 / 3)
        found_s = compiler(chip).operation(matmul(4096, k, 4096, hbm_bytes=0)).total_s
        shares.append((found_s - hidden_s) / (product_s + results_s - hidden_s))
    assert shares == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)


@pytest.mark.parametrize("name", ["v4", "tpu7x"])
def test_small_rows_wait_for_the_weights(name):
    chip = chip_with(name)
    task = matmul(8, 8192, 8192)
    rate = 0.5 * chip.hbm_bytes_per_s / chip.devices_per_chip
    time = compiler(chip).operation(task)
    edge_s = min(float(time.unit_s), 1e6 / rate)
    assert time.total_s == pytest.approx(task.hbm_bytes / rate + edge_s, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "share"), [("attention", 0.4), ("optimizer", 0.8), ("copy", 0.2), ("transpose", 0.1)]
)
def test_streams_take_their_share_of_hbm(kind, share):
    chip = chip_with()
    task = Compute(name="stream", kind=kind, hbm_bytes=1e9)
    wanted = 1e9 / (share * chip.hbm_bytes_per_s)
    assert compiler(chip).operation(task).total_s == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("vector_ops", [1e6, 1e12])
def test_a_kernel_takes_the_longer_of_products_and_vector_operations(vector_ops):
    chip = chip_with()
    task = matmul(1024, 128, 1024, kind="attention", batch=64, hbm_bytes=0, vector_ops=vector_ops)
    products_s = 64 * 2.0 * 1024 * 128 * 1024 / (0.5 * chip.peak("bf16"))
    wanted = max(products_s, vector_ops / chip.vector_flops)
    assert compiler(chip).operation(task).total_s == pytest.approx(wanted, rel=1e-12)


def test_vector_operations_add_to_elementwise_bytes():
    chip = chip_with(fixed_cycles=1000.0)
    task = Compute(name="norm", kind="elementwise", hbm_bytes=1e9, vector_ops=1e9)
    wanted = 1e9 / (0.25 * chip.hbm_bytes_per_s) + (1e9 / 200.0 + 1000.0) / chip.clock_hz
    assert compiler(chip).operation(task).total_s == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LEARNED)
@given(m=sizes, k=sizes, n=sizes)
def test_no_matmul_is_faster_than_peak_or_bandwidth(name, m, k, n):
    chip = load_chip(name)
    task = matmul(m, k, n)
    total_s = compiler(chip).operation(task).total_s
    assert total_s * chip.peak("bf16") / chip.devices_per_chip >= task.flops
    assert total_s * chip.hbm_bytes_per_s / chip.devices_per_chip >= task.hbm_bytes


@pytest.mark.parametrize("name", LEARNED)
@given(m=sizes, k=sizes, n=sizes, more=st.sampled_from("mkn"), factor=st.floats(1.0, 8.0))
def test_a_larger_matmul_takes_no_less(name, m, k, n, more, factor):
    chip = load_chip(name)
    dims = {"m": m, "k": k, "n": n}
    larger = dims | {more: dims[more] * factor}
    before = compiler(chip).operation(matmul(**dims)).total_s
    assert compiler(chip).operation(matmul(**larger)).total_s >= before * (1 - 1e-12)


@pytest.mark.parametrize("name", LEARNED)
@given(m=sizes, k=sizes, n=sizes, batch=st.integers(2, 64))
def test_a_batch_costs_between_one_and_its_number(name, m, k, n, batch):
    chip = load_chip(name)
    one = compiler(chip).operation(matmul(m, k, n)).total_s
    task = matmul(m, k, n, batch=batch)
    all_s = compiler(chip).operation(replace(task, hbm_bytes=task.hbm_bytes * batch)).total_s
    assert one * (1 - 1e-12) <= all_s <= batch * one * (1 + 1e-12)


@given(faster=st.floats(0.1, 10.0), m=sizes, k=sizes, n=sizes)
def test_a_chip_faster_in_all_is_faster_by_that(faster, m, k, n):
    chip = load_chip("v4")
    quick = replace(
        chip,
        clock_hz=chip.clock_hz * faster,
        peak_flops={"bf16": chip.peak("bf16") * faster},
        hbm_bytes_per_s=chip.hbm_bytes_per_s * faster,
        vector_flops=chip.vector_flops * faster,
    )
    task = matmul(m, k, n)
    wanted = compiler(chip).operation(task).total_s / faster
    assert compiler(quick).operation(task).total_s == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", ["matmul", "elementwise", "attention", "optimizer", "copy"])
def test_arrays_are_priced_as_numbers(kind):
    chip = load_chip("v4")
    rng = np.random.default_rng(4)
    columns = {name: 2.0 ** rng.uniform(3, 14, 50).round() for name in ("m", "k", "n")}
    columns["hbm_bytes"] = 10.0 ** rng.uniform(3, 9, 50)
    columns["vector_ops"] = 10.0 ** rng.uniform(0, 10, 50)
    matmuls = int(kind in ("matmul", "attention"))
    whole = Compute(name="all", kind=kind, matmuls=matmuls, **columns)
    together = compiler(chip).operation(whole).total_s
    for index in range(50):
        numbers = {name: float(values[index]) for name, values in columns.items()}
        one = Compute(name="one", kind=kind, matmuls=matmuls, **numbers)
        assert compiler(chip).operation(one).total_s == pytest.approx(together[index], rel=1e-12)


# Cycles that libtpu estimates for GELU of 32,768 x 4,096 numbers, SiLU times a gate, and gradients
# of that (jax 0.10.2, libtpu 0.0.42.1).
ACTIVATIONS = {
    "v4": (1194048, 1483176, 2079512),
    "v5p": (938176, 1137792, 1540096),
    "v6e": (1421312, 1707776, 2283904),
    "tpu7x": (851456, 989056, 1268864),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_alone_takes_about_what_the_compiler_estimates(name: str) -> None:
    """Its twelve vector operations in a product's end would make it more than twice as long."""
    chip = load_chip(name)
    rows, columns = 32768, 4096
    elements = rows * columns

    def cycles(passes: float, ops: float) -> float:
        product = Compute(
            **{"name": "product", "kind": "matmul", "m": rows, "k": 1024, "n": columns},
            matmuls=1,
            pointwise=elements,
            vector_ops=ops * elements,
            hbm_bytes=2.0 * (rows * 1024 + 1024 * columns + elements * (1 + passes - 2)),
        )
        _, alone = in_two(product)
        assert alone.hbm_bytes == 2.0 * passes * elements
        return float(compiler(chip).operation(alone).total_s) * chip.clock_hz

    alone, gated, back = ACTIVATIONS[name]
    assert read_points().cycles[name][parse_op(f"gelu:1,{rows},1,{columns}:bf16")] == alone
    assert 2 / 3 < cycles(2, 12.0) / alone < 4 / 3
    assert 2 / 3 < cycles(3, 12.0) / gated < 3 / 2
    assert 2 / 3 < cycles(5, 12.0) / back < 8 / 5
    assert cycles(2, 12.0 * 6) / alone > 2
