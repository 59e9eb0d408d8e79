"""What torchtitan's step does beyond a plan: copies, keys that are repeated, sums in float32."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.program.gpu_rules import add_up_summands
from shardsim.program.partition import partition
from shardsim.program.passes import ON_GPU, implemented
from shardsim.program.schedule import Task, Work, every
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Collective, Compute, Program

BATCH, TOKENS, WIDTH, HEADS, KEYS, HEAD = 2, 4096, 4096, 32, 8, 128
RULES = {
    "parameters": {"embed": ["fsdp", "context"], "heads": ["model"], "mlp": ["model"]},
    "activations": {"batch": ["fsdp"], "seq": ["context", "model"], "heads": ["model"]},
}


def llama(mesh: dict[str, int], **more: Any) -> Plan:
    def there(rules: dict[str, list[str]]) -> dict[str, list[str]]:
        return {key: [one for one in axes if one in mesh] for key, axes in rules.items()}

    data = {
        "model": {"base": "llama3-8b", "layers": 2},
        "machine": "h100:8",
        "batch": BATCH * mesh.get("fsdp", 1),
        "sequence": TOKENS,
        "mesh": mesh,
        "rules": {key: there(rules) for key, rules in RULES.items()},
        "attention": "flash-2023",
        "overlap": {"matmul": "off"},
        "remat": "full",
        **more,
    }
    return plan_from_data(data, "test")


def tasks(plan: Plan, name: str = "torchtitan", phase: str = "forward") -> list[Task]:
    layout = resolve(plan)
    program = implemented(partition(Workload.of(plan), layout), name, plan.machine, layout)
    block = next(one for one in program.blocks if one.phase == phase and one.name.startswith("lay"))
    return [task for task in block.tasks if task.count is not False and float(task.count) > 0]


def moved(found: list[Task], word: str) -> list[float]:
    return [
        float(task.hbm_bytes)
        for task in found
        if isinstance(task, Compute) and word in task.name and float(task.hbm_bytes)
    ]


def test_only_gpus_have_it() -> None:
    plan = llama({"fsdp": 8}, machine="v5e:2x4")
    with pytest.raises(PlanError, match="torchtitan"):
        predict(plan, implementation="torchtitan")
    assert predict(llama({"fsdp": 8}), implementation="torchtitan").implementation == "torchtitan"


def test_every_rule_changes_one_of_these_programs() -> None:
    plans = [
        llama({"fsdp": 2, "context": 4}, context={"keys": "ring", "overlap": False}),
        llama({"fsdp": 2, "model": 4}, precision={"compute": "fp8"}),
        llama({"fsdp": 2, "model": 4}, overlap={"matmul": "bidirectional"}),
    ]
    more = [rule for rule in ON_GPU["torchtitan"] if rule not in ON_GPU["trainer"]]
    assert more
    for rule in (*more, add_up_summands):
        kept = [one for one in ON_GPU["torchtitan"] if one is not rule]
        changed = False
        for plan in plans:
            layout = resolve(plan)
            program = partition(Workload.of(plan), layout)
            whole = implemented(program, "torchtitan", plan.machine, layout)
            saved = ON_GPU["torchtitan"]
            try:
                ON_GPU["torchtitan"] = tuple(kept)  # type: ignore[index]
                changed |= implemented(program, "torchtitan", plan.machine, layout) != whole
            finally:
                ON_GPU["torchtitan"] = saved  # type: ignore[index]
        assert changed, rule.__name__


def test_keys_of_shared_heads_are_repeated_and_rotated_in_float32() -> None:
    found = tasks(llama({"fsdp": 8}))
    tokens = BATCH * TOKENS
    heads, keys = tokens * HEADS * HEAD, tokens * KEYS * HEAD
    # Of keys and of values: read as they are, written for every head of queries.
    assert moved(found, "repeat keys") == [2 * 2 * (keys + heads)]
    assert sorted(moved(found, "turned")) == [20 * keys, 20 * heads]
    alone = {"base": "llama3-8b", "layers": 2, "kv_heads": HEADS}
    assert not moved(tasks(llama({"fsdp": 8}, model=alone)), "repeat keys")


def test_what_is_gathered_or_scattered_along_the_sequence_is_copied() -> None:
    plain = tasks(llama({"fsdp": 2, "model": 4}))
    size = 2.0 * BATCH * TOKENS * WIDTH  # of the stream, all of a group's tokens
    assert moved(plain, "lay out: ").count(2.0 * size) == 4  # two gathers and two scatters
    rings = tasks(llama({"fsdp": 2, "model": 4}, overlap={"matmul": "bidirectional"}))
    assert moved(rings, "lay out: ").count(2.0 * size) == 0
    assert not moved(tasks(llama({"fsdp": 2, "model": 4}), "trainer"), "lay out: ")


def test_a_gradient_that_several_products_add_to_is_scattered_whole() -> None:
    plan = llama({"fsdp": 2, "model": 4}, overlap={"matmul": "bidirectional"})
    found = [task for task in tasks(plan, phase="backward") if isinstance(task, Collective)]
    scatters = [one for one in found if (one.kind, one.role) == ("reduce-scatter", "tensor")]
    whole = [one.name for one in scatters if one.schedule == "exposed"]
    assert whole == ["scatter d mlp input", "scatter d attention input"]
    rings = [one for one in scatters if one.schedule == "ring"]
    assert [len(one.partners) for one in rings] == [1]  # of what is computed again
    size = 2.0 * BATCH * TOKENS * WIDTH  # summands of all four, and their sum
    assert moved(tasks(plan, phase="backward"), "add up scatter") == [size * 1.25]


@pytest.mark.parametrize("name", ["torchtitan", "trainer", "ideal"])
def test_summands_of_a_ring_are_added_up_once(name: str) -> None:
    """Blocks write what they make in 16 bits; one pass reads what came and writes its sum."""
    plan = llama({"fsdp": 2, "model": 4}, overlap={"matmul": "bidirectional"})
    found = tasks(plan, name)
    down = next(one for one in found if isinstance(one, Compute) and one.name == "mlp_out")
    block = predict(plan, implementation=name).schedule.block("layer forward")
    works = [(one, times) for one, times, _ in every(block.tasks) if isinstance(one, Work)]
    blocks = sum(float(one.hbm_bytes * times) for one, times in works if one.name == down.name)
    m, k, n = (float(size) for size in (down.m, down.k, down.n))
    beside = float(down.hbm_bytes) - 2.0 * (m * k + k * n + m * n)  # what its end reads
    assert blocks == pytest.approx(2.0 * (m * k + 4 * k * n + m * n) + beside)
    sums = [float(one.hbm_bytes * times) for one, times in works if "add up scatter" in one.name]
    assert sums == [pytest.approx(2.0 * m * n * 1.25)] * 2  # of attention and the MLP


def test_products_of_8_bits_gather_8_bits() -> None:
    def gathered(**more: Any) -> list[float]:
        found = tasks(llama({"fsdp": 2, "model": 4}, **more))
        moves = [one for one in found if isinstance(one, Collective) and one.role == "tensor"]
        return [float(one.bytes) for one in moves if one.kind == "all-gather"]

    wide, narrow = gathered(), gathered(precision={"compute": "fp8"})
    assert len(wide) == 2
    assert [2.0 * size for size in narrow] == wide


def test_only_positions_that_turn_heads_are_rotated() -> None:
    """Gradients of biases by head are sums that stay fused (GPT-2, whose positions are learned)."""
    rules = {"activations": {"batch": ["data"]}}
    data = {"model": "gpt2-xl", "machine": "h100:8", "batch": 8, "mesh": {"data": 8}}
    plan = plan_from_data({**data, "rules": rules}, "a test")
    for phase in ("forward", "backward"):
        assert tasks(plan, phase=phase) == tasks(plan, "trainer", phase=phase)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "dit-xl-2-512"])
def test_what_is_read_before_its_cast_or_cast_for_others_is_gathered_wide(model: str) -> None:
    """Tokens that a router reads, and an example's conditions, which are no operand of what is
    cast behind them."""
    weights = {key: ["model"] for key in ("heads", "kv_heads", "mlp")}
    data = {
        **{"model": model, "machine": "h100:8", "batch": 32, "mesh": {"data": 4, "model": 2}},
        "rules": {
            "parameters": weights,
            "activations": {"batch": ["data"], "seq": ["model"], **weights},
        },
        "precision": {"compute": "fp8"},
    }
    plan = plan_from_data(data, "a test")
    layout = resolve(plan)
    written = partition(Workload.of(plan), layout)

    def sizes(program: Program) -> dict[str, float]:
        moves = [one for block in program.blocks for one in block.collectives()]
        found = [one for one in moves if (one.kind, one.role) == ("all-gather", "tensor")]
        return {one.name: float(one.bytes) for one in found}

    before = sizes(written)
    after = sizes(implemented(written, "trainer", plan.machine, layout))
    experts = {"turn copies, over tensor"} if model.startswith("mixtral") else set()
    assert after.keys() - before.keys() == experts  # gathered behind the all-to-all
    assert before.keys() <= after.keys()
    halved = {name for name in before if 2.0 * after[name] == before[name]}
    assert all(after[name] == before[name] for name in before.keys() - halved)
    routed = "modulation columns" if model.startswith("dit") else "mlp input"
    wide = {name for name in before if name.endswith(routed)}
    assert wide
    assert not wide & halved
    assert "gather attention input" in halved


def test_rounds_send_all_heads_and_gradients_in_float32() -> None:
    plan = llama({"fsdp": 2, "context": 4}, context={"keys": "ring", "overlap": False})
    forward, back = tasks(plan), tasks(plan, phase="backward")
    keys = 2.0 * BATCH * TOKENS * HEADS * HEAD  # of all members, in two bytes

    def sizes(found: list[Task], kind: str) -> list[float]:
        moves = [one for one in found if isinstance(one, Collective) and one.role == "context"]
        return [float(one.bytes) for one in moves if one.kind == kind]

    assert sizes(forward, "all-gather") == [keys, keys]
    assert sizes(back, "reduce-scatter") == [2.0 * keys, 2.0 * keys]
    own = BATCH * TOKENS / 4 * HEADS * HEAD
    # Three sums of float32, read and written, and what joins them.
    assert moved(forward, "add up") == [3 * 10 * own]
    # Back of queries as often, of keys and values once for each of four members.
    assert moved(back, "add up context gradient") == [3 * 10 * own + 2 * 4 * 10 * own]
