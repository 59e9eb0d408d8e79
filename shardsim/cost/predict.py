"""Predictions: what a plan will do, as people and scripts read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from math import ceil
from typing import Any, Protocol

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import HbmUse, dropping, hbm_use
from shardsim.cost.mfu import beyond, mfu_of
from shardsim.cost.price import CollectiveCost, Price, price
from shardsim.cost.real import RealTokens, real_tokens_of
from shardsim.cost.sensitivity import Sensitivity, sensitivity
from shardsim.cost.words import HBM, PARTS, figure_words
from shardsim.machine import Machine
from shardsim.plan.idle import idle_keys, shares_told
from shardsim.plan.io import PlanOrPath, as_plan
from shardsim.plan.layout import Layout
from shardsim.plan.plan import Plan
from shardsim.plan.precision import NARROW
from shardsim.plan.resolve import resolve
from shardsim.plan.split import state_apart
from shardsim.program.holds import held_by
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.schedule import Copy, Move, Schedule
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Compute, Program

TIME_PARTS = tuple(PARTS)
CUT = 0.01  # of the tokens: less is not worth a word
LIMITING = 0.01  # of an elasticity: below it nothing limits
NOT_OF_LINKS = ("peak_flops", "vector_flops", "hbm_bytes_per_s")
HBM_PARTS = ("capacity_bytes", "peak_bytes", "thrifty_bytes", "lavish_bytes", *HBM)


@dataclass(frozen=True, kw_only=True)
class CollectiveUse:
    """All collectives of one kind over the same mesh axes in a step, per chip's device.

    `bytes_per_chip` is what one device sends in the step, which is what it receives; `count` how
    many there are; `time_s` what they would take on their own; `exposed_s` what of that nothing
    hides.
    """

    kind: str
    mesh_axes: tuple[str, ...]
    purpose: str
    bytes_per_chip: float
    count: float
    time_s: float
    exposed_s: float


class Part(Protocol):
    """What only one level of fidelity finds."""

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Prediction:
    """What one plan is predicted to do, at every level of fidelity."""

    plan: Plan
    step_time_s: float
    tokens_per_s_per_chip: float
    mfu: float
    hfu: float
    hbm: dict[str, float]  # keys: HBM_PARTS; bytes on one device
    peak_moment: str
    fits: bool
    time: dict[str, float]  # keys: TIME_PARTS; sums to step_time_s
    collectives: tuple[CollectiveUse, ...]
    warnings: tuple[str, ...]
    costs: str  # what operations take: a name of `cost.costs.COSTS`
    implementation: str  # what is done beyond the plan: of `program.passes.IMPLEMENTATIONS`
    use: HbmUse = field(repr=False)
    schedule: Schedule = field(repr=False)
    price: Price = field(repr=False)
    real: RealTokens | None = None  # where the plan says how long sequences are
    fidelity: str = "analytic"  # or "events", "compiled"
    events: Part | None = field(default=None, repr=False)  # a `simulate.Outcome`
    compiled: Part | None = field(default=None, repr=False)  # a `xla.tpu.compiled.Compiled`

    @property
    def operations_s(self) -> float:
        """Seconds of the step in operations, all that is no collective and no waiting for one."""
        return self.time["compute_s"] + self.time["hbm_bound_s"] + self.time["overhead_s"]

    @cached_property
    def elasticities(self) -> tuple[Sensitivity, ...]:
        """How the step time answers to each figure of the chip, that which counts most first."""
        made = self.use.account.layout, self.schedule
        return tuple(sensitivity(self.plan, costs=self.costs, made=made))

    @cached_property
    def limited_by(self) -> str:
        """The figure of the chip that the plan's step time answers to most (`elasticities`).

        Where that is one of the links, also the collective that costs most. It is the closed
        forms' answer at every fidelity, found when it is asked for.
        """
        first = self.elasticities[0]
        if abs(first.elasticity) < LIMITING:
            return "no figure of the chip"
        if first.figure in NOT_OF_LINKS or not self.collectives:
            return figure_words(first.figure, self.plan.machine.chip)
        worst = max(self.collectives, key=lambda use: use.exposed_s)
        over = ", ".join(worst.mesh_axes) or "the host link"
        words = figure_words(first.figure, self.plan.machine.chip)
        return f"{words} ({worst.kind} over {over})"

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"Prediction({plan.name!r} on {plan.machine.name}: {self.step_time_s:.4g} s a step, "
            f"{100 * self.mfu:.1f} % MFU, {self.hbm['peak_bytes'] / 2**30:.1f} GiB of HBM, "
            f"{'fits' if self.fits else 'does not fit'})"
        )

    def _repr_html_(self) -> str:
        # Views stand above: looked up only when a notebook asks.
        return str(import_module("shardsim.views.notebook").shown(self))

    def _host(self) -> dict[str, float | None]:
        """Return a device's share of its host's memory, and what of it the plan takes."""
        use, known = self.use, self.plan.machine.chip.host_bytes is not None
        capacity = use.host_capacity_bytes if known else None
        return {"capacity_bytes": capacity, "bytes": float(use.host_bytes)}

    def to_data(self) -> dict[str, Any]:
        """Return the prediction as plain data: the JSON of the command line."""
        return {
            "model": self.plan.model.name,
            "machine": self.plan.machine.name,
            "chips": self.plan.machine.chips,
            "step_time_s": self.step_time_s,
            "tokens_per_s_per_chip": self.tokens_per_s_per_chip,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "hbm": dict(self.hbm),
            "peak_moment": self.peak_moment,
            "fits": self.fits,
            "time": dict(self.time),
            "limited_by": self.limited_by,
            "collectives": [
                {
                    "kind": use.kind,
                    "mesh_axes": list(use.mesh_axes),
                    "purpose": use.purpose,
                    "bytes_per_chip": use.bytes_per_chip,
                    "count": use.count,
                    "time_s": use.time_s,
                    "exposed_s": use.exposed_s,
                }
                for use in self.collectives
            ],
            "warnings": list(self.warnings),
            "costs": self.costs,
            "as": self.implementation,
            "fidelity": self.fidelity,
            **({"host": self._host()} if float(self.use.host_bytes) else {}),
            **({"real": self.real.to_data()} if self.real else {}),
            **({"compiled": self.compiled.to_data()} if self.compiled else {}),
            **({"events": self.events.to_data()} if self.events else {}),
        }


def predict(
    plan: PlanOrPath,
    layout: Layout | None = None,
    *,
    costs: str | None = None,
    implementation: str | None = None,
) -> Prediction:
    """Predict one plan with the closed forms, in some hundredths of a second.

    >>> predict("vit-22b-published-tp8", costs="compiler").implementation
    'emitted'

    `plan` may be a file, or the name of a shipped one. `layout` replaces the one that its rules
    resolve to. Operations take `costs`, "physical" or "compiler", or what the plan says; the step
    is done as `implementation` ("emitted", "trainer", "ideal", on GPUs "combined-1f1b" and
    "torchtitan") says, by default as goes with the costs (`program.passes.USUAL`).
    """
    plan = as_plan(plan)
    layout = layout or resolve(plan)
    machine = plan.machine
    costs = plan.op_costs if costs is None else costs
    implementation = USUAL.get(costs, "ideal") if implementation is None else implementation
    use = hbm_of(plan, implementation, layout)
    done, again = _as_compiled(plan, layout, use)
    program = implemented(partition(Workload.of(plan), done), implementation, machine, done)
    schedule = overlap(program, done)
    cost = price(machine, done, schedule, costs_of(costs, machine.chip))
    step_time_s = float(cost.step_time_s)
    peak = machine.chip.peak(plan.precision.compute)
    flops_per_chip = float(cost.flops) * machine.chip.devices_per_chip
    hbm = {name: float(getattr(use, name)) for name in HBM_PARTS}
    fits = bool(use.fits)
    real = real_tokens_of(plan, layout, step_time_s, by_sequence=_by_sequence(plan, program))
    return Prediction(
        plan=plan,
        step_time_s=step_time_s,
        tokens_per_s_per_chip=plan.tokens / step_time_s / machine.chips,
        mfu=mfu_of(plan, step_time_s),
        hfu=flops_per_chip / step_time_s / peak,
        hbm=hbm,
        peak_moment=use.peak_moment,
        fits=fits,
        time={name: float(getattr(cost, name)) for name in TIME_PARTS},
        collectives=_summed(cost.collectives, layout),
        warnings=(
            *_warnings(plan, layout, use, again),
            *_of_another_program(plan, layout, implementation, use),
            *_pricing(costs, implementation, machine),
            *_of_lengths(plan, real),
            *_of_precision(plan),
            *idle_keys(plan, layout),
            *shares_told(plan),
            *beyond(plan, step_time_s, flops_per_chip / step_time_s / peak),
        ),
        costs=costs,
        implementation=implementation,
        use=use,
        schedule=schedule,
        price=cost,
        real=real,
    )


def hbm_of(plan: Plan, implementation: str, layout: Layout | None = None) -> HbmUse:
    """Return what one plan holds in HBM as an implementation does it, in a third of the time that
    all of a prediction takes."""
    chip = plan.machine.chip
    holds = held_by(implementation, chip)
    return hbm_use(plan.machine, Workload.of(plan), layout or resolve(plan), holds)


def _as_compiled(plan: Plan, layout: Layout, use: HbmUse) -> tuple[Layout, int]:
    """Return the layout that is priced, and how many layers are computed again though the plan
    keeps what they make: as many as have to be until the rest fits.

    XLA's pass chooses single arrays, whose price lies about that of whole layers with as many
    bytes. Where layers are of several kinds or on pipeline stages, it is all of them.
    """
    if not bool(use.recomputed):
        return layout, 0
    model = plan.model
    alone = len(model.stacks) == 1 and len(model.parts) == 1 and int(layout.pipeline.size) == 1
    rounds = model.layers // model.round_layers
    again = model.round_layers * ceil(float(use.recomputed_share) * rounds)
    if not alone or len(layout.kept) > 1:
        again = model.layers
    return dropping(layout, again, model.layers), again


def _summed(costs: list[CollectiveCost], layout: Layout) -> tuple[CollectiveUse, ...]:
    """Return the collectives of a step, one entry per kind, axes and purpose, longest first."""
    sums: dict[tuple[str, tuple[str, ...], str], np.ndarray[Any, Any]] = {}
    for cost in costs:
        if float(cost.count) == 0:
            continue
        key = _key(cost.task, layout)
        row = [cost.sent_bytes, cost.count, cost.time_s, cost.exposed_s]
        sums[key] = sums.get(key, np.zeros(4)) + np.array([float(value) for value in row])
    return collective_uses({key: row for key, row in sums.items() if row[2] > 0})


def _key(task: Move | Copy, layout: Layout) -> tuple[str, tuple[str, ...], str]:
    """Return kind, mesh axes and purpose of a move, or of a copy to or from the host."""
    if isinstance(task, Copy):
        return "host-transfer", (), task.moves
    return task.kind, layout.mesh_axes(task.role), task.moves


def collective_uses(
    sums: Mapping[tuple[str, tuple[str, ...], str], np.ndarray[Any, Any]],
) -> tuple[CollectiveUse, ...]:
    """Return rows of (sent bytes, count, time, exposed) by kind, axes, purpose; longest first."""
    uses = [
        CollectiveUse(
            kind=kind,
            mesh_axes=axes,
            purpose=purpose,
            bytes_per_chip=float(row[0]),
            count=float(row[1]),
            time_s=float(row[2]),
            exposed_s=float(row[3]),
        )
        for (kind, axes, purpose), row in sums.items()
    ]
    return tuple(sorted(uses, key=lambda use: -use.time_s))


def _warnings(plan: Plan, layout: Layout, use: HbmUse, again: int) -> tuple[str, ...]:
    warnings = []
    capacity = use.capacity_bytes / 2**30
    short = float(use.thrifty_bytes) / 2**30 - capacity
    if not bool(use.host_fits):
        warnings.append(
            f"does not fit: keeps {float(use.host_bytes) / 2**30:.1f} GiB in the host's memory, of "
            f"which a device of {plan.machine.chip.name} has {use.host_capacity_bytes / 2**30:.1f}"
        )
    if float(use.host_bytes) and plan.machine.chip.pcie_bytes_per_s is None:
        warnings.append(
            f"copies to the host's memory are taken as free: {plan.machine.chip.name} has no "
            "pcie_bytes_per_s"
        )
    if short > 0:
        warnings.append(
            f"does not fit: needs {short:.1f} GiB more HBM than a device of "
            f"{plan.machine.chip.name} offers"
        )
    elif bool(use.recomputed):
        warnings.append(
            f"fits only as the compiler by itself recomputes what layers keep: what {again} of "
            f"{plan.model.layers} layers keep is priced as computed twice"
        )
    elif float(use.lavish_bytes) > use.capacity_bytes:
        warnings.append(
            f"may not fit: a program that spends HBM freely reserves "
            f"{float(use.lavish_bytes) / 2**30:.1f} of {capacity:.1f} GiB; the leanest needs "
            f"{float(use.thrifty_bytes) / 2**30:.1f}, both with the gaps between buffers"
        )
    tensor = int(layout.tensor.size)
    full = bool(use.fits) and not bool(use.hides)
    overlaps = plan.overlap.weights or (plan.overlap.matmul != "off" and tensor > 1)
    if full and overlaps:
        there, limit = float(use.at[0]) / use.capacity_bytes, use.account.passes.hides_up_to
        warnings.append(
            f"HBM is {100 * there:.0f} % full while layers run: above {100 * limit:.0f} % or so "
            "the TPU compiler's scheduler may hide no gather and no ring; compile the plan "
            "(shardsim verify --against tpu)"
        )
    if plan.overlap.matmul != "off" and tensor > 1 and int(layout.residual) == 0:
        warnings.append(
            "the residual stream is replicated over the tensor axis: its all-reduces cannot "
            "become collective matmuls"
        )
    data = int(layout.data.size)
    if layout.optimizer_over_data and data > 1 and not state_apart(plan.model, layout):
        over = int(layout.gather.size * layout.tensor2.size) * data
        warnings.append(
            f"optimizer state lies as the weights do: their embed of {plan.model.embed:,} does not "
            f"divide by {over:,}"
        )
    if plan.machine.twisted:
        warnings.append("a twisted torus is priced as a straight one")
    return tuple(warnings)


def _of_precision(plan: Plan) -> list[str]:
    """Return what formats gain nothing, and why."""
    precision, chip = plan.precision, plan.machine.chip
    warnings = []
    if precision.sparsity and chip.sparse_gain == 1.0:
        warnings.append(
            f"sparsity {precision.sparsity} gains nothing: {chip.name} multiplies zeros as it does "
            "other numbers, and masters are stored whole"
        )
    elif precision.sparsity not in ("", "2:4"):
        warnings.append(
            f"sparsity {precision.sparsity} gains nothing: {chip.name} skips zeros of 2:4 alone"
        )
    if precision.compute in NARROW and chip.peak(precision.compute) <= chip.peak("bf16"):
        warnings.append(
            f"{precision.compute} multiplies no faster than bf16 on {chip.name}: casts cost, and "
            "only bytes that travel may shrink (precision.weights)"
        )
    return warnings


def _by_sequence(plan: Plan, program: Program) -> bool:
    """Return whether attention leaves out what no sequence of a row reaches."""
    if plan.lengths is None or plan.lengths.unpadded:
        return plan.lengths is not None
    tasks = (task for block in program.blocks for task in block.tasks)
    return any(
        isinstance(task, Compute) and bool(np.any(np.less(task.fraction, task.whole_fraction)))
        for task in tasks
    )


def _of_another_program(
    plan: Plan, layout: Layout, implementation: str, use: HbmUse
) -> Iterator[str]:
    """Yield that a training library's program of a plan fits, where the emitted one does not; no
    library trains on host devices."""
    if implementation != "emitted" or bool(use.fits) or plan.machine.chip.kind == "cpu":
        return
    other = hbm_of(plan, "trainer", layout)
    if bool(other.fits):
        size = float(other.peak_bytes) / 2**30
        yield f"a training library's program of it fits, with {size:.2f} GiB (--as trainer)"


def _of_lengths(plan: Plan, real: RealTokens | None) -> list[str]:
    """Return what to know about sequences of many lengths."""
    warnings: list[str] = []
    if real is None or plan.lengths is None:
        return warnings
    if real.cut_share > CUT:
        warnings.append(
            f"{100 * real.cut_share:.1f} % of the sequences' tokens are beyond the longest, "
            f"{plan.sequence:,}, and cut"
        )
    if plan.lengths.unpadded and plan.machine.chip.kind == "tpu":
        warnings.append(
            "unpadded: a TPU program has arrays of fixed shapes; packed rows are what comes near"
        )
    return warnings


def _pricing(costs: str, implementation: str, machine: Machine) -> list[str]:
    """Return what to know about how a plan is priced."""
    warnings = []
    if costs == "compiler":
        warnings.append("operations take what the TPU compiler estimates; fitted to no run")
    if implementation != USUAL.get(costs, "ideal"):
        warnings.append(priced_as(costs, implementation))
    if machine.chip.kind == "gpu" and machine.chip.kernels is None:
        warnings.append(f"{machine.chip.name}'s kernels were not measured: published figures")
    if machine.chip.kind == "gpu" and machine.devices > 1:
        warnings.append("links between GPUs have published figures and were checked in no run")
    return warnings


def priced_as(costs: str, implementation: str) -> str:
    """Return how a plan is priced, in words."""
    return f"priced as {implementation}, with {costs} costs"
