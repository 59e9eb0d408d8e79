"""Plans of small ViTs for host devices: those that are timed, and the one that calibration learns
from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardsim.machine import Machine
from shardsim.plan import Overlap, Plan, plan_from_data
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data

# Host devices share the cores that move their data, so nothing runs beside a collective.
NO_OVERLAP = Overlap(matmul="off", weights=False, gradients=False)

DEVICES = 8  # that the plans below are for
_MODEL = {
    "name": "vit-small-host",
    "family": "vit",
    "layers": 4,
    "embed": 256,
    "heads": 8,
    "patch": 4,
    "image": 32,
    "pooling": "mean",
    "classes": 16,
    "parallel_block": True,
}
_LEARNED = _MODEL | {
    "name": "vit-learned-host",
    "layers": 3,
    "embed": 384,
    "heads": 6,
    "image": 24,
    "parallel_block": False,
}


def measured_plans(machine: Machine) -> list[Plan]:
    """Return plans of a small ViT for eight devices that differ in work and in what they move."""
    eight, wide, square = {"fsdp": 8}, {"fsdp": 4, "model": 2}, {"fsdp": 2, "model": 4}
    data, tensor = {"data": 8}, {"model": 8}
    table: dict[str, tuple[dict[str, int], int, dict[str, Any]]] = {
        "data, 16 images": (data, REPLICATED, {"batch": 16}),
        "data": (data, REPLICATED, {}),
        "data, 64 images": (data, REPLICATED, {"batch": 64}),
        "data, nothing kept": (data, REPLICATED, {"remat": "full"}),
        "fsdp": (eight, REPLICATED, {}),
        "fsdp, 64 images, nothing kept": (eight, REPLICATED, {"batch": 64, "remat": "full"}),
        "fsdp, four microbatches": (eight, REPLICATED, {"microbatches": 4}),
        "fsdp and tensor 2": (wide, SEQUENCE_SHARDED, {}),
        "fsdp and tensor 4": (square, SEQUENCE_SHARDED, {}),
        "fsdp and tensor 4 on embed": (square, EMBED_SHARDED, {}),
        "fsdp and tensor 4, whole residual": (square, REPLICATED, {}),
        "tensor 8": (tensor, SEQUENCE_SHARDED, {}),
        "tensor 8, 64 images, nothing kept": (
            *(tensor, SEQUENCE_SHARDED),
            {"batch": 64, "remat": "full"},
        ),
        "tensor 8, whole residual": (tensor, REPLICATED, {"batch": 16}),
    }
    return [_plan(machine, name, *chosen) for name, chosen in table.items()]


def learned_plan(machine: Machine) -> Plan:
    """Return a plan of another small ViT than the timed ones, whose weights are gathered and whose
    gradients are scattered."""
    more = {"model": _LEARNED, "batch": 3 * machine.devices}
    return _plan(machine, "gathered", {"fsdp": machine.devices}, REPLICATED, more)


def _plan(
    machine: Machine, name: str, mesh: dict[str, int], residual: int, more: dict[str, Any]
) -> Plan:
    plan = plan_from_data(
        {
            "name": name,
            "model": _MODEL,
            "machine": machine.name,
            "batch": 32,
            "mesh": mesh,
            "rules": rules_data(mesh, residual=residual),
            "precision": {"compute": "f32", "reduce": "f32"},
            "attention": "unfused",
            "remat": "none",
            **more,
        },
        name,
        machine=machine,
    )
    return replace(plan, overlap=NO_OVERLAP)
