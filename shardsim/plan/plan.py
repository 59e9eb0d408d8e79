"""A plan: how one model is trained on one machine. A plan file is this, as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from shardsim.errors import PlanError, nearest, shown
from shardsim.machine import Machine
from shardsim.model import Model
from shardsim.ops.attend import KERNELS
from shardsim.plan.lengths import BY_SEQUENCE, Lengths, row_tokens
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.precision import Precision, choose
from shardsim.plan.remat import Remat

# The logical axes that a rule may name, by what it shards.
PARAMETER_AXES = ("embed", "heads", "kv_heads", "mlp", "vocab", "layers", "expert")
ACTIVATION_AXES = ("batch", "seq", "embed", "heads", "kv_heads", "mlp", "vocab", "expert")

MATMUL_OVERLAP = ("off", "unidirectional", "bidirectional")
ATTENTION = (*KERNELS, "unfused")
# How an exported plan runs: collectives written out (shard_map), or left to the compiler (jit).
EXECUTION = ("explicit", "partitioned")

# Logical axes that are dimensions of one array: a mesh axis can split only one of two.
_OF_WEIGHTS = tuple(("embed", other) for other in ("heads", "kv_heads", "mlp", "vocab"))
TOGETHER = {
    "parameters": _OF_WEIGHTS,
    "activations": (("batch", "seq"), ("batch", "embed")),
    "optimizer": _OF_WEIGHTS,
}

MOST_UNEVEN = 1000.0  # of experts' tokens

# What operations take: from the chip's figures, or as its compiler estimates them.
OP_COSTS = ("calibrated", "compiler", "physical")

Rules = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes


@dataclass(frozen=True, kw_only=True)
class MeshAxis:
    """One logical axis of the mesh and the torus axes it lies on.

    `torus` maps a torus axis (or "dcn", the axis of slices) to how much of it this mesh axis
    takes; the product is `size`. Where two mesh axes share a torus axis, the later one in the
    mesh is the inner one: its members are neighbours.
    """

    name: str
    size: int
    torus: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Which communication runs behind computation."""

    matmul: str = "bidirectional"  # collective matmul: off, unidirectional, bidirectional
    weights: bool = True  # gather the next layer's weights while this one computes
    gradients: bool = True  # reduce a layer's gradients while the next one computes
    dcn: bool = False  # reduce gradients between slices behind the backward pass


# How tokens reach experts on other devices: exchanged, or all gathered and results scattered.
EXCHANGES = ("all-to-all", "ring")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens reach the experts of an expert axis."""

    exchange: str = "all-to-all"
    imbalance: float = 1.0  # tokens of the fullest device over the mean
    padding: float = 1.0  # what an all-to-all has room for over what comes; 1: counts are exact


# The order of microbatches over pipeline stages: one forward, one backward; the same in ticks that
# all stages run alike; all forward, then all backward, in such ticks; or as the first two, with
# gradients of weights apart from the way back ("zb-h1": zero-bubble, arXiv 2401.10241).
PIPELINE_SCHEDULES = ("1f1b", "1f1b-ticks", "gpipe", "zb-h1", "zb-h1-ticks")
TICKS = ("1f1b-ticks", "gpipe", "zb-h1-ticks")
IN_TURNS = ("1f1b-ticks", "zb-h1-ticks")  # one forward, one backward in a tick
WEIGHTS_APART = ("zb-h1", "zb-h1-ticks")

# How gradients add up over microbatches. Weights are gathered, and their gradients scattered, in
# each ("repeated": ZeRO-3); weights are gathered once a step and stay whole, and so do sums of
# gradients until they are scattered ("gathered": ZeRO-1), or gradients are scattered in each
# ("scattered": ZeRO-2); or every layer runs all microbatches before the next ("layered").
ACCUMULATION = ("repeated", "gathered", "scattered", "layered")
WHOLE = ("gathered", "scattered")  # weights stay whole on the device over a step

# How keys and values reach the queries of other members of a context axis, and which tokens a
# member has: see `Context`.
CONTEXT_KEYS = ("gathered", "ring", "ulysses", "dsp")
CONTEXT_ORDERS = ("contiguous", "striped")


@dataclass(frozen=True, kw_only=True)
class Context:
    """How a context axis attends.

    `keys` are gathered, or pass round a ring (arXiv 2310.01889), or an all-to-all turns queries,
    keys and values so that a member has some heads of all tokens (arXiv 2309.14509); or, of layers
    that attend in turn within a video's frames and through time, one turns all tokens between them
    ("dsp", arXiv 2403.10266), so that a member has what each layer's attention reads. Of N members
    each has the next N-th of the tokens, or "striped" one of the first N of 2 N parts and its
    counterpart from the end, so that a causal mask leaves all of them the same work (after arXiv
    2311.09431); left out, tokens are striped where that balances (`resolve.stripes`). A ring's hops
    run beside the attention of the piece that is there, or with no `overlap` between it and the
    next.
    """

    keys: str = "gathered"
    order: str | None = None
    overlap: bool = True

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for but what every partitioner does."""
        return self in (Context(), Context(order="contiguous"))


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A model, a machine, a batch, and every choice of how to shard and schedule the step."""

    name: str
    model: Model
    machine: Machine
    batch: int  # sequences (images) per optimizer step, over all chips
    sequence: int  # tokens per sequence
    mesh: tuple[MeshAxis, ...]  # major to minor
    parameters: Rules
    activations: Rules
    optimizer_rules: Rules = field(default_factory=dict)  # in addition to the parameters' rules
    remat: Remat = Remat()
    microbatches: int = 1
    overlap: Overlap = Overlap()
    precision: Precision = Precision()
    experts: Routing = Routing()
    context: Context = Context()
    lengths: Lengths | None = None  # of sequences, where they are not all `sequence` long
    optimizer: str = "adamw"
    attention: str = "flash"
    fused_projections: bool = False  # one matmul for QKV and MLP-in (parallel blocks only)
    pipeline_schedule: str = "1f1b"  # of PIPELINE_SCHEDULES
    pipeline_interleave: int = 1  # layer chunks per pipeline stage
    stage_layers: tuple[int, ...] = ()  # of each pipeline stage, where they are not as many
    accumulation: str = "repeated"  # of ACCUMULATION
    vocab_tiles: int = 1  # parts of the tokens for which logits are made one after another
    forward_only: bool = False  # inference: one forward pass of the batch, and nothing is trained
    offload_optimizer: bool = False  # optimizer state lies in the host's memory
    offload_parameters: bool = False  # so do matrices of layers, which each layer fetches
    execution: str = "explicit"  # or "partitioned": see EXECUTION
    compiler_options: Mapping[str, str] = field(default_factory=dict)  # beyond the usual ones
    op_costs: str = "calibrated"  # how the plan is priced by whoever says nothing else: OP_COSTS
    note: str = ""

    def __post_init__(self) -> None:
        chip = self.machine.chip.compiled_with(self.compiler_options)
        if chip is not self.machine.chip:
            object.__setattr__(self, "machine", replace(self.machine, chip=chip))
        _check_numbers(self)
        _check_mesh(self)
        _check_rules(self)
        self.remat.check(self.model.layers, self.model.round_layers)

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step, over all chips: padding too, where there is any."""
        return self.batch * self.row

    @property
    def row(self) -> int:
        """Tokens of a row, or where sequences lie without rows, of a sequence on average."""
        return row_tokens(self.lengths, self.sequence)

    def __repr__(self) -> str:
        mesh = ", ".join(f"{axis.name}={axis.size}" for axis in self.mesh)
        return (
            f"Plan({self.name!r}: {self.model.name} on {self.machine.name}, batch {self.batch:,}, "
            f"{mesh})"
        )

    def _repr_html_(self) -> str:
        # Views stand above: looked up only when a notebook asks.
        return str(import_module("shardsim.views.notebook").shown(self))

    def axis(self, name: str) -> MeshAxis:
        """Return the mesh axis called `name`."""
        return next(axis for axis in self.mesh if axis.name == name)


def uneven(value: Any, key: str) -> float:
    """Return how much over the mean `key` of experts says; raise `PlanError` for what is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1.0 <= value <= MOST_UNEVEN:
        raise PlanError(f"{key}: must be a number from 1 to {MOST_UNEVEN:g}, not {shown(value)}")
    return float(value)


def _check_numbers(plan: Plan) -> None:
    for key in ("batch", "sequence", "microbatches", "pipeline_interleave", "vocab_tiles"):
        value = getattr(plan, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{key}: must be a positive whole number, not {shown(value)}")
    choose(plan.overlap.matmul, MATMUL_OVERLAP, "overlap.matmul")
    choose(plan.attention, ATTENTION, "attention")
    choose(plan.execution, EXECUTION, "execution")
    choose(plan.optimizer, OPTIMIZERS, "optimizer")
    choose(plan.pipeline_schedule, PIPELINE_SCHEDULES, "pipeline_schedule")
    choose(plan.accumulation, ACCUMULATION, "accumulation")
    plan.precision.check()
    choose(plan.op_costs, OP_COSTS, "op_costs")
    choose(plan.experts.exchange, EXCHANGES, "experts.exchange")
    uneven(plan.experts.imbalance, "experts.imbalance")
    uneven(plan.experts.padding, "experts.padding")
    if plan.experts != Routing() and plan.model.experts is None:
        raise PlanError(f"experts: {plan.model.name} has none; leave the key out")
    _check_stages(plan)
    _check_context(plan)
    _check_lengths(plan)
    _check_parts(plan)
    frames = plan.model.frames
    if plan.model.attends and plan.sequence % frames:
        raise PlanError(
            f"sequence: {plan.sequence} tokens are not {frames} frames that are alike; the nearest "
            f"number that are: {max(1, round(plan.sequence / frames)) * frames}"
        )
    if plan.model.experts and plan.model.experts.soft_slots and plan.experts != Routing():
        raise PlanError("experts: slots of soft experts are exchanged, and even; leave the key out")
    if plan.op_costs == "compiler" and plan.machine.chip.compiler is None:
        raise PlanError(f"op_costs: the file of {plan.machine.chip.name} has none of its compiler")
    if plan.offload_parameters and plan.accumulation in WHOLE:
        raise PlanError(
            "offload_parameters: weights stay whole on the device over a step (accumulation: "
            f"{plan.accumulation}); use repeated or layered"
        )
    if plan.fused_projections and not plan.model.parallel_block:
        raise PlanError(
            "fused_projections: only a parallel block can fuse QKV with the MLP's input; "
            f"{plan.model.name} has serial layers, so leave it out or set it to false"
        )


def _check_stages(plan: Plan) -> None:
    given: Any = plan.stage_layers
    if not isinstance(given, tuple) or not all(
        isinstance(many, int) and not isinstance(many, bool) and many >= 0 for many in given
    ):
        raise PlanError("stage_layers: expected the layers of each stage, as [10, 12, 12, 6]")
    if given and sum(given) != plan.model.layers:
        raise PlanError(
            f"stage_layers: {sum(given)} layers in all, and {plan.model.name} has "
            f"{plan.model.layers}"
        )
    length = plan.model.round_layers if given else 1
    if odd := next((many for many in given if many % length), 0):
        raise PlanError(
            f"stage_layers: {odd} layers are not whole rounds of {length} of {plan.model.name}; "
            f"the nearest number is {round(odd / length) * length}"
        )


def _check_context(plan: Plan) -> None:
    context = plan.context
    choose(context.keys, CONTEXT_KEYS, "context.keys")
    if context.order is not None:
        choose(context.order, CONTEXT_ORDERS, "context.order")
    if not isinstance(context.overlap, bool):
        raise PlanError("context.overlap: must be true or false")
    if context.keys not in ("gathered", "dsp") and plan.attention == "unfused":
        raise PlanError(
            f"context.keys: {context.keys} needs attention in blocks or one kernel; use "
            "attention: flash"
        )
    if context.keys != "gathered" and plan.model.latent:
        raise PlanError(
            f"context.keys: {context.keys} of latent attention is not modelled; use gathered"
        )
    if context.keys == "dsp" and "time" not in plan.model.attends:
        raise PlanError(
            "context.keys: dsp is for layers that attend in turn within frames and through time "
            f"(attends of a model), and those of {plan.model.name} see all tokens; use ulysses"
        )
    if plan.model.attends and context.order == "striped":
        raise PlanError(
            f"context.order: {plan.model.name} attends within whole frames, and stripes cut them; "
            "leave it out"
        )
    if context.keys == "ulysses" and context.order == "striped":
        raise PlanError(
            "context.order: with ulysses every member attends to all tokens; leave it out"
        )
    if context.keys != "ring" and not context.overlap:
        raise PlanError(
            f"context.overlap: only a ring has hops to hide, and keys are {context.keys}"
        )


def _check_lengths(plan: Plan) -> None:
    lengths = plan.lengths
    if lengths is not None and len(plan.model.parts) > 1:
        raise PlanError("lengths: of a model of several stacks they are not modelled; leave it out")
    if lengths is None or lengths.held not in BY_SEQUENCE:
        return
    if plan.attention == "unfused":
        raise PlanError(
            f"lengths.as: {lengths.held} needs attention in a kernel, by sequence; use attention: "
            "flash"
        )
    if lengths.unpadded and plan.model.experts and plan.model.experts.capacity:
        raise PlanError(
            "lengths.as: the places of an expert are a share of a row (experts.capacity), and "
            "unpadded sequences have none; use packed"
        )


def _check_parts(plan: Plan) -> None:
    """Refuse what models of several stacks do not train with."""
    model = plan.model
    if model.family == "encoder" or model.frozen:
        raise PlanError(
            f"model: {model.name} has no loss to train on; name it as encoder: of a decoder"
        )
    if model.images and plan.sequence <= model.images.sequence:
        raise PlanError(
            f"sequence: {plan.sequence} tokens, of which the images' are {model.images.sequence}; "
            "use more"
        )
    several = len(model.parts) > 1
    relative = any(part.model.positions == "relative" for part in model.parts)
    if (several or relative or model.lora) and plan.accumulation != "repeated":
        what = "several stacks" if several else "adapters" if model.lora else "relative positions"
        raise PlanError(
            f"accumulation: {plan.accumulation} of {what} is not modelled; use repeated"
        )
    if several and plan.lengths is not None:
        raise PlanError("lengths: sequences of several stacks are all as long; leave the key out")
    if model.lora and plan.fused_projections:
        raise PlanError("fused_projections: adapters are not fused; leave the key out")
    if model.text and plan.microbatches > 1:
        raise PlanError(
            f"microbatches: {plan.microbatches}: embeddings are compared with those of the whole "
            "batch; use 1"
        )
    if several and plan.context.keys != "gathered":
        raise PlanError(
            f"context.keys: {plan.context.keys} of a model of several stacks is not modelled; use "
            "gathered"
        )
    if relative and plan.attention != "unfused":
        raise PlanError(
            f"attention: {plan.attention}: kernels have no bias of scores, as relative positions "
            "are; use unfused"
        )


def _check_mesh(plan: Plan) -> None:
    machine = plan.machine
    lengths = {axis.name: axis.length for axis in machine.axes} | {"dcn": machine.slices}
    used = dict.fromkeys(lengths, 1)
    names = [axis.name for axis in plan.mesh]
    for axis in plan.mesh:
        if names.count(axis.name) > 1:
            raise PlanError(f"mesh: axis '{axis.name}' appears twice")
        product = 1
        for torus, factor in axis.torus.items():
            if torus not in lengths:
                raise PlanError(
                    f"mesh.{axis.name}.torus: {machine.name} has no axis '{torus}'"
                    f"{nearest(torus, lengths)}"
                )
            used[torus] *= factor
            product *= factor
        if product != axis.size:
            raise PlanError(
                f"mesh.{axis.name}: size {axis.size} is not the product {product} of its "
                "torus factors"
            )
    for torus, length in lengths.items():
        if used[torus] != length:
            raise PlanError(
                f"mesh: its axes take {used[torus]} of '{torus}', which is {length} long on "
                f"{machine.name}; the factors on a torus axis must multiply to its length"
            )


def _check_rules(plan: Plan) -> None:
    names = [axis.name for axis in plan.mesh]
    for kind, rules, choices in (
        ("parameters", plan.parameters, PARAMETER_AXES),
        ("activations", plan.activations, ACTIVATION_AXES),
        ("optimizer", plan.optimizer_rules, PARAMETER_AXES),
    ):
        for logical, axes in rules.items():
            where = f"rules.{kind}.{logical}"
            if logical == "expert" and plan.model.experts is None:
                raise PlanError(f"{where}: {plan.model.name} has no experts; leave it out")
            if logical not in choices:
                raise PlanError(
                    f"rules.{kind}: unknown axis '{logical}'{nearest(logical, choices)}"
                )
            for axis in axes:
                if axis not in names:
                    raise PlanError(f"{where}: no mesh axis '{axis}'{nearest(axis, names)}")
            if len(set(axes)) != len(axes):
                raise PlanError(f"{where}: a mesh axis appears twice")
        what = "activation" if kind == "activations" else "weight"
        for one, other in TOGETHER[kind]:
            for axis in rules.get(one, ()):
                if axis in rules.get(other, ()):
                    raise PlanError(
                        f"rules.{kind}: '{axis}' splits two dimensions of one {what}, {one} and "
                        f"{other}; an axis can split only one of them"
                    )
