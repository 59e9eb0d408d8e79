"""`shardsim evidence`: what compilers made of plans and of trainers' programs, and predictions."""

from __future__ import annotations

import click

from shardsim.cli.output import command_errors, emit_json, json_option, show
from shardsim.units import show_percent


@click.command()
@json_option
@command_errors
def evidence(as_json: bool) -> None:
    """Compare predictions with the kept compilations: emitted steps and MaxText's own programs.

    \b
    Examples:
      shardsim evidence
      shardsim evidence --json
    """
    from shardsim.views.evidence import hbm
    from shardsim.xla.tpu.agreement import held, pairs, to_data, trainers

    ours, theirs = pairs(), [*held(), *trainers()]
    data = to_data(ours, theirs)
    if as_json:
        emit_json(data)
        return
    found = data["hbm"]
    show(hbm([*ours, *theirs]))
    click.echo(
        f"\nHBM peaks within 5 %: {show_percent(found['within_5'])}, "
        f"within 10 %: {show_percent(found['within_10'])}\n"
        f"predicted to fit but refused: {', '.join(found['false_fits']) or 'none'}\n"
        f"predicted not to fit but compiled: {', '.join(found['false_refusals']) or 'none'}\n"
        f"operations of emitted steps: median error {show_percent(data['operations_median'])}"
    )
    for group in data["groups"]:
        click.echo(
            f"{group['model']} on {group['slice']}: {group['plans']} plans, "
            f"rank correlation of step time {group['kendall']:.2f}"
        )
