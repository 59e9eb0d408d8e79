"""Blocks of a matmul that a ring cuts: what they multiply and what they move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import axis_layout, plain_chip
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.costs import physical
from shardsim.plan.layout import EMBED_SHARDED, ROLES, SEQUENCE_SHARDED, Layout, whole_axis
from shardsim.program.rings import BIDIRECTIONAL, UNIDIRECTIONAL, ring, ring_block
from shardsim.program.schedule import Work, every
from shardsim.program.tasks import Collective, Compute

SIZES = st.integers(1, 4000)
MEMBERS = st.sampled_from([2, 4, 8, 16])
RINGS = st.sampled_from(["gathered", "scattered", ""])


def matmul(m: float, k: float, n: float, ring: str, extra_bytes: float = 0.0) -> Compute:
    moved = 2.0 * (m * k + k * n + m * n) + extra_bytes
    return Compute(
        name="x", kind="matmul", m=m, k=k, n=n, matmuls=1, hbm_bytes=moved, vector_ops=m, ring=ring
    )


def tensor_layout(members: int, residual: int, mode: int) -> Layout:
    axes: dict[str, Any] = {role: whole_axis(1) for role in ROLES}
    axes["tensor"] = axis_layout(members)
    return Layout(**axes, residual=residual, matmul_overlap=mode)


@given(SIZES, SIZES, SIZES, MEMBERS, RINGS, st.booleans(), st.floats(0, 1e9))
def test_blocks_together_multiply_the_whole_and_move_no_less(
    m, k, n, members, ring, embed, extra_bytes
):
    whole = matmul(m * members, k * members, n * members, ring, extra_bytes)
    block = ring_block(whole, members, embed)
    assert block.flops * members == pytest.approx(whole.flops, rel=1e-12)
    assert block.vector_ops * members == pytest.approx(whole.vector_ops, rel=1e-12)
    assert block.hbm_bytes * members >= whole.hbm_bytes * (1 - 1e-12)


@given(SIZES, SIZES, SIZES, MEMBERS, RINGS, st.booleans())
def test_blocks_together_take_no_less_than_the_whole(m, k, n, members, ring, embed):
    chip = plain_chip("v4", op_overhead_s=1e-6)
    whole = matmul(m * members, k * members, n * members, ring)
    total_s = members * physical(chip).operation(ring_block(whole, members, embed)).total_s
    assert total_s >= physical(chip).operation(whole).total_s * (1 - 1e-12)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_traffic_of_a_gathered_input(members):
    m, k, n = 1024.0, 512.0, 256.0
    whole = matmul(m, k, n, "gathered")
    rows = members * ring_block(whole, members, False).hbm_bytes
    assert rows == pytest.approx(2 * (m * k + members * k * n + m * n))  # weights once a block
    # Summands: float32 written by all blocks but the last, read by all but the first.
    sums = members * ring_block(whole, members, True).hbm_bytes
    added = m * n * (4 * (members - 1) + 4 * (members - 1) + 2)
    assert sums == pytest.approx(2 * (m * k + k * n) + added)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_traffic_of_a_scattered_result(members):
    m, k, n = 1024.0, 512.0, 256.0
    whole = matmul(m, k, n, "scattered")
    # All but the first sum arrive, and pass in float32 until they leave.
    joined = m * n * (2 + (2 + 4 + 4) * (members - 1) / members)
    rows = members * ring_block(whole, members, False).hbm_bytes
    assert rows == pytest.approx(2 * (m * k + members * k * n) + joined)
    columns = members * ring_block(whole, members, True).hbm_bytes
    assert columns == pytest.approx(2 * (members * m * k + k * n) + joined)


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
def test_products_of_a_scatter_add_up_before_their_sum_joins_what_arrived(mode, missing):
    m, k, n, members = 1024.0, 512.0, 256.0, 8
    made = [
        replace(matmul(m, k, n, "scattered"), name=str(number), count=int(number != missing))
        for number in range(3)
    ]
    layout = tensor_layout(members, SEQUENCE_SHARDED, mode)
    scatter = Collective(name="c", kind="reduce-scatter", role="tensor", bytes=1e6, schedule="ring")
    tasks = ring(scatter, made, layout, True)
    moved = sum(
        task.hbm_bytes * times * task.count
        for task, times, _ in every(tasks)
        if isinstance(task, Work)
    )
    products = 3 if missing is None else 2
    operands = products * 2 * (m * k + members * k * n)
    # Each product of a block is written in float32, all but the first have read the sum before; a
    # sum that arrived is read beside that, and all leave in 16 bits: those that begin one at once.
    starts = 2 if mode == BIDIRECTIONAL else 1
    sums = members * (4 * (products - 1) + 4 * (products - 1) + 2)
    sums += (members - starts) * (4 + 4) + (members - 1) * 2
    assert moved == pytest.approx(operands + m * n / members * sums)


@pytest.mark.parametrize("residual", [SEQUENCE_SHARDED, EMBED_SHARDED])
@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
def test_a_ring_cuts_what_the_residual_stream_is_split_along(residual, mode):
    m, k, n, members = 1024.0, 512.0, 256.0, 4
    layout = tensor_layout(members, residual, mode)
    gather = Collective(name="c", kind="all-gather", role="tensor", bytes=1e6, schedule="ring")
    tasks = ring(gather, [matmul(m, k, n, "gathered")], layout, True)
    moved = sum(task.hbm_bytes * times for task, times, _ in every(tasks) if isinstance(task, Work))
    sums = m * n * (4 * (members - 1) + 4 * (members - 1) + 2)
    pieces = {
        SEQUENCE_SHARDED: 2 * (m * k + members * k * n + m * n),
        EMBED_SHARDED: 2 * (m * k + k * n) + sums,
    }
    assert moved == pytest.approx(pieces[residual])


def test_what_runs_whole_beside_a_ring_is_a_share_of_itself():
    whole = matmul(1024.0, 512.0, 256.0, "")
    assert ring_block(whole, 4, True).hbm_bytes == whole.hbm_bytes / 4
