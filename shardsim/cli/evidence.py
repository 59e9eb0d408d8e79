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
@click.option(
    "--op-costs",
    default="physical",
    show_default=True,
    type=click.Choice(["physical", "compiler", "both"]),
    help="What operations take: from the chip's figures, or as its compiler estimates.",
)
@json_option
@command_errors
def validate(runs: str | None, op_costs: str, as_json: bool) -> None:
    """Predict published runs and compare tokens/s/chip with what was measured.

    \b
    Examples:
      shardsim validate
      shardsim validate --op-costs both
      shardsim validate --runs my_runs.yaml --json
    """
    from shardsim.validate.runs import validate as run

    result = run(runs, "physical" if op_costs == "both" else op_costs)
    other = run(runs, "compiler") if op_costs == "both" else None
    if as_json:
        emit_json(result.to_data() | ({"compiler": other.to_data()} if other else {}))
    else:
        click.echo(_rows(result, other))
        for each in (result, other) if other else (result,):
            click.echo(f"\nop costs: {COSTS[each.op_costs]}\n{_summary(each.summary())}")
        click.echo("\nfitted constants:")
        for item in result.constants:
            click.echo(f"  {item.name} = {item.value:g}, fitted to {item.fitted_to}")
        if filled := _filled(result):
            click.echo(f"\nwhat the sources leave open:\n{filled}")
    for name, why in result.failed:
        note(f"not predicted: {name}: {why}")
    if not result.rows:
        sys.exit(2)


COSTS = {
    "physical": "physical, from the chip's figures and the fitted constants below",
    "compiler": "as the TPU compiler estimates them, fitted to no run",
}


def _number(value: float | None, form: str = "{:,.1f}", scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None or low == high:
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _filled(result: Any) -> str:
    """Return what sources leave open, each with the runs that it is filled in for."""
    runs: dict[str, list[str]] = {}
    for row in result.rows:
        for key, text in row.filled.items():
            runs.setdefault(f"{key}: {text}", []).append(row.id)
    return "\n".join(f"  {text} ({', '.join(ids)})" for text, ids in runs.items())


def _rows(result: Any, other: Any) -> str:
    """Return the table of all rows, with the errors of `other` beside them if there is one."""
    errors = {row.id: row.error for row in other.rows} if other else {}
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
                *([_number(errors.get(row.id), "{:+.1f}", 100)] if other else []),
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
            *(["by compiler %"] if other else []),
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
