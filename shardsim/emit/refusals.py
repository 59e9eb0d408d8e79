"""Plans that have no emitted program: each refused in one line that names the key."""

from __future__ import annotations

from typing import Any

from shardsim.errors import PlanError
from shardsim.model import Experts, Model
from shardsim.plan import Plan
from shardsim.plan.layout import Layout

FORMATS = ("f32", "bf16")
# Options of a model that the emitted code has only as they are here.
UNSUPPORTED: dict[str, Any] = {
    "branch": 0,
}


def refuse(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot do."""
    _refuse_lengths(plan, layout)
    for part in plan.model.parts:
        _refuse_part(plan, part.model, layout)
    if len(plan.model.parts) > 1 and plan.execution != "explicit":
        raise PlanError(
            f"execution: export of a model of several stacks as {plan.execution} is not supported; "
            "use explicit"
        )
    _refuse_conditions(plan, layout)
    _refuse_stages(plan, layout)
    _refuse_host(plan, layout)
    _refuse_numbers(plan)
    _refuse_tokens(plan)


def _refuse_lengths(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot do with sequences of many lengths."""
    if plan.lengths is None:
        return
    if plan.lengths.unpadded:
        raise PlanError(
            "lengths.as: export of unpadded is not supported, as arrays have fixed shapes; use "
            "packed"
        )
    if not plan.model.vocab or plan.model.positions not in ("rotary", "none"):
        raise PlanError(
            "lengths: export is supported for decoders with rotary positions or none, whose "
            "attention has only distances; leave lengths out"
        )
    if layout.layered or layout.lockstep:
        raise PlanError(
            "lengths: export of layers that run all microbatches before the next, or that lie on "
            "stages, is not supported; leave lengths out"
        )
    if plan.execution != "explicit" or int(layout.context.size) > 1:
        raise PlanError(
            "lengths: export is supported for execution: explicit without a context axis"
        )
    if plan.machine.chip.kind == "gpu":
        raise PlanError("lengths: export for GPUs is not supported; leave lengths out")


def _refuse_stages(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for stages and microbatches that the emitted code does not run so."""
    if int(layout.pipeline.size) > 1 and not layout.lockstep:
        raise PlanError(
            f"pipeline_schedule: export of {plan.pipeline_schedule} is not supported: all stages "
            f"run one program, in ticks; use {plan.pipeline_schedule}-ticks"
        )
    if layout.split_backward and int(layout.tensor2.size) > 1:
        raise PlanError(
            f"pipeline_schedule: export of {plan.pipeline_schedule} beside a second tensor axis is "
            "not supported; use 1f1b-ticks"
        )
    if plan.stage_layers:
        raise PlanError(
            "stage_layers: export of stages that are not alike is not supported: all run one "
            "program; leave it out"
        )
    if plan.execution != "explicit":
        for what, there in (
            ("pipeline stages", int(layout.pipeline.size) > 1),
            (f"accumulation: {plan.accumulation}", plan.accumulation != "repeated"),
        ):
            if there:
                raise PlanError(
                    f"execution: export of {what} as {plan.execution} is not supported; use "
                    "explicit"
                )


def _refuse_numbers(plan: Plan) -> None:
    """Raise `PlanError` for formats, tiles and passes that the emitted code does not have."""
    for key in ("compute", "parameters", "reduce"):
        if (value := getattr(plan.precision, key)) not in FORMATS:
            raise PlanError(
                f"precision.{key}: export of {value} is not supported; choose f32 or bf16"
            )
    for key, value, usual in (
        ("forward_only", plan.forward_only, False),
        ("vocab_tiles", plan.vocab_tiles, 1),
        ("precision.gradients", plan.precision.gradients, ""),
        ("precision.state", plan.precision.state, ""),
        ("precision.master", plan.precision.master, ""),
        ("precision.sparsity", plan.precision.sparsity, ""),
    ):
        if value != usual:
            raise PlanError(f"{key}: export of {value} is not supported; leave it out")


def _refuse_tokens(plan: Plan) -> None:
    """Raise `PlanError` for a sequence that the model's images or positions do not have."""
    model = plan.model
    if model.patch and plan.sequence != model.image_tokens:
        raise PlanError(
            f"sequence: {plan.sequence} is not the {model.image_tokens} tokens that an image of "
            f"{model.name} has; leave the key out, or change the model's image and patch"
        )
    if model.positions == "learned" and plan.sequence > (model.image_tokens or model.sequence):
        raise PlanError(
            f"sequence: {plan.sequence} is longer than the {model.sequence} learned positions of "
            f"{model.name}"
        )


def _refuse_host(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot keep in the host's memory."""
    if not plan.offload_parameters:
        return
    for what, there in (
        ("over pipeline stages", int(layout.pipeline.size) > 1),
        ("of several stacks", len(plan.model.parts) > 1),
        (f"as {plan.execution}", plan.execution != "explicit"),
    ):
        if there:
            raise PlanError(f"offload_parameters: export {what} is not supported; leave it out")


def _refuse_part(plan: Plan, model: Model, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot do of one stack."""
    if model.experts:
        _refuse_experts(plan, model.experts, layout)
    if model.latent and plan.execution != "explicit":
        raise PlanError(
            f"execution: export of latent attention as {plan.execution} is not supported; use "
            "explicit"
        )
    if model.index:
        _refuse_index(plan, layout)
    if model.delta and (plan.execution != "explicit" or plan.lengths):
        raise PlanError(
            "model: export of linear attention is supported as explicit, without lengths"
        )
    axes = max(int(layout.tensor2.size), int(layout.pipeline.size))
    if model.chunked and plan.machine.chip.kind == "gpu":
        raise PlanError(
            "model: export of attention in chunks for GPUs is not supported; use chunked: false"
        )
    if model.lora and (plan.execution != "explicit" or axes > 1):
        raise PlanError(
            "model: export of lora is supported as explicit, without a second tensor axis or stages"
        )
    if model.positions == "relative" and int(layout.pipeline.size) > 1:
        raise PlanError("mesh: export of relative positions over pipeline stages is not supported")
    if model.parallel_norms and plan.activations.get("embed"):
        raise PlanError(
            "rules.activations: export of parallel_norms with a residual stream split along embed "
            "is not supported: the compiler makes the sums of both norms at once; leave embed out"
        )
    for key, usual in UNSUPPORTED.items():
        if (value := getattr(model, key)) != usual:
            shown = "" if usual is None else f": {str(value).lower()}"
            raise PlanError(f"model: export of {key}{shown} is not supported; leave it out")
    tensor, tensor2 = int(layout.tensor.size), int(layout.tensor2.size)
    local = model.kv_heads // min(model.kv_heads, tensor)
    if model.kv_heads % tensor and tensor % model.kv_heads:
        raise PlanError(
            f"mesh: {model.kv_heads} key-value heads and a tensor axis of {tensor}: export needs "
            "one to divide the other"
        )
    if local % tensor2 and tensor2 % local:
        raise PlanError(
            f"mesh: {local} key-value heads on a device and a second tensor axis of {tensor2}: "
            "export needs one to divide the other"
        )


def _refuse_index(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code of an index of tokens, whose weights have no
    gradient, cannot do."""
    accumulation = plan.accumulation
    for key, what, there, instead in (
        ("mesh", "over a context axis", int(layout.context.size) > 1, "split batch instead"),
        ("mesh", "over pipeline stages", int(layout.pipeline.size) > 1, "split batch instead"),
        ("accumulation", f"as {accumulation}", accumulation != "repeated", "use repeated"),
        ("model", "in a parallel block", plan.model.parallel_block, "use parallel_block: false"),
        ("offload_parameters", "in the host's memory", plan.offload_parameters, "leave it out"),
        ("lengths", "of rows of several sequences", plan.lengths is not None, "leave it out"),
        ("machine", "for GPUs", plan.machine.chip.kind == "gpu", "choose a slice of TPUs"),
    ):
        if there:
            raise PlanError(
                f"{key}: export of an index of tokens {what} is not supported; {instead}"
            )


def _refuse_conditions(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code of conditions, predictions and norms over all
    heads cannot do."""
    model, tensor = plan.model, int(layout.tensor.size)
    if model.sinks and plan.context.keys != "gathered" and int(layout.context.size) > 1:
        raise PlanError(
            f"context.keys: export of sinks with keys {plan.context.keys} is not supported; use "
            "gathered"
        )
    if model.sinks and model.latent:
        raise PlanError("model: export of sinks of latent attention is not supported; use false")
    if model.qk_norm_over == "heads" and (model.kv_heads % tensor or model.latent):
        raise PlanError(
            f"mesh: export of norms over all of {model.kv_heads} key-value heads, which a tensor "
            f"axis of {tensor} does not split, is not supported"
        )
    for what, has in (
        ("modulation", model.modulation != "none"),
        ("predicts", model.predicts > 0),
        ("prompt", model.prompt > 0),
        ("attends", bool(model.attends)),
        ("qk_norm_over: heads", model.qk_norm_over == "heads"),
        ("layer_scale", model.layer_scale),
        ("registers", model.registers > 0),
        ("sinks", model.sinks),
        ("sub_norms", model.sub_norms),
        ("patch_norms", model.patch_norms),
        ("deepnorm", model.deepnorm > 0),
    ):
        if has and plan.execution != "explicit":
            raise PlanError(
                f"execution: export of {what} as {plan.execution} is not supported; use explicit"
            )
        if has and int(layout.tensor2.size) > 1:
            raise PlanError(
                f"mesh: export of {what} over a second tensor axis is not supported; name one axis "
                "for heads or embed in rules.activations"
            )
        if has and int(layout.pipeline.size) > 1:
            raise PlanError(f"mesh: export of {what} over pipeline stages is not supported")


def _refuse_experts(plan: Plan, experts: Experts, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code of experts cannot do."""
    if plan.execution != "explicit":
        raise PlanError(f"execution: export of experts as {plan.execution} is not supported")
    if int(layout.tensor2.size) > 1:
        raise PlanError("mesh: export of experts over a second tensor axis is not supported")
    if experts.capacity and not experts.group and int(layout.context.size) > 1:
        raise PlanError(
            "experts.group: export of a capacity in sequences that a context axis splits is not "
            "supported; give a group of tokens"
        )
    members = int(layout.expert.size)
    if members > 1 and experts.dropless and plan.experts.padding == 1.0:
        raise PlanError(
            "experts.padding: export with exact counts of tokens is not supported; give room for "
            f"uneven ones ({min(2, members)}; with {members} for all that can come)"
        )
