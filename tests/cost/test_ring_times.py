"""Collective matmul: what stays exposed follows from the loops of the exported code."""

from __future__ import annotations

from typing import Any

import pytest
from building import axis_layout, plain_chip
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.collectives import collective_s
from shardsim.cost.costs import physical
from shardsim.cost.network import group_of
from shardsim.cost.price import step_time_s
from shardsim.machine import Machine, load_chip
from shardsim.plan.layout import SEQUENCE_SHARDED, Layout, whole_axis
from shardsim.program.rings import BIDIRECTIONAL, UNIDIRECTIONAL, ring
from shardsim.program.schedule import Block, Move, Schedule, every
from shardsim.program.tasks import Collective, Compute

W, HOP_S = 1e9, 2e-6
LENGTH = 16  # of the axis: whole it is a ring, a part of it a line


def machine(**figures: float) -> Machine:
    chip = plain_chip("v4", **({"link_bytes_per_s": W, "hop_latency_s": HOP_S} | figures))
    return Machine(chip=chip, shape=(4, 4, LENGTH))


def layout(members: int, mode: int) -> Layout:
    alone = whole_axis(3)
    return Layout(
        data=alone,
        fsdp=alone,
        expert=alone,
        context=alone,
        tensor2=alone,
        pipeline=alone,
        tensor=axis_layout(1, 1, members),
        residual=SEQUENCE_SHARDED,
        matmul_overlap=mode,
    )


def matmul_and(kind: str, total_bytes: float, block_s: float) -> tuple[Collective, Compute]:
    """Return a collective and a matmul of which every block takes so many seconds."""
    clock = load_chip("v4").clock_hz or 0.0
    collective = Collective(
        name="c", kind=kind, role="tensor", bytes=total_bytes, schedule="ring", partners=("w",)
    )
    return collective, Compute(name="w", kind="matmul", cycles=block_s * clock, matmuls=1)


def ring_s(
    kind: str, members: int, mode: int, total_bytes: float, block_s: float, **figures: Any
) -> float:
    where = layout(members, mode)
    collective, work = matmul_and(kind, total_bytes, block_s)
    block = Block(
        name="b", phase="forward", trips=1, tasks=tuple(ring(collective, [work], where, True))
    )
    on = machine(**figures)
    schedule = Schedule(blocks=(block,), order=(0,))
    return float(step_time_s(on, where, schedule, physical(on.chip)))


def emitted_s(members: int, both: bool, block_s: float, hop_s: float, pair_s: float) -> float:
    """Run the loop of `emit/runtime/collectives.py`: in step `s` a piece comes from below, and
    in both directions another from above while there are any; meanwhile the pieces of the step
    before are multiplied, first the own one."""
    up = members // 2 if both else members - 1
    down = (members - 1) // 2 if both else 0
    total_s, pieces = 0.0, 1
    for step in range(1, up + 1):
        hops_s = pair_s if step <= down else hop_s
        total_s += max(pieces * block_s, hops_s)
        pieces = 2 if step <= down else 1
    return total_s + pieces * block_s


@pytest.mark.parametrize("members", [2, 4, 8, 16])
@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize("blocks_per_hop", [0.1, 0.4, 0.9, 2.5, 40.0])
def test_time_is_that_of_the_exported_loop(members, mode, kind, blocks_per_hop):
    total = 8e6
    wire_s = total / members / W
    closes = members in (2, LENGTH)  # of a line of two the way back is the hop
    # On a line both directions cross the same links, and the ends wait for the whole way back.
    closing_s = HOP_S if closes else (members - 1) * HOP_S
    pair_s = (1 if members == LENGTH else 2) * wire_s + closing_s
    block_s = (wire_s + HOP_S) * blocks_per_hop
    both = mode == BIDIRECTIONAL
    expected = emitted_s(members, both, block_s, wire_s + HOP_S, pair_s)
    # One hop is the closing one: of those behind each other, or the last of an even ring.
    more = max(wire_s + closing_s, block_s) - max(wire_s + HOP_S, block_s)
    if both and members > 2:
        more = max(wire_s + closing_s, 2 * block_s) - max(wire_s + HOP_S, 2 * block_s)
    found = ring_s(kind, members, mode, total, block_s)
    assert found == pytest.approx(expected + more, rel=1e-9)


@given(st.integers(2, 33), st.sampled_from([UNIDIRECTIONAL, BIDIRECTIONAL]), st.booleans())
def test_every_member_sends_all_pieces_but_its_own_and_multiplies_all(members, mode, gather):
    kind = "all-gather" if gather else "reduce-scatter"
    collective, work = matmul_and(kind, 8e6, 1.0)
    sent, pieces, blocks = 0.0, 0, 0
    for task, times, _ in every(tuple(ring(collective, [work], layout(members, mode), True))):
        if isinstance(task, Move):
            sent += float(task.bytes * times)
            pieces += int(task.ways * times)
        else:
            blocks += int(times)
    assert (pieces, blocks) == (members - 1, members)
    assert sent == pytest.approx(8e6 * (members - 1) / members)


@pytest.mark.parametrize("members", [2, 4, 8, 16])
@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
def test_long_blocks_hide_all_hops(members, mode):
    assert ring_s("all-gather", members, mode, 8e6, 1.0) == pytest.approx(members, rel=1e-12)


@given(
    st.sampled_from([2, 4, 8, 16]),
    st.floats(1e3, 1e9),
    st.floats(1e-7, 1.0),
    st.sampled_from([UNIDIRECTIONAL, BIDIRECTIONAL]),
)
def test_never_much_worse_than_one_after_the_other(members, total, block_s, mode):
    """A ring uses one direction, or waits for both; the plain collective uses all links."""
    on = machine()
    group = group_of(on, axis_layout(1, 1, members))
    whole_s = members * block_s + float(collective_s("all-gather", group, total))
    found = ring_s("all-gather", members, mode, total, block_s)
    latencies_s = 2 * members * HOP_S * members
    assert members * block_s * (1 - 1e-9) <= found
    assert found <= whole_s + total / W + latencies_s


@given(st.sampled_from([4, 8, 16]), st.floats(1e-7, 1e-1), st.floats(1.0, 50.0))
def test_faster_links_never_make_a_ring_slower(members, block_s, times):
    slow, fast = (
        ring_s("all-gather", members, BIDIRECTIONAL, 8e6, block_s, link_bytes_per_s=rate)
        for rate in (W, W * times)
    )
    assert fast <= slow * (1 + 1e-12)


def test_both_directions_halve_the_hops_where_the_axis_wraps():
    one, two = (
        ring_s("all-gather", 16, mode, 8e6, 1e-9, hop_latency_s=0.0)
        for mode in (UNIDIRECTIONAL, BIDIRECTIONAL)
    )
    assert two == pytest.approx(one * 8 / 15, rel=1e-3)
