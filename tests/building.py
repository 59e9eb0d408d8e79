"""Small models, machines with round figures, and plans written without the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError
from shardsim.machine import Chip, Machine, load_chip, override_chip, parse_machine
from shardsim.model import Biases, Experts, Latent, Model
from shardsim.plan import MeshAxis, Overlap, Plan, Precision, Remat, resolve
from shardsim.plan.layout import AxisLayout, Layout
from shardsim.plan.legality import check
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import CONTEXT_KEYS, EXCHANGES, MATMUL_OVERLAP, Context, Routing
from shardsim.plan.remat import POLICIES, Policy
from shardsim.program.schedule import Move, Schedule, Start

# One sequence over 16 devices, whose keys and values are gathered, as a plan file.
LONG: dict[str, Any] = {
    "model": "llama2-7b",
    "machine": "v5p:4x4x4",
    "batch": 64,
    "sequence": 32768,
    "mesh": {"fsdp": 4, "context": 16},
    "rules": {
        "parameters": {"embed": ["fsdp", "context"]},
        "activations": {"batch": ["fsdp"], "seq": ["context"]},
    },
    "remat": {"save": ["context"]},
}

# What the tests call the axes; outermost first, as the roles are.
NAMES = {
    "pipeline": "p",
    "data": "d",
    "fsdp": "f",
    "expert": "e",
    "context": "c",
    "tensor2": "u",
    "tensor": "t",
}


# As reported: a GPT on v3 that fits in batches of 512 only as the compiler recomputes by itself.
SMALL_GPT = {
    "model": {
        "base": "gpt3-175b",
        "name": "small",
        "layers": 12,
        "embed": 768,
        "mlp": 3072,
        "heads": 12,
        "kv_heads": 12,
        "head_dim": 64,
        "vocab": 50257,
    },
    "machine": "v3:2x2",
    "sequence": 512,
    "mesh": {"data": 8},
    "rules": {"activations": {"batch": ["data"]}},
    "remat": "none",
    "precision": {"compute": "f32", "parameters": "f32", "reduce": "f32"},
    "attention": "unfused",
}


def decoder(**changes: Any) -> Model:
    """Return a decoder whose every dimension divides by 16."""
    options: dict[str, Any] = {
        "name": "small-decoder",
        "family": "decoder",
        "layers": 8,
        "embed": 1024,
        "mlp": 4096,
        "heads": 16,
        "head_dim": 64,
        "kv_heads": 16,
        "sequence": 512,
        "vocab": 2048,
        "causal": True,
        "positions": "rotary",
    }
    return Model(**(options | changes))


def vit(**changes: Any) -> Model:
    """Return a vision transformer with a parallel block, 256 tokens an image."""
    options: dict[str, Any] = {
        "name": "small-vit",
        "family": "vit",
        "layers": 8,
        "embed": 1024,
        "mlp": 4096,
        "heads": 16,
        "head_dim": 64,
        "kv_heads": 16,
        "sequence": 256,
        "patch": 14,
        "image": 224,
        "parallel_block": True,
        "qk_norm": True,
        "biases": Biases(mlp=True),
    }
    return Model(**(options | changes))


def plain_chip(name: str = "v4", **figures: float) -> Chip:
    """Return a chip whose links and starts are ideal unless `figures` say otherwise."""
    ideal = {
        "link_efficiency": 1.0,
        "dcn_efficiency": 1.0,
        "hop_latency_s": 0.0,
        "dcn_hop_latency_s": 0.0,
        "collective_overhead_s": 0.0,
        "op_overhead_s": 0.0,
    }
    return override_chip(load_chip(name), ideal | figures)


@dataclass(frozen=True)
class Axis:
    """A torus axis of any length, as pricing reads one."""

    name: str
    length: int
    wrapped: bool
    bytes_per_s: float
    hop_latency_s: float
    switched: bool = False


@dataclass(frozen=True)
class Wires:
    """A machine of any shape, as far as the price of a collective needs one."""

    chip: Chip
    axes: tuple[Axis, ...]


def wires(chip: Chip, *axes: tuple[int, bool]) -> Any:
    """Return links of `chip` along axes of (length, wrapped)."""
    return Wires(
        chip,
        tuple(
            Axis(name, length, wrapped, chip.link_bytes_per_s, chip.hop_latency_s)
            for name, (length, wrapped) in zip("xyz", axes, strict=False)
        ),
    )


def axis_layout(*factors: int, strides: Sequence[int] | None = None, slices: int = 1) -> AxisLayout:
    """Return a group that takes `factors` of the torus axes."""
    return AxisLayout(factors=factors, strides=tuple(strides or [1] * len(factors)), slices=slices)


def build(
    model: Model,
    machine: Machine | str,
    batch: int,
    where: Mapping[str, Mapping[str, int]],
    *,
    residual: str = "seq",
    context_shards: bool = False,
    expert_shards: bool = False,
    by_expert: bool = False,
    over_data: bool = False,
    **options: Any,
) -> Plan:
    """Return a plan; `where` gives each role its factors of the torus axes (and of "dcn").

    It is priced by the chip's figures, as they stand, unless `options` say otherwise.
    """
    if isinstance(machine, str):
        machine = parse_machine(machine)
    mesh = []
    for role in NAMES:
        if role in where:
            size = 1
            for factor in where[role].values():
                size *= factor
            mesh.append(MeshAxis(name=NAMES[role], size=size, torus=dict(where[role])))
    present = {role: (NAMES[role],) if role in where else () for role in NAMES}
    wide = {key: present["tensor"] for key in ("heads", "kv_heads", "mlp", "vocab")}
    parameters = wide | {
        "embed": present["fsdp"]
        + (present["expert"] if expert_shards else ())
        + (present["context"] if context_shards else ())
        + present["tensor2"],
        "layers": present["pipeline"],
        "expert": present["expert"],
    }
    if by_expert:
        parameters["expert"] += present["fsdp"] + (present["context"] if context_shards else ())
    activations = wide | {
        "batch": present["data"] + present["fsdp"] + present["expert"],
        "expert": present["expert"],
        "seq": present["context"] + (present["tensor"] if residual == "seq" else ()),
        "embed": present["tensor2"] + (present["tensor"] if residual == "embed" else ()),
    }
    options.setdefault("op_costs", "physical")
    kept = options.pop("remat", "full")
    return Plan(
        name="built",
        model=model,
        machine=machine,
        batch=batch,
        sequence=options.pop("sequence", model.sequence),
        mesh=tuple(mesh),
        parameters={key: axes for key, axes in parameters.items() if axes},
        activations={key: axes for key, axes in activations.items() if axes},
        optimizer_rules={"embed": present["data"]} if over_data and present["data"] else {},
        remat=Remat.of(save=POLICIES.get(kept, kept)),
        **options,
    )


def renamed(plan: Plan, names: Mapping[str, str]) -> Plan:
    """Return `plan` with its mesh axes called otherwise."""

    def rules(given: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {key: tuple(names[axis] for axis in axes) for key, axes in given.items()}

    return replace(
        plan,
        mesh=tuple(replace(axis, name=names[axis.name]) for axis in plan.mesh),
        parameters=rules(plan.parameters),
        activations=rules(plan.activations),
        optimizer_rules=rules(plan.optimizer_rules),
    )


def sent(prediction: Prediction) -> dict[tuple[str, tuple[str, ...], str], float]:
    """Return the bytes that a device sends in a step, by kind, mesh axes and purpose."""
    return {
        (use.kind, use.mesh_axes, use.purpose): use.bytes_per_chip for use in prediction.collectives
    }


def quiet(plan: Plan, costs: str | None = None) -> Prediction:
    """Return what the closed form says of a plan where nothing contends; reject others.

    Most generated plans contend, and simulating them only to see that takes most of the time.
    """
    found = predict(plan, costs=costs)
    assume(not contends(found.schedule, resolve(plan)))
    return found


def contends(schedule: Schedule, layout: Layout) -> bool:
    """Return whether moves of two groups are under way at once on one torus axis, or on the DCN."""
    for block in schedule.blocks:
        started = [task.task for task in block.tasks if isinstance(task, Start)]
        beside = {task.role for task in started if isinstance(task, Move)}
        others = {task.role for task in block.collectives() if np.any(task.count)}
        for one in beside:
            # Two of one group that spans slices: one may be on the torus, the other between slices.
            together = [task for task in started if isinstance(task, Move) and task.role == one]
            if layout.role(one).slices > 1 and len(together) > 1:
                return True
            for other in others - {one}:
                mine, theirs = layout.role(one), layout.role(other)
                if mine.shares_links_with(theirs) or (mine.slices > 1 and theirs.slices > 1):
                    return True
    return False


def is_legal(plan: Plan) -> bool:
    """Return whether a plan file with this plan would be accepted."""
    try:
        check(plan, resolve(plan))
    except PlanError:
        return False
    return True


@st.composite
def in_groups(draw: st.DrawFn, drawn: st.SearchStrategy[Plan], most: int = 3) -> Plan:
    """Draw a plan without stages whose layers keep different things, in two groups or more."""
    plan = draw(drawn)
    assume(int(resolve(plan).pipeline.size) == 1)
    layers = plan.model.layers
    ends = draw(st.lists(st.integers(1, layers - 1), min_size=1, max_size=most - 1, unique=True))
    edges = [0, *sorted(ends), layers]
    names = draw(
        st.lists(st.sampled_from(sorted(POLICIES)), min_size=len(ends) + 1, max_size=len(ends) + 1)
    )
    groups = tuple(
        Policy(save=POLICIES[name], layers=end - start)
        for name, start, end in zip(names, edges, edges[1:], strict=False)
    )
    assume(len(Remat(groups).groups) > 1)
    return replace(plan, remat=Remat(groups))


MODELS = (
    decoder(),
    decoder(kv_heads=2, gated_mlp=True, tied_embeddings=True, norm="rmsnorm"),
    decoder(parallel_block=True, kv_heads=1, post_norms=True),
    vit(),
    vit(parallel_block=False, pooling="map", classes=1000, qk_norm=False),
)
# Experts: sorted tokens, a capacity in sequences or in groups, among dense layers.
MIXTURES = (
    decoder(experts=Experts(number=16, top_k=2, mlp=1024)),
    decoder(gated_mlp=True, experts=Experts(number=16, top_k=2, mlp=1024, capacity=1.25, shared=1)),
    decoder(
        kv_heads=2,
        experts=Experts(number=32, top_k=4, mlp=512, capacity=1.0, group=64, beside=True, every=2),
    ),
    decoder(gated_mlp=True, experts=Experts(number=64, top_k=8, mlp=256, shared=2, dense_layers=1)),
)
# Of videos, whose layers attend in turn within frames and through time.
VIDEO = vit(
    name="small-video",
    layers=4,
    image=56,
    frames=16,
    attends=("space", "time"),
    parallel_block=False,
    qk_norm=False,
)
# Latents: of queries too, or of keys and values alone, with experts.
LATENTS = (
    decoder(
        norm="rmsnorm",
        head_dim=64,
        latent=Latent(queries=256, keys=128, rotary=16, values=32),
    ),
    decoder(
        norm="rmsnorm",
        head_dim=64,
        gated_mlp=True,
        latent=Latent(keys=128, rotary=32, values=64),
        experts=Experts(number=64, top_k=8, mlp=256, shared=2, dense_layers=1),
    ),
)
MACHINES = (
    "v4:2x2x1",
    "v4:2x2x4",
    "v4:4x4x4",
    "v5e:4x4",
    "v5e:8x16",
    "v3:4x4",
    "tpu7x:2x2x2",
    "2*v4:2x2x4",
    "4*v5e:4x4",
    "h100:8",
    "2*h100:8",
)


def _routing(axis: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Draw how experts are spread, with an expert `axis` or without."""
    uneven = st.sampled_from([1.0, 1.25])
    exchange = st.sampled_from(EXCHANGES if axis else EXCHANGES[:1])
    return st.fixed_dictionaries(
        {
            "expert_shards": st.booleans(),
            "by_expert": st.booleans(),
            "experts": st.builds(Routing, exchange=exchange, imbalance=uneven, padding=uneven),
        }
    )


ALIKE_KEYS = tuple(keys for keys in CONTEXT_KEYS if keys != "dsp")  # of layers that are all alike

# Every way in which a context axis attends.
CONTEXTS = tuple(
    Context(keys=keys, order=order, overlap=overlap)
    for keys in ALIKE_KEYS
    for order in (("contiguous", "striped") if keys != "ulysses" else ("contiguous",))
    for overlap in ((True, False) if keys == "ring" else (True,))
)


@st.composite
def plans(
    draw: st.DrawFn,
    models: Sequence[Model] = MODELS,
    machines: Sequence[str] = MACHINES,
    matmul_overlap: Sequence[str] = MATMUL_OVERLAP,
) -> Plan:
    """Draw a legal plan: every torus axis whole to one role, or split between two."""
    model = draw(st.sampled_from(models))
    machine = parse_machine(draw(st.sampled_from(machines)))
    narrow = [name for name in ("fp8", "int8") if name in machine.chip.peak_flops][:1]
    roles = [role for role in NAMES if model.experts or role != "expert"]
    where: dict[str, dict[str, int]] = {}
    if machine.slices > 1:
        role = draw(st.sampled_from(["data", "fsdp", "pipeline"]))
        where.setdefault(role, {})["dcn"] = machine.slices
    for axis in machine.axes:
        if axis.length == 1:
            continue
        inner = draw(st.sampled_from([n for n in range(2, axis.length + 1) if not axis.length % n]))
        first, second = sorted(
            draw(st.lists(st.sampled_from(roles), min_size=2, max_size=2, unique=True)),
            key=roles.index,
        )
        where.setdefault(second, {})[axis.name] = inner
        if inner < axis.length:
            where.setdefault(first, {})[axis.name] = axis.length // inner
    microbatches = draw(st.sampled_from([1, 2, 4, 8, 16]))
    attention = draw(st.sampled_from(["flash", "unfused"]))
    other = attention == "flash" and model.latent is None
    attends = [one for one in CONTEXTS if other or one.keys == "gathered"]
    if model.attends:
        attends = [one for one in attends if one.order == "contiguous"]
        attends += [Context(keys="dsp")] * 3
    groups = 1
    for role in ("data", "fsdp", "expert"):
        for factor in where.get(role, {}).values():
            groups *= factor
    plan = build(
        model,
        machine,
        groups * microbatches * draw(st.sampled_from([1, 2, 3])),
        where or {"data": {}},
        residual=draw(st.sampled_from(["", "seq", "embed"])),
        context_shards=draw(st.booleans()),
        **(draw(_routing("expert" in where)) if model.experts else {}),
        over_data=draw(st.booleans()),
        remat=draw(st.sampled_from([*sorted(POLICIES), frozenset({"statistics", "qkv"})])),
        microbatches=microbatches,
        overlap=Overlap(
            matmul=draw(st.sampled_from(matmul_overlap)),
            weights=draw(st.booleans()),
            gradients=draw(st.booleans()),
            dcn=draw(st.booleans()),
        ),
        precision=Precision(
            compute=draw(st.sampled_from(["bf16", "f32", *narrow])),
            parameters=draw(st.sampled_from(["f32", "bf16"])),
            reduce=draw(st.sampled_from(["f32", "bf16"])),
        ),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        attention=attention,
        context=draw(st.sampled_from(attends)) if "context" in where else Context(),
        fused_projections=model.parallel_block and draw(st.booleans()),
    )
    assume(is_legal(plan))
    return plan
