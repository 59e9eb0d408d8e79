"""What divides what: the conditions under which a layout can be run at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shardsim.errors import PlanError
from shardsim.graph.place import BY_LOCATION, RULES
from shardsim.model import Model
from shardsim.model.checks import nearest_divisor
from shardsim.plan.layout import Layout, Number
from shardsim.plan.lengths import BY_SEQUENCE
from shardsim.plan.plan import Plan
from shardsim.plan.split import dimension, kv_left, lengths, named

_WHAT = {
    "batch": "sequences",
    "seq": "tokens",
    "heads": "attention heads",
    "mlp": "the MLP's width",
    "embed": "embed",
    "layers": "layers",
    "expert": "experts",
    "chunk": "groups of a sequence",
    "frame": "frames",
    "location": "locations in a frame",
    "delta": "heads of linear attention",
}
_OVER = {
    ("data", "fsdp", "expert"): "data, fsdp and microbatches",
    ("data", "fsdp"): "data, fsdp and microbatches",
    ("expert", "by_expert"): "the expert axis",
    ("expert",): "the expert axis",
    ("tensor2", "by_embed"): "the axes that shard experts' parameters",
    ("tensor2", "tensor"): "the tensor axes",
    ("context",): "the context axis",
    ("by_token",): "the context axis",
    ("tensor", "tensor2", "by_head"): "the tensor axes and the context axis of ulysses",
    ("tokens",): "the context and tensor axes",
    ("by_time",): "the context axis",
    ("by_space",): "the context axis of dsp",
    ("switched",): "the context and tensor axes of dsp",
    ("tensor",): "the tensor axis",
    ("tensor", "tensor2"): "the tensor axes",
    ("tensor2",): "the second tensor axis",
    ("embed",): "the tensor axes",
    ("tensor2", "gather"): "the axes that shard parameters",
    ("pipeline",): "pipeline stages",
}
# What is spread over no axis of a kind, as conditions call it.
_NEVER_SPLIT = (
    *("models of several stacks", "stacks of layers", "soft experts", "tokens of soft experts"),
    *("latent attention", "linear attention", "the state of linear attention"),
    "attention in chunks",
)
_KEYS = {
    "batch": "batch",
    "seq": "sequence",
    "location": "sequence",
}  # else it is the mesh that a plan can change


Condition = tuple[str, str, Number, Number]  # key, what is divided, its size, by what


def conditions(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> Iterator[Condition]:
    """Yield (key, what is divided, its size, by what) for each division that must be exact.

    They are the dimensions of activations and weights that `dimension` calls exact, each once, of
    every part of the model.
    """
    *read, _ = model.parts
    for part in read:
        yield from _of_part(part.model, batch, part.model.sequence, layout, interleave)
    yield from _of_part(model, batch, sequence, layout, interleave)
    if read:
        yield "mesh", "models of several stacks over pipeline stages", 1, layout.pipeline.size


def _of_part(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int
) -> Iterator[Condition]:
    """Yield the conditions of one stack and its ends."""
    yield from _of_dimensions(model, batch, sequence, layout)
    yield from _of_stages(model, layout, interleave)
    yield from _of_blocks(model, sequence, layout)
    yield from _of_key_value_heads(model, layout)
    if np.any(layout.striped):
        parts = layout.context.size * np.where(layout.striped, 2, 1)
        yield "sequence", "tokens over two parts a member of the context axis", sequence, parts
        if model.experts and model.experts.group:
            what = "groups of a sequence over two parts a member of the context axis"
            yield "sequence", what, model.experts.groups(sequence), parts


def _of_dimensions(model: Model, batch: int, sequence: int, layout: Layout) -> Iterator[Condition]:
    """Yield for every dimension that must divide exactly that it does, each once."""
    also: Mapping[str, Number] = {"batch": layout.microbatches}
    seen = set()
    for kind, axis, size in _dimensions(model, batch, sequence, layout):
        roles = RULES[kind].get(axis, ())
        if (axis, size, roles) in seen:
            continue
        seen.add((axis, size, roles))
        found = dimension(kind, axis, size, layout)
        if found.exact:
            over = _OVER[roles]
            if axis == "batch" and model.experts:
                over = over.replace("fsdp", "fsdp, the expert axis")
            elif axis == "expert" and np.any(layout.spread.by_expert):
                over = f"{over} and those that shard parameters"
            words = _WHAT[axis]
            if axis == "embed" and size != model.embed:
                words = "width of branches" if model.branch else "width of latents"
            elif axis == "mlp" and model.index and size == model.index.heads:
                words = "heads of the index"
            what = f"{words} over {over}"
            yield _KEYS.get(axis, "mesh"), what, size, found.ways * also.get(axis, 1)


def _dimensions(
    model: Model, batch: int, sequence: int, layout: Layout
) -> list[tuple[str, str, int]]:
    """Return the dimensions of weights, and of activations where they lie: kind, axis, size."""
    sizes = lengths(model, batch, sequence)
    found = [("inside", axis, sizes[axis]) for axis in RULES["inside"]]
    for tensor in model.own_tensors:
        kind, axes, shape = named(tensor)
        stages = tensor.part == "block"  # layers are asked for by `_of_stages`, in whole rounds
        found += [*zip([kind] * len(axes), axes, shape, strict=True)][stages:]
    found += _of_experts(model, sequence)
    found += [("residual", axis, sizes[axis]) for axis in RULES["residual"]]
    if np.any(layout.spread.by_head):
        found.append(("attended", "heads", sizes["heads"]))
    if model.attends:
        found.append(("in space", "frame", model.frames))
        found += [(kind, "location", sizes["location"]) for kind in ("in time", BY_LOCATION)]
        if np.any(layout.spread.switched):
            found.append(("by frame", "frame", model.frames))
    return found


def _of_stages(model: Model, layout: Layout, interleave: int) -> Iterator[Condition]:
    """Yield that whole rounds of layers come to each stage of a pipeline."""
    for rounds, layers in () if layout.stage_layers else model.stacks:
        ways = layout.pipeline.size * interleave
        yield "mesh", "layers over pipeline stages", rounds * layers, ways * layers
    if len(model.stacks) > 1:
        yield "mesh", "stacks of layers over pipeline stages", 1, layout.pipeline.size


def _of_blocks(model: Model, sequence: int, layout: Layout) -> Iterator[Condition]:
    """Yield which axes a kind of block does not know."""
    if model.experts and model.experts.soft_slots:
        yield "mesh", "tokens of soft experts over a context axis", 1, layout.context.size
        yield "mesh", "soft experts over a second tensor axis", 1, layout.tensor2.size
    if model.latent:
        yield "mesh", "latent attention over a second tensor axis", 1, layout.tensor2.size
    if model.chunked:
        yield "mesh", "attention in chunks over a context axis", 1, layout.context.size
    if model.delta:
        yield "mesh", "linear attention over a second tensor axis", 1, layout.tensor2.size
        yield "mesh", "the state of linear attention over a context axis", 1, layout.context.size
        yield "sequence", "tokens in chunks of linear attention", sequence, model.delta.chunk


def _of_key_value_heads(model: Model, layout: Layout) -> Iterator[Condition]:
    """Yield that each device has the key-value heads of its own queries."""
    kv_shards = np.minimum(layout.tensor.size, model.kv_heads)
    yield "mesh", "key-value heads over the tensor axis", model.kv_heads, kv_shards
    if model.global_heads:  # each member has some of those of all layers
        ways = layout.tensor.size * layout.tensor2.size
        if np.any(layout.spread.by_head):
            ways = ways * np.where(layout.spread.by_head, layout.context.size, 1)
        what = "key-value heads of layers without a window over the tensor axes"
        yield "mesh", what, model.global_heads.kv_heads, ways
    if np.any(layout.spread.by_head):
        members, left = layout.context.size, kv_left(model, layout)
        over = np.minimum(members, np.maximum(np.floor(left), 1))
        what = "key-value heads over the tensor axes and the context axis of ulysses"
        ways = np.where(np.greater(members, 1), model.kv_heads / left * over, 1)
        yield "mesh", what, model.kv_heads, ways
        what = "the context axis of ulysses over the key-value heads of a device"
        yield "mesh", what, members, over


def _of_experts(model: Model, sequence: int) -> list[tuple[str, str, int]]:
    """Return the dimensions that tokens have on their way to experts: kind, axis, size."""
    experts = model.experts
    if experts is None:
        return []
    found = [("slots", "mlp", experts.mlp), ("sum", "embed", model.embed)]
    if experts.shared:
        found.append(("inside", "mlp", experts.shared_width))
    return [*found, ("slots", "chunk", experts.groups(sequence))] if experts.group else found


def divides(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where every division is exact, broadcast over the layout."""
    result: Any = np.True_
    for _, _, size, by in conditions(model, batch, sequence, layout, interleave):
        result = result & (np.mod(size, by) == 0)
    return np.asarray(result)


def legal(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where `layout` can be run: every division exact, and every pipeline stage filled."""
    exact = divides(model, batch, sequence, layout, interleave)
    staged = np.greater(layout.pipeline.size, 1)
    filled = np.greater_equal(layout.microbatches, layout.pipeline.size)
    apart = staged & (layout.layered | layout.scattered)
    apart = apart | ((layout.in_turns | layout.split_backward) & (interleave > 1))
    phased = layout.lockstep | layout.split_backward
    others = bool(_untrained(model)) & (layout.layered | layout.gathered | phased)
    return np.asarray(exact & filled & np.logical_not(apart | others))


def _untrained(model: Model) -> str:
    """Return what of a model lets microbatches only follow one another, if anything."""
    if len(model.parts) > 1:
        return "several stacks"
    return "adapters" if model.lora else "frozen weights" if model.frozen else ""


def check(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what no implementation does, and the first division of a single plan
    that is not exact."""
    _check_parts(plan, layout)
    _check_divisions(plan, layout)
    _check_order(plan, layout)
    _check_stages(plan, layout)
    _check_over_stages(plan, layout)


def _check_parts(plan: Plan, layout: Layout) -> None:
    """Refuse roles that stacks of a model, packed sequences or latents are not spread over."""
    if len(plan.model.stacks) > 1 and int(layout.pipeline.size) > 1:
        front = plan.model.experts is not None and plan.model.experts.dense_layers > 0
        which = "in front of those with experts" if front else "after the last whole round"
        raise PlanError(
            f"mesh: {'dense ' if front else ''}layers {which} are not spread over pipeline "
            "stages; name no axis for layers in rules.parameters"
        )
    if plan.lengths and plan.model.chunked:
        raise PlanError("lengths: of attention in chunks they are not modelled; leave it out")
    if plan.lengths and plan.lengths.held in BY_SEQUENCE and int(layout.context.size) > 1:
        raise PlanError(
            f"lengths.as: {plan.lengths.held} sequences are not split over a context axis; use "
            "packed_masked, or name no axis for seq in rules.activations"
        )
    if len(plan.model.parts) > 1 and int(layout.pipeline.size) > 1:
        raise PlanError(
            f"mesh: the stacks of {plan.model.name} are not spread over pipeline stages; name no "
            "axis for layers in rules.parameters"
        )
    if plan.model.latent and int(layout.tensor2.size) > 1:
        raise PlanError(
            "mesh: latent attention is not spread over a second tensor axis; name one axis for "
            "heads or embed in rules.activations"
        )


def _check_divisions(plan: Plan, layout: Layout) -> None:
    """Refuse sizes that do not divide by what splits them."""
    for key, what, size, by in conditions(
        plan.model, plan.batch, plan.sequence, layout, plan.pipeline_interleave
    ):
        if int(size) == 1 < int(by) and what.startswith(_NEVER_SPLIT):
            raise PlanError(f"{key}: {what} of {int(by)} is not modelled; leave the axis out")
        if int(size) % int(by):
            raise PlanError(
                f"{key}: {what}: {int(size)} does not divide by {int(by)}"
                f"{_nearest(key, what, int(size), int(by))}"
            )
    experts = plan.model.experts
    if experts and experts.group and plan.sequence % experts.group:
        raise PlanError(
            f"sequence: {plan.sequence} tokens are not whole groups of {experts.group} "
            f"(experts.group){_nearest('batch', '', plan.sequence, experts.group)}"
        )


def _check_order(plan: Plan, layout: Layout) -> None:
    """Refuse orders of microbatches that are not modelled for the model, or with each other."""
    for key, value, usual in (
        ("accumulation", plan.accumulation, "repeated"),
        ("pipeline_schedule", plan.pipeline_schedule, "1f1b"),
    ):
        if value != usual and (what := _untrained(plan.model)):
            raise PlanError(f"{key}: {value} of a model with {what} is not modelled; leave it out")
        if value != usual and plan.forward_only:
            raise PlanError(f"{key}: {value} is for training; leave it out, or forward_only")
    if (layout.in_turns or layout.split_backward) and plan.pipeline_interleave > 1:
        raise PlanError(
            f"pipeline_schedule: {plan.pipeline_schedule} has one chunk of layers a stage; leave "
            "out pipeline_interleave, or use 1f1b or gpipe"
        )
    if layout.split_backward and layout.gathered:
        raise PlanError(
            f"accumulation: {plan.accumulation} beside pipeline_schedule: "
            f"{plan.pipeline_schedule} is not modelled; use repeated"
        )


def _check_over_stages(plan: Plan, layout: Layout) -> None:
    """Refuse ways to accumulate, and microbatches too few, over pipeline stages."""
    if layout.layered and int(layout.pipeline.size) > 1:
        raise PlanError(
            "accumulation: layered is not possible over pipeline stages, where a layer passes each "
            "microbatch on; use gathered, and pipeline_schedule: gpipe with a pipeline_interleave"
        )
    if layout.scattered and int(layout.pipeline.size) > 1:
        raise PlanError(
            "accumulation: scattered is not possible over pipeline stages; use repeated or gathered"
        )
    if plan.microbatches < int(layout.pipeline.size) and not plan.forward_only:
        raise PlanError(
            f"microbatches: {plan.microbatches} cannot fill {int(layout.pipeline.size)} pipeline "
            "stages; use at least as many microbatches as stages"
        )


def _check_stages(plan: Plan, layout: Layout) -> None:
    """Refuse layers of stages that there are not, or that an order of microbatches asks alike."""
    given, stages = plan.stage_layers, int(layout.pipeline.size)
    if not given:
        return
    if len(given) != stages:
        raise PlanError(
            f"stage_layers: {len(given)} stages, and the mesh has {stages}; list the layers of each"
        )
    if plan.pipeline_interleave > 1 or layout.lockstep or layout.gathered or layout.layered:
        raise PlanError(
            "stage_layers: with one chunk of layers a stage, pipeline_schedule 1f1b or zb-h1, and "
            "accumulation repeated alone, as others run all stages alike; leave it out"
        )


def _nearest(key: str, what: str, size: int, by: int) -> str:
    if what.startswith("experts"):
        return f"; the nearest axis that does: {nearest_divisor(size, by)}"
    if key != "batch":
        return ""
    below = size // by * by
    choices = [str(value) for value in (below, below + by) if value]
    return f"; the nearest that do: {' and '.join(choices)}"
