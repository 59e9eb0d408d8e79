"""The sections of a report that say what was asked, what comes out, and what the plan is."""

from __future__ import annotations

from shardsim.plan import dump_plan
from shardsim.plan.words import mesh_text, techniques
from shardsim.planner.compare import how_priced
from shardsim.report.document import Bullets, Code, Drawing, Facts, Item, Section, Text
from shardsim.report.plots_torus import mesh_on_torus
from shardsim.report.specs import activation_specs, axis_sentences, specs, weight_specs
from shardsim.report.study import Study
from shardsim.report.words import count_words, days_words, limits_sentence
from shardsim.units import GIB, show_bytes, show_count, show_percent, show_time


def question(study: Study) -> Section:
    """Return what was asked: model, slice, batch."""
    plan = study.plan
    unit = "images" if study.images else "sequences"
    items: list[Item] = [
        Text(
            f"Train {plan.model.name} ({count_words(plan.model.parameters)} parameters, "
            f"{plan.model.layers} layers) on {plan.machine.describe()}, with "
            f"{plan.batch:,} {unit} of {plan.sequence:,} tokens per step: how fast does this plan "
            "train it, and does it fit?"
        )
    ]
    if plan.note:
        items.append(Text(f"Note in the plan: {' '.join(plan.note.split())}"))
    return Section("Question", items)


def answer(study: Study) -> Section:
    """Return the numbers that were asked for, and for how long the chips are needed."""
    item = study.prediction
    free = item.hbm["capacity_bytes"] - item.hbm["peak_bytes"]
    facts = [
        ("MFU", show_percent(item.mfu)),
        ("step time", show_time(item.step_time_s)),
        ("tokens/s/chip", f"{item.tokens_per_s_per_chip:,.1f}"),
        (
            "HBM peak per device",
            f"{item.hbm['peak_bytes'] / GIB:.2f} of {item.hbm['capacity_bytes'] / GIB:.2f} GiB",
        ),
        ("fits", "yes" if item.fits else "no"),
        ("HFU, recomputation counted", show_percent(item.hfu)),
    ]
    items: list[Item] = [Facts([*facts, *_cost_facts(study)])]
    items += [Text(f"Warning: {warning}", warning=True) for warning in item.warnings]
    verdict = (
        f"It fits, with {show_bytes(free)} free on a device"
        if item.fits
        else f"It does not fit: {show_bytes(-free)} too much on a device"
    )
    items.append(
        Text(
            f"{verdict} at the peak ({item.peak_moment}). "
            f"{limits_sentence(item, study.sensitivities)}"
        )
    )
    items.append(Text(_days(study)))
    items.append(
        Text(
            f"All predictions on this page are priced {how_priced([study.plan], item.costs)}, and "
            f"scheduled as {item.implementation}."
        )
    )
    return Section("Answer", items)


def _cost_facts(study: Study) -> list[tuple[str, str]]:
    if study.days is None or study.chip_hours is None:
        return []
    facts = [("training", days_words(study.days)), ("chip-hours", f"{study.chip_hours:,.0f}")]
    if study.chip_hour_price is not None:
        price = f"cost, at {study.chip_hour_price:g} a chip-hour"
        facts.append((price, f"{study.cost(study.prediction):,.0f}"))
    return facts


def _days(study: Study) -> str:
    plan = study.plan
    a_day = count_words(study.tokens_per_day)
    if study.images:
        a_day += f" tokens ({count_words(study.tokens_per_day / plan.sequence)} images)"
    else:
        a_day += " tokens"
    if study.tokens is None or study.days is None or study.chip_hours is None:
        unit = 1e9 * plan.sequence if study.images else 1e12
        each = "billion images" if study.images else "trillion tokens"
        days = unit / study.tokens_per_day
        hours = days * 24.0 * plan.machine.chips
        return (
            f"In a day it trains on {a_day}; a {each} takes {days_words(days)} and "
            f"{hours:,.0f} chip-hours, failures and pauses apart."
        )
    what = f"{count_words(study.tokens)} tokens"
    if study.images:
        what = f"{count_words(study.tokens / plan.sequence)} images ({what})"
    steps = study.tokens / plan.tokens
    return (
        f"{what} are {steps:,.0f} steps: {days_words(study.days)} and {study.chip_hours:,.0f} "
        f"chip-hours, failures and pauses apart. In a day it trains on {a_day}."
    )


def the_plan(study: Study) -> Section:
    """Return the plan in words, on the torus, and as specs."""
    plan = study.plan
    items: list[Item] = [
        Text(f"Mesh: {mesh_text(plan)}. Besides: {techniques(plan)}, {_numbers(study)}."),
        Bullets(axis_sentences(plan)),
        Drawing(
            mesh_on_torus(study.prediction),
            "Which mesh axis lies on which links. Filled marks are the members of one "
            "group of a mesh axis, a bracket closes a ring. The links are busy for as long as "
            "collectives over them would take alone, hidden or not.",
        ),
        Text("Weights, and activations of one microbatch inside a block:"),
        specs("weight", weight_specs(plan)),
        specs("activation", activation_specs(plan)),
    ]
    return Section("The plan", items)


def _numbers(study: Study) -> str:
    plan = study.plan
    return (
        f"{plan.precision.compute} matmuls, parameters stored in {plan.precision.parameters}, "
        f"gradients sent in {plan.precision.reduce}, {plan.optimizer}, {plan.attention} attention"
    )


def reproduce(study: Study) -> Section:
    """Return the commands behind every number, and the plan file itself."""
    plan = study.plan
    path = f"{study.path} --set op_costs={plan.op_costs}"
    sequence = "" if plan.sequence == plan.model.sequence else f" --seq {plan.sequence}"
    lines = [
        f"shardsim predict {path}",
        f"shardsim ablate {path}",
        f"shardsim sensitivity {path}",
        f"shardsim plan {plan.model.name} --on '{plan.machine.name}' --batch {plan.batch}"
        f"{sequence} --optimizer {plan.optimizer} --attention {plan.attention}"
        f" --op-costs {plan.op_costs}",
        "shardsim validate",
        f"shardsim report {' '.join(study.page)}{_trained(study)} -o report.html",
    ]
    return Section(
        "Commands that reproduce it",
        [Code("\n".join(lines)), Text("The plan file:"), Code(dump_plan(plan))],
    )


def _trained(study: Study) -> str:
    """Return the options of a report that say for what it trains."""
    tokens = "" if study.tokens is None else f" --tokens {study.tokens:.15g}"
    price = study.chip_hour_price
    return tokens + ("" if price is None else f" --chip-hour-price {price:g}")


def peak_words(study: Study) -> str:
    """Return the chip's peak and the part that counts as sustained."""
    chip = study.plan.machine.chip
    return (
        f"{show_count(chip.peak('bf16'), 'FLOP/s')} in bf16, of which matmuls sustain "
        f"{show_percent(chip.matmul_efficiency)}"
    )
