"""What each level of fidelity says of a plan: closed forms, events, the TPU compiler."""

from __future__ import annotations

from functools import cache
from math import isnan
from operator import itemgetter
from typing import Any

from shardsim.plan import Plan, resolve
from shardsim.plan.layout import Layout
from shardsim.report.document import Bullets, Item, Text
from shardsim.report.sections import peak_words
from shardsim.report.study import Study
from shardsim.units import show_percent, show_time
from shardsim.views.evidence import compiled
from shardsim.views.table import Column, table
from shardsim.xla.tpu.agreement import Pair, pairs, summary
from shardsim.xla.tpu.rows import as_compiled, load_rows

MOST_CONTENTION = 4
LEVELS = (
    Column("fidelity", "fidelity", itemgetter(0)),
    Column("what", "what it is", itemgetter(1)),
    Column("mfu", "MFU", itemgetter(2), ".2f", "%"),
    Column("step_time_s", "step", itemgetter(3), ".4g", "s"),
)
COLUMNS = (
    *("plan", "predicted_mfu", "compiled_mfu", "predicted_step_time_s", "compiled_step_time_s"),
    *("predicted_hbm_peak_gib", "compiled_hbm_peak_gib"),
)


def fidelity(study: Study) -> list[Item]:
    """Return what each level of fidelity says, and who waits for whose links."""
    item, simulation = study.prediction, study.simulation
    levels = [("analytic", "closed forms over the tasks of one device", item.mfu, item.step_time_s)]
    if simulation is not None:
        what = "the step played on the links of the machine"
        levels.append(("events", what, simulation.mfu, simulation.step_time_s))
    found = compiled_pairs(study.plan)
    if kept := same_plan(study.plan, found):
        what = f"scheduled by the TPU compiler on {kept.row['date']}, replayed"
        levels.append(("compiled", what, kept.row["mfu"], kept.row["step_time_s"]))
    items: list[Item] = [
        table(LEVELS, levels),
        Text(f"Nothing was run on chips for this report. The chip's peak is {peak_words(study)}."),
        *compiled_items(study.plan, found),
    ]
    if simulation is None:
        return items
    lost = [
        f"{row.collective} loses {show_time(row.lost_s)} of the step to {row.other}, on "
        f"{', '.join(row.links)}."
        for row in simulation.events.contention[:MOST_CONTENTION]
    ]
    if lost:
        items += [Text("Collectives that share links at the same time:"), Bullets(lost)]
    else:
        items.append(Text("No collective waits for another one's links."))
    return items


def compiled_pairs(plan: Plan) -> list[Pair]:
    """Return the kept compilations of this plan's model on its slice, beside predictions."""
    return [
        pair
        for pair in _kept(f"{plan.model.name} on {plan.machine.name}")
        if pair.predicted.plan.model == plan.model and pair.predicted.plan.machine == plan.machine
    ]


@cache
def _kept(group: str) -> tuple[Pair, ...]:
    """Return the rows of one model and slice; several plans of a report share them."""
    return tuple(pairs([row for row in load_rows() if row["group"] == group]))


def same_plan(plan: Plan, found: list[Pair]) -> Pair | None:
    """Return the compilation of this plan, whatever it is called and however its rules say it."""
    if not found:
        return None  # a chip's file may have no costs of a compiler to price it by
    wanted = _essence(as_compiled(plan))
    for pair in found:
        if "mfu" in pair.row and _essence(pair.predicted.plan) == wanted:
            return pair
    return None


def _essence(plan: Plan) -> tuple[dict[str, Any], Layout]:
    """Return what decides the program of a plan."""
    said = ("name", "note", "activations")
    return {key: value for key, value in vars(plan).items() if key not in said}, resolve(plan)


def compiled_items(plan: Plan, found: list[Pair]) -> list[Item]:
    """Return what the compiler says: of the same model and slice, or else of all that is kept."""
    if found:
        words = _words(found, f"Of {plan.model.name} on {plan.machine.name}")
        return [words, compiled(found).only(*COLUMNS)]
    everything = pairs() if plan.machine.chip.compiler is not None else []
    if not everything:  # or of a chip that the compiler is not for
        return []
    text = f"No plan of {plan.model.name} on {plan.machine.name} was compiled. Of other models"
    return [_words(everything, text)]


def _words(found: list[Pair], start: str) -> Text:
    figures = summary(found)
    parts = [
        f"{start}, {figures['plans']} plans were given to the real TPU compiler, without a chip; "
        f"{figures['compiled']} compiled"
    ]
    ranks = [
        f"{group['rank_correlation']:.2f} ({name})"
        if len(figures["groups"]) > 1
        else f"{group['rank_correlation']:.2f}"
        for name, group in figures["groups"].items()
        if not isnan(group["rank_correlation"])
    ]
    if ranks:
        parts.append(f"rank correlation of predicted and compiled step times: {', '.join(ranks)}")
    if figures["operations_median_abs_error"] is not None:
        error = show_percent(figures["operations_median_abs_error"])
        parts.append(f"median error of the time of operations {error}")
    if figures["peak_median_abs_error"] is not None:
        parts.append(f"of the HBM peak {show_percent(figures['peak_median_abs_error'])}")
    return Text(f"{'; '.join(parts)}.")
