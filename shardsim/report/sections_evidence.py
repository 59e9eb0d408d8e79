"""The sections of a report that say what would change it, what lost, and how far to trust it."""

from __future__ import annotations

from statistics import median

from shardsim.cost.predict import Prediction, priced_as
from shardsim.plan.words import mesh_text
from shardsim.report.document import Beside, Bullets, Drawing, Item, Section, Table, Text
from shardsim.report.plots_evidence import ablation_bars, sensitivity_bars
from shardsim.report.plots_plan import step_breakdown
from shardsim.report.sections_fidelity import fidelity
from shardsim.report.study import Study, family_range
from shardsim.report.words import (
    count_words,
    limits_sentence,
    sensitivity_sentences,
    why_lost,
)
from shardsim.units import GIB, show_percent, show_time


def sensitivity_section(study: Study) -> Section:
    """Return what would change if the chip were better in one figure."""
    item = study.prediction
    return Section(
        title="What would change it",
        items=[
            Text(text=limits_sentence(item, study.sensitivities)),
            Beside(
                items=[
                    Bullets(lines=sensitivity_sentences(item, study.sensitivities)),
                    Drawing(
                        figure=sensitivity_bars(item, study.sensitivities),
                        caption="What 10 % more of each figure of the chip would save of the step.",
                    ),
                ]
            ),
        ],
    )


def ablation_section(study: Study) -> Section:
    """Return what each technique is worth, beside what was published."""
    item = study.prediction
    rows = []
    for one in study.ablations:
        if one.prediction is None:
            rows.append([one.technique, one.why, "-", "-", "", one.published])
            continue
        more = 100 * (one.prediction.step_time_s / item.step_time_s - 1)
        rows.append(
            [
                one.technique,
                one.change,
                f"{more:+.1f}",
                f"{100 * one.prediction.mfu:.1f}",
                "yes" if one.prediction.fits else "no",
                one.published,
            ]
        )
    items: list[Item] = [
        Table(headers=["without", "so", "step +%", "MFU %", "fits", "published effect"], rows=rows)
    ]
    if any(one.prediction is not None for one in study.ablations):
        items.append(
            Drawing(
                figure=ablation_bars(item, study.ablations),
                caption="Each technique switched off alone. Diamonds are published effects, "
                "measured on other models and slices.",
            )
        )
    return Section(title="What each technique is worth", items=items)


def runners_section(study: Study) -> Section:
    """Return the plans that a search finds for the same question, and why they are slower."""
    found = study.search
    item = study.prediction
    if found is None:
        text = "A search for the same model, slice and batch finds no plan that fits in HBM."
        return Section(title="Runners-up", items=[Text(text=text)])
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
    rows = [_runner("this plan", item, why_lost(best, item))]
    for number, other in enumerate(found.predictions, 1):
        why = "the best found" if number == 1 else why_lost(best, other)
        rows.append(_runner(str(number), other, why))
    headers = [
        "plan",
        "MFU %",
        "step s",
        "HBM GiB",
        "mesh (torus axes)",
        "remat",
        "microbatches",
        "why",
    ]
    return Section(
        title="Runners-up, and why they lost",
        items=[
            Text(
                text=f"The same model, slice and batch searched anew: {found.searched:,} plans "
                f"considered, {found.fit:,} of those priced fit. This plan is {how}, "
                f"{show_percent(item.mfu)} against {show_percent(best.mfu)} MFU. {_ranked(item)} "
                "Of plans with equal sizes of all mesh axes only the best is listed."
            ),
            Table(headers=headers, rows=rows),
        ],
    )


def _ranked(item: Prediction) -> str:
    """Return by which op costs a search for the plan's own machine ranks."""
    if item.costs == "compiler":
        return "All are ranked as the TPU compiler schedules plans."
    text = "All are ranked by the chip's figures, as this plan is priced"
    if item.plan.machine.chip.compiler is None:
        return f"{text}."
    return (
        f"{text}; by default shardsim plan ranks as the TPU compiler schedules plans, "
        "which can prefer others."
    )


def _runner(name: str, item: Prediction, why: str) -> list[str]:
    return [
        name,
        f"{100 * item.mfu:.1f}",
        f"{item.step_time_s:.4g}",
        f"{item.hbm['peak_bytes'] / GIB:.1f}",
        mesh_text(item.plan),
        item.plan.remat.name,
        str(item.plan.microbatches),
        why,
    ]


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
                text=f"Predictions of {len(compared)} published runs on {chip.name}: median "
                f"absolute error {show_percent(median(errors))}, largest "
                f"{show_percent(max(errors))}."
            )
        )
        items += [_range(study)]
    else:
        items.append(
            Text(
                text=f"No published run on {chip.name} was compared: its figures are the "
                "vendor's, and nothing says how much of them is reached.",
                warning=True,
            )
        )
    constants = [
        f"{constant.name} = {constant.value:.4g}, fitted to {constant.fitted_to}"
        for constant in chip.constants
    ]
    items.append(
        Text(
            text="Constants of this chip that were fitted:"
            if constants
            else "No constant of this chip was fitted."
        )
    )
    if constants:
        items.append(Bullets(lines=constants))
    if compared:
        headers = ["published run", "measured", "predicted tokens/s/chip", "error %", "fitted to"]
        items.append(
            Table(
                headers=headers,
                rows=[
                    [
                        row.id,
                        f"{row.measured:,.1f}",
                        f"{row.predicted:,.1f}",
                        f"{100 * (row.error or 0.0):+.1f}",
                        "yes" if row.fitted else "no",
                    ]
                    for row in compared
                ],
            )
        )
    items.append(
        Text(
            text="Not in these numbers: stragglers, jitter and broken links (what-ifs of shardsim "
            "predict --fidelity events), input pipelines, checkpoints, and what a compiler does "
            "beyond the plan."
        )
    )
    return Section(title="How far to trust it", items=items)


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
            text=f"{where} This plan is outside of what was validated: {', '.join(outside)}.",
            warning=True,
        )
    return Text(text=f"{where} This plan is inside of that.")


def comparison_section(studies: list[Study]) -> Section:
    """Return several plans side by side."""
    first = studies[0].prediction
    priced = studies[0].chip_hour_price is not None
    rows = []
    for study in studies:
        item = study.prediction
        same = (
            item.plan.model == first.plan.model
            and item.plan.machine == first.plan.machine
            and item.plan.tokens == first.plan.tokens
        )
        rows.append(
            [
                study.plan.name,
                f"{100 * item.mfu:.1f}",
                show_time(item.step_time_s),
                f"{item.hbm['peak_bytes'] / GIB:.2f}",
                "yes" if item.fits else "no",
                "-" if study.days is None else f"{study.days:,.1f}",
                *([f"{study.cost(item):,.0f}"] if priced else []),
                mesh_text(study.plan),
                why_lost(first, item) if same and item is not first else "",
            ]
        )
    headers = ["plan", "MFU %", "step", "HBM GiB", "fits", "days"]
    headers += [*(["cost"] if priced else []), "mesh", "against the first"]
    return Section(
        title="Side by side",
        items=[
            _pricing(studies),
            Table(headers=headers, rows=rows),
            Drawing(
                figure=step_breakdown(
                    [study.prediction for study in studies],
                    [study.plan.name for study in studies],
                ),
                caption="The step of each plan by what it is made of.",
            ),
        ],
    )


def _pricing(studies: list[Study]) -> Text:
    """Return how plans side by side are priced, as a warning where that differs."""
    words = [priced_as(item.costs, item.implementation) for item in (s.prediction for s in studies)]
    if len(set(words)) == 1:
        return Text(text=f"All are {words[0]}.")
    each = "; ".join(
        f"{study.plan.name} {word}" for study, word in zip(studies, words, strict=True)
    )
    return Text(text=f"Not like with like: {each}.", warning=True)
