"""The section of a report that says what training costs, here and on more or fewer chips."""

from __future__ import annotations

from shardsim.report.document import Drawing, Section, Text
from shardsim.report.plots_search import cost_front
from shardsim.report.study import Study
from shardsim.report.words import count_words, days_words
from shardsim.views.plans import PLANS, named
from shardsim.views.plans import columns as of_plans
from shardsim.views.table import Column, pick


def cost_section(study: Study) -> Section:
    """Return days and cost of this plan, and of the best ones on half and twice as many chips."""
    price, training = study.chip_hour_price or 0.0, study.training
    tokens = training.tokens
    plans = [("this plan", study.prediction)]
    plans += [(f"best on {item.plan.machine.name}", item) for item in study.sizes]
    columns = [
        *pick(PLANS, "chips", "mfu"),
        Column("days", "training", training.days, show=days_words),
        Column("chip_hours", "chip-hours", training.chip_hours, ",.0f"),
        Column("cost", "cost", study.cost, ",.0f"),
        *of_plans([study.prediction], "mesh"),
    ]
    return Section(
        "What it costs",
        [
            Text(
                f"Training on {count_words(tokens)} tokens at {price:g} a chip-hour, the "
                "price that was given, with the same batch on every slice; failures and pauses "
                "apart."
            ),
            named(plans, columns),
            Drawing(
                cost_front([item for _, item in plans], price, tokens),
                "Days against cost. On the line no other plan is both sooner done and cheaper.",
            ),
        ],
    )
