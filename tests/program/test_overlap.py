"""From a Program to a Schedule: nothing is lost, all that is started is awaited."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from building import build, contends, decoder, plans
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import costs_of
from shardsim.cost.meshlinks import RoleLinks
from shardsim.cost.network import Links
from shardsim.cost.predict import predict
from shardsim.cost.replay import replay
from shardsim.cost.task_times import TaskTimes
from shardsim.machine import parse_machine
from shardsim.plan import Overlap, Plan, resolve
from shardsim.plan.layout import Layout
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.schedule import Await, Block, Move, Repeat, Schedule, Start, Task, Work
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Program
from shardsim.xla.compare import planned

TPUS = ("v4:2x2x4", "v4:4x4x4", "v5e:4x4", "v5e:8x16", "2*v4:2x2x4", "4*v5e:4x4")


def both(plan: Plan) -> tuple[Program, Schedule, Layout]:
    layout = resolve(plan)
    program = partition(Workload.of(plan), layout)
    return program, overlap(program, layout), layout


@given(plans())
@settings(max_examples=60, deadline=None)
def test_products_and_bytes_are_those_of_the_program(plan: Plan) -> None:
    program, schedule, layout = both(plan)
    links = Links(plan.machine, layout)
    flops, moved = [0.0, 0.0], [defaultdict(float), defaultdict(float)]

    def add(side: int, task: Task, times: float) -> None:
        if isinstance(task, Work):
            flops[side] += float(task.flops * task.count) * times
        elif isinstance(task, Move) and float(task.count):
            sent = sent_bytes(task.kind, links[task.role], task.bytes, task.stage)
            moved[side][task.role, task.purpose] += float(sent * task.count) * times

    for block in program.blocks:
        for task in block.tasks:
            add(0, task, float(block.trips))
    for _, task, times in schedule.runs():
        add(1, task, float(times))
    assert flops[1] == pytest.approx(flops[0], rel=1e-9)
    for key in {*moved[0], *moved[1]}:
        assert moved[1][key] == pytest.approx(moved[0][key], rel=1e-9), key


@given(plans())
@settings(max_examples=60, deadline=None)
def test_blocks_run_as_often_as_they_say(plan: Plan) -> None:
    _, schedule, _ = both(plan)
    times = [0.0] * len(schedule.blocks)
    for visit in schedule.visits():
        times[visit.block] += float(visit.many * visit.times)
    assert times == pytest.approx([float(block.trips) for block in schedule.blocks])


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_stage_runs_each_chunk_of_its_layers_once_a_microbatch(chunks: int) -> None:
    where = {"pipeline": {"x": 2}, "data": {"y": 4}}
    plan = build(
        decoder(layers=16), "v5e:2x4", 64, where, microbatches=8, pipeline_interleave=chunks
    )
    _, schedule, _ = both(plan)
    visited: dict[str, list[float]] = defaultdict(list)
    for visit in schedule.visits():
        if schedule.blocks[visit.block].phase in ("forward", "boundary"):
            phase = schedule.blocks[visit.block].phase
            visited[phase].append(float(visit.times) * float(visit.many))
    # Eight layers a stage, in chunks; of the stage with the head each sends gradients to another
    # stage, and all but the last their results.
    assert sum(visited["forward"]) == 8 * 16 / 2
    assert sum(visited["boundary"]) == 8 * (chunks + chunks - 1)


@given(plans())
@settings(max_examples=60, deadline=None)
def test_operations_of_a_block_have_names_of_their_own(plan: Plan) -> None:
    for block in both(plan)[0].blocks:
        names = [task.name for task in block.computes()]
        assert len(set(names)) == len(names), block.name


@given(plans())
@settings(max_examples=60, deadline=None)
def test_what_a_trip_starts_it_awaits(plan: Plan) -> None:
    _, schedule, _ = both(plan)
    for trip in schedule.trips():
        under_way: set[str] = set()
        for task in schedule.blocks[trip.block].tasks:
            if isinstance(task, Start) and trip.has(task.when):
                assert task.name not in under_way
                under_way.add(task.name)
            elif isinstance(task, Await) and trip.has(task.when):
                under_way.discard(task.name)
            elif isinstance(task, Repeat):
                inside = [one.name for one in task.tasks if isinstance(one, Start)]
                assert inside == [one.name for one in task.tasks if isinstance(one, Await)]
        assert not under_way


@given(plans(machines=TPUS))
@settings(max_examples=60, deadline=None)
def test_predicted_bytes_are_those_that_verify_plans(plan: Plan) -> None:
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for use in predict(plan).collectives:
        axes = tuple(axis.name for axis in plan.mesh if axis.name in use.mesh_axes)
        sums[use.kind, tuple(a for a in axes if plan.axis(a).size > 1)][0] += use.bytes_per_chip
    for one in planned(plan):
        sums[one.kind, one.mesh_axes][1] += one.planned_bytes
    for key, (predicted, wanted) in sums.items():
        assert predicted == pytest.approx(wanted, rel=1e-9), key


@given(plans(machines=TPUS), st.sampled_from(["physical", "compiler"]))
@settings(max_examples=80, deadline=None)
def test_the_closed_form_of_arrays_is_the_replay(plan: Plan, costs: str) -> None:
    layout = resolve(plan)
    found = predict(plan, costs=costs)
    times = TaskTimes(costs_of(costs, plan.machine.chip), RoleLinks(plan.machine, layout))
    replayed = replay(times, found.schedule).price
    without_bubble_s = found.step_time_s - found.time["bubble_s"]
    if contends(found.schedule, layout):
        # The replay lets moves that are waited for queue behind what was started before them.
        assert without_bubble_s <= float(replayed.step_time_s) * (1 + 1e-3)
    else:
        assert without_bubble_s == pytest.approx(float(replayed.step_time_s), rel=1e-9)
        for part in ("compute_s", "hbm_bound_s", "overhead_s"):
            assert found.time[part] == pytest.approx(float(getattr(replayed, part)), rel=1e-9)


def trips_s(layers: int, weights: bool, gradients: bool) -> float:
    """Return the waits of a step over `layers`, on links so slow that all waits show."""
    plan = build(
        decoder(layers=layers),
        parse_machine("v5e:4x4"),
        16,
        {"fsdp": {"x": 4, "y": 4}},
        overlap=Overlap(weights=weights, gradients=gradients),
    )
    uses = predict(plan).price.collectives
    return sum(float(use.exposed_s) for use in uses if use.task.purpose == "weights")


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_of_one_layer_nothing_is_hidden(layers: int) -> None:
    waited, alone = trips_s(layers, True, True), trips_s(layers, False, False)
    if layers == 1:
        assert waited == pytest.approx(alone)
    else:
        # The first gather of either pass, and the last scatter.
        assert trips_s(1, False, False) <= waited * (1 + 1e-9)
        assert waited < alone


def test_a_stage_without_layers_moves_what_the_head_needs_before_it() -> None:
    """Once each, whatever many blocks of layers begin it; what layers move for themselves is
    gone with them."""
    head, mine, late = (Move(name=name, kind="all-gather", bytes=8.0) for name in ("h", "m", "l"))
    product = Work(name="product", kind="matmul")
    layer = Block(
        name="layer forward",
        phase="forward",
        trips=4,
        tasks=(
            Start(task=mine),
            Start(task=head, when="before the head"),
            Start(task=late, when="after the head"),
            product,
            Await(name="m"),
            Await(name="h", when="before the head"),
        ),
    )
    end = Block(name="head", phase="head", trips=1, tasks=(product,))
    whole = Schedule(blocks=(layer, replace(layer, name="other"), end), order=(0, 2, 1))
    without = whole.with_share(0.0, head=True)
    assert [block.trips for block in without.blocks] == [0.0, 0.0, 1]
    assert without.blocks[2].tasks == (head, late, product)
    assert whole.with_share(0.5, head=True).blocks[2].tasks == (product,)
