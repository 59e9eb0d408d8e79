"""What implementations add to a Program: by what tasks are, and seen by whoever prices it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from building import plans
from found import SAMPLE
from hypothesis import given

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import compiler, costs_of, physical
from shardsim.cost.network import Links
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import step_time_s
from shardsim.errors import PlanError
from shardsim.files import data_folder
from shardsim.plan import Plan, load_plan, plan_from_data, resolve
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import IMPLEMENTATIONS, USUAL, Where, implemented, table
from shardsim.program.schedule import Block, every
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Collective, Compute, Program

SHIPPED = [load_plan(name) for name in SAMPLE]
# One sequence over 16 devices: keys and values are gathered.
LONG = plan_from_data(
    {
        "model": "llama2-7b",
        "machine": "v5p:4x4x4",
        "batch": 64,
        "sequence": 32768,
        "mesh": {"fsdp": 4, "context": 16},
        "rules": {
            "parameters": {"embed": ["fsdp", "context"]},
            "activations": {"batch": ["fsdp"], "seq": ["context"]},
        },
        "remat": {"save": ["context"]},
    },
    "long",
)
RINGS = plan_from_data(
    {
        "model": "vit-22b",
        "machine": "v4:4x4x4",
        "batch": 4096,
        "mesh": {"fsdp": 16, "model": 4},
        "rules": {
            "parameters": {"embed": ["fsdp"], "heads": ["model"], "mlp": ["model"]},
            "activations": {"batch": ["fsdp"], "seq": ["model"]},
        },
        "overlap": {"weights": False},
    },
    "rings",
)


def written(plan: Plan) -> Program:
    return partition(Workload.of(plan), resolve(plan), plan.remat)


def program_as(plan: Plan, name: str) -> Program:
    return implemented(written(plan), name, plan.machine, resolve(plan))


def renamed(program: Program) -> Program:
    """Return the same tasks under other names."""

    def block(old: Block, at: int) -> Block:
        names = {task.name: f"t{at}-{place}" for place, task in enumerate(old.tasks)}
        tasks = []
        for task in old.tasks:
            changes = {"name": names[task.name]}
            if isinstance(task, Collective):
                changes["partners"] = tuple(names.get(name, name) for name in task.partners)
            tasks.append(replace(task, **changes))
        return replace(old, tasks=tuple(tasks))

    return replace(program, blocks=tuple(block(old, at) for at, old in enumerate(program.blocks)))


@pytest.mark.parametrize("plan", [*SHIPPED, LONG, RINGS], ids=lambda plan: plan.name or "plan")
def test_rules_do_not_read_names(plan: Plan) -> None:
    layout, costs = resolve(plan), physical(plan.machine.chip)
    times = [
        step_time_s(
            plan.machine,
            layout,
            overlap(implemented(program, "emitted", plan.machine, layout), layout),
            costs,
        )
        for program in (written(plan), renamed(written(plan)))
    ]
    assert times[0] == pytest.approx(times[1], rel=1e-12)
    for block, old in zip(program_as(plan, "emitted").blocks, written(plan).blocks, strict=True):
        added = [task.name for task in block.tasks if task not in old.tasks]
        assert len(set(added)) == len(added)


def test_every_rule_is_used_and_says_where_it_was_seen() -> None:
    blocks = [
        (block, Where(machine=plan.machine, layout=resolve(plan)))
        for plan in (*SHIPPED, LONG, RINGS)
        for block in written(plan).blocks
    ]
    for rules in IMPLEMENTATIONS.values():
        for rule in rules:
            assert any(rule(block, where) != block for block, where in blocks), rule.__name__
            words = rule.__doc__ or ""
            assert any(place in words for place in ("docs/", "splash", "maxtext")), rule.__name__


def test_the_docs_have_every_rule() -> None:
    page = data_folder("plans").parent.joinpath("docs", "cost-model.md").read_text("utf-8")
    assert table() in page


@given(plan=plans())
def test_what_is_ideal_is_the_plan_and_what_is_done_beyond_it_takes_time(plan: Plan) -> None:
    assert program_as(plan, "ideal") == written(plan)
    ideal, emitted = (predict(plan, implementation=name) for name in ("ideal", "emitted"))
    assert ideal.step_time_s <= emitted.step_time_s * (1 + 1e-9)
    assert ideal.hbm["peak_bytes"] <= emitted.hbm["peak_bytes"] * (1 + 1e-9)
    for part in ("parameters_bytes", "optimizer_bytes", "gradients_bytes", "activations_bytes"):
        assert ideal.hbm[part] == emitted.hbm[part]


@given(plan=plans())
def test_costs_decide_no_tasks(plan: Plan) -> None:
    def tasks(item: Prediction) -> list[tuple[str, ...]]:
        blocks = item.schedule.blocks
        return [tuple(task.name for task, _, _ in every(block.tasks)) for block in blocks]

    if plan.machine.chip.compiler is not None:
        found = [
            predict(plan, costs=costs, implementation="emitted")
            for costs in ("physical", "compiler")
        ]
        assert tasks(found[0]) == tasks(found[1])
        assert found[0].price.flops == found[1].price.flops


@given(plan=plans())
def test_weights_travel_as_often_as_planned_or_twice_over_a_whole_slice(plan: Plan) -> None:
    layout = resolve(plan)
    group = Links(plan.machine, layout)["gather"]
    inside = int(layout.gather.size) // int(layout.gather.slices)
    whole = inside > 1 and inside == plan.machine.devices_per_slice

    def sent(name: str) -> dict[str, float]:
        sums = {"all-gather": 0.0, "other": 0.0}
        for block in program_as(plan, name).blocks:
            for task in block.collectives():
                if task.role == "gather":
                    moved = sent_bytes(task.kind, group, task.bytes) * task.count * block.trips
                    sums[task.kind if task.kind in sums else "other"] += float(moved)
        return sums

    ideal, emitted = sent("ideal"), sent("emitted")
    if whole and not layout.weights_overlap:
        assert emitted["all-gather"] == 0
        assert emitted["other"] == pytest.approx(2 * sum(ideal.values()))
    else:
        assert emitted["all-gather"] == pytest.approx(ideal["all-gather"])
        assert emitted["other"] == pytest.approx((2 if whole else 1) * ideal["other"])


def test_attention_by_blocks_is_of_the_emitted_program_alone() -> None:
    emitted = predict(LONG, costs="compiler")
    others = [predict(LONG, costs="compiler", implementation=name) for name in ("trainer", "ideal")]
    assert all(item.step_time_s < 0.3 * emitted.step_time_s for item in others)
    assert all("priced as" in item.warnings[-1] for item in others)

    def attention(item: Prediction) -> Compute:
        tasks = item.schedule.block("layer forward").computes()
        return next(task for task in tasks if task.purpose == "softmax attention")

    # The loop skips no block of keys that a causal mask leaves empty.
    assert attention(emitted).fraction == 1.0
    assert attention(others[0]).fraction == pytest.approx(0.5, rel=0.02)


def test_one_program_of_many_plans_is_each_of_them() -> None:
    """A switch given as an array: what becomes an all-reduce where nothing is to overlap."""
    plan = load_plan("maxtext-22b-published-v4-1x64")
    layout, costs = resolve(plan), compiler(plan.machine.chip)
    both = layout.reshaped(weights_overlap=np.array([True, False]))

    def step_s(layout):
        program = partition(Workload.of(plan), layout, plan.remat)
        done = implemented(program, "emitted", plan.machine, layout)
        return step_time_s(plan.machine, layout, overlap(done, layout), costs)

    alone = [float(step_s(layout.reshaped(weights_overlap=on))) for on in (True, False)]
    assert step_s(both) == pytest.approx(alone, rel=1e-12)
    assert alone[1] > alone[0]


def test_unknown_words_are_one_line() -> None:
    plan = SHIPPED[0]
    with pytest.raises(PlanError, match="as: 'emited' is not possible; did you mean 'emitted'"):
        predict(plan, implementation="emited")
    with pytest.raises(PlanError, match="op_costs: 'guess' is not possible"):
        costs_of("guess", plan.machine.chip)
    assert set(USUAL.values()) <= set(IMPLEMENTATIONS)
