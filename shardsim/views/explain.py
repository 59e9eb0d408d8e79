"""What is known of one plan, in words and tables: `shardsim explain`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from shardsim.cost.words import figure_words
from shardsim.model import load_model, model_names
from shardsim.plan.words import mesh_text
from shardsim.units import GIB, show_bytes, show_percent, show_time
from shardsim.views.plans import MFU, PEAK, STEP
from shardsim.views.table import Column, Table, table

if TYPE_CHECKING:
    from shardsim.answers.explain import Explanation, Measured
    from shardsim.answers.host import Instead
    from shardsim.answers.trials import Trial
    from shardsim.cost.account import Held
    from shardsim.cost.sensitivity import Sensitivity
    from shardsim.machine import Chip

SHOWN = 8  # rows of a table; JSON has all
OF_A_KIND = 3  # of changes that gain most
ANOTHER = 5.0  # times the prediction: that is no gap, but another run
VISIBLE = 1e-3  # a gain, a share
VISIBLE_BYTES = 0.02  # of the peak


def explained(item: Explanation) -> list[Table | str]:
    """Return all that is said of one plan, as lines and tables."""
    made = item.prediction
    plan = made.plan
    found: list[Table | str] = [
        f"{plan.name}: {plan.model.name} on {plan.machine.name} ({plan.machine.chips:,} chips), "
        f"batch {plan.batch:,} x {plan.sequence:,} tokens",
        f"mesh: {mesh_text(plan)}",
        f"step {show_time(made.step_time_s)}, MFU {show_percent(made.mfu)}",
        "",
        fitting(item),
        "",
        held(item.at_peak, made.hbm["peak_bytes"]),
        "",
        f"limited by: {made.limited_by}",
        "",
        limits(item.limits, plan.machine.chip),
        "",
        *helping(item),
        *hosted(item),
    ]
    if item.measured is not None:
        found += ["", *measured(item.measured)]
    return [*found, *(f"warning: {text}" for text in made.warnings)]


def fitting(item: Explanation) -> str:
    """Return whether a plan fits, and by how much, in one sentence."""
    hbm = item.prediction.hbm
    least, most, there = (
        show_bytes(hbm[f"{name}_bytes"]) for name in ("thrifty", "lavish", "capacity")
    )
    spread = f"the leanest program needs {least}, one with room to spare {most}"
    moment = f"the peak is at the {item.prediction.peak_moment}"
    if not item.fits:
        return f"does not fit: {spread}, of {there} on a device; {moment}"
    return f"fits: {spread}, of {there} on a device; {moment}"


def held(items: Sequence[Held], peak_bytes: float) -> Table:
    """Return what fills HBM at the peak, largest first."""
    columns = [
        Column("what", "HBM at the peak", attrgetter("name")),
        Column("gib", "GiB", lambda one: one.size_bytes / GIB, ".2f"),
        Column("share", "share", lambda one: one.size_bytes / peak_bytes, "percent"),
    ]
    return table(columns, [one for one in items[:SHOWN] if abs(one.size_bytes) > VISIBLE * GIB])


def hosted(item: Explanation) -> Iterator[str]:
    """Yield what it is worth to use the host's memory, and where that breaks even."""
    for one in item.instead_of_host:
        fits = "fits" if one.fits else "does not fit"
        yield (
            f"{one.what} on the host: if {one.how} instead, the step takes "
            f"{show_time(one.step_time_s)} with {show_bytes(one.hbm_peak_bytes)} of HBM ({fits}); "
            f"{even(one, item.prediction.plan.machine.chip)}"
        )


def even(one: Instead, chip: Chip) -> str:
    """Return at which link of the host a plan takes as long as without its memory."""
    if one.even_bytes_per_s is None:
        return "offloading is slower at any host link"
    if one.even_bytes_per_s == 0:
        return "offloading is faster at any host link"
    there = chip.pcie_bytes_per_s or 0.0
    return (
        f"offloading breaks even at a host link of {one.even_bytes_per_s / 1e9:.1f} GB/s; this one "
        f"has {there / 1e9:.1f}"
    )


def limits(items: Iterable[Sensitivity], chip: Chip) -> Table:
    """Return the figures of the chip that the step time answers to."""
    columns = [
        Column("what", "figure of the chip", lambda one: figure_words(one.figure, chip)),
        Column("elasticity", "elasticity of the step", attrgetter("elasticity"), "+.3f"),
    ]
    return table(columns, items)


def _fit(how: tuple[bool, bool]) -> str:
    fits, has_room = how
    return "yes" if has_room else "recomputing" if fits else "no"


TRIALS = (
    Column("set", "--set", attrgetter("text")),
    *(one.within(attrgetter("prediction")) for one in (STEP, MFU, PEAK)),
    Column("fits", "fits", attrgetter("prediction.fits", "has_room"), show=_fit),
    Column("gain", "gain", attrgetter("gain"), "+.1f", "%"),
    Column("chips", "chips", lambda one: one.prediction.plan.machine.chips, ",d"),
)


def helping(item: Explanation) -> list[Table | str]:
    """Return the changes that would help most: to fit, to be faster, to free HBM."""
    fit = [one for one in item.trials if one.has_room]
    if not item.fits:
        fit = fit or [one for one in item.trials if one.prediction.fits]
        if not fit:
            return ["no single change makes it fit; the one that needs least:", *_least(item)]
        return ["what would make it fit, cheapest first (gain: of the time per token):", "",
                table(TRIALS, fit[:SHOWN])]  # fmt: skip
    faster = [one for one in fit if one.gain > VISIBLE]
    found: list[Table | str] = ["no single change that fits makes it faster"]
    if faster:
        head = "what would make it faster, cheapest in chip-seconds first"
        found = [f"{head} (gain: of the time per token):", "", table(TRIALS, some(faster))]
    enough = VISIBLE_BYTES * item.prediction.hbm["peak_bytes"]
    lean = sorted(
        (one for one in fit if one.gain <= VISIBLE and one.freed_bytes > enough),
        key=lambda one: -one.gain / one.freed_bytes,
    )
    if lean:
        found += ["", "what would free HBM, that which costs least time per byte first:", "",
                  table(TRIALS, some(lean))]  # fmt: skip
    return found


def _least(item: Explanation) -> list[Table | str]:
    lean = sorted(item.trials, key=lambda one: one.prediction.hbm["thrifty_bytes"])
    plan = item.prediction.plan
    known = plan.model.name in model_names() and load_model(plan.model.name) == plan.model
    name = plan.model.name if known else "MODEL.yaml"  # a file with what the plan says of it
    again = f"shardsim plan {name} --on {plan.machine.name} --batch {plan.batch}"
    found: list[Table | str] = ["", table(TRIALS, lean[:1])] if lean else ["(there is none)"]
    return [*found, "", f"what fits at all: {again} --seq {plan.sequence}"]


def some(trials: Iterable[Trial]) -> list[Trial]:
    """Return the first few, not too many of one kind."""
    found: list[Trial] = []
    for one in trials:
        if sum(other.kind == one.kind for other in found) < OF_A_KIND:
            found.append(one)
    return found[:SHOWN]


CAUSES = (
    Column("cause", "what may be otherwise", attrgetter("cause")),
    Column("step_time_s", "step then", attrgetter("step_time_s"), ".4g", "s"),
    Column("explains", "of the gap", attrgetter("explains"), ".0f", "%"),
)


def measured(item: Measured) -> list[Table | str]:
    """Return what a measured step says."""
    more = item.ratio - 1.0
    way = f"{show_percent(abs(more))} {'longer' if more > 0 else 'shorter'} than predicted"
    if item.ratio > ANOTHER:
        way = f"{item.ratio:,.3g} times what is predicted: is it of one step, and of this plan?"
    found: list[Table | str] = [
        f"measured: {show_time(item.step_time_s)}, MFU {show_percent(item.mfu)}: {way}"
    ]
    if item.step_time_s < item.at_peak_s:
        found.append(
            f"this plan cannot be so fast: what it executes takes {show_time(item.at_peak_s)} at "
            "the chip's peak; the run computes less again, another batch, or in another format"
        )
    usual = item.usual_error
    if usual is not None:
        within = abs(more) <= usual
        found.append(
            f"predictions of the {len(item.runs)} published runs most like it are off by "
            f"{show_percent(usual)} (median)"
            f"{': the gap is no more than that' if within else ''}"
        )
    found += ["", table(CAUSES, item.causes[:SHOWN])] if item.causes else []
    if item.causes:
        rest = 1.0 - min((one.explains for one in item.causes[:1]), default=0.0)
        if more > 0 and rest > 0.1:
            found.append(
                "what none of them explains may lie outside the step: input, checkpoints, "
                "a slow host or chip (predict --fidelity events --straggler)"
            )
    elif abs(more) > VISIBLE:
        found.append("nothing that is tried explains it: look at input, checkpoints, slow hosts")
    return [*found, "", runs(item)] if item.runs else found


def runs(item: Measured) -> Table:
    """Return the published runs most like a plan."""
    columns = [
        Column("id", "nearest published run", lambda one: one.run.id),
        Column("model", "model", lambda one: one.run.model.name),
        Column("machine", "slice", lambda one: one.run.plans[0].machine.name),
        Column("mfu", "MFU", attrgetter("mfu"), ".1f", "%"),
        Column("error", "predicted", attrgetter("error"), "+.1f", "%"),
    ]
    return table(columns, item.runs)
