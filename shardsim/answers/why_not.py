"""Why one plan is slower than another, why not a certain mesh, and why there is no plan at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardsim.answers.illegal import Question, why_illegal
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.words import PARTS
from shardsim.errors import PlanError
from shardsim.machine import Machine, scaled
from shardsim.model import Model
from shardsim.plan.layout import ROLES
from shardsim.plan.legality import check
from shardsim.plan.resolve import AXIS_NAMES, resolve
from shardsim.plan.words import hosted_text
from shardsim.planner import hosted
from shardsim.planner.found import OfSlice, SearchResult
from shardsim.planner.presets import parse_mesh, plan_of_mesh
from shardsim.units import show_bytes, show_time

# A change of the step time smaller than this is none to a reader.
VISIBLE = 5e-4
DOUBLINGS = 3  # of a slice on which nothing fits

# Searches the same model as the question with another machine, batch, or choices held.
Again = Callable[..., SearchResult]


@dataclass(frozen=True, kw_only=True)
class WhyNot:
    """A mesh that someone has in mind, beside the best plan of a search."""

    mesh: str
    prediction: Prediction | None  # of the best plan with that mesh; None where there is none
    says: str  # one sentence

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        item = self.prediction
        return {
            "mesh": self.mesh,
            "says": self.says,
            "fits": None if item is None else item.fits,
            "step_time_s": None if item is None else item.step_time_s,
            "hbm_peak_bytes": None if item is None else item.hbm["peak_bytes"],
        }


def why_not(
    text: str,
    model: Model,
    machine: Machine,
    batch: int,
    sequence: int | None,
    best: Prediction | None,
    again: Again,
    fix: Mapping[str, Any] | None = None,
) -> WhyNot:
    """Say in one sentence what makes a mesh slower than the `best` plan, too large, or illegal.

    `text` is a mesh of roles, as `fsdp=32,model=8`; roles that it leaves out have size 1. Of all
    plans with it, and with what `fix` holds besides a mesh, the best counts. Raises `PlanError` if
    `text` is no mesh.
    """
    sizes = parse_mesh(text)
    mesh = ", ".join(f"{AXIS_NAMES[role]}={size}" for role, size in sizes.items())
    try:
        one = plan_of_mesh(model, machine, batch, sizes, sequence)
        check(one, resolve(one))
    except PlanError as error:
        return WhyNot(mesh=mesh, prediction=None, says=f"{mesh} cannot be: {error}")
    held = {key: value for key, value in (fix or {}).items() if not key.startswith("mesh.")}
    held |= {f"mesh.{role}": sizes.get(role, 1) for role in ROLES}
    # First as the plan that it is compared with.
    alike = {} if best is None else {key: getattr(best.plan, key) for key in hosted.KEYS}
    found = again(machine, fix=held | alike)
    if not found.predictions and not held.keys() & set(hosted.KEYS):
        found = again(machine, fix=held)
    if found.predictions:
        return _beside(mesh, found.best, best)
    item = predict(one)
    if item.fits:
        return _beside(mesh, item, best)
    least = min(found.smallest_peak_bytes, item.hbm["thrifty_bytes"])
    return WhyNot(
        mesh=mesh,
        prediction=item,
        says=f"{mesh} does not fit: its leanest plan needs {show_bytes(least)} of "
        f"{show_bytes(item.hbm['capacity_bytes'])} on a device",
    )


def _beside(mesh: str, item: Prediction, best: Prediction | None) -> WhyNot:
    says = f"{mesh} takes {show_time(item.step_time_s)} at best (remat {item.plan.remat.name}, "
    many = item.plan.microbatches
    says += f"{many} microbatch{'es' if many > 1 else ''}"
    if there := hosted_text(item.plan):
        says += f", {there.replace(', ', ' and ')} in the host's memory"
    says += ")"
    if best is not None:
        says += f" against {show_time(best.step_time_s)}: {why_lost(best, item)}"
    return WhyNot(mesh=mesh, prediction=item, says=says)


def why_lost(winner: Prediction, loser: Prediction) -> str:
    """Return why one plan is slower than another: the parts of the step that grew most.

    Two plans of the same model, machine and batch.
    """
    more = loser.step_time_s / winner.step_time_s - 1
    if abs(more) < VISIBLE:
        return "as fast"
    growth = {part: loser.time[part] - winner.time[part] for part in PARTS}
    against = {part: value for part, value in growth.items() if value * more > 0}
    reasons = []
    for part in sorted(against, key=lambda part: -abs(against[part])):
        if abs(against[part]) < 0.15 * max(map(abs, against.values())):
            continue
        sign = "+" if against[part] > 0 else "-"
        text = f"{PARTS[part]} {sign}{show_time(abs(against[part]))}"
        if part == "exposed_comm_s" and loser.collectives and against[part] > 0:
            worst = max(loser.collectives, key=lambda use: use.exposed_s)
            where = ", ".join(worst.mesh_axes) or "the host link"
            text += f" (most in the {worst.kind} over {where})"
        if part == "compute_s" and (work := loser.price.flops / winner.price.flops) > 1.01:
            text += f" (it executes {100 * (float(work) - 1):.0f} % more FLOP: {_remat(loser)})"
        reasons.append(text)
    way = "slower" if more > 0 else "faster"
    return f"{100 * abs(more):.1f} % {way}: {', '.join(reasons)}"


def _remat(item: Prediction) -> str:
    name = item.plan.remat.name
    return "nothing is recomputed" if name == "none" else f"remat {name}"


def none_found(result: OfSlice, asked: Question, fix: Mapping[str, Any], again: Again) -> str:
    """Return in one line why a search on one machine found no plan: what is held, what does not
    divide, or memory, and what would do instead."""
    model, machine, batch = asked.model, asked.machine, asked.batch
    if fix and result.searched == 0 and asked.legal({}):
        return f"no plan: {why_illegal(asked, fix)}"
    if fix and result.searched and again(machine, fix=None, top=1, leanest=False).predictions:
        words = {key: str(v).lower() if isinstance(v, bool) else v for key, v in fix.items()}
        held = ", ".join(f"{key}={value}" for key, value in words.items())
        how = f"none fits: {_needs(result, machine)}"
        return f"of the plans with {held} {how}; without it there are plans"
    if (said := _batch(model, machine, batch, again)) is not None:
        return said
    if result.searched == 0:
        mlp, heads = model.mlp, model.heads
        return (
            f"no legal plan: {machine.devices:,} devices do not divide batch {batch:,}, "
            f"{heads:,} heads, {model.embed:,} and {mlp:,} of width and {model.layers:,} layers; "
            "try a batch that is a multiple of a power of two"
        )
    larger = _larger(machine, again)
    advice = f"{larger.name} would do" if larger else "try more chips"
    return f"no plan fits in HBM: {_needs(result, machine)}; {advice}, or a smaller batch"


def _needs(result: OfSlice, machine: Machine) -> str:
    device = show_bytes(machine.chip.hbm_usable_bytes_per_device)
    return f"the leanest needs {show_bytes(result.smallest_peak_bytes)} of {device} on a device"


def _batch(model: Model, machine: Machine, batch: int, again: Again) -> str | None:
    """Return that the batch does not divide, if the nearest that does makes a plan."""
    ways = max(
        number
        for number in range(1, min(batch, machine.devices) + 1)
        if machine.devices % number == 0
    )
    if batch % ways == 0:
        return None
    below = batch // ways * ways
    nearest = sorted((below, below + ways), key=lambda one: abs(one - batch))
    if not again(machine, batch=nearest[0], top=1, leanest=False).predictions:
        return None
    most = max(number for number in range(1, ways + 1) if ways % number == 0 == batch % number)
    return (
        f"batch: {batch:,} sequences do not divide by {ways:,}, only by {most:,} of the "
        f"{machine.devices:,} devices; the nearest that do: {below:,} and {below + ways:,}"
    )


def _larger(machine: Machine, again: Again) -> Machine | None:
    """Return the smallest of the next larger machines on which a plan fits."""
    for power in range(1, DOUBLINGS + 1):
        other = scaled(machine, 2.0**power)
        if other is not None and again(other, top=1, leanest=False).predictions:
            return other
    return None
