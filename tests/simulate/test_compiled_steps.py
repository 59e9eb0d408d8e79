"""Compiled programs as events: against the closed-form replay, contention, what-ifs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.meshlinks import MeshLinks
from shardsim.errors import HardwareError
from shardsim.plan import Plan, plan_from_data
from shardsim.program.schedule import Await, Block, Copy, Move, Schedule, Start, Task, Work
from shardsim.simulate.compiled import CompiledSimulation, simulate_compiled
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.topology import Fault


def plan_on(machine: str, mesh: dict[str, Any]) -> Plan:
    """Return a small plan; only its mesh and machine matter."""
    data = {"model": "vit-l-16", "machine": machine, "batch": 4096, "mesh": mesh}
    rules = {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": list(mesh)}}
    return plan_from_data({"name": "small", **data, "rules": rules}, "small")


# One mesh axis on each torus axis, whole rings of four: what the closed forms know best.
CUBE = plan_on(
    "v4:4x4x4",
    {
        "fsdp": {"size": 4, "torus": {"x": 4}},
        "data": {"size": 4, "torus": {"y": 4}},
        "model": {"size": 4, "torus": {"z": 4}},
    },
)
CLOCK = CUBE.machine.chip.clock_hz or 0.0


def work(name: str, seconds: float, hbm_bytes: float = 0.0) -> Work:
    return Work(name=name, kind="elementwise", cycles=seconds * CLOCK, hbm_bytes=hbm_bytes)


def move(name: str, size: float, axis: str = "model", **more: Any) -> Move:
    values = {"kind": "all-gather", "mesh_axes": (axis,)} | more
    return Move(name=name, bytes=size, **values)


def started(name: str, size: float, axis: str = "model", **more: Any) -> Start:
    return Start(task=move(name, size, axis, **more))


def copied(name: str, hbm_bytes: float, host_bytes: float = 0.0) -> Start:
    return Start(task=Copy(name=name, hbm_bytes=hbm_bytes, host_bytes=host_bytes))


def moves(body: Iterable[Task]) -> list[Move]:
    """Return all moves, started or not."""
    found = [task.task if isinstance(task, Start) else task for task in body]
    return [task for task in found if isinstance(task, Move)]


def schedule(*tasks: Task, trips: int = 1) -> Schedule:
    block = Block(name="block", phase="forward", trips=trips, tasks=tasks)
    return Schedule(blocks=(block,), order=(0,) * trips)


def play(*tasks: Task, trips: int = 1, **options: Any) -> CompiledSimulation:
    return simulate_compiled(CUBE.machine, CUBE, schedule(*tasks, trips=trips), **options)


# Against the replay in closed form.


SECONDS = st.floats(1e-6, 1e-2)
BYTES = st.floats(1e3, 1e9)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")
AXES = ("fsdp", "data", "model")


@st.composite
def tasks(draw: st.DrawFn, prefix: str, shared: bool) -> list[Task]:
    """Return tasks that start things and wait for all of them.

    Unless links may be `shared`, what runs side by side is on torus axes of its own.
    """
    found: list[Task] = []
    under_way: dict[str, str] = {}
    for number in range(draw(st.integers(1, 8))):
        name = f"{prefix}{number}"
        chosen = draw(st.sampled_from(["work", "moved", "host", "sync", "start", "end"]))
        free = [axis for axis in AXES if shared or axis not in under_way.values()]
        if chosen == "work":
            found.append(work(name, draw(SECONDS), draw(BYTES)))
        elif chosen in ("moved", "host"):
            size = draw(BYTES)
            host = size if chosen == "host" else 0
            found.append(copied(name, size, host))
            under_way[name] = ""
        elif chosen == "end" and under_way:
            ended = draw(st.sampled_from(sorted(under_way)))
            del under_way[ended]
            found.append(Await(name=ended))
        elif chosen in ("sync", "start") and free:
            kind, axis = draw(st.sampled_from(KINDS)), draw(st.sampled_from(free))
            # Further ones take more than the one hop's latency that the closed form counts.
            shifts = (draw(st.sampled_from([1, -1])),) if kind == "permute" else ()
            make = started if chosen == "start" else move
            found.append(make(name, draw(BYTES), axis, kind=kind, shifts=shifts))
            if chosen == "start":
                under_way[name] = axis
    return found + [Await(name=name) for name in under_way]


@settings(deadline=None, max_examples=40)
@given(inner=tasks("a", False), outer=tasks("b", False), trips=st.integers(1, 4))
def test_without_contention_it_is_the_closed_form(
    inner: list[Task], outer: list[Task], trips: int
) -> None:
    blocks = (
        Block(name="inner", phase="forward", trips=2 * trips, tasks=tuple(inner)),
        Block(name="outer", phase="backward", trips=2, tasks=tuple(outer)),
    )
    both = Schedule(blocks=blocks, order=(*[0] * trips, 1) * 2)
    found = simulate_compiled(CUBE.machine, CUBE, both)
    assert not found.events.contention
    assert found.events.classes["devices"] == 1
    assert found.step_time_s == pytest.approx(float(found.closed.price.step_time_s), rel=1e-9)
    for mine, theirs in zip(found.replayed.blocks, found.closed.blocks, strict=True):
        assert mine.time == pytest.approx(theirs.time, rel=1e-6, abs=1e-12)
    exposed = sum(cost.exposed_s for cost in found.replayed.price.collectives)
    copies = (t.task for t in (*inner, *outer) if isinstance(t, Start))
    hosts = sum(isinstance(task, Copy) and task.host_bytes > 0 for task in copies)
    if not hosts:
        assert exposed == pytest.approx(found.replayed.price.exposed_comm_s, abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(body=tasks("a", True), trips=st.integers(2, 4), slow=st.floats(1.0, 3.0))
def test_folded_equals_unfolded(body: list[Task], trips: int, slow: float) -> None:
    """Unfolded, every trip is played; folded, equal ones are remembered."""
    plan = plan_on("v5e:4x4", {"fsdp": {"size": 4, "torus": {"x": 4}}} | MINOR)
    made = schedule(*_on_two_axes(body), trips=trips)
    wanted = Perturbation(slowdowns=((5, slow),)) if slow > 2 else None
    folded = simulate_compiled(plan.machine, plan, made, perturbation=wanted)
    whole = simulate_compiled(plan.machine, plan, made, perturbation=wanted, unfold=True)
    assert folded.step_time_s == pytest.approx(whole.step_time_s, rel=1e-9)
    assert folded.events.utilisation == pytest.approx(whole.events.utilisation)
    mine, theirs = folded.replayed.price, whole.replayed.price
    assert mine.exposed_comm_s == pytest.approx(theirs.exposed_comm_s, rel=1e-6, abs=1e-12)
    assert mine.compute_s == pytest.approx(theirs.compute_s)
    assert [cost.time_s for cost in mine.collectives] == pytest.approx(
        [cost.time_s for cost in theirs.collectives]
    )


MINOR = {"model": {"size": 4, "torus": {"y": 4}}}


def _on_two_axes(body: list[Task]) -> list[Task]:
    def moved(task: Task) -> Task:
        if isinstance(task, Start) and isinstance(task.task, Move):
            inner = moved(task.task)
            assert isinstance(inner, Move)
            return dataclasses.replace(task, task=inner)
        if isinstance(task, Move) and task.mesh_axes == ("data",):
            return dataclasses.replace(task, mesh_axes=("model",))
        return task

    return [moved(task) for task in body]


HALF = Perturbation(faults=(Fault(device=0, port=0, factor=0.5),))


# Bytes.


@settings(deadline=None, max_examples=15)
@given(body=tasks("a", True), trips=st.integers(1, 3))
def test_what_is_put_on_links_comes_off_and_is_what_was_sent(body: list[Task], trips: int) -> None:
    found = play(*body, trips=trips)
    assert found.events.engine is not None
    links = found.events.engine.links
    assert links.bytes_on == pytest.approx(links.bytes_off)
    assert (links.busy_s <= found.step_time_s * (1 + 1e-9)).all()
    passed = float((links.bytes_off * found.events.engine.folded.link_counts).sum())
    route = MeshLinks(CUBE.machine, CUBE)
    wanted = 0.0
    for task in moves(body):
        sent = float(sent_bytes(task.kind, route.route(task.mesh_axes).group, task.bytes))
        # Of a ring of four, 2 of 3 messages of an exchange go one hop, 1 goes two.
        hops = {"all-to-all": 4 / 3, "permute": abs(task.shifts[0]) if task.shifts else 1}
        wanted += sent * hops.get(task.kind, 1) * trips * CUBE.machine.devices
    assert passed == pytest.approx(wanted, rel=1e-9)
    uses = {cost.task.name: cost for cost in found.replayed.price.collectives}
    assert all(cost.time_s >= 0 for cost in uses.values())


# Sharing links.


@given(sizes=st.tuples(st.floats(1e8, 1e9), st.floats(1e8, 1e9)))
@settings(deadline=None, max_examples=10)
def test_collectives_share_the_links_that_both_need(sizes: tuple[float, float]) -> None:
    first, second = (started(n, s) for n, s in zip("ab", sizes, strict=True))
    alone = [play(task, Await(name=task.name)).step_time_s for task in (first, second)]
    ends = [Await(name="a"), Await(name="b")]
    together = play(first, second, *ends)
    # Both are there from the start: links are busy until the last byte, latencies overlap.
    assert max(alone) < together.step_time_s <= sum(alone)
    assert together.step_time_s == pytest.approx(sum(alone), rel=0.03)
    apart = started("b", sizes[1], "data")
    assert play(first, apart, *ends).step_time_s == pytest.approx(
        max(alone[0], play(apart, Await(name="b")).step_time_s)
    )
    assert together.events.contention
    assert {link for row in together.events.contention for link in row.links} <= {"z+", "z-"}


def test_a_small_collective_does_not_queue_behind_a_large_one() -> None:
    large, small = started("large", 1e9), move("small", 1e6)
    found = play(large, small, work("w", 1.0), Await(name="large"))
    closed = float(found.closed.price.exposed_comm_s)
    assert 0 < float(found.replayed.price.exposed_comm_s) < 0.01 * closed


def test_permutes_in_opposite_directions_share_a_line_but_no_ring() -> None:
    there = started("a", 1e8, kind="permute", shifts=(1,))
    back = started("b", 1e8, kind="permute", shifts=(-1,))
    ends = [Await(name="a"), Await(name="b")]
    ring = play(there, back, *ends)
    one = play(there, ends[0])
    assert ring.step_time_s == pytest.approx(one.step_time_s)
    assert not ring.events.contention
    # On half of an axis the last member's block goes all the way back.
    line = plan_on("v4:4x4x8", {"fsdp": {"size": 32, "torus": {"x": 4, "y": 4, "z": 2}}} | LINE)
    both = simulate_compiled(line.machine, line, schedule(there, back, *ends))
    single = simulate_compiled(line.machine, line, schedule(there, ends[0]))
    assert both.step_time_s == pytest.approx(2 * single.step_time_s, rel=0.01)
    assert both.events.contention


LINE = {"model": {"size": 4, "torus": {"z": 4}}}


@settings(deadline=None, max_examples=40)
@given(shift=st.integers(1, 31).flatmap(lambda n: st.sampled_from([n, -n])))
def test_a_permute_over_several_torus_axes_agrees_with_the_closed_form(shift: int) -> None:
    """What carries over from one torus axis to the next is as slow as where it carries most."""
    plan = plan_on("v4:4x4x4", {"fsdp": {"size": 64, "torus": {"z": 4, "x": 4, "y": 4}}})
    task = move("p", 1e9, "fsdp", kind="permute", shifts=(shift,))
    found = simulate_compiled(plan.machine, plan, schedule(task))
    assert found.events.classes["devices"] == 1
    assert found.step_time_s == pytest.approx(float(found.closed.price.step_time_s), rel=1e-3)
    assert found.events.engine is not None
    # Bytes times hops, counted member by member; members count along y first, then x, then z.
    hops = 0
    for member in range(64):
        for place in (1, 4, 16):
            ahead = ((member + shift) % 64 // place - member // place) % 4
            hops += min(ahead, 4 - ahead)
    links = found.events.engine.links
    passed = float((links.bytes_off * found.events.engine.folded.link_counts).sum())
    assert passed == pytest.approx(hops * 1e9)


# What-ifs.


@settings(deadline=None, max_examples=15)
@given(body=tasks("a", True), slow=st.floats(1.0, 4.0), data=st.data())
def test_a_straggler_makes_nothing_faster(
    body: list[Task], slow: float, data: st.DataObject
) -> None:
    device = data.draw(st.integers(0, 63))
    base, found = play(*body), play(*body, perturbation=Perturbation(slowdowns=((device, slow),)))
    busy = [task for task in body if isinstance(task, Work)]
    assert found.step_time_s >= base.step_time_s * (1 - 0.02 * bool(base.events.contention) - 1e-9)
    if not busy:
        assert found.step_time_s == pytest.approx(base.step_time_s, rel=1e-9)


def test_a_straggler_costs_its_own_work_and_splits_only_its_groups() -> None:
    body = (work("w", 1e-2), move("g", 1e6))
    base = play(*body, trips=3)
    slow = play(*body, trips=3, perturbation=Perturbation(slowdowns=((21, 1.5),)))
    busy_s = base.replayed.price.compute_s + base.replayed.price.overhead_s
    assert slow.step_time_s - base.step_time_s == pytest.approx(0.5 * busy_s)
    assert base.events.classes["devices"] == 1
    assert slow.events.classes["devices"] == 3  # itself, its group, all others
    assert slow.replayed.price.step_time_s == pytest.approx(slow.step_time_s)
    own = 3 * 1e-2 * (63 + 1.5) / 64
    assert slow.replayed.price.compute_s == pytest.approx(own)


def test_slow_and_dead_links_cost_time() -> None:
    task = move("g", 1e9)
    base = play(task).step_time_s
    half = play(task, perturbation=HALF).step_time_s
    assert half == pytest.approx(base)  # x has no part in it
    slow = Perturbation(faults=(Fault(device=0, port=4, factor=0.5),))
    assert play(task, perturbation=slow).step_time_s == pytest.approx(2 * base, rel=0.01)
    dead = play(task, perturbation=Perturbation(faults=(Fault(device=0, port=4),)))
    assert dead.step_time_s > base
    assert dead.events.engine is not None
    assert dead.events.engine.topology.dead
    with pytest.raises(HardwareError, match="chip 0,0,0 is broken"):
        play(task, perturbation=Perturbation(broken=(0,)))


def test_same_seed_same_result_to_the_last_bit() -> None:
    body = (work("w", 1e-2), move("g", 1e6), work("v", 1e-3), move("h", 1e6, "data"))
    jitters = [Perturbation(jitter=0.05, seed=seed) for seed in (1, 1, 2)]
    runs = [play(*body, trips=4, perturbation=wanted).step_time_s for wanted in jitters]
    assert runs[0] == runs[1] != runs[2]
    assert min(runs) > play(*body, trips=4).step_time_s


def test_trips_that_are_alike_are_played_once() -> None:
    body = (started("g", 1e8), work("w", 1e-3), copied("t", 1e6), Await(name="g"), Await(name="t"))
    few, many = play(*body, trips=3), play(*body, trips=300)
    assert many.step_time_s == pytest.approx(100 * few.step_time_s, rel=1e-9)
    assert many.events.transfers == few.events.transfers
    assert many.events.link_bytes == pytest.approx(
        {k: 100 * v for k, v in few.events.link_bytes.items()}
    )
    assert many.replayed.price.exposed_comm_s == pytest.approx(
        100 * few.replayed.price.exposed_comm_s, rel=1e-6
    )
