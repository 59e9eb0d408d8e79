"""Collective matmul: what stays exposed follows from the schedule of blocks and hops."""

from __future__ import annotations

import pytest
from building import axis_layout, plain_chip, wires
from hypothesis import given
from hypothesis import strategies as st
from shardsim.cost.overlap import (
    BIDIRECTIONAL,
    OFF,
    UNIDIRECTIONAL,
    RingTime,
    behind_s,
    ring_matmul_s,
)

from shardsim.cost.collectives import collective_s
from shardsim.cost.network import Group, group_of

W = 1e9
HOP_S = 2e-6


def ring(members: int, *, wrapped: bool = True, **figures: float) -> Group:
    chip = plain_chip(**({"link_bytes_per_s": W, "hop_latency_s": HOP_S} | figures))
    return group_of(wires(chip, (members, wrapped)), axis_layout(members))


def matmul(
    group: Group,
    mode: int,
    *,
    total_bytes: float = 8e6,
    matmul_s: float = 1.0,
    block_s: float | None = None,
    kind: str = "all-gather",
) -> RingTime:
    members = int(group.size)
    return ring_matmul_s(
        group=group,
        total_bytes=total_bytes,
        matmul_s=matmul_s,
        block_s=matmul_s / members if block_s is None else block_s,
        collective_s=collective_s(kind, group, total_bytes),
        mode=mode,
    )


def one_way_s(members: int, block_s: float, hop_s: float, closing_s: float) -> float:
    """Run the schedule chip by chip: each multiplies a block while the next one is on its way.

    The same for a gather, whose operand travels, and a scatter, whose sums do: chip `j` needs in
    each trip what chip `j - 1` had in the trip before. Chip 0 waits for the last one.
    """
    begun = [0.0] * members
    for _ in range(members - 1):
        begun = [
            max(begun[j] + block_s, begun[j - 1] + (hop_s if j else closing_s))
            for j in range(members)
        ]
    return max(begun) + block_s


def both_ways_s(
    kind: str, members: int, block_s: float, pair_s: tuple[float, float], closing_s: float
) -> float:
    """Run the schedule chip by chip: two blocks a trip, one from each side; a hop on its own."""
    begun = [closing_s if kind == "all-gather" else 0.0] * members
    for _ in range(members // 2):
        arrived = [
            max(
                begun[j - 1] + (pair_s[0] if j else pair_s[1]),
                begun[(j + 1) % members] + (pair_s[0] if j < members - 1 else pair_s[1]),
            )
            for j in range(members)
        ]
        begun = [max(begun[j] + 2 * block_s, arrived[j]) for j in range(members)]
    return max(begun) + (0.0 if kind == "all-gather" else closing_s)


@pytest.mark.parametrize("members", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("blocks_per_hop", [0.3, 0.9, 2.5, 40.0])
def test_time_is_that_of_the_schedule(members, mode, kind, wrapped, blocks_per_hop):
    group = ring(members, wrapped=wrapped)
    total = 8e6
    hop_s = total / members / W + HOP_S
    block_s = hop_s * blocks_per_hop
    result = matmul(
        group, mode, total_bytes=total, matmul_s=block_s * members, block_s=block_s, kind=kind
    )
    if not result.decomposed:
        whole = block_s * members + collective_s(kind, group, total)
        assert result.total_s == pytest.approx(whole, rel=1e-12)
        return
    wire_s = total / members / W
    closing_s = hop_s if wrapped or members == 2 else wire_s + (members - 1) * HOP_S
    if mode == BIDIRECTIONAL and members % 4 == 0:
        # On a line both directions cross the same links, on a ring each has its own.
        more = 0.0 if wrapped else wire_s
        pair_s = (hop_s + more, closing_s + more)
        expected = both_ways_s(kind, members, block_s, pair_s, closing_s)
    else:
        expected = one_way_s(members, block_s, hop_s, closing_s)
    assert result.total_s == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
def test_hops_are_those_of_the_loops_of_xla(mode):
    """The plain loop skips the last; the one of both directions has one more, alone."""
    assert matmul(ring(8), mode).hops == {UNIDIRECTIONAL: 7, BIDIRECTIONAL: 9}[mode]
    assert matmul(ring(6), mode).hops == 5


@pytest.mark.parametrize("members", [4, 8, 16])
@pytest.mark.parametrize("mode", [UNIDIRECTIONAL, BIDIRECTIONAL])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize("inefficiency", [1.0, 1.25])
def test_free_links_leave_the_blocks_of_the_matmul(members, mode, kind, inefficiency):
    group = ring(members, link_bytes_per_s=1e30, hop_latency_s=0.0)
    result = matmul(group, mode, matmul_s=1.0, block_s=inefficiency / members, kind=kind)
    assert result.total_s == pytest.approx(inefficiency, rel=1e-9) or not result.decomposed


@pytest.mark.parametrize("members", [4, 8, 16])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_a_matmul_of_no_time_is_not_cut(members, kind):
    # Cutting hides nothing then, and its prologue is extra.
    group = ring(members)
    for mode in (UNIDIRECTIONAL, BIDIRECTIONAL):
        result = matmul(group, mode, matmul_s=0.0, kind=kind)
        assert not result.decomposed
        assert result.total_s == collective_s(kind, group, 8e6)


@pytest.mark.parametrize("members", [8, 16])
def test_little_to_multiply_leaves_the_ring(members):
    # Just enough to pass XLA's test; then the hops are what takes time.
    group = ring(members, hop_latency_s=0.0)
    total = 8e6
    alone = collective_s("all-gather", group, total)
    matmul_s = 0.9 * alone
    result = matmul(group, BIDIRECTIONAL, total_bytes=total, matmul_s=matmul_s)
    assert result.decomposed
    hop_s = total / members / W
    assert result.total_s == pytest.approx((members / 2 + 1) * hop_s, rel=1e-12)


@given(
    st.integers(2, 32),
    st.booleans(),
    st.floats(1e3, 1e10),
    st.floats(1e-7, 10.0),
    st.floats(0.0, 1e-4),
    st.sampled_from([UNIDIRECTIONAL, BIDIRECTIONAL]),
    st.sampled_from(["all-gather", "reduce-scatter"]),
)
def test_never_much_worse_than_one_after_the_other(
    members, wrapped, total, matmul_s, hop_latency_s, mode, kind
):
    group = ring(members, wrapped=wrapped, hop_latency_s=hop_latency_s)
    result = matmul(group, mode, total_bytes=total, matmul_s=matmul_s, kind=kind)
    alone = collective_s(kind, group, total)
    # XLA's test takes the prologue for 2/N of the traffic and knows no latency; the schedule has
    # at most half a hop and 1/N more, and a latency each hop.
    hop_s = total / members / W
    unseen = hop_s * (0.5 + 1 / members) + (members + 1) * hop_latency_s
    assert result.total_s <= (matmul_s + alone + unseen) * (1 + 1e-12)
    assert result.total_s >= matmul_s * (1 - 1e-12)
    if not result.decomposed:
        assert result.total_s == pytest.approx(matmul_s + alone, rel=1e-12)


@pytest.mark.parametrize("members", [2, 6, 10, 14])
def test_both_directions_need_members_that_divide_by_four(members):
    group = ring(members)
    one, both = matmul(group, UNIDIRECTIONAL), matmul(group, BIDIRECTIONAL)
    assert both.total_s == one.total_s


@pytest.mark.parametrize("members", [4, 8, 12])
def test_both_directions_halve_the_hops_where_the_axis_wraps(members):
    total = 8e6
    block_s = 1e-9 + total / members / W / 4  # hops are longer
    times = {}
    for wrapped in (False, True):
        group = ring(members, wrapped=wrapped, hop_latency_s=0.0)
        times[wrapped] = matmul(
            group, BIDIRECTIONAL, matmul_s=block_s * members * 3, block_s=block_s
        ).total_s
    assert times[True] < 0.7 * times[False]


def test_switched_off_is_one_after_the_other():
    group = ring(8)
    result = matmul(group, OFF)
    assert not result.decomposed
    assert result.total_s == 1.0 + collective_s("all-gather", group, 8e6)


def gate(members: int, matmul_s: float, alone_s: float, multiplier: float) -> bool:
    """XLA's own words: reject if comm > 1e-5 ms and max(comp, comm*mult) + extra >= comp + comm."""
    extra = alone_s * multiplier * 2 / members
    return max(matmul_s, alone_s * multiplier) + extra < matmul_s + alone_s


@given(
    st.sampled_from([2, 4, 8, 16, 32]),
    st.booleans(),
    st.booleans(),
    st.floats(1e-3, 1e3),
)
def test_the_gate_is_that_of_xla(members, wrapped, both, work):
    group = ring(members, wrapped=wrapped, hop_latency_s=0.0)
    mode = BIDIRECTIONAL if both else UNIDIRECTIONAL
    alone = collective_s("all-gather", group, 8e6)
    two_links = wrapped and members > 2
    ring_ways = 2 if two_links and both and members % 4 == 0 else 1
    multiplier = (2 if two_links else 1) / ring_ways
    expected = gate(members, work * alone, alone, multiplier)
    assert bool(matmul(group, mode, matmul_s=work * alone).decomposed) == expected


def test_a_matmul_much_shorter_than_the_prologue_is_not_cut():
    group = ring(4)
    alone = collective_s("all-gather", group, 8e6)
    assert not matmul(group, UNIDIRECTIONAL, matmul_s=0.1 * alone).decomposed
    assert matmul(group, BIDIRECTIONAL, matmul_s=10 * alone).decomposed


@given(st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_behind_other_work(wanted_s, window_s, on):
    exposed = float(behind_s(wanted_s, window_s, on))
    assert exposed == (max(0.0, wanted_s - window_s) if on else wanted_s)
