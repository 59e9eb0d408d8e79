"""`shardsim compare`: plans side by side."""

from __future__ import annotations

import click

from shardsim.cli.chosen import load
from shardsim.cli.output import command_errors, emit_json, json_option, show
from shardsim.cli.planning import op_costs_option
from shardsim.errors import PlanError


@click.command()
@click.argument("paths", metavar="PLAN.yaml...", nargs=-1, required=True)
@op_costs_option
@json_option
@command_errors
def compare(paths: tuple[str, ...], op_costs: str | None, as_json: bool) -> None:
    """Set plans side by side, priced alike, with what differs between their files.

    \b
    Examples:
      shardsim compare plan.yaml vit-22b-published-tp8
      shardsim compare vit-22b-published-tp2 vit-22b-published-tp8 --op-costs physical
    """
    from shardsim.cost.predict import predict
    from shardsim.planner.compare import HOW, differences, priced_alike
    from shardsim.views.plans import differing, side_by_side

    if len(paths) < 2:
        raise PlanError("compare: name at least two plans, such as: compare a.yaml b.yaml")
    given = [load(path) for path in paths]
    plans, costs = priced_alike(given, op_costs)
    items = [predict(plan) for plan in plans]
    rows = differences(given)
    if as_json:
        emit_json(
            {
                "costs": costs,
                "plans": [
                    {"path": path, **item.to_data()}
                    for path, item in zip(paths, items, strict=True)
                ],
                "differences": [{"key": row.key, "values": row.values} for row in rows],
            }
        )
        return
    show(f"all priced {HOW[costs]}\n", side_by_side(items, paths))
    show("", differing(rows, paths) if rows else "their files say the same")
