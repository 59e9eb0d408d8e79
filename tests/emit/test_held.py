"""What is predicted to be held is what the emitted step holds, and what is legal can be emitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from building import MODELS as ROUND_MODELS
from building import decoder, vit
from building import plans as drawn_plans
from hypothesis import given, settings

from plans import EXPERTS, PLANS, make
from shardsim.cost.predict import predict
from shardsim.emit import export_plan
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, load_plan, plan_names, resolve
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.split import state_apart
from shardsim.planner.search import search

# Sizes that not every mesh divides; layers enough for a factored moment of vectors.
MODELS = (
    *ROUND_MODELS,
    decoder(vocab=2047, kv_heads=4, head_dim=128),
    decoder(heads=12, kv_heads=6, embed=1000, layers=128, gated_mlp=True),
    vit(embed=24, heads=48, kv_heads=48, head_dim=32, pooling="map", classes=10),
)
# Why a legal plan is not emitted (docs/running.md).
REFUSALS = (
    "export of 1f1b is not supported",
    "export of zb-h1 is not supported",
    "is not supported; choose f32 or bf16",
    "export needs one to divide the other",
    "forward_only: export of True is not supported",
    "model: export of ",  # what shipped models have that the step does not
    "precision.sparsity: export of ",
    "lengths",
)


@pytest.fixture(scope="module")
def generated() -> list[Plan]:
    """Return legal plans, drawn once, and with optimizer state over every data axis."""
    found: list[Plan] = []

    @settings(max_examples=160, database=None)
    @given(drawn_plans(models=MODELS))
    def draw(plan: Plan) -> None:
        found.append(plan)

    draw()
    zero = [plan for plan in found if "d" in (axis.name for axis in plan.mesh)]
    return found + [replace(plan, optimizer_rules={"embed": ("d",)}) for plan in zero]


def emitted(plans: Sequence[Plan]) -> list[tuple[Plan, dict[str, Any]]]:
    """Return the plans that can be emitted, with their data; check why others cannot."""
    found, refused = [], []
    for plan in plans:
        try:
            found.append((plan, plan_data(plan)))
        except PlanError as error:
            refused.append(str(error))
    assert not [text for text in refused if not any(words in text for words in REFUSALS)]
    return found


def held(datas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what `run_held.py` finds, in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("run_held.py"))],
        input=json.dumps(datas),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_predicted_state_is_what_the_emitted_step_holds(generated: list[Plan]) -> None:
    offered = [item.plan for item in search("vit-e", "v4:8x8x8", 16384).predictions]
    pairs = emitted(
        [*generated, *PLANS.values(), *EXPERTS.values(), *map(load_plan, plan_names()), *offered]
    )
    assert len(pairs) > 100
    # Among them is everything that can go wrong.
    assert {plan.optimizer for plan, _ in pairs} == set(OPTIMIZERS)
    assert {plan.precision.parameters for plan, _ in pairs} == {"f32", "bf16"}
    split = [(plan, resolve(plan)) for plan, _ in pairs]
    for apart in (False, True):
        assert any(
            layout.optimizer_over_data and bool(state_apart(plan.model, layout)) == apart
            for plan, layout in split
        )
    assert any(plan.model.kv_heads % int(layout.tensor.size) for plan, layout in split)
    assert any(plan.model.vocab % int(layout.tensor.size) for plan, layout in split)
    for (plan, _), found in zip(pairs, held([data for _, data in pairs]), strict=True):
        hbm = predict(plan).hbm
        assert hbm["parameters_bytes"] == found["parameters"], plan
        assert hbm["optimizer_bytes"] == found["optimizer"], plan
        # Counters of steps, and what stands for a moment that another array holds.
        assert found["counters"] <= 4 * (2 + 3 * len(plan.model.tensors))


def test_weights_in_bf16_have_float32_moments_before_and_after_a_step() -> None:
    precision = {"compute": "bf16", "parameters": "bf16", "reduce": "bf16"}
    plans = [
        make("gpt", {"data": 8}, {}, {"batch": ["data"]}, optimizer=name, precision=precision)
        for name in OPTIMIZERS
    ]
    for plan, found in zip(
        plans, held([plan_data(plan) | {"step": True} for plan in plans]), strict=True
    ):
        assert found["before"] == found["after"]
        assert found["optimizer"] == predict(plan).hbm["optimizer_bytes"]


def test_what_is_legal_is_emitted_with_exact_splits(generated: list[Plan]) -> None:
    for plan, data in emitted(generated):
        sizes = {axis.name: axis.size for axis in plan.mesh}
        for entry in data["parameters"].values():
            for key in ("spec", "optimizer_spec"):
                assert len(entry[key]) == len(entry["shape"])
                used = [name for axes in entry[key] for name in axes]
                assert len(used) == len(set(used))
                for size, axes in zip(entry["shape"], entry[key], strict=True):
                    for name in axes:
                        assert size % sizes[name] == 0
                        size //= sizes[name]
        assert json.loads(export_plan(plan, "json")) == data
