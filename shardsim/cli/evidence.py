"""`shardsim validate`: predictions beside published results."""

from __future__ import annotations

import sys
from typing import Any

import click

from shardsim.cli.output import command_errors, emit_json, json_option, note, printable, table


@click.command()
@click.option(
    "--runs",
    type=click.Path(dir_okay=False),
    help="A file of runs in the format of shardsim's own; those that ship with it if left out.",
)
@json_option
@command_errors
def validate(runs: str | None, as_json: bool) -> None:
    """Predict published runs and compare tokens/s/chip with what was measured.

    \b
    Examples:
      shardsim validate
      shardsim validate --runs my_runs.yaml --json
    """
    from shardsim.validate.rows import RULES
    from shardsim.validate.runs import validate as run

    result = run(runs)
    if as_json:
        emit_json(result.to_data())
    else:
        click.echo(_rows(result))
        click.echo("\n" + _summary(result.summary()))
        click.echo("\nfitted constants:")
        for item in result.constants:
            click.echo(f"  {item.name} = {item.value:g}, fitted to {item.fitted_to}")
        click.echo("\nwhat a source leaves open:")
        for rule in RULES:
            click.echo(f"  {rule}")
    for name, why in result.failed:
        note(f"not predicted: {name}: {why}")
    if not result.rows:
        sys.exit(2)


def _number(value: float | None, form: str = "{:,.1f}", scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None or low == high:
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _rows(result: Any) -> str:
    rows = []
    notes = []
    for row in result.rows:
        mark = ""
        if row.notes:
            notes.append(f"{row.id}: {'; '.join(row.notes)}")
            mark = f"[{len(notes)}]"
        if row.measured_ratio is not None:
            notes.append(
                f"{row.id}: speed-up over one slice {row.measured_ratio:.2f} measured, "
                f"{row.predicted_ratio:.2f} predicted"
            )
            mark = f"[{len(notes)}]"
        rows.append(
            [
                row.id,
                _number(row.measured),
                _number(row.predicted),
                _number(row.error, "{:+.1f}", 100),
                _number(row.measured_mfu, "{:.1f}", 100),
                _number(row.predicted_mfu, "{:.1f}", 100),
                _span(row.mfu_low, row.mfu_high),
                _number(row.baseline_error, "{:+.1f}", 100),
                "yes" if row.fitted else "",
                mark,
            ]
        )
    text = table(
        [
            "run",
            "measured",
            "predicted",
            "error %",
            "MFU %",
            "predicted",
            "range",
            "mean-MFU error %",
            "fitted",
            "",
        ],
        rows,
    )
    head = "tokens/s/chip; MFU as PaLM counts it; mean-MFU: one utilisation per chip family\n\n"
    return head + text + "".join(f"\n[{i}] {printable(line)}" for i, line in enumerate(notes, 1))


def _summary(summary: dict[str, float | None]) -> str:
    def percent(key: str) -> str:
        return _number(summary[key], "{:.1f} %", 100)

    return (
        f"absolute error, all rows: median {percent('median_abs_error')}, "
        f"mean {percent('mean_abs_error')}, largest {percent('max_abs_error')}\n"
        f"rows that no constant was fitted to: median {percent('median_abs_error_unfitted')}, "
        f"mean {percent('mean_abs_error_unfitted')}; with one mean MFU per chip family instead: "
        f"median {percent('baseline_median_abs_error')}, "
        f"mean {percent('baseline_mean_abs_error')}"
    )
