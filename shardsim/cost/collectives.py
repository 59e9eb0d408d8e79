"""Time and traffic of one collective.

Notation: the group has P members, the whole array V bytes, each shard v = V / P. A level with n
members and Q members outside it has received Q shards when it starts, and receives (n - 1) Q
more. A level's time is those bytes over its bandwidth, plus its latency: with W bytes/s into each
member of a wrapped axis this is (P - 1)/P V/W + ceil((P - 1)/2) a, the exact time of a
bidirectional ring (jax-ml/scaling-book, `sharding.md`, gives max(V/W, a P/2) as its bound).
"""

from __future__ import annotations

import numpy as np

from shardsim.cost.network import Group
from shardsim.plan.layout import Number
from shardsim.program.schedule import Move


def all_gather_s(group: Group, total_bytes: Number, messages: Number, stage: str) -> Number:
    """Return the time in seconds to gather an array of `total_bytes` onto every member.

    The outermost level goes first, while the shards are small. `messages` arrays of together
    `total_bytes` pay the latency each. A group of one takes no time. `stage` leaves only the part
    inside a slice ("torus") or between slices ("dcn").
    """
    shard = total_bytes / group.size
    outer: Number = group.dcn.size if stage == "torus" else 1
    size: Number = 1
    time: Number = 0.0
    for level in reversed(group.levels(stage)):
        many = np.greater(level.size, 1)
        time = time + (level.size - 1) * outer * shard / level.bytes_per_s
        time = time + many * messages * level.latency_s
        outer = outer * level.size
        size = size * level.size
    return time + np.greater(size, 1) * messages * group.overhead_s


def reduce_scatter_s(group: Group, total_bytes: Number, messages: Number, stage: str) -> Number:
    """Return the time to sum an array of `total_bytes` and leave a shard on each member.

    The same links carry the same bytes as in an all-gather, the other way round.
    """
    return all_gather_s(group, total_bytes, messages, stage)


def all_reduce_s(group: Group, total_bytes: Number, messages: Number, stage: str) -> Number:
    """Return the time to sum an array of `total_bytes` onto every member.

    Reduce-scatter, then all-gather: 2 (P - 1)/P V/W on one wrapped axis.
    """
    return 2.0 * all_gather_s(group, total_bytes, messages, stage)


def all_to_all_s(group: Group, held_bytes: Number, messages: Number, stage: str) -> Number:
    """Return the time to exchange `held_bytes` of each member with every other member.

    Across the middle of an axis of P members goes half of what each half holds for the other:
    v P/4 over two links of a wrapped axis or one of an open one, so v P/(8 w) or v P/(4 w), with
    (P^2 - 1)/P instead of an odd P; the longest axis governs. Between slices each member
    sends the share of the other slices. `stage` leaves only the part inside a slice or node
    ("torus") or between them ("dcn").
    """
    time: Number = 0.0
    latency: Number = 0.0
    size: Number = 1
    if stage != "torus":
        time = held_bytes * (group.dcn.size - 1) / group.dcn.size / group.dcn.bytes_per_s
        size, latency = group.dcn.size, group.dcn.latency_s
    if stage != "dcn":
        core = held_bytes * (group.core.size - 1) / group.core.size / group.core.bytes_per_s
        time = time + held_bytes * group.longest_axis + core
        size = size * group.torus.size * group.core.size
        latency = latency + group.torus.latency_s + group.core.latency_s
    many = np.greater(size, 1)
    return time + np.where(many, messages * (latency + group.overhead_s), 0.0)


def permute_s(group: Group, held_bytes: Number, messages: Number) -> Number:
    """Return the time to pass `held_bytes` to the next member of the ring."""
    time = held_bytes / group.ring_bytes_per_s + messages * (group.ring_hop_s + group.overhead_s)
    return np.where(np.greater(group.size, 1), time, 0.0)


def ring_hop_s(
    group: Group, held_bytes: Number, ways: int, closing: bool, messages: Number
) -> Number:
    """Return the time to pass a piece to the next member of a ring, or one to either side.

    `held_bytes` is all that a member sends. A `closing` hop is as slow as that of the last member
    to the first, which on a line goes the whole way back; there pieces of both directions share
    the links.
    """
    wire_s = held_bytes / ways / group.ring_bytes_per_s
    if ways == 2:
        wire_s = wire_s * np.where(group.ring_ways > 1, 1.0, 2.0)
    hop_s = group.ring_hop_s + group.ring_close_s if closing else group.ring_hop_s
    return wire_s + messages * hop_s


_TIMES = {
    "all-gather": all_gather_s,
    "reduce-scatter": reduce_scatter_s,
    "all-reduce": all_reduce_s,
}


def collective_s(
    kind: str, group: Group, total_bytes: Number, messages: Number = 1, stage: str = "all"
) -> Number:
    """Return the time of one collective of `kind`."""
    if kind in _TIMES:
        return _TIMES[kind](group, total_bytes, messages, stage)
    if kind == "all-to-all":
        return all_to_all_s(group, total_bytes, messages, stage)
    if kind == "permute":
        return permute_s(group, total_bytes, messages)
    raise ValueError(f"unknown collective '{kind}'")


def move_s(group: Group, task: Move) -> Number:
    """Return the time of one planned move on free links."""
    if task.ways:
        return ring_hop_s(group, task.bytes, task.ways, task.stage == "closing", task.messages)
    return collective_s(task.kind, group, task.bytes, task.messages, task.stage)


def sent_bytes(kind: str, group: Group, total_bytes: Number, stage: str = "all") -> Number:
    """Return the bytes that one member sends, which is what it receives.

    All-gather and reduce-scatter: (P - 1)/P V; all-reduce twice that; all-to-all (P - 1)/P of
    what one member holds; permute all of it. With a `stage` only what crosses those levels.
    """
    many = np.greater(group.size, 1)
    if kind == "permute":
        return many * total_bytes
    size = group.size
    if kind == "all-to-all":
        if stage != "all":
            size = group.dcn.size if stage == "dcn" else size / group.dcn.size
        return total_bytes * (size - 1) / size
    moved = total_bytes * (size - 1) / size
    across = total_bytes * (group.dcn.size - 1) / size  # between slices, of a 1/inner share
    if stage == "dcn":
        moved = across
    elif stage == "torus":
        moved = moved - across
    return moved * (2.0 if kind == "all-reduce" else 1.0)
