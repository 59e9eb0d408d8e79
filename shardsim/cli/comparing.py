"""`shardsim compare`: plans side by side."""

from __future__ import annotations

from typing import Any

import click

from shardsim.cli.chosen import load
from shardsim.cli.output import command_errors, emit_json, json_option, note, show
from shardsim.cli.planning import op_costs_option, training_options


@click.command()
@click.argument("paths", metavar="PLAN.yaml...", nargs=-1, required=True)
@op_costs_option
@training_options[0]
@training_options[1]
@training_options[2]
@json_option
@command_errors
def compare(
    paths: tuple[str, ...],
    op_costs: str | None,
    tokens: float | None,
    images: float | None,
    prices: dict[str, float] | None,
    as_json: bool,
) -> None:
    """Set plans side by side, priced alike, with what differs between their files.

    Plans of different batches are compared by what a token takes, of different models not at all:
    then it says so.

    \b
    Examples:
      shardsim compare plan.yaml vit-22b-published-tp8
      shardsim compare vit-22b-published-tp2 vit-22b-published-tp8 --op-costs physical
      shardsim compare a.yaml b.yaml --tokens 1e12 --chip-hour-price v5p=4.2,v6e=2.7
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
    training = training_of(
        tokens, images, given[0].sequence, prices, [plan.machine.chip.name for plan in given]
    )
    if len({plan.model.name for plan in given}) > 1:
        note("these are different models: their steps and tokens are not alike")
    if as_json:
        emit_json(
            {
                "costs": costs,
                "plans": [
                    {"path": path, **item.to_data(), **_trained(training, item)}
                    for path, item in zip(paths, items, strict=True)
                ],
                "differences": [{"key": row.key, "values": row.values} for row in rows],
            }
        )
        return
    more = views.training_columns(training) if training else []
    show(f"all priced {how_priced(plans, costs)}\n", side_by_side(items, paths, more))
    show("", differing(rows, paths) if rows else "their files say the same")
    if training:
        show("", views.trained(training))


def _trained(training: Any, item: Any) -> dict[str, Any]:
    return {"training": training.to_data(item)} if training else {}
