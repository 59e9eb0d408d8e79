"""Gathers of keys over a context axis, beside what runs until attention reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import LONG

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan, Remat, plan_from_data
from shardsim.program.schedule import Start

PLAN = plan_from_data(LONG, "long")


def gathers(item: Prediction) -> dict[str, tuple[float, float]]:
    """Return by block the seconds of all gathers of keys and values, and what of them waits."""
    found: dict[str, tuple[float, float]] = {}
    for cost in item.price.collectives:
        if cost.task.kind == "all-gather" and cost.task.purpose == "keys and values":
            alone, waits = found.get(cost.block, (0.0, 0.0))
            found[cost.block] = alone + float(cost.time_s), waits + float(cost.exposed_s)
    return found


def projection_s(item: Prediction, name: str) -> float:
    return sum(float(cost.time_s) for cost in item.price.computes if cost.task.name == name)


def kept(*names: str) -> Plan:
    return replace(PLAN, remat=Remat.of(save=frozenset(names)))


def test_projections_hide_a_part_forward_and_the_mlp_all_of_it_backward() -> None:
    item = predict(PLAN, implementation="trainer")
    alone, waits = gathers(item)["layer forward"]
    # Behind the projections of values and queries, with the rotation that follows them.
    least = projection_s(item, "value") + projection_s(item, "query")
    assert least <= alone - waits <= 1.25 * least
    alone, waits = gathers(item)["layer backward"]
    assert waits == pytest.approx(0.0, abs=1e-9)
    assert alone > 0


def test_where_attention_runs_again_a_pass_back_hides_as_much_as_one_forward() -> None:
    found = gathers(predict(kept(), implementation="trainer"))
    forward, back = found["layer forward"], found["layer backward"]
    assert back[0] == pytest.approx(forward[0])
    assert back[1] == pytest.approx(forward[1], rel=0.05)


@pytest.mark.parametrize("plan", [PLAN, kept(), kept("qkv"), kept("qkv", "context")])
def test_nothing_is_gathered_more_often_and_all_waits_where_nothing_may_overlap(plan: Plan) -> None:
    waiting = replace(plan, overlap=replace(plan.overlap, weights=False))
    found, alone = gathers(predict(plan)), gathers(predict(waiting))
    for block, (time_s, waits_s) in alone.items():
        assert waits_s == pytest.approx(time_s)
        assert found[block][0] == pytest.approx(time_s)
        assert found[block][1] <= time_s * (1 + 1e-9)


def test_the_published_run_takes_as_long_as_predicted() -> None:
    # MaxText's pull request 4687: 8.83 s.
    assert predict(PLAN, implementation="trainer").step_time_s == pytest.approx(8.83, rel=0.02)


ON_SPARSE_CORES = {
    **LONG,
    "model": "llama3-8b",
    "machine": "tpu7x:4x4x4",
    "batch": 256,
    "sequence": 8192,
    "mesh": {
        "fsdp": {"size": 32, "torus": {"x": 4, "y": 4, "core": 2}},
        "context": {"size": 4, "torus": {"z": 4}},
    },
    "remat": "full",
}


def test_sparse_cores_move_keys_before_weights_and_their_gradients_beside_queries() -> None:
    """As in programs of llama3-8b and llama3-70b on tpu7x."""
    item = predict(plan_from_data(ON_SPARSE_CORES, "on SparseCores"), implementation="trainer")
    moved = [cost for cost in item.price.collectives if cost.task.purpose == "keys and values"]
    waits_s = sum(float(cost.exposed_s) for cost in moved)  # behind weights longer than they take
    assert waits_s < 0.7 * sum(float(cost.time_s) for cost in moved)
    for name in ("layer forward", "layer backward"):
        tasks = item.schedule.block(name).tasks
        names = [getattr(task, "name", "") for task in tasks]
        starts = [at for at, task in enumerate(tasks) if isinstance(task, Start)]
        keys = next(at for at in starts if names[at].startswith("gather v for"))
        assert keys < next(at for at, one in enumerate(names) if one.startswith("query"))
        assert names[keys + 1].startswith("gather weights")
    scatter, value, query = (names.index(one) for one in ("scatter d v", "value dW", "query dW"))
    assert scatter < query < value


def test_what_turns_queries_hides_keys_where_sparse_cores_lay_out_columns_first() -> None:
    item = predict(plan_from_data(ON_SPARSE_CORES, "columns"))
    turned_s = sum(
        float(cost.time_s)
        for cost in item.price.computes
        if cost.block == "layer forward" and cost.task.name.endswith("q turned")
    )
    alone_s, waits_s = gathers(item)["layer forward"]
    assert 0 < turned_s < alone_s
    assert alone_s - waits_s == pytest.approx(turned_s, rel=1e-6)
    # Two heads a column of the matrix unit: nothing is laid out first, queries hide more.
    wide = {**ON_SPARSE_CORES, "model": {"base": "llama3-8b", "heads": 16, "head_dim": 256}}
    by_head = predict(plan_from_data(wide, "by head"))
    alone_s, waits_s = gathers(by_head)["layer forward"]
    assert alone_s - waits_s > turned_s
