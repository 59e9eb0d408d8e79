"""What implementations add to a Program: by what tasks are, and seen by whoever prices it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from building import LONG as LONG_DATA
from building import MIXTURES, VIDEO, build, plans
from found import SAMPLE
from hypothesis import given

from shardsim.cost.collectives import move_s, sent_bytes
from shardsim.cost.costs import compiler, costs_of, physical
from shardsim.cost.network import Links
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import step_time_s
from shardsim.errors import PlanError
from shardsim.files import data_folder
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.plan import Overlap, Plan, load_plan, plan_from_data, resolve
from shardsim.plan.layout import EMBED_SHARDED, SEQUENCE_SHARDED
from shardsim.plan.plan import Context
from shardsim.plan.remat import Policy, Remat
from shardsim.plan.resolve import rules_data
from shardsim.program.end_rules import join_all_ends
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import IMPLEMENTATIONS, USUAL, Where, implemented, table
from shardsim.program.schedule import Block, Move, Start, every
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Collective, Compute, Program

SHIPPED = [load_plan(name) for name in SAMPLE]
# One sequence over 16 devices: keys and values are gathered.
LONG = plan_from_data(LONG_DATA, "long")
IN_ORDER = replace(LONG, context=Context(order="contiguous"))


def rings(model: str, machine: str, split: int = SEQUENCE_SHARDED, **more: Any) -> Plan:
    """Return a plan with a tensor axis of 4, whose rings pass pieces of the sequence or embed."""
    data = {
        "model": model,
        "machine": machine,
        "batch": 4096,
        "mesh": {"fsdp": parse_machine(machine).devices // 4, "model": 4},
        "rules": rules_data(["fsdp", "model"], residual=split),
        **more,
    }
    return plan_from_data(data, "rings")


RINGS = rings("vit-22b", "v4:4x4x4", overlap={"weights": False})
STOPPED = rings("maxtext-16b", "v5e:4x8")
LEFT = rings("vit-22b", "v4:4x4x4", execution="partitioned")
OFFLOADED = rings("vit-22b", "tpu7x:4x4x4", EMBED_SHARDED, overlap={"gradients": False})
BESIDE = rings("llama3-8b", "tpu7x:4x4x4", overlap={"matmul": "off"})
NARROW = rings("vit-bigg", "v5e:4x4", attention="flash")  # heads of 104
IN_8_BITS = rings("maxtext-16b", "v5e:4x4", precision={"compute": "int8"})
# Attention through 16 frames.
FRAMES = build(VIDEO, "v4:2x2x4", 16, {"fsdp": {"x": 2, "y": 2, "z": 4}}, attention="flash")
# Experts over one axis, their MLPs over another.
EXCHANGED = build(
    next(model for model in MIXTURES if model.experts and not model.experts.soft_slots),
    "v4:2x2x4",
    64,
    {"expert": {"x": 2, "y": 2}, "tensor": {"z": 4}},
)
PACKED = load_plan("navit-packed")  # rows of several images, attended to one by one
# Weights over the whole slice, none gathered ahead.
WAITING = plan_from_data(
    {
        "model": "vit-22b",
        "machine": "v4:4x4x4",
        "batch": 4096,
        "mesh": {"fsdp": 64},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
        "remat": "full",
        "overlap": {"weights": False},
    },
    "waiting",
)


def odd(machine: str = "v4:8x8x16", execution: str = "partitioned") -> Plan:
    """Return a plan with weights over a whole slice: on 1,024 chips in pieces of 6 rows or columns,
    which are no whole tiles."""
    data = {
        "model": "vit-22b",
        "machine": machine,
        "batch": 65536,
        "mesh": {"fsdp": parse_machine(machine).devices},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
        "execution": execution,
    }
    return plan_from_data(data, "odd")


def short(members: int) -> Plan:
    """Return a plan whose devices have 256 tokens over so many members."""
    where = {"fsdp": {"x": 4, "y": 4, "z": 4 // members}, "context": {"z": members}}
    return build(load_model("vit-22b"), "v4:4x4x4", 256, where, attention="unfused")


# Heads for tokens, over a context axis.
TURNED = load_plan("ulysses-32k")

# Queries, keys and values in the host's memory.
GATHERING = ("layer forward", "layer backward", "embedding and head")
AWAY = replace(WAITING, name="away", remat=Remat.of(offload=frozenset({"qkv"})))


def partitioned(plan: Plan) -> Program:
    return partition(Workload.of(plan), resolve(plan))


def written(plan: Plan) -> Program:
    """Return the plan's Program with the ends of products in them, as none moves less."""
    program = partitioned(plan)
    where = where_of(plan)
    ends = (join_all_ends(block, where) for block in program.blocks)
    return replace(program, blocks=tuple(ends))


def program_as(plan: Plan, name: str) -> Program:
    return implemented(partitioned(plan), name, plan.machine, resolve(plan))


def where_of(plan: Plan) -> Where:
    return Where(machine=plan.machine, layout=resolve(plan))


def renamed(program: Program) -> Program:
    """Return the same tasks under other names."""

    def block(old: Block, at: int) -> Block:
        names = {task.name: f"t{at}-{place}" for place, task in enumerate(old.tasks)}
        tasks = []
        for task in old.tasks:
            changes = {"name": names[task.name]}
            if isinstance(task, Collective):
                changes["partners"] = tuple(names.get(name, name) for name in task.partners)
            if isinstance(task, Compute):
                changes["end_of"] = names.get(task.end_of, task.end_of)
            if isinstance(task, Start):
                changes = {"task": replace(task.task, **changes)}
            tasks.append(replace(task, **changes))
        return replace(old, tasks=tuple(tasks))

    return replace(program, blocks=tuple(block(old, at) for at, old in enumerate(program.blocks)))


@pytest.mark.parametrize(
    "plan", [*SHIPPED, LONG, RINGS, STOPPED, LEFT, OFFLOADED], ids=lambda plan: plan.name or "plan"
)
def test_rules_do_not_read_names(plan: Plan) -> None:
    layout, costs = resolve(plan), physical(plan.machine.chip)
    times = [
        step_time_s(
            plan.machine,
            layout,
            overlap(implemented(program, "emitted", plan.machine, layout), layout),
            costs,
        )
        for program in (partitioned(plan), renamed(partitioned(plan)))
    ]
    assert times[0] == pytest.approx(times[1], rel=1e-12)
    for block, old in zip(
        program_as(plan, "emitted").blocks, partitioned(plan).blocks, strict=True
    ):
        added = [task.name for task in block.tasks if task not in old.tasks]
        assert len(set(added)) == len(added)


def test_every_rule_is_used_and_says_where_it_was_seen() -> None:
    blocks = [
        (block, Where(machine=plan.machine, layout=resolve(plan)))
        for plan in (
            *SHIPPED,
            IN_ORDER,
            replace(LONG, context=Context(keys="ring")),
            replace(LONG, context=Context(keys="ring"), sequence=LONG.sequence + 1024),
            RINGS,
            STOPPED,
            LEFT,
            OFFLOADED,
            BESIDE,
            WAITING,
            PACKED,
            AWAY,
            TURNED,
            NARROW,
            IN_8_BITS,
            FRAMES,
            EXCHANGED,
            short(4),
        )
        for block in partitioned(plan).blocks
    ]
    for rules in IMPLEMENTATIONS.values():
        for rule in rules:
            assert any(rule(block, where) != block for block, where in blocks), rule.__name__
            words = rule.__doc__ or ""
            seen = any(place in words for place in ("docs/", "splash", "maxtext"))
            assert seen or rules is IMPLEMENTATIONS["ideal"], rule.__name__


def test_columns_that_are_no_whole_tiles_are_turned_where_the_partitioner_gathers_them() -> None:
    def turned(plan: Plan) -> list[float]:
        blocks = program_as(plan, "emitted").blocks
        return [
            float(task.hbm_bytes)
            for block in blocks
            for task in block.tasks
            if isinstance(task, Compute) and task.name.endswith(", turned") and task.count
        ]

    columns = 24576 * 6144 * 2.0  # of the second product of the MLP, in bf16
    assert turned(odd()) == [2 * 4 * columns] * 2  # forward and back, read and written by quarters
    assert turned(odd("v4:4x4x4")) == []
    assert turned(odd(execution="explicit")) == []


@pytest.mark.parametrize(("members", "turned"), [(4, {"forward": 2, "backward": 4}), (2, {})])
def test_keys_of_few_queries_are_turned(members: int, turned: dict[str, int]) -> None:
    plan = short(members)
    for block in program_as(plan, "emitted").blocks:
        names = {task.name for task in block.tasks if task.name.startswith(("gather", "scatter"))}
        copies = [t for t in block.computes() if t.name.removeprefix("lay out: ") in names]
        copies = [task for task in copies if task.kind == "transpose"]
        assert sum(bool(np.any(task.count)) for task in copies) == turned.get(block.phase, 0)


def test_stacks_are_filled_wherever_inputs_of_layers_lie() -> None:
    """What products make is written there at once; only inputs on the device are copied."""
    save, away = frozenset({"mlp_hidden"}), frozenset({"layer_input"})
    found = {}
    for remat in (Policy(), Policy(save=save), Policy(save=save, offload=away)):
        plan = replace(odd(), remat=Remat((remat,)))
        tasks = [task for block in program_as(plan, "emitted").blocks for task in block.computes()]
        moved = {task.name: float(task.hbm_bytes * task.count) for task in tasks}
        found[remat.name] = moved["zeros: keep for backward"], moved["keep for backward"]
    (inputs, copied), both, hidden = found.values()
    assert copied == inputs
    assert both[1] == copied
    assert hidden == (both[0] - inputs, 0.0)


def test_the_docs_have_every_rule() -> None:
    page = data_folder("plans").parent.joinpath("docs", "cost-model.md").read_text("utf-8")
    assert table() in page


@given(plan=plans())
def test_what_is_ideal_is_the_plan_and_what_is_done_beyond_it_takes_time(plan: Plan) -> None:
    gpu = plan.machine.chip.kind == "gpu"  # libraries there send summands
    assert program_as(plan, "ideal") == written(plan) or gpu
    ideal = predict(plan, implementation="ideal")
    for name in ("emitted", "trainer"):
        other = predict(plan, implementation=name)
        narrow = name == "trainer" and not gpu and plan.precision.compute in ("fp8", "int8")
        if not (plan.machine.chip.offloads_collectives or narrow):  # those hide, or send, less
            assert ideal.step_time_s <= other.step_time_s * (1 + 1e-9)
        if name == "emitted" or gpu:
            assert ideal.hbm["peak_bytes"] <= other.hbm["peak_bytes"] * (1 + 1e-9)
            assert ideal.hbm["thrifty_bytes"] <= other.hbm["thrifty_bytes"] * (1 + 1e-9)
        for part in ("parameters_bytes", "optimizer_bytes", "gradients_bytes", "activations_bytes"):
            assert ideal.hbm[part] <= other.hbm[part]
            assert ideal.hbm[part] == other.hbm[part] or gpu or name == "trainer"


@given(plan=plans(machines=("h100:8", "2*h100:8")))
def test_no_library_on_gpus_does_with_less_than_the_ideal(plan: Plan) -> None:
    """But in rings that torchtitan leaves whole."""
    plan = replace(plan, overlap=replace(plan.overlap, matmul="off"))
    ideal = predict(plan, implementation="ideal")
    for name in ("trainer", "torchtitan"):
        other = predict(plan, implementation=name)
        assert ideal.step_time_s <= other.step_time_s * (1 + 1e-9)
        assert ideal.hbm["peak_bytes"] <= other.hbm["peak_bytes"] * (1 + 1e-9)


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
    whole = whole and not plan.machine.chip.offloads_collectives

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


def test_gradients_of_experts_on_an_axis_of_their_own_are_scattered_over_the_others() -> None:
    plan = plan_from_data(
        {
            "model": "mixtral-8x7b",
            "machine": "v6e:8x8",
            "batch": 64,
            "mesh": {"fsdp": 8, "expert": 8},
            "rules": rules_data(["fsdp", "expert"]),
        },
        "experts",
    )
    summed = {
        (task.role, task.kind)
        for block in program_as(plan, "trainer").blocks
        for task in block.collectives()
        if task.name.startswith("scatter gradients of weights")
    }
    assert summed == {("fsdp+expert", "all-reduce"), ("fsdp", "reduce-scatter")}


def test_programs_wait_for_the_last_part_of_a_sequence_in_order() -> None:
    names = ("emitted", "trainer", "ideal")
    emitted, trainer, ideal = (
        predict(IN_ORDER, costs="compiler", implementation=name) for name in names
    )
    dealt = [predict(LONG, costs="compiler", implementation=name) for name in names]
    assert dealt[0].step_time_s < 0.8 * emitted.step_time_s
    assert dealt[1].step_time_s < 0.8 * trainer.step_time_s
    assert dealt[2].step_time_s == ideal.step_time_s
    assert all("priced as" in " ".join(item.warnings) for item in (trainer, ideal))

    def attention(item: Prediction) -> Compute:
        tasks = item.schedule.block("layer forward").computes()
        return next(task for task in tasks if task.purpose == "softmax attention")

    # The loop skips no block of keys that a causal mask leaves empty.
    # The last 2,048 of 32,768 queries see all keys but half of their own, in blocks of 512.
    last = 1 - (2048 - 512) / 2 / 32768
    assert attention(emitted).fraction == pytest.approx(last)
    assert attention(trainer).fraction == pytest.approx(last)
    assert attention(ideal).fraction == pytest.approx(0.5, rel=0.02)
    assert attention(dealt[0]).fraction == pytest.approx(0.5, rel=0.04)


def test_one_program_of_many_plans_is_each_of_them() -> None:
    """A switch given as an array: what becomes an all-reduce where nothing is to overlap."""
    plan = load_plan("maxtext-22b-published-v4-1x64")
    layout, costs = resolve(plan), compiler(plan.machine.chip)
    both = layout.reshaped(weights_overlap=np.array([True, False]))

    def step_s(layout):
        program = partition(Workload.of(plan), layout)
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


# What single rules do.


def added(plan: Plan, block: str) -> dict[str, list[Compute]]:
    """Return the work of a block that the plan does not have, by kind."""
    known = {task.name for task in written(plan).block(block).computes()}
    found: dict[str, list[Compute]] = {"copy": [], "transpose": [], "elementwise": []}
    for task in program_as(plan, "emitted").block(block).computes():
        if task.name not in known and not task.name.startswith("zeros"):
            assert isinstance(task, Compute)
            found[task.kind].append(task)
    return found


@pytest.mark.parametrize("split", [SEQUENCE_SHARDED, EMBED_SHARDED])
def test_what_a_ring_gathers_is_put_together(split: int) -> None:
    """Once for each array that a weight gradient needs; pieces of embed are turned before."""
    plan = rings("vit-22b", "v4:4x4x4", split)
    stream = 4096 * 256 / 16 * 6144 * 2.0  # of the tokens of a member of fsdp, in bf16
    found = added(plan, "layer backward")
    for kind in ("transpose", "elementwise"):
        whole = [task.hbm_bytes for task in found[kind] if "gather" in task.name]
        turned = kind == "elementwise" or split == EMBED_SHARDED
        assert whole == [2.0 * stream] * 2 * turned


def test_what_attention_reads_and_makes_is_turned_where_rows_are_passed() -> None:
    """Forward queries, keys, values and the context; backward these again, and the gradients of
    all four. A loop that gathers ahead copies empty arrays forward, of four products."""
    plan = rings("vit-22b", "v4:4x4x4")
    heads = 4096 * 256 / 16 * 6144 / 4 * 2.0
    for block, times in (("layer forward", 4), ("layer backward", 8)):
        turned = [task for task in added(plan, block)["transpose"] if np.any(task.count)]
        assert [task.hbm_bytes for task in turned] == [2.0 * heads] * times, block
        empty = [t for t in added(plan, block)["copy"] if "empty array" in t.name]
        copied = sorted(float(task.hbm_bytes) for task in empty if np.any(task.count))
        forward = block == "layer forward"
        assert (
            copied == ([2.0 * heads] * 3 + [2.0 * 4 * heads]) * forward
        )  # the MLP is 4 times as wide
    empty = [t for t in added(RINGS, "layer forward")["copy"] if "empty array" in t.name]
    assert not any(np.any(task.count) for task in empty)  # without gathering ahead


@pytest.mark.parametrize("split", [SEQUENCE_SHARDED, EMBED_SHARDED])
def test_rings_end_in_a_pass_over_own_tokens(split: int) -> None:
    """A product in float32, and what came from both sides."""
    own = 4096 * 256 / 16 / 4 * 6144
    for block in ("layer forward", "layer backward"):
        plan = rings("vit-22b", "v4:4x4x4", split)
        ends = [t for t in added(plan, block)["elementwise"] if t.name.startswith("end of ")]
        ends = [task for task in ends if np.any(task.count)]
        assert [task.hbm_bytes for task in ends] == [8.0 * own]


@pytest.mark.parametrize("split", [SEQUENCE_SHARDED, EMBED_SHARDED])
def test_biases_of_rows_are_summed_by_what_reads_them(split: int) -> None:
    """An activation has a pass backward for its gradient, and none for being done again."""
    plan = rings("vit-22b", "v4:4x4x4", split)
    computes = [*program_as(plan, "emitted").block("layer backward").computes()]
    sums = {task.name for task in computes if "bias gradient" in task.name and np.any(task.count)}
    apart = {task.name for task in computes if task.name.startswith("apply after")}
    rows = split == SEQUENCE_SHARDED
    assert not rows or not sums
    assert apart == ({"apply after mlp_out d hidden"} if rows else set())


def test_a_kernel_multiplies_what_it_is_padded_with() -> None:
    """FLOPs of a compiled step of two layers on v5e (libtpu 0.0.42.1): 197 tokens are 256, heads of
    64 are 128 deep."""
    data = {
        "model": {"base": "vit-b-16", "name": "two-layers", "layers": 2},
        "machine": "v5e:2x2",
        "batch": 256,
        "mesh": {"fsdp": 4},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
        "attention": "flash",
    }
    found = predict(plan_from_data(data, "padded"), implementation="emitted")
    assert float(found.price.flops) == pytest.approx(1.5708e12, rel=1e-4)


def test_products_make_whole_heads_for_a_kernel() -> None:
    """Heads of 104 in lanes of 128: not where scores are in HBM, nor in gradients of weights."""
    apart = replace(NARROW, attention="unfused")
    for plan, wanted in ((NARROW, 4 * 128), (apart, 4 * 104)):
        tasks = [
            task
            for task in program_as(plan, "emitted").block("layer backward").computes()
            if isinstance(task, Compute) and task.kind == "matmul" and task.purpose == "by head"
        ]
        made = {float(max(t.n, t.columns)) for t in tasks if not t.of_weights}
        assert made == {wanted}
        assert all(task.columns == 0 for task in tasks if task.of_weights)


def test_norms_by_position_move_float32_arrays() -> None:
    """Four passes forward (three reads, the result) where pieces of embed went round, as without
    rings where those of the sequence did, which lie by rows."""
    elements = 4096 * 256 / 16 * 6144 / 4

    def norms(plan: Plan) -> list[float]:
        block = program_as(plan, "emitted").block("layer forward")
        purposes = [task for task in block.computes() if isinstance(task, Compute)]
        return [task.hbm_bytes for task in purposes if task.purpose == "query-key norm"]

    assert norms(rings("vit-22b", "v4:4x4x4", EMBED_SHARDED)) == [14.0 * elements] * 2
    assert norms(LEFT) == [14.0 * elements] * 2
    assert norms(RINGS) == [4.0 * elements] * 2
    off = replace(RINGS, overlap=replace(RINGS.overlap, matmul="off"))
    assert norms(off) == [4.0 * elements] * 2
    assert not added(off, "layer forward")["transpose"]


@pytest.mark.parametrize(("machine", "joins"), [("v5e:4x4", True), ("v6e:4x4", False)])
def test_ends_of_products_add_gate_and_sum(machine: str, joins: bool) -> None:
    """The sum with the stream reads one array more in the product's end, not two in a pass; with a
    matrix unit 256 wide all are passes. Halves of heads of 128 are put together for the kernel."""
    where = {"mesh": {"fsdp": 16}, "rules": rules_data(["fsdp"]), "attention": "flash"}
    data = {"model": "llama3-8b", "machine": machine, "batch": 16, "sequence": 8192, **where}
    block = program_as(plan_from_data(data, "ends"), "emitted").block("layer forward")
    tasks = {task.name: task for task in block.computes()}
    for name in ("x after attention", "x after mlp", "hidden"):
        assert bool(np.any(tasks[name].count)) is not joins
    rows, wide, hidden = 8192, 4096, 14336
    own = 2.0 * (rows * hidden + hidden * wide + rows * wide)
    assert tasks["mlp_out"].hbm_bytes == own + 2.0 * rows * wide * joins
    assert tasks["put together: q turned"].hbm_bytes == 2 * 2.0 * rows * wide


def test_rotation_is_laid_out_by_head_once() -> None:
    """In float32, read and written, in front of both the queries' and the keys' rotation."""
    plan = rings("maxtext-16b", "v4:4x4x4")
    tasks = list(program_as(plan, "emitted").block("layer forward").computes())
    model = plan.model
    for part, heads in (("q", model.heads), ("k", model.kv_heads)):
        at = next(i for i, task in enumerate(tasks) if task.name == f"{part} turned")
        elements = plan.tokens / 16 * heads * model.head_dim / 4
        assert tasks[at - 1].kind == "copy"
        assert tasks[at - 1].hbm_bytes == pytest.approx(2 * 4.0 * elements)


@pytest.mark.parametrize(("machine", "waits"), [("v5e:4x4", False), ("v5e:4x8", True)])
@pytest.mark.parametrize("matmul", ["unidirectional", "bidirectional"])
def test_work_stops_for_hops_on_large_v5e(machine: str, waits: bool, matmul: str) -> None:
    """There all N - 1 hops of a ring of N are exposed, one after the other; as bytes, no more."""
    plan = rings("maxtext-16b", machine, overlap={"matmul": matmul, "weights": False})
    both = [predict(plan, costs="compiler", implementation=name) for name in ("ideal", "emitted")]
    hops = [[use for use in item.collectives if use.kind == "permute"] for item in both]
    assert sum(use.bytes_per_chip for use in hops[0]) == pytest.approx(
        sum(use.bytes_per_chip for use in hops[1])
    )
    time_s, exposed_s = (
        sum(getattr(use, name) for use in hops[1]) for name in ("time_s", "exposed_s")
    )
    assert (exposed_s == pytest.approx(time_s)) == waits
    # A hop of each direction takes as long as one of either: three for a ring of four.
    (group,) = {hop.role for hop in _hops(both[1])}
    piece_s = move_s(Links(plan.machine, resolve(plan))[group], _hops(both[1])[0])
    if waits:
        assert exposed_s == pytest.approx(sum(use.count for use in hops[1]) * piece_s, rel=0.02)


def _hops(item: Prediction) -> list[Move]:
    block = item.schedule.block("layer forward")
    return [task for task in block.collectives() if task.ways == 1]


@pytest.mark.parametrize(
    ("model", "machine", "forward", "backward"),
    [  # as in compiled programs: attention's output and the MLP's; queries', keys', values', MLP's
        ("vit-22b", "v4:4x4x4", 2, 4),
        ("palm-8b", "v4:4x4x4", 1, 2),
        ("vit-h-14", "v4:4x4x4", 0, 0),
        ("llama2-7b", "v5p:4x4x4", 1, 2),
    ],
)
def test_the_partitioner_gives_long_products_rings_of_their_own(
    model: str, machine: str, forward: int, backward: int
) -> None:
    plan = rings(model, machine, EMBED_SHARDED, execution="partitioned", remat="full")
    program = program_as(plan, "emitted")
    for name, wanted in (("layer forward", forward), ("layer backward", backward)):
        tasks = [task for task in program.block(name).tasks if isinstance(task, Collective)]
        scattered = [task for task in tasks if task.kind == "reduce-scatter"]
        cut = [task for task in scattered if task.schedule == "ring"]
        assert len(cut) == wanted
        assert all(len(task.partners) == 1 for task in cut)
        assert sum(task.name.startswith("zeros") for task in tasks) == (wanted > 0)


def test_the_partitioner_gathers_whole_what_several_matmuls_read() -> None:
    for plan, wanted in ((LEFT, False), (RINGS, True)):
        block = program_as(plan, "emitted").block("layer forward")
        gathers = [
            task
            for task in block.collectives()
            if isinstance(task, Collective) and task.role == "tensor" and "gather" in task.kind
        ]
        assert gathers
        assert all((task.schedule == "ring") == wanted for task in gathers)
    # It has weights from the shards in the layout that matmuls read.
    assert not any("gather weights" in task.name for task in added(LEFT, "layer forward")["copy"])
    beside = Overlap(weights=True, gradients=False)
    whole = replace(WAITING, execution="partitioned", overlap=beside)
    laid_out = [t for t in added(whole, "layer forward")["copy"] if "gather weights" in t.name]
    heads = 4 * 6144 * 6144 * 2.0  # bf16, read and written
    assert [float(task.hbm_bytes) for task in laid_out] == [2 * heads]


def test_what_an_all_reduce_gathers_is_zeros_first() -> None:
    """Twice the bytes of what it gathers, of weights and tables; heads come as they are read."""
    for plan, summed in ((WAITING, True), (replace(WAITING, overlap=Overlap(weights=True)), False)):
        for block in program_as(plan, "emitted").blocks:
            zeros = [t for t in block.computes() if t.name.startswith("zeros: gather")]
            moved = [t for t in block.collectives() if t.name.endswith("all-reduced")]
            gathered = [t for t in moved if "gather" in t.name]
            assert [t.hbm_bytes for t in zeros] == [2 * t.bytes for t in gathered]
            assert bool(gathered) == (summed and block.name in GATHERING)
            if block.name in GATHERING[:2]:
                laid = [t for t in block.computes() if t.name.startswith("lay out: gather w")]
                assert bool(laid) != summed


def test_sparse_cores_move_weights_beside_all_else() -> None:
    """Nothing waits but for the first gather of a pass, and the last scatter of one."""
    machine = "tpu7x:4x4x4"
    plan = plan_from_data(
        {
            "model": "llama3-70b",
            "machine": machine,
            "batch": 256,
            "sequence": 8192,
            "mesh": {"fsdp": 128},
            "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
            "overlap": {"gradients": False},
            "attention": "flash",
        },
        "whole",
    )
    emitted = predict(plan, costs="compiler")
    weights = [use for use in emitted.collectives if use.purpose == "parameters"]
    assert {use.kind for use in weights} == {"all-gather", "reduce-scatter", "all-reduce"}
    waited, moved = (sum(getattr(use, name) for use in weights) for name in ("exposed_s", "time_s"))
    assert waited < 0.03 * moved
    assert sum(use.time_s for use in weights if use.kind == "all-reduce") < 1e-3
