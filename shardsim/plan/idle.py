"""Keys of a plan that change nothing there: said, since whoever set them expects otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from shardsim.plan.layout import REPLICATED, Layout
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import Plan, Routing
from shardsim.plan.precision import DTYPE_BYTES, Precision
from shardsim.plan.remat import Remat

SUM_OF_SHARES = 0.01  # so far from one a histogram's shares may add up by rounding


def idle_keys(plan: Plan, layout: Layout) -> tuple[str, ...]:
    """Return a line for each key that says other than the usual and changes no prediction and no
    program, with why: "pipeline_interleave 2 changes nothing: no axis splits layers into stages".

    Keys that no axis of their own goes with are refused where they are read (`context`), and so are
    those that contradict others; these are left in plans that are tried with many meshes.
    """
    return tuple(f"{key} {value} changes nothing: {why}" for key, value, why in _idle(plan, layout))


def _idle(plan: Plan, layout: Layout) -> Iterator[tuple[str, object, str]]:
    if int(layout.pipeline.size) == 1:
        why = "no mesh axis splits layers into stages"
        if plan.pipeline_schedule != "1f1b":
            yield "pipeline_schedule", plan.pipeline_schedule, why
        if plan.pipeline_interleave > 1:
            yield "pipeline_interleave", plan.pipeline_interleave, why
        if plan.stage_layers:
            yield "stage_layers", list(plan.stage_layers), why
    one_way = plan.overlap.matmul == "unidirectional"
    if one_way and (int(layout.tensor.size) == 1 or int(layout.residual) == REPLICATED):
        yield "overlap.matmul", plan.overlap.matmul, "there are no collective matmuls"
    if plan.overlap.dcn and plan.machine.slices == 1:
        yield "overlap.dcn", "true", "there is one slice"
    if plan.vocab_tiles > 1 and not plan.model.vocab:
        yield "vocab_tiles", plan.vocab_tiles, f"{plan.model.name} has no vocabulary"
    if plan.compiler_options and plan.machine.chip.kind != "tpu" and not plan.forward_only:
        names = ", ".join(sorted(plan.compiler_options))
        yield "compiler_options", names, f"{plan.machine.chip.name} is no TPU"
    if plan.attention == "flash-2048" and plan.machine.chip.kind == "gpu":
        yield "attention", plan.attention, f"{plan.machine.chip.name}'s kernel has its own blocks"
    yield from _of_experts(plan, layout)
    yield from _of_state(plan)
    if plan.forward_only:
        yield from _of_training(plan)
        if plan.execution != "explicit" and int(layout.tensor.size) == 1:
            yield "execution", plan.execution, "a forward pass has no program"


def _of_experts(plan: Plan, layout: Layout) -> Iterator[tuple[str, object, str]]:
    experts = plan.model.experts
    if experts is None:
        return
    why = ""
    if not experts.dropless:
        why = "experts have as many places as their capacity says"
    elif int(layout.expert.size) == 1:
        why = "no expert axis splits them, and no device waits for another's"
    for key in ("imbalance", "padding"):
        value = getattr(plan.experts, key)
        if why and value != getattr(Routing(), key):
            yield f"experts.{key}", value, why


def _of_state(plan: Plan) -> Iterator[tuple[str, object, str]]:
    """Yield the format of moments, where none is wider."""
    state = plan.precision.state
    widest = max(OPTIMIZERS[plan.optimizer].moments, default=0.0)
    if state and not plan.forward_only and widest <= DTYPE_BYTES[state] < DTYPE_BYTES["f32"]:
        yield "precision.state", state, f"{plan.optimizer} keeps no moment that is wider"


def _of_training(plan: Plan) -> Iterator[tuple[str, object, str]]:
    """Yield what only a backward pass and an update read."""
    why = "nothing is trained (forward_only)"
    for key in ("reduce", "gradients", "state", "master"):
        value = getattr(plan.precision, key)
        if value != getattr(Precision(), key):
            yield f"precision.{key}", value, why
    if plan.remat != Remat():
        yield "remat", "of layers", why
    for key, usual in (
        ("optimizer", "adamw"),
        ("accumulation", "repeated"),
        ("offload_optimizer", False),
    ):
        if (value := getattr(plan, key)) != usual:
            yield key, str(value).lower(), why
    if plan.compiler_options:
        yield "compiler_options", ", ".join(sorted(plan.compiler_options)), "it has no program"
    if plan.optimizer_rules:
        yield "rules.optimizer", ", ".join(plan.optimizer_rules), why


def shares_told(plan: Plan) -> tuple[str, ...]:
    """Return what shares of lengths add up to, where it is not one."""
    lines = plan.lengths.histogram if plan.lengths else ()
    total = sum(share for _, share in lines)
    if not lines or abs(total - 1.0) <= SUM_OF_SHARES:
        return ()
    return (f"lengths.histogram: shares add up to {total:g}, and count as parts of that",)
