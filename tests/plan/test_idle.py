"""No key of a plan file is silent: it changes a prediction or a program, is refused, or is said."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from building import decoder, vit

from shardsim.cost.predict import Prediction, predict
from shardsim.emit import plan_data
from shardsim.errors import PlanError
from shardsim.machine import parse_machine
from shardsim.model import Experts
from shardsim.plan import Plan, resolve
from shardsim.plan.io import KEYS, parse_lengths
from shardsim.plan.legality import check
from shardsim.plan.lengths import Lengths
from shardsim.plan.plan import Context, Overlap, Routing
from shardsim.plan.precision import Precision
from shardsim.planner.changes import changed
from shardsim.planner.presets import plan_of_mesh

# What says which step it is, and what is tried elsewhere (meshes, models) or changes words alone.
STEPS = {"name", "note", "model", "machine", "batch", "sequence", "mesh", "rules", "op_costs"}

CHANGES: dict[str, Any] = {
    "remat": "none",
    "microbatches": 2,
    "optimizer": "sgd",
    "attention": "unfused",
    "fused_projections": True,
    "pipeline_schedule": "gpipe",
    "pipeline_interleave": 2,
    "stage_layers": [3, 1],
    "accumulation": "layered",
    "vocab_tiles": 2,
    "offload_optimizer": True,
    "offload_parameters": True,
    "execution": "partitioned",
    "compiler_options": {"xla_tpu_scoped_vmem_limit_kib": 65536},
    "lengths": {"distribution": "constant", "mean": 100},
    "forward_only": True,
    "overlap.matmul": "unidirectional",
    "overlap.weights": False,
    "overlap.gradients": False,
    "overlap.dcn": True,
    "precision.compute": "int8",
    "precision.parameters": "bf16",
    "precision.reduce": "f32",
    "precision.gradients": "bf16",
    "precision.state": "bf16",
    "precision.master": "f32",
    "precision.weights": "int8",
    "precision.scales": "static",
    "precision.bf16": ["head"],
    "precision.sparsity": "2:4",
    "experts.exchange": "ring",
    "experts.imbalance": 1.5,
    "experts.padding": 3.0,
    "context.keys": "ring",
    "context.order": "striped",
    "context.overlap": False,
}
MIXED = {"layers": 4, "sequence": 256}
BASES = {
    "alone": plan_of_mesh(vit(layers=4), parse_machine("v5e:1x1"), 16),
    "images": plan_of_mesh(vit(layers=4), parse_machine("v5e:2x4"), 64, {"fsdp": 8}),
    "copies": plan_of_mesh(decoder(layers=4), parse_machine("v5e:2x4"), 64, {"data": 8}),
    "tensor": plan_of_mesh(
        decoder(layers=4), parse_machine("v5e:2x4"), 64, {"fsdp": 2, "tensor": 4}
    ),
    "context": plan_of_mesh(
        decoder(layers=4), parse_machine("v5e:2x4"), 64, {"fsdp": 2, "context": 4}
    ),
    "stages": plan_of_mesh(
        decoder(layers=4), parse_machine("v5e:2x4"), 64, {"fsdp": 4, "pipeline": 2}
    ),
    "experts": plan_of_mesh(
        decoder(**MIXED, experts=Experts(number=8, top_k=2, mlp=512)),
        parse_machine("v5e:2x4"),
        64,
        {"fsdp": 2, "expert": 4},
    ),
    "experts at home": plan_of_mesh(
        decoder(**MIXED, experts=Experts(number=8, top_k=2, mlp=512)),
        parse_machine("v5e:2x4"),
        64,
        {"fsdp": 8},
    ),
    "places": plan_of_mesh(
        decoder(**MIXED, experts=Experts(number=8, top_k=2, mlp=512, capacity=1.25)),
        parse_machine("v5e:2x4"),
        64,
        {"fsdp": 2, "expert": 4},
    ),
    "GPUs": plan_of_mesh(decoder(layers=4), parse_machine("h100:8"), 64, {"fsdp": 8}),
}
BASES["stages"] = changed(BASES["stages"], {"pipeline_schedule": "gpipe"})
BASES["forward"] = changed(BASES["images"], {"forward_only": True})
BASES["adafactor"] = changed(BASES["images"], {"optimizer": "adafactor"})


def test_every_key_of_a_plan_file_is_tried() -> None:
    parts = {"overlap": Overlap, "precision": Precision, "experts": Routing, "context": Context}
    keys = {*KEYS} - STEPS - parts.keys()
    keys |= {f"{key}.{field.name}" for key, form in parts.items() for field in fields(form)}
    assert keys == CHANGES.keys()


def numbers(item: Prediction) -> Any:
    """Return all that a prediction says of a step but words."""
    return item.step_time_s, item.hbm, item.collectives, item.real and item.real.padding_share


def program(plan: Plan) -> Any:
    """Return what is emitted, without what no program reads there, or why nothing is."""
    try:
        data = plan_data(plan)
    except PlanError as refused:
        return str(refused)
    if not resolve(plan).names["expert"]:
        del data["plan"]["padding"]
    if data["plan"]["residual"] == "replicated" or not resolve(plan).names["tensor"]:
        data["plan"]["matmul"] = "off"
    return data


@pytest.mark.parametrize("name", BASES)
def test_what_a_key_changes_is_seen_or_said(name: str) -> None:
    base = BASES[name]
    before = numbers(predict(base)), program(base)
    for key, value in CHANGES.items():
        rest = key.partition(".")[2]
        try:
            plan = changed(base, {key: value})
            check(plan, resolve(plan))
            found = predict(plan)
        except PlanError:  # one line that says why
            continue
        if plan == base or (numbers(found), program(plan)) != before:
            continue
        # To turn off what is not there promises nothing.
        said = any(text.startswith((f"{key} ", f"{rest or key} ")) for text in found.warnings)
        assert said or value is False, key


def test_blocks_of_a_kernel_of_tpus_are_none_of_a_gpu() -> None:
    found = predict(changed(BASES["GPUs"], {"attention": "flash-2048"}))
    assert numbers(found) == numbers(predict(changed(BASES["GPUs"], {"attention": "flash"})))
    assert any(text.startswith("attention flash-2048 ") for text in found.warnings)


def test_a_key_that_does_something_is_not_said_to_do_nothing() -> None:
    for key, value, name in (
        ("pipeline_schedule", "gpipe", "stages"),
        ("overlap.matmul", "unidirectional", "tensor"),
        ("experts.padding", 3.0, "experts"),
        ("optimizer", "sgd", "copies"),
        ("compiler_options", {"xla_tpu_scoped_vmem_limit_kib": 65536}, "copies"),
    ):
        found = predict(changed(BASES[name], {key: value}))
        assert not [text for text in found.warnings if "changes nothing" in text]


@pytest.mark.parametrize(
    ("shares", "said"), [((0.5, 0.5), False), ((0.3, 0.3), True), ((300, 700), True)]
)
def test_shares_of_lengths_that_add_up_to_something_else_are_said(shares, said) -> None:
    lines = [[64, shares[0]], [128, shares[1]]]
    lengths = parse_lengths({"histogram": lines}, "")
    assert isinstance(lengths, Lengths)
    found = predict(changed(BASES["copies"], {"lengths": {"histogram": lines}}))
    assert any(f"add up to {sum(shares):g}" in text for text in found.warnings) == said
