"""The plans of the compiled evidence: models of four families on five generations of TPU.

Each group is one model on one slice with one batch, in a dozen kinds of plan; plans that are not
legal for a model (heads that do not divide) are left out of its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardsim.errors import PlanError
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.layout import EMBED_SHARDED, SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data


@dataclass(frozen=True, kw_only=True)
class Group:
    """One model on one slice."""

    model: str
    machine: str
    batch: int
    sequence: int
    attention: str = "unfused"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """The model and the slice."""
        return f"{self.model} on {self.machine}"


GROUPS = (
    Group(model="vit-22b", machine="v4:8x8x16", batch=65536, sequence=256, optimizer="adafactor"),
    Group(model="maxtext-22b", machine="v4:4x4x4", batch=512, sequence=1024),
    Group(model="maxtext-16b", machine="v5e:16x16", batch=1536, sequence=2048),
    Group(model="vit-22b", machine="v5p:4x8x8", batch=16384, sequence=256),
    Group(model="llama2-70b", machine="v5p:8x8x8", batch=1024, sequence=4096, attention="flash"),
    Group(model="llama3-8b", machine="v6e:8x8", batch=256, sequence=8192, attention="flash"),
    Group(model="vit-22b", machine="v6e:16x16", batch=16384, sequence=256),
    Group(model="llama3-70b", machine="tpu7x:4x4x4", batch=256, sequence=8192, attention="flash"),
    Group(model="palm-8b", machine="v4:4x4x8", batch=512, sequence=2048),
    Group(model="vit-bigg", machine="v5e:8x8", batch=4096, sequence=256),
)

GROUPED = "a quarter of the layers keeps mlp_hidden"
CONTIGUOUS, STRIPED = {"order": "contiguous"}, {"order": "striped"}  # of causal models


def kinds(devices: int) -> dict[str, dict[str, Any]]:
    """Return the kinds of plan for a slice of `devices`, by name, what says most first."""

    def over(mesh: dict[str, int], residual: int = SEQUENCE_SHARDED, **more: Any) -> dict[str, Any]:
        return {"mesh": mesh, "rules": rules_data(mesh, residual=residual), **more}

    def sharded(**more: Any) -> dict[str, Any]:
        return over({"fsdp": devices}, **more)

    def over_32(**more: Any) -> dict[str, Any]:
        return over({"data": devices // 32, "fsdp": 32}, **more)

    def tensor(size: int, residual: str, matmul: str, **more: Any) -> dict[str, Any]:
        mesh = {"fsdp": devices // size, "model": size}
        how = SEQUENCE_SHARDED if residual == "seq" else EMBED_SHARDED
        return over(mesh, how, overlap={"matmul": matmul, "weights": True}, **more)

    return {
        "fsdp": sharded(),
        "data and fsdp": over_32(),
        "data and fsdp, fused attention": over_32(attention="flash"),
        "data and fsdp, fused attention, two groups of layers": over_32(
            attention="flash", remat=GROUPED
        ),
        "tensor 4, sequence": tensor(4, "seq", "bidirectional"),
        "tensor 4, embed": tensor(4, "embed", "bidirectional"),
        "partitioned, fsdp": sharded(execution="partitioned"),
        "context 4": over({"fsdp": devices // 4, "context": 4}, context=CONTIGUOUS),
        "context 4, striped": over({"fsdp": devices // 4, "context": 4}, context=STRIPED),
        "fsdp, no prefetch": sharded(overlap={"matmul": "off", "weights": False}),
        "tensor 8, sequence": tensor(8, "seq", "bidirectional"),
        "partitioned, tensor 4, embed": tensor(
            4, "embed", "bidirectional", execution="partitioned"
        ),
        "tensor 4, sequence, no overlap": tensor(4, "seq", "off"),
        "fsdp, 4 microbatches": sharded(microbatches=4),
        "tensor 8, embed": tensor(8, "embed", "bidirectional"),
        "tensor 4, sequence, one direction, 2 microbatches": tensor(
            4, "seq", "unidirectional", microbatches=2
        ),
        "2-D tensor": over({"fsdp": devices // 16, "model2": 4, "model": 4}),
        "tensor 16, embed": tensor(16, "embed", "bidirectional"),
        "tensor 4, sequence, 4 microbatches, dots": tensor(
            4, "seq", "bidirectional", microbatches=4, remat="dots_and_context"
        ),
        "fsdp, 4 microbatches, dots": sharded(microbatches=4, remat="dots_and_context"),
    }


def cases(group: Group) -> dict[str, Plan]:
    """Return the legal plans of a group, by kind."""
    machine = parse_machine(group.machine)
    model = load_model(group.model)
    layers = model.layers
    grouped = [
        {"layers": layers - layers // 4, "save": []},
        {"layers": layers // 4, "save": ["mlp_hidden"]},
    ]
    found = {}
    for kind, keys in kinds(machine.devices).items():
        if keys.get("attention") == group.attention:
            continue
        if "context" in keys and not model.causal:
            if keys["context"] == STRIPED:
                continue
            keys = {key: value for key, value in keys.items() if key != "context"}
        if keys.get("remat") == GROUPED:
            keys = {**keys, "remat": grouped}
        overlap = {"gradients": False, "dcn": False, **keys.get("overlap", {})}
        data = {
            "name": f"{group.name}: {kind}",
            "model": group.model,
            "machine": group.machine,
            "batch": group.batch,
            "sequence": group.sequence,
            "optimizer": group.optimizer,
            "attention": group.attention,
            "remat": "full",
            **keys,
            "overlap": overlap,
        }
        try:
            found[kind] = plan_from_data(data, group.name)
        except PlanError:
            continue
    return found
