"""Single changes of a plan that people try: what layers keep, where it lies, sizes, slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import ShardsimError
from shardsim.files import flow_text
from shardsim.machine import scaled
from shardsim.plan.plan import (
    ACCUMULATION,
    CONTEXT_KEYS,
    CONTEXT_ORDERS,
    MATMUL_OVERLAP,
    WHOLE,
    Plan,
)
from shardsim.plan.remat import TENSORS, Remat
from shardsim.plan.resolve import AXIS_NAMES, resolve
from shardsim.planner.attention import other_attention
from shardsim.planner.changes import changed
from shardsim.planner.space import policies

MOST_MICROBATCHES = 64
TILES = 8  # of the vocabulary's logits
NOTHING = 5e-4  # a change of time and of HBM by less is none
NARROW = ("precision.gradients", "precision.state", "precision.parameters")
Keys = Mapping[str, Any]  # of plan files, with their values


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A plan with one thing changed, and what is predicted of it beside the plan itself."""

    kind: str  # remat, offload, microbatches, mesh, chips, batch, overlap, precision, ...
    changes: Keys  # as `changed` and --set take them
    base: Prediction
    prediction: Prediction

    @property
    def text(self) -> str:
        """The change as --set takes it."""
        return set_text(self.changes)

    @cached_property
    def gain(self) -> float:
        """The share of the time per token that it saves; below zero it costs time."""
        return 1.0 - _per_token(self.prediction) / _per_token(self.base)

    @property
    def chip_seconds(self) -> float:
        """Chip-seconds per token."""
        return _per_token(self.prediction) * self.prediction.plan.machine.chips

    @property
    def has_room(self) -> bool:
        """Whether it fits without the compiler recomputing by itself, which takes longer than is
        predicted."""
        return self.prediction.fits and not bool(self.prediction.use.recomputed)

    @property
    def freed_bytes(self) -> float:
        """HBM of a device that it frees at the peak."""
        return self.base.hbm["peak_bytes"] - self.prediction.hbm["peak_bytes"]

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "set": self.text,
            "kind": self.kind,
            "step_time_s": self.prediction.step_time_s,
            "hbm_peak_bytes": self.prediction.hbm["peak_bytes"],
            "gain": self.gain,
            "fits": self.prediction.fits,
            "has_room": self.has_room,
            "mfu": self.prediction.mfu,
            "chips": self.prediction.plan.machine.chips,
        }


def set_text(changes: Keys) -> str:
    """Return changes as --set takes them, one after the other.

    >>> set_text({"remat": {"save": ["qkv"]}, "microbatches": 2})
    'remat={save: [qkv]} microbatches=2'
    """
    return " ".join(f"{key}={flow_text(value)}" for key, value in changes.items())


def _per_token(item: Prediction) -> float:
    return item.step_time_s / item.plan.tokens


def trials(base: Prediction, progress: Callable[[int, int], None] | None = None) -> list[Trial]:
    """Return all single changes that make a legal plan, cheapest first: those that fit, then those
    that fit only as the compiler recomputes by itself, then the others.

    Cheapest is in chip-seconds per token. All are priced as the plan itself; what changes neither
    its time nor its HBM is left out. `progress(done, total)` is called after each.
    """
    found, seen = [], {_identity(base.plan)}
    every = list(candidates(base.plan))
    for number, (kind, changes) in enumerate(every):
        if progress is not None:
            progress(number + 1, len(every))
        try:
            other = changed(base.plan, changes)
            if _identity(other) in seen:
                continue
            seen.add(_identity(other))
            item = predict(other, costs=base.costs, implementation=base.implementation)
        except ShardsimError:
            continue
        one = Trial(kind=kind, changes=changes, base=base, prediction=item)
        if abs(one.gain) > NOTHING or abs(one.freed_bytes) > NOTHING * base.hbm["peak_bytes"]:
            found.append(one)
    return sorted(
        found, key=lambda one: (not one.has_room, not one.prediction.fits, one.chip_seconds)
    )


def _identity(plan: Plan) -> str:
    return repr([getattr(plan, name) for name in plan.__dataclass_fields__ if name != "name"])


def candidates(plan: Plan) -> Iterator[tuple[str, Keys]]:
    """Yield (kind, changes) of everything that is tried, legal or not."""
    yield from _kept(plan)
    for number in (1, 2, 4):
        for many in (plan.microbatches * number, plan.microbatches // number):
            if 1 <= many <= max(MOST_MICROBATCHES, plan.microbatches):
                yield "microbatches", {"microbatches": many}
    yield "microbatches", {"microbatches": 1}
    if plan.microbatches > 1:
        for how in ACCUMULATION:
            yield "accumulation", {"accumulation": how}
    if resolve(plan).names["pipeline"]:
        for chunks in (1, 2, 4):
            yield "pipeline", {"pipeline_interleave": chunks}
    yield from _meshes(plan)
    yield from _switches(plan)
    for key in NARROW:
        yield "precision", {key: "bf16"}
    for part in (0.25, 0.5, 0.75, 2.0):
        if (plan.batch * part).is_integer():
            yield "batch", {"batch": int(plan.batch * part)}
    for factor in (2.0, 4.0):
        if (machine := scaled(plan.machine, factor)) is not None:
            yield "chips", {"machine": machine.name}
    two = replace(plan.machine, slices=2 * plan.machine.slices)
    yield "chips", {"machine": two.name}


def _kept(plan: Plan) -> Iterator[tuple[str, Keys]]:
    """Yield other remat policies: one tensor more or less, those that have a name, and those with
    the host's memory that searches try, also without what they keep beside on the device. No
    other pair with it was compiled."""
    if len(plan.remat.groups) == 1:
        policy = plan.remat.groups[0]
        for name in sorted(policy.offload):
            yield "remat", _policy(policy.save - {name}, policy.offload - {name})
        for name in TENSORS:
            if name in policy.save:
                yield "remat", _policy(policy.save - {name}, policy.offload)
            elif not policy.offload:
                yield "remat", _policy(policy.save | {name}, policy.offload)
    for policy in policies(plan.model, plan.machine):
        if policy.offload:
            yield "offload", _policy(frozenset(), policy.offload)
        yield "offload" if policy.offload else "remat", _policy(policy.save, policy.offload)
    yield "offload", {"offload_optimizer": not plan.offload_optimizer}
    if plan.accumulation not in WHOLE:
        yield "offload", {"offload_parameters": not plan.offload_parameters}


def _policy(save: frozenset[str], offload: frozenset[str]) -> Keys:
    data = Remat.of(save, offload).to_data()
    if isinstance(data, dict):
        data = {key: names for key, names in data.items() if names}
    return {"remat": data}


def _meshes(plan: Plan) -> Iterator[tuple[str, Keys]]:
    """Yield meshes with one axis longer or shorter, or with one more."""
    for axis in plan.mesh:
        for factor in (2, 4):
            yield "mesh", {f"mesh.{axis.name}": axis.size * factor}
            if axis.size % factor == 0:
                yield "mesh", {f"mesh.{axis.name}": axis.size // factor}
    names = resolve(plan).names
    for role in ("data", "fsdp", "tensor", "context"):
        if not names[role]:
            yield from (("mesh", {f"mesh.{AXIS_NAMES[role]}": size}) for size in (2, 4, 8))


def _switches(plan: Plan) -> Iterator[tuple[str, Keys]]:
    """Yield how attention and logits are computed, what overlaps, where optimizer state lies."""
    names = resolve(plan).names
    yield "attention", {"attention": other_attention(plan.attention)}
    if plan.model.vocab:
        yield "logits", {"vocab_tiles": TILES if plan.vocab_tiles == 1 else 1}
    if names["context"]:
        for keys in CONTEXT_KEYS if "time" in plan.model.attends else CONTEXT_KEYS[:-1]:
            for order in CONTEXT_ORDERS:
                yield "context", {"context": {"keys": keys, "order": order}}
    if names["tensor"]:
        for mode in MATMUL_OVERLAP:
            yield "overlap", {"overlap.matmul": mode}
    yield "overlap", {"overlap.weights": not plan.overlap.weights}
    if plan.overlap.gradients:  # on is for plan files to say: no compiler options do it
        yield "overlap", {"overlap.gradients": False}
    if data := list(names["data"]):
        yield "optimizer", {"rules.optimizer.embed": data if not plan.optimizer_rules else []}
