"""Whatever a file holds: a result, or a `ShardsimError` of one line; nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_cases import places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import ShardsimError
from shardsim.files import read_yaml
from shardsim.model import load_model, parameters
from shardsim.plan.io import plan_from_data, plan_to_data
from shardsim.planner.changes import changed
from shardsim.validate.runs import PUBLISHED, validate_data

PLAN: dict[str, Any] = {
    "name": "tiny",
    "model": {"base": "vit-22b", "layers": 8, "name": "tiny"},
    "machine": "2*v4:4x4x4",
    "batch": 4096,
    "sequence": 256,
    "mesh": {
        "data": {"size": 2, "torus": {"dcn": 2}},
        "fsdp": {"size": 16, "torus": {"x": 4, "z": 4}},
        "model": {"size": 4, "torus": {"y": 4}},
    },
    "rules": {
        "parameters": {"embed": ["fsdp"], "heads": ["model"], "mlp": ["model"]},
        "activations": {"batch": ["data", "fsdp"], "heads": ["model"], "mlp": ["model"]},
        "optimizer": {"embed": ["data"]},
    },
    "remat": {"save": ["qkv", "mlp_hidden"], "offload": ["context"]},
    "microbatches": 2,
    "overlap": {"matmul": "bidirectional", "weights": True, "gradients": True, "dcn": False},
    "precision": {"compute": "bf16", "parameters": "f32", "reduce": "bf16"},
    "optimizer": "adamw",
    "attention": "flash",
    "fused_projections": True,
    "pipeline_interleave": 1,
}

WORDS = st.sampled_from(
    ["", "x", "data", "model", "fsdp", "none", "full", "v4:4x4x4", "v5e:16x16", "8*h100:8",
     "embed", "batch", "seq", "layers", "vit-22b", "llama3-8b", "off", "\x1b[31m\n", "\x00",
     "é" * 9, "a" * 5000, "\udcff", "{}", "%s", "stage", "../x", "16x16", "v5litepod-256"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([0, 1, 2, 4, 8, 16, 256, 4096, 10**6, 10**9, 2**63, 10**40, -(2**70)]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORDS, NUMBERS), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutations(draw: st.DrawFn, base: Any) -> Any:
    """Return `base` with up to three entries replaced, removed or added."""
    data = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        options = places(data)
        if not options:
            break
        *path, last = draw(st.sampled_from(options))
        inside = data
        for step in path:
            inside = inside[step]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if how == "replace":
            inside[last] = draw(JUNK)
        elif how == "remove":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(st.one_of(WORDS, NUMBERS))] = draw(JUNK)
        else:
            inside.append(draw(JUNK))
    return data


relaxed = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """Return what the call returns and "", or None and the message of its `ShardsimError`."""
    try:
        return function(*args), ""
    except ShardsimError as error:
        return None, str(error)


def check_prediction(plan: Any) -> None:
    item = predict(plan)
    numbers = [item.step_time_s, item.mfu, item.hfu, *item.time.values(), *item.hbm.values()]
    assert all(math.isfinite(number) for number in numbers)
    assert item.step_time_s > 0


def test_the_plan_itself_is_good() -> None:
    check_prediction(plan_from_data(PLAN, "tiny.yaml"))


@relaxed
@given(mutations(PLAN))
def test_mutated_plans(data: Any) -> None:
    plan, why = attempt(plan_from_data, data, "tiny.yaml")
    if plan is None:
        assert why.startswith("tiny.yaml: ")
        return
    check_prediction(plan)
    assert plan_from_data(plan_to_data(plan), "again") == plan


@relaxed
@given(JUNK)
def test_junk_is_no_plan(data: Any) -> None:
    with pytest.raises(ShardsimError):
        plan_from_data(data, "tiny.yaml")


KEYS = st.sampled_from(
    ["batch", "mesh", "mesh.model", "mesh.model.size", "mesh.fsdp", "rules", "rules.parameters",
     "rules.parameters.embed", "rules.activations.seq", "model", "model.layers", "model.name",
     "model.biases", "model.biases.qkv", "model.x", "chip.link_bytes_per_s", "chip.hop_latency_s",
     "chip.peak_flops.bf16", "chip.peak_flops", "chip", "chip.", "machine", "remat", "remat.save",
     "overlap", "overlap.matmul", "overlap.weights", "precision.compute", "name", "name.x", "",
     "note", "sequence", "microbatches", "pipeline_interleave", "chip.matmul_efficiency"]
)  # fmt: skip


@relaxed
@given(st.dictionaries(KEYS, JUNK, min_size=1, max_size=2))
def test_changes_of_a_plan(changes: dict[str, Any]) -> None:
    plan = plan_from_data(PLAN, "tiny.yaml")
    other, _ = attempt(changed, plan, changes)
    if other is not None:
        check_prediction(other)


MODEL = {**load_model("vit-22b").to_mapping(), "base": "vit-22b"}


@relaxed
@given(mutations(MODEL))
def test_mutated_models(data: Any) -> None:
    model, _ = attempt(load_model, data)
    if model is None:
        return
    assert parameters(model)
    assert load_model(model.to_mapping()) == model


ROWS = read_yaml(PUBLISHED)["runs"]


@relaxed
@given(st.sampled_from(ROWS).flatmap(lambda row: mutations({"runs": [row]})))
def test_mutated_runs(data: Any) -> None:
    result, why = attempt(validate_data, data, "runs.yaml")
    if result is None:
        assert why.startswith("runs.yaml: ")
        return
    for row in result.rows:
        assert row.predicted is not None
        assert math.isfinite(row.predicted)
    for _, why in result.failed:
        assert why
