"""Replaying programs whose times can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.collectives import collective_s
from shardsim.cost.meshlinks import MeshLinks
from shardsim.cost.network import Links
from shardsim.cost.replay import PARTS, Replayed, replay_schedule
from shardsim.errors import PlanError
from shardsim.plan import load_plan
from shardsim.plan.resolve import resolve
from shardsim.program.schedule import Await, Block, Copy, Move, Schedule, Start, Task, Visit, Work

PLAN = load_plan("vit-22b-published-tp8")  # fsdp=128 on x and z, model=8 on y
MACHINE = replace(PLAN.machine, chip=replace(PLAN.machine.chip, op_overhead_s=0.0))
CLOCK = PLAN.machine.chip.clock_hz or 0.0
HBM = PLAN.machine.chip.hbm_bytes_per_s * PLAN.machine.chip.hbm_efficiency


def work(name: str, seconds: float, hbm_bytes: float = 0.0) -> Work:
    """Return an operation of so many seconds."""
    return Work(name=name, kind="elementwise", cycles=seconds * CLOCK, hbm_bytes=hbm_bytes)


def gather(name: str, size: float, **more: Any) -> Move:
    """Return an all-gather over the model axis, unless told otherwise."""
    values = {"kind": "all-gather", "mesh_axes": ("model",)} | more
    return Move(name=name, bytes=size, **values)


def started(name: str, size: float, **more: Any) -> Start:
    """Return the start of such a gather."""
    return Start(task=gather(name, size, **more))


def copied(name: str, hbm_bytes: float, host_bytes: float = 0.0) -> Start:
    """Return the start of a copy."""
    return Start(task=Copy(name=name, hbm_bytes=hbm_bytes, host_bytes=host_bytes))


def run(*tasks: Task, trips: int = 1, machine: Any = MACHINE) -> Replayed:
    """Replay one block."""
    block = Block(name="block", phase="forward", trips=trips, tasks=tasks)
    return replay_schedule(machine, PLAN, Schedule(blocks=(block,), order=(0,) * trips))


def alone(task: Move | Start) -> float:
    """Return what the closed form says of a collective."""
    task = task.task if isinstance(task, Start) else task
    assert isinstance(task, Move)
    links = Links(MACHINE, resolve(PLAN))
    role = {"model": "tensor", "fsdp": "fsdp"}[task.mesh_axes[0]]
    return float(collective_s(task.kind, links[role], task.bytes))


def test_a_task_counts_as_often_as_its_block_is_passed() -> None:
    blocks = [
        Block(name=name, phase="forward", trips=trips, tasks=(work(name, 1e-3), gather(name, 1e6)))
        for name, trips in (("a", 2), ("b", 1))
    ]
    price = replay_schedule(MACHINE, PLAN, Schedule(blocks=tuple(blocks), order=(0, 1, 0))).price
    for costs in (price.computes, price.collectives):
        assert {cost.task.name: cost.count for cost in costs} == {"a": 2, "b": 1}


def test_of_several_trips_one_is_the_first_and_one_the_last() -> None:
    visit = Visit(block=0, times=3, many=1, after=False, before=True)
    trips = list(visit.each())
    assert [trip.first for trip in trips] == [True, False, False]
    assert [trip.last for trip in trips] == [False, False, True]
    for when in ("each", "but first", "but last", "first", "last"):
        assert sum(trip.has(when) for trip in trips) == visit.trips(when), when


SECONDS = st.floats(1e-6, 1e-2)
BYTES = st.floats(1e3, 1e9)


@given(works=st.lists(SECONDS, max_size=4), sizes=st.lists(BYTES, max_size=4))
def test_without_overlap_a_step_is_the_sum_of_its_parts(
    works: list[float], sizes: list[float]
) -> None:
    tasks: list[Task] = [work(f"w{i}", seconds) for i, seconds in enumerate(works)]
    gathers = [gather(f"g{i}", size) for i, size in enumerate(sizes)]
    price = run(*tasks, *gathers, trips=3).price
    communication = sum(alone(task) for task in gathers)
    assert price.compute_s == pytest.approx(3 * sum(works))
    assert price.exposed_comm_s == pytest.approx(3 * communication)
    assert price.step_time_s == pytest.approx(3 * (sum(works) + communication))


def test_every_trip_sends_and_multiplies_again() -> None:
    product = Work(name="p", kind="matmul", m=8, k=128, n=256, matmuls=1, count=2)
    price = run(product, gather("g", 1e6), trips=3).price
    (sent,), (multiplied,) = price.collectives, price.computes
    assert sent.sent_bytes == pytest.approx(3 * 1e6 * 7 / 8)
    assert sent.time_s == sent.exposed_s == pytest.approx(3 * alone(gather("g", 1e6)))
    assert price.flops == multiplied.flops == 3 * 2 * 2 * 8 * 128 * 256
    assert multiplied.count == 6
    assert price.step_time_s == pytest.approx(sent.time_s + multiplied.time_s)
    assert multiplied.time_s == pytest.approx(multiplied.unit_s + multiplied.memory_s)


@given(seconds=SECONDS, size=BYTES)
def test_what_is_started_first_hides_behind_the_work(seconds: float, size: float) -> None:
    task = started("g", size)
    price = run(task, work("w", seconds), Await(name="g")).price
    assert price.step_time_s == pytest.approx(max(seconds, alone(task)))
    assert price.exposed_comm_s == pytest.approx(max(alone(task) - seconds, 0.0), abs=1e-15)
    assert price.collectives[0].exposed_s == pytest.approx(price.exposed_comm_s)
    assert price.collectives[0].time_s == pytest.approx(alone(task))


@given(sizes=st.tuples(BYTES, BYTES))
def test_collectives_on_the_same_links_queue(sizes: tuple[float, float]) -> None:
    first, second = (started(name, size) for name, size in zip("ab", sizes, strict=True))
    price = run(first, second, Await(name="a"), Await(name="b")).price
    assert price.step_time_s == pytest.approx(alone(first) + alone(second))


@given(sizes=st.tuples(BYTES, BYTES))
def test_collectives_on_other_torus_axes_run_side_by_side(sizes: tuple[float, float]) -> None:
    first = started("a", sizes[0])
    second = started("b", sizes[1], mesh_axes=("fsdp",))
    price = run(first, second, Await(name="a"), Await(name="b")).price
    assert price.step_time_s == pytest.approx(max(alone(first), alone(second)))


def test_permutes_in_opposite_directions_share_no_link() -> None:
    there = started("a", 1e8, kind="permute", shifts=(1,))
    back = started("b", 1e8, kind="permute", shifts=(-1,))
    again = started("c", 1e8, kind="permute", shifts=(1,))
    ends = [Await(name=name) for name in "abc"]
    opposite = run(there, back, *ends[:2]).price.step_time_s
    same = run(there, again, ends[0], ends[2]).price.step_time_s
    assert opposite == pytest.approx(alone(there))
    assert same == pytest.approx(2 * alone(there))


def test_a_permute_of_more_steps_loads_more_links() -> None:
    one, three, seven = (
        run(gather("a", 1e9, kind="permute", shifts=(shift,))).price.step_time_s
        for shift in (1, 3, 7)
    )
    assert three / one == pytest.approx(3, rel=0.01)
    assert seven == one  # the other way round


@given(seconds=SECONDS, own=st.floats(0, 0.9), size=BYTES)
def test_transfers_take_what_the_work_leaves_of_hbm(
    seconds: float, own: float, size: float
) -> None:
    tasks = (copied("t", size), work("w", seconds, hbm_bytes=own * seconds * HBM), Await(name="t"))
    price = run(*tasks).price
    left = max(size / HBM - seconds * (1 - own), 0.0)
    assert price.hbm_bound_s == pytest.approx(left, rel=1e-9, abs=1e-12)
    assert price.step_time_s == pytest.approx(seconds + left)


def test_transfers_wait_for_those_before_them() -> None:
    tasks = (
        copied("a", HBM),
        copied("b", 2 * HBM),
        work("w", 1.5),
        Await(name="b"),
        work("v", 1.0),
        Await(name="a"),
    )
    assert run(*tasks).price.step_time_s == pytest.approx(3.0 + 1.0)
    host = copied("h", 0, MACHINE.chip.pcie_bytes_per_s)
    assert run(host, work("w", 0.25), Await(name="h")).price.exposed_comm_s == pytest.approx(0.75)


def test_what_one_block_starts_another_may_await() -> None:
    task = started("g", 1e8)
    seconds = alone(task)
    blocks = (
        Block(name="a", phase="forward", trips=2, tasks=(task,)),
        Block(name="b", phase="forward", trips=6, tasks=(work("w", seconds / 4),)),
        Block(name="c", phase="forward", trips=2, tasks=(Await(name="g"),)),
    )
    schedule = Schedule(blocks=blocks, order=(0, 1, 1, 1, 2) * 2)
    replayed = replay_schedule(MACHINE, PLAN, schedule)
    assert replayed.price.step_time_s == pytest.approx(2 * seconds)
    times = [block.time_s for block in replayed.blocks]
    assert times == pytest.approx([0, 1.5 * seconds, 0.5 * seconds])


@given(data=st.data())
def test_trips_are_alike_whether_replayed_or_remembered(data: st.DataObject) -> None:
    tasks: list[Task] = []
    for number in range(data.draw(st.integers(1, 5))):
        name = f"{number}"
        chosen = data.draw(st.sampled_from(["work", "gather", "started", "moved"]))
        if chosen == "work":
            tasks.append(work(name, data.draw(SECONDS), data.draw(BYTES)))
        elif chosen == "gather":
            tasks.append(gather(name, data.draw(BYTES)))
        else:
            size = data.draw(BYTES)
            first = started(name, size) if chosen == "started" else copied(name, size)
            tasks += [first, work(f"w{name}", data.draw(SECONDS)), Await(name=name)]
    once = run(*tasks).price
    often = run(*tasks, trips=7).price
    for part in PARTS:
        assert getattr(often, part) == pytest.approx(7 * getattr(once, part), abs=1e-12)
    assert often.step_time_s == pytest.approx(7 * once.step_time_s)


@given(size=BYTES, factor=st.floats(1.0, 8.0))
def test_faster_links_never_make_a_step_longer(size: float, factor: float) -> None:
    chip = MACHINE.chip
    faster = replace(MACHINE, chip=replace(chip, link_bytes_per_s=chip.link_bytes_per_s * factor))
    tasks = (
        started("a", size),
        work("w", 1e-4),
        gather("b", size, kind="all-reduce"),
        Await(name="a"),
    )
    slow, fast = (run(*tasks, machine=machine).price for machine in (MACHINE, faster))
    assert fast.step_time_s <= slow.step_time_s
    assert fast.compute_s == slow.compute_s


# The links of any group.


@pytest.mark.parametrize(
    "name",
    ["vit-22b-published-tp8", "palm-540b-published-two-pods", "llama3-8b-published-v6e-1x16"],
)
def test_whole_axes_have_the_links_of_their_role(name: str) -> None:
    plan = load_plan(name)
    layout = resolve(plan)
    links, known = MeshLinks(plan.machine, plan), Links(plan.machine, layout)
    by_layout = MeshLinks(plan.machine, layout)
    for role, names in layout.names.items():
        if not names:
            continue
        for kind in ("all-gather", "all-to-all", "permute"):
            expected = float(collective_s(kind, known[role], 1e8))
            assert float(collective_s(kind, links.route(names).group, 1e8)) == expected
            if len(names) == 1:
                assert float(collective_s(kind, by_layout.route(names).group, 1e8)) == expected


def test_parts_of_an_axis_have_their_stretch_of_the_torus() -> None:
    links = MeshLinks(MACHINE, PLAN)
    minor = links.route(("fsdp",), (("fsdp", 16, 1),))  # all of z
    major = links.route(("fsdp",), (("fsdp", 8, 16),))  # all of x
    half = links.route(("fsdp",), (("fsdp", 4, 4),))  # every fourth of z
    both = links.route(("fsdp",))
    sizes = [int(route.group.size) for route in (minor, major, half, both)]
    assert sizes == [16, 8, 4, 128]
    assert minor.ports == half.ports == {"z+", "z-"}
    assert major.ports == {"x+", "x-"}
    assert both.ports == minor.ports | major.ports
    # What passes its block on to the next member goes up the axes, to the one before it down.
    assert links.route(("fsdp",), (), (1,)).ports == {"x+", "z+"}
    assert links.route(("fsdp",), (), (-1,)).ports == {"x-", "z-"}
    assert half.group.torus.bytes_per_s == pytest.approx(minor.group.torus.bytes_per_s / 4)
    with pytest.raises(PlanError, match="does not follow the torus"):
        links.route(("fsdp",), (("fsdp", 3, 1),))
    with pytest.raises(PlanError, match="no mesh axis 'expert'"):
        links.route(("expert",))


@given(shift=st.integers(1, 64))
def test_hops_are_the_longest_way_along_a_torus_axis(shift: int) -> None:
    most = 0
    for device in range(128):
        (x, z), (u, w) = divmod(device, 16), divmod((device + shift) % 128, 16)
        most = max(most, *(min(d % n, -d % n) for d, n in ((u - x, 8), (w - z, 16))))
    assert MeshLinks(MACHINE, PLAN).route(("fsdp",), (), (shift,)).hops == most


@given(sizes=st.lists(st.floats(1.0, 1e10), min_size=2, max_size=12), done=st.floats(0.0, 1.0))
def test_a_small_transfer_behind_large_ones_ends_when_awaited(
    sizes: list[float], done: float
) -> None:
    transfers = [copied(f"t{i}", size) for i, size in enumerate(sizes)]
    tiny = copied("tiny", 1e-6)
    busy = work("w", done * sum(sizes) / HBM)
    awaits = [Await(name=task.name) for task in (tiny, *transfers)]
    price = run(*transfers, tiny, busy, *awaits).price
    assert price.hbm_bound_s == pytest.approx((1 - done) * sum(sizes) / HBM, abs=1e-12)
