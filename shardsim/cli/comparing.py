"""`shardsim compare`: plans side by side."""

from __future__ import annotations

from typing import Any

import click

from shardsim.cli.chosen import load
from shardsim.cli.options import op_costs_option, training_options
from shardsim.cli.output import answer, json_option, note


@click.command()
@click.argument("paths", metavar="PLAN.yaml...", nargs=-1, required=True)
@op_costs_option
@training_options
@json_option
def compare(
    paths: tuple[str, ...], op_costs: str | None, training: dict[str, Any], as_json: bool
) -> None:
    """Set plans side by side, priced alike.

    It says what differs between their files. Plans of different batches are compared by what a
    token takes, of different models not at all: then it says so.

    \b
    Examples:
      shardsim compare plan.yaml vit-22b-published-tp8
      shardsim compare plan.yaml vit-22b-published-tp8 --op-costs physical
      shardsim compare a.yaml b.yaml --tokens 1T --chip-hour-price v5p=4.2,v6e=3
    """
    from shardsim.answers.training import training_of
    from shardsim.planner.compare import compare, differences, how_priced
    from shardsim.views import slices as views
    from shardsim.views.plans import differing, side_by_side

    given = [load(path) for path in paths]
    items = compare(*given, costs=op_costs)
    plans = [item.plan for item in items]
    costs = plans[0].op_costs
    rows = differences(given)
    chips = [plan.machine.chip.name for plan in given]
    trained = training_of(**training, sequence=given[0].sequence, chips=chips)
    if len({plan.model.name for plan in given}) > 1:
        note("these are different models: their steps and tokens are not alike")
    data = [
        {"path": path, **item.to_data(), **({"training": trained.to_data(item)} if trained else {})}
        for path, item in zip(paths, items, strict=True)
    ]
    answer(
        as_json,
        {
            "costs": costs,
            "plans": data,
            "differences": [{"key": row.key, "values": row.values} for row in rows],
        },
        f"all priced {how_priced(plans, costs)}\n",
        side_by_side(items, paths, views.training_columns(trained) if trained else []),
        "",
        differing(rows, paths) if rows else "their files say the same",
        *(["", views.trained(trained)] if trained else []),
    )
