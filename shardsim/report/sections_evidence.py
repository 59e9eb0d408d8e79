"""The sections of a report that say what would change it, what lost, and how far to trust it."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from shardsim.answers.why_not import why_lost
from shardsim.cost.predict import Prediction
from shardsim.machine import Chip
from shardsim.planner.compare import how_priced
from shardsim.report.document import Beside, Bullets, Drawing, Item, Section, Text
from shardsim.report.plots_evidence import ablation_bars, sensitivity_bars
from shardsim.report.plots_plan import step_breakdown
from shardsim.report.sections_fidelity import fidelity
from shardsim.report.study import Study, family_range
from shardsim.report.words import count_words, limits_sentence, sensitivity_sentences
from shardsim.units import show_percent
from shardsim.views import what_ifs
from shardsim.views.evidence import published
from shardsim.views.plans import PLANS, named
from shardsim.views.plans import columns as of_plans
from shardsim.views.table import Column, pick


def sensitivity_section(study: Study) -> Section:
    """Return what would change if the chip were better in one figure."""
    item = study.prediction
    return Section(
        "What would change it",
        [
            Text(limits_sentence(item, study.sensitivities)),
            Beside(
                [
                    Bullets(sensitivity_sentences(item, study.sensitivities)),
                    Drawing(
                        sensitivity_bars(item, study.sensitivities),
                        "What 10 % more of each figure of the chip would save of the step.",
                    ),
                ]
            ),
        ],
    )


def ablation_section(study: Study) -> Section:
    """Return what each technique is worth, beside what was published."""
    item = study.prediction
    made = what_ifs.ablations(item, study.ablations)
    items: list[Item] = [made.only("without", "so", "step_change", "mfu", "fits", "published")]
    if any(one.prediction is not None for one in study.ablations):
        items.append(
            Drawing(
                ablation_bars(item, study.ablations),
                "Each technique switched off alone. Diamonds are published effects, "
                "measured on other models and slices.",
            )
        )
    return Section("What each technique is worth", items)


def runners_section(study: Study) -> Section:
    """Return the plans that a search finds for the same question, and why they are slower."""
    found = study.search
    item = study.prediction
    if found is None:
        text = "A search for the same model, slice and batch finds no plan that fits in HBM."
        return Section("Runners-up", [Text(text)])
    best = found.best
    ratio = item.step_time_s / best.step_time_s - 1
    how = (
        f"{100 * ratio:.1f} % slower than the best found"
        if ratio > 5e-4
        else "as fast as the best found"
        if ratio > -5e-4
        else f"{-100 * ratio:.1f} % faster than the best found"
    )
    if not item.fits:
        how += " but does not fit in HBM"
    numbered = [(str(number), other) for number, other in enumerate(found.predictions, 1)]
    shown = ("mfu", "step_time_s", "hbm_peak_gib", "mesh", "remat", "microbatches")
    columns = [
        *of_plans([item], *shown),
        Column("why", "why", lambda one: "the best found" if one is best else why_lost(best, one)),
    ]
    return Section(
        "Runners-up, and why they lost",
        [
            Text(
                f"The same model, slice and batch searched anew: {found.searched:,} plans "
                f"considered, {found.fit:,} of them fit. This plan is {how}, "
                f"{show_percent(item.mfu)} against {show_percent(best.mfu)} MFU. All are "
                f"priced as this plan is, {how_priced([item.plan], item.costs)}. "
                "Of plans with equal sizes of all mesh axes only the best is listed."
            ),
            named([("this plan", item), *numbered], columns),
        ],
    )


def _rates(chip: Chip) -> str:
    """Return where the rates of a chip without published runs come from."""
    if chip.kernels is None:
        return "its figures are the vendor's, and nothing says how much of them is reached."
    return (
        "what kernels take was measured on such a chip (shardsim validate --measured); links have "
        "published figures."
    )


def trust_section(study: Study) -> Section:
    """Return how far to trust the numbers: fidelity, validated range, constants, errors."""
    chip = study.plan.machine.chip
    rows = [row for row in study.validation.rows if row.family == chip.name]
    compared = [row for row in rows if row.error is not None]
    items = fidelity(study)
    if compared:
        errors = [abs(row.error) for row in compared if row.error is not None]
        items.append(
            Text(
                f"Predictions of {len(compared)} published runs on {chip.name}: median "
                f"absolute error {show_percent(median(errors))}, largest "
                f"{show_percent(max(errors))}."
            )
        )
        items += [_range(study)]
    else:
        items.append(
            Text(
                f"No published run on {chip.name} was compared: {_rates(chip)}",
                warning=chip.kernels is None,
            )
        )
    constants = [
        f"{constant.name} = {constant.value:.4g}, fitted to {constant.fitted_to}"
        for constant in chip.constants
    ]
    items.append(
        Text(
            "Constants of this chip that were fitted:"
            if constants
            else "No constant of this chip was fitted."
        )
    )
    if constants:
        items.append(Bullets(constants))
    if compared:
        made = published(replace(study.validation, rows=tuple(compared)))
        items.append(made.only("run", "measured", "predicted", "error", "fitted"))
    items.append(
        Text(
            "Not in these numbers: stragglers, jitter and broken links (what-ifs of shardsim "
            "predict --fidelity events), input pipelines, checkpoints, and what a compiler does "
            "beyond the plan."
        )
    )
    return Section("How far to trust it", items)


def _range(study: Study) -> Text:
    """Return whether the plan is inside what the family's published runs span."""
    plan = study.plan
    own = {
        "parameters": float(plan.model.parameters),
        "chips": float(plan.machine.chips),
        "sequence": float(plan.sequence),
    }
    names = {"parameters": "parameters", "chips": "chips", "sequence": "tokens per sequence"}
    spans = family_range(plan.machine.chip.name)
    inside = []
    outside = []
    for key, (low, high) in spans.items():
        text = f"{count_words(low)} to {count_words(high)} {names[key]}"
        inside.append(text)
        if not low <= own[key] <= high:
            outside.append(f"{count_words(own[key])} {names[key]}")
    where = f"Those runs have {', '.join(inside)}."
    if outside:
        return Text(
            f"{where} This plan is outside of what was validated: {', '.join(outside)}.",
            warning=True,
        )
    return Text(f"{where} This plan is inside of that.")


def comparison_section(studies: list[Study], costs: str) -> Section:
    """Return several plans side by side."""
    first = studies[0].prediction
    how = how_priced((study.plan for study in studies), costs)
    studied = {id(study.prediction): study for study in studies}

    def against(item: Prediction) -> str:
        asked, same = ((one.plan.model, one.plan.machine, one.plan.tokens) for one in (item, first))
        return why_lost(first, item) if asked == same and item is not first else ""

    columns = [
        *pick(PLANS, "mfu", "step_time_s", "hbm_peak_gib", "fits"),
        *of_plans((study.prediction for study in studies), "mesh"),
        Column("why", "against the first", against),
    ]
    if studies[0].chip_hour_price is not None:
        columns.insert(4, Column("cost", "cost", studies[0].cost, ",.0f"))
    if any(study.days is not None for study in studies):
        columns.insert(4, Column("days", "days", lambda item: studied[id(item)].days, ",.1f"))
    items = [(study.plan.name, study.prediction) for study in studies]
    return Section(
        "Side by side",
        [
            Text(f"All plans are priced {how}, whatever their files say."),
            named(items, columns),
            Drawing(
                step_breakdown(
                    [study.prediction for study in studies], [study.plan.name for study in studies]
                ),
                "The step of each plan by what it is made of.",
            ),
        ],
    )
