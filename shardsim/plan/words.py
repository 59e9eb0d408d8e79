"""A plan in words: its mesh and its techniques, each in one line."""

from __future__ import annotations

from shardsim.plan.plan import Plan
from shardsim.plan.resolve import resolve
from shardsim.plan.split import state_apart


def mesh_text(plan: Plan) -> str:
    """Return the mesh in one line: `data=128 (x8 z16), model=8 (y8)`."""
    parts = []
    for axis in plan.mesh:
        torus = " ".join(f"{name}{size}" for name, size in axis.torus.items())
        parts.append(f"{axis.name}={axis.size}" + (f" ({torus})" if torus else ""))
    return ", ".join(parts)


def techniques(plan: Plan) -> str:
    """Return what the plan does besides its mesh, in a few words."""
    parts = [f"remat {plan.remat.name}", f"{plan.microbatches} microbatch"]
    parts[1] += "es" if plan.microbatches > 1 else ""
    if plan.accumulation != "repeated":
        parts.append(f"accumulation {plan.accumulation}")
    if resolve(plan).names["pipeline"]:
        chunks = plan.pipeline_interleave
        parts.append(f"stages {plan.pipeline_schedule}" + (f", {chunks} chunks" * (chunks > 1)))
    tensor = plan.parameters.get("heads", ())
    if tensor:
        parts.append(f"collective matmul {plan.overlap.matmul}")
        split = [name for name in ("seq", "embed") if tensor[0] in plan.activations.get(name, ())]
        parts.append(f"residual split on {split[0]}" if split else "residual replicated")
    if plan.parameters.get("embed"):
        parts.append("weights prefetched" if plan.overlap.weights else "weights not prefetched")
    if state_apart(plan.model, resolve(plan)):
        parts.append("optimizer state split over data")
    if context := context_text(plan):
        parts.append(context)
    return ", ".join(parts)


def context_text(plan: Plan) -> str:
    """Return how a context axis attends, unless keys of contiguous tokens are gathered."""
    context, layout = plan.context, resolve(plan)
    words = {
        "ring": "keys pass round",
        "ulysses": "heads for tokens",
        "dsp": "locations for frames",
    }.get(context.keys, "")
    words += "" if context.overlap else ", not overlapped"
    striped = "striped tokens" if layout.striped else ""
    return ", ".join(filter(None, (words, striped)))


def hosted_text(plan: Plan) -> str:
    """Return what besides activations lies in the host's memory: "optimizer state, parameters"."""
    there = ("optimizer state", plan.offload_optimizer), ("parameters", plan.offload_parameters)
    return ", ".join(what for what, away in there if away)
