"""Closed forms of collectives against shards moved hop by hop, and against JAX's own count."""

from __future__ import annotations

import math
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from building import axis_layout, plain_chip, wires
from hypothesis import given
from hypothesis import strategies as st
from moving import Line

from shardsim.cost.collectives import collective_s, move_s, sent_bytes
from shardsim.cost.network import Group, group_of
from shardsim.machine import Machine, parse_machine
from shardsim.plan.layout import AxisLayout
from shardsim.program.schedule import Move

W = 2e9  # one link, one way
HOP_S = 3e-6
SHARD = 7e5
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")
TIMES_A_SHARD = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


def group(axes: list[tuple[int, bool]], layout: AxisLayout, **figures: float) -> Group:
    chip = plain_chip(**({"link_bytes_per_s": W, "hop_latency_s": HOP_S} | figures))
    return group_of(wires(chip, *axes), layout)


def moved(kind: str, line: Line) -> Line:
    {
        "all-gather": line.all_gather,
        "reduce-scatter": line.reduce_scatter,
        "all-reduce": line.all_reduce,
    }[kind](SHARD)
    return line


@pytest.mark.parametrize("members", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_message_is_started_once(members, kind):
    at_once, started = (
        group([(members, False)], axis_layout(members), collective_overhead_s=each_s)
        for each_s in (0.0, 5e-6)
    )
    before_s, after_s = (float(collective_s(kind, links, 1e6, 3)) for links in (at_once, started))
    # An all-reduce is two collectives; one device alone starts none.
    starts = 3 * (members > 1) * (2 if kind == "all-reduce" else 1)
    assert after_s - before_s == pytest.approx(starts * 5e-6, rel=1e-9)
    assert (after_s > 0) == (members > 1)


@pytest.mark.parametrize("members", range(2, 17))
@pytest.mark.parametrize("kind", TIMES_A_SHARD)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_axis_takes_the_time_of_its_hops(members, kind, wrapped):
    # Two members have one link between them even where longer axes close.
    line = moved(kind, Line(members, 1, wrapped and members > 2, W, HOP_S))
    links = group([(members, wrapped)], axis_layout(members))
    total = SHARD * members
    assert collective_s(kind, links, total) == pytest.approx(line.time_s, rel=1e-12)
    # In a line the inner members pass on more than the end ones; the sums must agree.
    expected = sent_bytes(kind, links, total)
    received = list(line.received.values())
    if kind == "all-gather":
        assert received == [pytest.approx(expected)] * members
    assert sum(received) == pytest.approx(members * expected, rel=1e-12)
    assert sum(line.sent.values()) == pytest.approx(members * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("length", "wrapped", "factor", "stride"),
    [
        (length, wrapped, factor, stride)
        for length, wrapped in product((4, 8, 12, 16), (False, True))
        for factor in range(2, length + 1)
        for stride in range(1, length + 1)
        if length % (factor * stride) == 0
    ],
)
def test_parts_of_an_axis_and_interleaved_groups(length, wrapped, factor, stride):
    # Two members half a ring apart use one of the two equally long ways.
    closed = wrapped and factor * stride == length and factor > 2
    line = moved("all-gather", Line(factor, stride, closed, W, HOP_S))
    links = group([(length, wrapped)], axis_layout(factor, strides=[stride]))
    assert collective_s("all-gather", links, SHARD * factor) == pytest.approx(line.time_s)


@pytest.mark.parametrize("members", range(2, 17))
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_all_to_all_is_as_long_as_the_busiest_link(members, wrapped, stride):
    closed = wrapped and members > 2
    line = Line(members, stride, closed, W, HOP_S)
    links = group([(members * stride, wrapped)], axis_layout(members, strides=[stride]))
    hops = stride * (members // 2 if closed else members - 1)
    exact = line.all_to_all_s(SHARD) + hops * HOP_S
    time = collective_s("all-to-all", links, SHARD)
    assert time == pytest.approx(exact, rel=1e-12)


def all_to_all_load(shape: tuple[int, ...], wraps: tuple[bool, ...]) -> float:
    """Return the bytes on the busiest link if every member sends 1 byte to each, axis by axis."""
    load: dict[tuple[Any, ...], float] = {}
    for source, target in product(product(*map(range, shape)), repeat=2):
        place = list(source)
        for axis, size in enumerate(shape):
            line = Line(size, 1, wraps[axis] and size > 2, W, 0.0)
            for way, share in line.routes(source[axis], target[axis]):
                here = source[axis]
                while here != target[axis]:
                    link = (axis, way, *place[:axis], here, *place[axis + 1 :])
                    load[link] = load.get(link, 0.0) + share
                    here = (here + way) % size
            place[axis] = target[axis]
    return max(load.values())


@pytest.mark.parametrize(
    ("shape", "wraps"),
    [
        ((4, 4), (True, True)),
        ((4, 8), (True, True)),
        ((2, 8), (False, True)),
        ((4, 4), (False, False)),
        ((4, 6), (True, False)),
        ((2, 4, 4), (False, False, False)),
        ((4, 4, 4), (True, True, True)),
    ],
)
def test_all_to_all_over_several_axes(shape, wraps):
    links = group(list(zip(shape, wraps, strict=True)), axis_layout(*shape), hop_latency_s=0.0)
    held = SHARD * math.prod(shape)
    expected = all_to_all_load(shape, wraps) * SHARD / W
    assert collective_s("all-to-all", links, held) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "snake"), [((4, 4), True), ((2, 6), True), ((2, 2, 2), True), ((3, 5), False)]
)
def test_a_ring_closes_on_a_patch_of_an_even_number(shape, snake):
    # A way through all members of a grid that ends beside its beginning visits as many black as
    # white ones. In both directions at once every hop then takes one hop of half the bytes.
    links = group([(length, False) for length in shape], axis_layout(*shape))
    closing = Move(name="h", kind="permute", role="tensor", bytes=1e6, ways=2, stage="closing")
    one_hop_s = 1e6 / 2 / W + HOP_S
    if snake:
        assert move_s(links, closing) == pytest.approx(one_hop_s, rel=1e-12)
    else:
        assert move_s(links, closing) > 1.5 * one_hop_s


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("length", [2, 3, 4, 8])
@pytest.mark.parametrize("wrapped", [False, True])
def test_equal_axes_carry_one_part_each(dims, length, wrapped):
    # Part i of the array crosses the axes in the order i, i + 1, ...: no two parts share an axis.
    shape = [(length, wrapped)] * dims
    links = group(shape, axis_layout(*[length] * dims), hop_latency_s=HOP_S)
    members = length**dims
    time = 0.0
    for phase in range(dims):
        line = Line(length, 1, wrapped and length > 2, W, HOP_S)
        line.all_gather(SHARD / dims * length**phase)
        time += line.time_s
    total = SHARD * members
    assert collective_s("all-gather", links, total) == pytest.approx(time, rel=1e-12)
    assert collective_s("reduce-scatter", links, total) == pytest.approx(time, rel=1e-12)
    assert collective_s("all-reduce", links, total) == pytest.approx(2 * time, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 8), (4, 4, 16), (2, 3), (5, 7, 2)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_unequal_axes_cannot_beat_the_links_of_one_member(shape, wrapped):
    axes = [(size, wrapped) for size in shape]
    links = group(axes, axis_layout(*shape), hop_latency_s=0.0)
    members = math.prod(shape)
    inbound = sum(W * (2 if wrapped and size > 2 else 1) for size in shape)
    time = collective_s("all-gather", links, SHARD * members)
    assert time == pytest.approx((members - 1) * SHARD / inbound, rel=1e-12)


@pytest.mark.parametrize("lengths", [(4, 2), (4, 8), (3, 16), (2, 4, 8), (4, 4, 2)])
@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 8, 1), (2, 1, 16), (1, 4, 4)])
def test_slow_axes_are_waited_for(lengths, strides):
    # Parts may cross the axes in all orders; the best shares of them are a linear program.
    scipy = pytest.importorskip("scipy.optimize")
    strides = strides[: len(lengths)]
    shape = [(length * stride, True) for length, stride in zip(lengths, strides, strict=True)]
    links = group(shape, axis_layout(*lengths, strides=list(strides)), hop_latency_s=0.0)
    rates = [(2.0 if n > 2 else 1.0) * W / s for n, s in zip(lengths, strides, strict=True)]
    orders = list(permutations(range(len(lengths))))
    load = np.zeros((len(lengths), len(orders)))
    for number, order in enumerate(orders):
        held = 1.0
        for axis in order:
            load[axis, number] = held * (lengths[axis] - 1) / rates[axis]
            held *= lengths[axis]
    best = scipy.linprog(
        [0.0] * len(orders) + [1.0],
        A_ub=np.hstack([load * 1e9, -np.ones((len(lengths), 1))]),
        b_ub=np.zeros(len(lengths)),
        A_eq=[[1.0] * len(orders) + [0.0]],
        b_eq=[1.0],
    )
    time = collective_s("all-gather", links, SHARD * math.prod(lengths))
    assert time == pytest.approx(best.fun * SHARD / 1e9, rel=1e-6)


@pytest.mark.parametrize(("slices", "length"), [(2, 4), (4, 4), (3, 8)])
def test_slices_exchange_first_then_each_slice_inside(slices, length):
    rate, latency_s = 5e7, 4e-5
    layout = axis_layout(length, slices=slices)
    links = group([(length, True)], layout, dcn_bytes_per_s=rate, dcn_hop_latency_s=latency_s)
    # Between slices one member of each: it receives the shard of every other slice.
    between_s = (slices - 1) * (SHARD / rate + latency_s)
    line = Line(length, 1, True, W, HOP_S)
    line.all_gather(slices * SHARD)
    total = SHARD * slices * length
    for kind, times in TIMES_A_SHARD.items():
        time = collective_s(kind, links, total)
        assert time == pytest.approx(times * (between_s + line.time_s), rel=1e-12)
        stages = [collective_s(kind, links, total, stage=stage) for stage in ("torus", "dcn")]
        assert stages == [
            pytest.approx(times * line.time_s, rel=1e-12),
            pytest.approx(times * between_s, rel=1e-12),
        ]
        sent = [sent_bytes(kind, links, total, stage) for stage in ("torus", "dcn", "all")]
        assert sent[1] == pytest.approx(times * (slices - 1) * SHARD)
        assert sent[0] == pytest.approx(times * (length - 1) * slices * SHARD)
        assert sum(sent[:2]) == pytest.approx(sent[2], rel=1e-12)


@pytest.mark.parametrize(("slices", "length"), [(2, 4), (4, 8)])
def test_what_every_member_sends_to_other_slices_crosses_its_own_network_link(slices, length):
    rate, latency_s = 5e7, 4e-5
    layout = axis_layout(length, slices=slices)
    links = group([(length, True)], layout, dcn_bytes_per_s=rate, dcn_hop_latency_s=latency_s)
    held = SHARD * slices * length  # one shard for each member
    inside = group([(length, True)], axis_layout(length))
    expected = SHARD * length * (slices - 1) / rate + (slices - 1) * latency_s
    expected += float(collective_s("all-to-all", inside, held))
    assert collective_s("all-to-all", links, held) == pytest.approx(expected, rel=1e-12)


def test_an_all_reduce_between_slices_is_of_one_share():
    # S slices of C chips: 2 (S - 1)/S V/C over the network of each chip.
    chip = plain_chip("v4", dcn_bytes_per_s=1e9, link_bytes_per_s=1e30)
    machine = Machine(chip=chip, shape=(4, 4, 4), slices=8)
    links = group_of(machine, axis_layout(4, 4, 4, slices=8))
    expected = 2 * 7 / 8 * 6.4e9 / 64 / 1e9
    assert collective_s("all-reduce", links, 6.4e9) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_a_switch_feeds_every_member_at_its_own_rate(members):
    chip = plain_chip("h100", link_bytes_per_s=W, collective_overhead_s=0.0)
    machine = Machine(chip=chip, shape=(8,))
    links = group_of(machine, axis_layout(members))
    time = collective_s("all-gather", links, SHARD * members)
    assert time == pytest.approx((members - 1) * SHARD / W, rel=1e-12)
    exchange = collective_s("all-to-all", links, SHARD * members)
    assert exchange == pytest.approx((members - 1) * SHARD / W, rel=1e-12)
    assert collective_s("permute", links, SHARD) == pytest.approx(SHARD / W, rel=1e-12)


def test_the_two_devices_of_a_chip_gather_last():
    chip = plain_chip("tpu7x", link_bytes_per_s=W, die_to_die_bytes_per_s=5 * W)
    machine = Machine(chip=chip, shape=(4, 4, 4))
    links = group_of(machine, axis_layout(4, 1, 1, 2))
    # Each device has half of the chip's links.
    ring = Line(4, 1, True, W / 2, 0.0)
    ring.all_gather(SHARD)
    expected = ring.time_s + 4 * SHARD / (5 * W)
    assert collective_s("all-gather", links, 8 * SHARD) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("axes", "factors", "strides", "expected"),
    [
        ([(8, True)], [8], [1], SHARD / W + HOP_S),
        ([(8, False)], [8], [1], SHARD / W + HOP_S),
        ([(8, True)], [4], [2], 2 * SHARD / W + 2 * HOP_S),
        ([(8, True), (4, True)], [8, 4], [1, 1], SHARD / W + HOP_S),
    ],
)
def test_permute_passes_to_the_next_member(axes, factors, strides, expected):
    links = group(axes, axis_layout(*factors, strides=strides))
    assert collective_s("permute", links, SHARD) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_efficiency_and_overhead(kind):
    layout = axis_layout(8)
    plain = group([(8, True)], layout, hop_latency_s=0.0)
    slow = group([(8, True)], layout, hop_latency_s=0.0, link_efficiency=0.25)
    late = group([(8, True)], layout, hop_latency_s=0.0, collective_overhead_s=1e-3)
    time = collective_s(kind, plain, SHARD)
    assert collective_s(kind, slow, SHARD) == pytest.approx(4 * time, rel=1e-12)
    starts = 2 if kind == "all-reduce" else 1
    assert collective_s(kind, late, SHARD) == pytest.approx(time + starts * 1e-3, rel=1e-12)
    three = collective_s(kind, late, SHARD, messages=3)
    assert three == pytest.approx(time + 3 * starts * 1e-3, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_does_nothing(kind):
    links = group([(4, True), (4, True)], axis_layout(1, 1), collective_overhead_s=1.0)
    assert collective_s(kind, links, 1e9) == 0
    assert sent_bytes(kind, links, 1e9) == 0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="broadcast"):
        collective_s("broadcast", group([(4, True)], axis_layout(4)), 1.0)


def pairs_bytes(kind: str, members: int, total: float) -> float:
    """Return the bytes that all members receive, counted pair by pair."""
    received = 0.0
    for source, target in product(range(members), repeat=2):
        if source == target:
            continue
        if kind in ("all-gather", "reduce-scatter"):
            received += total / members
        elif kind == "all-reduce":
            received += 2 * total / members
        elif kind == "all-to-all":
            received += total / members  # `total` is what one member holds
        elif (source + 1) % members == target:
            received += total
    return received


@given(
    st.sampled_from(KINDS),
    st.sampled_from(["v4:4x4x8", "v5e:8x16", "tpu7x:2x2x2", "4*v4:2x2x2", "2*h100:8"]),
    st.data(),
)
def test_what_members_send_is_what_they_receive(kind, name, data):
    machine = parse_machine(name)
    factors = [
        data.draw(st.sampled_from([n for n in range(1, axis.length + 1) if axis.length % n == 0]))
        for axis in machine.axes
    ]
    slices = data.draw(st.sampled_from([1, machine.slices]))
    links = group_of(machine, axis_layout(*factors, slices=slices))
    members = math.prod(factors) * slices
    assert int(links.size) == members
    sent = members * sent_bytes(kind, links, 1e6)
    assert sent == pytest.approx(pairs_bytes(kind, members, 1e6), rel=1e-12)


@given(
    st.sampled_from(KINDS),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=6, max_size=6),
    st.lists(st.sampled_from([1, 2, 4]), min_size=6, max_size=6),
    st.lists(st.floats(1.0, 1e9), min_size=3, max_size=3),
)
def test_arrays_give_what_numbers_give(kind, factors, strides, totals):
    x, y = np.array(factors[:3]), np.array(factors[3:])
    over, across = np.array(strides[:3]), np.array(strides[3:])
    axes = [(8, True), (8, False)]
    many = group(axes, AxisLayout(factors=(x, y), strides=(over, across)))
    times = np.broadcast_to(collective_s(kind, many, np.array(totals)), (3,))
    for index in range(3):
        one = group(
            axes,
            axis_layout(
                int(x[index]), int(y[index]), strides=[int(over[index]), int(across[index])]
            ),
        )
        assert times[index] == collective_s(kind, one, totals[index])


# JAX's own roofline of collectives under shard_map.

MESHES = [(4,), (8,), (2,), (4, 4), (2, 8), (4, 8), (2, 2, 4), (4, 4, 4), (4, 8, 16)]


def jax_roofline(operation: str, sizes: tuple[int, ...], rows: int, columns: int) -> dict[str, Any]:
    """Return JAX's bytes and hops per axis for one collective of a float32 array."""
    jax = pytest.importorskip("jax")
    roofline = pytest.importorskip("jax.experimental.roofline")
    names = tuple("xyz"[: len(sizes)])
    mesh = jax.sharding.AbstractMesh(sizes, names)
    spec = jax.sharding.PartitionSpec
    whole, split = spec(), spec(names)
    call, before, after = {
        "all-gather": (lambda a: jax.lax.all_gather(a, names, tiled=True), split, split),
        "all-reduce": (lambda a: jax.lax.psum(a, names), split, whole),
        "reduce-scatter": (lambda a: jax.lax.psum_scatter(a, names, tiled=True), whole, split),
        "all-to-all": (
            lambda a: jax.lax.all_to_all(a, names, 1, 0, tiled=True),
            split,
            spec(None, names),
        ),
    }[operation]
    array = jax.ShapeDtypeStruct((rows, columns), np.float32)
    wrap = roofline.roofline
    options: dict[str, Any] = {"mesh": mesh, "in_specs": (before,), "out_specs": after}
    _, result = wrap(call, **options)(array)
    return {"bytes": result.ici_bytes, "hops": result.ici_latency}


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("kind", KINDS[:4])
def test_volumes_agree_with_the_roofline_of_jax(kind, sizes):
    members = math.prod(sizes)
    rows, columns = 6 * members * members, 3 * members
    found = jax_roofline(kind, sizes, rows, columns)["bytes"]
    each = set(found.values())
    assert len(found) == len(sizes)
    assert len(each) == 1
    links = group([(size, True) for size in sizes], axis_layout(*sizes), hop_latency_s=0.0)
    array = rows * columns * 4.0
    if kind in ("all-gather", "reduce-scatter"):
        # JAX: the bytes on each axis, of an array cut into one part per axis.
        assert len(sizes) * each.pop() == pytest.approx(sent_bytes(kind, links, array), rel=1e-9)
    elif kind == "all-reduce":
        # Each device reduces its own block of the array.
        block = array / members
        assert len(sizes) * each.pop() == pytest.approx(sent_bytes(kind, links, block), rel=1e-9)
    elif len(set(sizes)) == 1 or (len(sizes) == 2 and min(sizes) > 2):
        # JAX: bytes through the bisection per link, both ways together. For three unequal axes
        # it takes the shortest twice for the cross-section of the longest, and it takes the
        # longest to be open when the shortest is: both are left out.
        held = array / members
        time = collective_s(kind, links, held)
        both_ways = each.pop()
        assert both_ways / (2 * W) == pytest.approx(time, rel=1e-9)
