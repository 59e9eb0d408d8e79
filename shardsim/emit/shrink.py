"""A small copy of a plan: every axis, sharding and technique kept, sizes as small as they go."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.model import Experts, Latent, Model
from shardsim.model.delta import Delta
from shardsim.model.global_heads import GlobalHeads
from shardsim.model.index import Index
from shardsim.model.parts import KEYS as PARTS
from shardsim.plan.layout import SEQUENCE_SHARDED, Layout
from shardsim.plan.legality import check
from shardsim.plan.lengths import Lengths
from shardsim.plan.placement import place
from shardsim.plan.plan import Plan
from shardsim.plan.precision import NARROW, Precision
from shardsim.plan.remat import Remat
from shardsim.plan.resolve import resolve

# Which mesh axes get a second member first when there are devices for some axes only.
_PRIORITY = ("tensor", "fsdp", "expert", "tensor2", "context", "data", "pipeline")
_HEAD_DIM = 8
_HEADS = 8
_LAYERS = 2
_PATCH = 4
_TOKENS = 32  # of a sequence without images
_LATENT = Latent(queries=4 * _HEAD_DIM, keys=2 * _HEAD_DIM, rotary=4, values=_HEAD_DIM)
_RANK = 4
_CHANNELS, _LABELS = 4, 16
_FRAMES = 2
_EXPERTS = 4  # at least, and as many on each device of an expert axis
_NOT_EMITTED = ("compute", "weights", "sparsity", "gradients", "state", "master")
_SIDES = (4, 8, 3, 5, 7, 16)  # patches along a side of the image, the preferred first


def shrink(plan: Plan, devices: int = 8) -> tuple[Plan, tuple[str, ...]]:
    """Return a tiny copy of `plan` on at most `devices` devices, and what it could not keep.

    Each mesh axis gets two members (the innermost more, if devices are left), the model two
    narrow layers (of each group that keeps something else), and everything is computed in float32,
    so that a comparison with the unsharded model means something. No axis becomes longer than it
    was.
    """
    layout = resolve(plan)
    roles = {name: role for role, names in layout.names.items() for name in names}
    sizes = _mesh_sizes(plan, roles, devices)
    lost = tuple(
        f"mesh axis '{axis.name}' of {axis.size} shrank to 1: {devices} devices are not enough "
        "for two along every axis"
        for axis in plan.mesh
        if axis.size > 1 and sizes[axis.name] == 1
    )
    lost += tuple(
        f"precision.{key} {value} is not run: the tiny copy computes, keeps and sends float32"
        for key, value in vars(plan.precision).items()
        if key in _NOT_EMITTED and value and (key != "compute" or value in NARROW)
    )
    used = math.prod(sizes.values())
    machine = _machine(plan, used)
    draft = replace(plan, machine=machine, mesh=place(sizes, machine))
    small = resolve(draft)
    model = _model(plan.model, small, _chunks(plan, small))
    if model.index:
        model = replace(model, index=_index(plan, model))
    stages = int(small.pipeline.size)
    microbatches = min(plan.microbatches, 2 * stages) if stages > 1 else min(plan.microbatches, 2)
    if small.split_backward:  # of one tick with all in it a compiler leaves out what it sends last
        microbatches = max(microbatches, stages + 1)
    groups = int(small.data.size * small.fsdp.size * small.expert.size)
    tiny = replace(
        draft,
        model=model,
        sequence=model.sequence,
        lengths=plan.lengths and _lengths(plan.lengths, plan.sequence, model.sequence),
        batch=groups * microbatches * 2,
        microbatches=microbatches,
        remat=_remat(plan.remat, model),
        precision=Precision(compute="f32", parameters="f32", reduce="f32"),
        pipeline_interleave=_chunks(plan, small),
        stage_layers=(),
    )
    check(tiny, resolve(tiny))
    return tiny, lost


def _lengths(lengths: Lengths, longest: int, tokens: int) -> Lengths:
    """Return a distribution of the same form for sequences of so many `tokens` at most."""
    share = tokens / longest
    lines = tuple((max(1, round(one * share)), often) for one, often in lengths.histogram)
    return replace(
        lengths,
        mean=lengths.mean * share,
        deviation=lengths.deviation * share,
        least=lengths.least and max(1, round(lengths.least * share)),
        most=lengths.most and max(1, round(lengths.most * share)),
        histogram=lines,
    )


def _remat(remat: Remat, model: Model) -> Remat:
    """Return the policies of all groups of layers for a model with equally many layers of each."""
    each = model.layers // len(remat.groups)
    if len(remat.groups) == 1:
        return Remat((replace(remat.groups[0], layers=0),))
    return Remat(tuple(replace(group, layers=each) for group in remat.groups))


def _mesh_sizes(plan: Plan, roles: dict[str, str], devices: int) -> dict[str, int]:
    """Return the size of each mesh axis: powers of two that multiply to at most `devices`."""
    sizes = {axis.name: 1 for axis in plan.mesh}
    order = sorted(sizes, key=lambda name: _PRIORITY.index(roles.get(name, "pipeline")))
    left, grew = devices, True
    while left > 1 and grew:
        grew = False
        for name in order:
            if left >= 2 and 2 * sizes[name] <= plan.axis(name).size:
                sizes[name] *= 2
                left //= 2
                grew = True
    return sizes


def _machine(plan: Plan, devices: int) -> Machine:
    """Return a slice of the plan's chip with `devices` devices, or fewer chips of two devices."""
    chip = plan.machine.chip
    if chip.devices_per_chip > 1 and devices % chip.devices_per_chip:
        raise PlanError(f"verify: {chip.name} has {chip.devices_per_chip} devices a chip")
    chips = devices // chip.devices_per_chip
    shape = [1] * chip.torus_dims
    axis = 0
    while math.prod(shape) < chips:
        shape[axis % len(shape)] *= 2
        axis += 1
    return Machine(chip=chip, shape=tuple(sorted(shape)))


def _experts(experts: Experts | None, layout: Layout, mlp: int) -> Experts | None:
    """Return few narrow experts of the same kind."""
    if experts is None:
        return None
    number = _EXPERTS * int(layout.expert.size)
    if layout.spread.by_expert:
        number *= int(layout.gather.size)
    return replace(
        experts,
        number=number,
        top_k=min(experts.top_k, _EXPERTS),
        mlp=mlp,
        shared_mlp=min(experts.shared_mlp, mlp),
        group=min(experts.group, _TOKENS // 2),
        dense_layers=_LAYERS if experts.dense_layers else 0,
    )


def _index(plan: Plan, small: Model) -> Index:
    """Return an index of as many narrow heads as a `small` model has; it chooses some tokens where
    the plan's does."""
    assert plan.model.index
    assert small.latent
    chooses = plan.sequence > plan.model.index.top
    top = small.sequence // 4 if chooses else small.sequence
    return Index(heads=small.heads, head_dim=2 * small.latent.rotary, top=top)


def _chunks(plan: Plan, small: Layout) -> int:
    """Return how many chunks of layers a stage has."""
    return min(plan.pipeline_interleave, 2) if int(small.pipeline.size) > 1 else 1


def _model(model: Model, layout: Layout, chunks: int = 1) -> Model:
    """Return the model with few narrow layers that every axis of `layout` divides."""
    heads = max(_HEADS, int(layout.tensor.size * layout.tensor2.size))
    if layout.spread.by_head:
        heads *= int(layout.context.size)
    kv_heads = heads // 2
    if model.kv_heads == model.heads:
        kv_heads = heads
    elif model.kv_heads == 1:
        kv_heads = 1
    square = model.attention_width == model.embed
    head_dim = _HEAD_DIM if square else 2 * _HEAD_DIM
    latent = model.latent
    if latent:
        latent = _LATENT if latent.queries else replace(_LATENT, queries=0)
        head_dim = _HEAD_DIM + _LATENT.rotary
    read = _read(model, layout)
    experts = _experts(model.experts, layout, 2 * heads * _HEAD_DIM)
    # Dense layers in front, and those after the last whole round, are stacks of their own.
    front, place = (experts.dense_layers, 1) if experts and experts.dense_layers else (0, 0)
    after = sum(rounds * many for rounds, many in model.stacks[place + 1 :])
    # In turns a compiler would find one layer's weights, gathered for the way forward, in its tick.
    staged = int(layout.pipeline.size) * (2 if layout.in_turns else chunks)
    rounds = max(_LAYERS * len(layout.kept), staged)
    layers = front + model.stacks[place][1] * rounds + after
    small = replace(
        model,
        **read,
        layers=layers,
        windows=model.windows[:layers] if len(model.windows) == model.layers else model.windows,
        embed=heads * _HEAD_DIM,
        mlp=2 * heads * _HEAD_DIM,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
        delta=_delta(model, heads),
        global_heads=_global_heads(model, kv_heads, head_dim),
        lora=replace(model.lora, rank=min(model.lora.rank, _RANK)) if model.lora else None,
        vocab=min(model.vocab, 64),
        classes=min(model.classes, 16),
        features=min(model.features, heads * _HEAD_DIM),
        predicts=min(model.predicts, _CHANNELS),
        labels=min(model.labels, _LABELS),
        prompt=min(model.prompt, _TOKENS),
        prompt_embed=min(model.prompt_embed, 2 * heads * _HEAD_DIM),
        sequence=2 * read["images"].sequence if "images" in read else _TOKENS,
        experts=experts,
    )
    return _with_image(small, model, layout) if model.patch else small


def _with_image(small: Model, model: Model, layout: Layout) -> Model:
    """Return a `small` model with an image, or a video, whose tokens every axis divides."""
    split = int(layout.context.size) * (2 if layout.striped else 1)
    if int(layout.residual) == SEQUENCE_SHARDED:
        split *= int(layout.tensor.size)
    first, frames = model.pooling == "cls", min(model.frames, _FRAMES)
    if model.attends:  # frames and locations are split, each as tokens are
        frames = split * max(1, frames // split)
    for side in _SIDES:
        kept = frames * side * side
        if model.attends and side * side % split:
            continue
        if model.kept:  # a quarter, or what divides
            kept = (kept // 4 + first) // split * split - first
        if kept > 0 and (kept + first) % split == 0:
            return replace(
                small,
                patch=_PATCH,
                image=side * _PATCH,
                width=0,
                frames=frames,
                kept=kept if model.kept else 0,
                sequence=kept + first,
            )
    raise PlanError(f"verify: no small image has tokens that divide by {split} with a class token")


def _delta(model: Model, heads: int) -> Delta | None:
    """Return linear attention of few narrow heads, in short chunks."""
    if not model.delta:
        return None
    sizes = {"key_heads": heads, "value_heads": 2 * heads, "chunk": _TOKENS // 4}
    return replace(model.delta, **sizes, key_dim=_HEAD_DIM, value_dim=_HEAD_DIM)


def _global_heads(model: Model, kv_heads: int, head_dim: int) -> GlobalHeads | None:
    """Return other heads of layers without a window: half as many, twice as wide, if there are."""
    if not model.global_heads:
        return None
    many = max(1, kv_heads // 2)
    return replace(model.global_heads, kv_heads=many, head_dim=2 * head_dim)


def _read(model: Model, layout: Layout) -> dict[str, Any]:
    """Return the models that a model reads, as small; an encoder has more tokens than images."""
    found: dict[str, Any] = {}
    for key in PARTS:
        read = getattr(model, key)
        if read is not None:
            one = _model(read, layout)
            found[key] = replace(one, sequence=2 * one.sequence) if one.vocab else one
    return found
