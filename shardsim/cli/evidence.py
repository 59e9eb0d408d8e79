"""`shardsim validate` and `evidence`: predictions beside what was published, measured, compiled."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import click

from shardsim.cli.options import OP_COSTS
from shardsim.cli.output import FilePath, answer, json_option, note
from shardsim.errors import FileError, ShardsimError
from shardsim.units import show_percent
from shardsim.views.table import Table


@click.command()
@click.option(
    "--runs",
    type=FilePath(dir_okay=False),
    help="A file of runs in the format of shardsim's own; `experts`: those that ship with it of "
    "mixtures of experts; the others that ship with it if left out.",
)
@click.option(
    "--op-costs",
    default="calibrated",
    show_default=True,
    type=click.Choice([*OP_COSTS, "both"]),
    help="What operations take: calibrated to these runs, as the TPU compiler estimates, from the "
    "chip's figures alone; both: the first two.",
)
@click.option(
    "--measured",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Steps measured on devices instead: a file of `verify --against device --results`, or "
    "those that ship with shardsim.",
)
@click.option(
    "--effects",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="What single changes did to measured steps instead: a file of such pairs, or those that "
    "ship with shardsim.",
)
@json_option
def validate(
    runs: str | None, op_costs: str, measured: str | None, effects: str | None, as_json: bool
) -> None:
    """Compare predictions with published or measured runs.

    \b
    Examples:
      shardsim validate
      shardsim validate --op-costs both
      shardsim validate --runs my_runs.yaml --json
      shardsim validate --runs experts
      shardsim validate --measured
      shardsim validate --effects
    """
    if effects is not None:
        _effects(effects or None, as_json)
        return
    if measured is not None:
        _measured(measured or None, runs, as_json)
        return
    from shardsim.validate.runs import EXPERTS
    from shardsim.validate.runs import validate as run

    if runs is not None and not os.path.exists(runs):
        if runs != "experts":
            raise FileError(f"{runs}: No such file or directory; 'experts' are those of shardsim's")
        runs = str(EXPERTS)
    result = run(runs, "calibrated" if op_costs == "both" else op_costs)
    other = run(runs, "compiler") if op_costs == "both" else None
    if result.rows:
        parts = _rows(result, other)
        for each in (result, other) if other else (result,):
            parts.append(f"\nop costs: {COSTS[each.op_costs]}\n{_summary(each.summary())}")
        parts.append("\nfitted constants:")
        for item in result.constants:
            parts.append(f"  {item.name} = {item.value:g}, fitted to {item.fitted_to}")
        if filled := _filled(result):
            parts.append(f"\nwhat the sources leave open:\n{filled}")
        data = result.to_data() | ({"compiler": other.to_data()} if other else {})
        answer(as_json, data, *parts)
    for name, why in result.failed:
        note(f"not predicted: {name}: {why}")
    if not result.rows:
        _none(runs, "runs", len(result.failed))


def _none(path: str | None, what: str, failed: int) -> NoReturn:
    """Raise `ShardsimError` for a file of which nothing could be predicted."""
    why = f"none of its {failed} {what} can be predicted" if failed else f"holds no {what}"
    raise ShardsimError(f"{path or 'validate'}: {why}")


def _effects(path: str | None, as_json: bool) -> None:
    """Show published effects of single changes beside their predictions."""
    from shardsim.validate.effects import effects
    from shardsim.views.evidence import changes, changes_words

    found = effects(path)
    data = {"effects": [one.to_data() for one in found]}
    answer(as_json, data, changes(found), "", *changes_words(found))


def _measured(path: str | None, runs: str | None, as_json: bool) -> None:
    """Show steps measured on devices beside their predictions."""
    from shardsim.validate.measured import measured
    from shardsim.views.evidence import measured_steps, measured_words

    if runs:
        raise ShardsimError("validate: --runs and --measured are two files: give one")
    found = measured(path)
    if found.steps:
        other = [(step.id, step.other_program) for step in found.steps if step.other_program]
        notes = [f"[{n}] {name}: measured with {text}" for n, (name, text) in enumerate(other, 1)]
        kinds = {"all": found.summary(), **found.by_attention()}
        summaries = [measured_words(kind, summary) for kind, summary in kinds.items()]
        steps = measured_steps(found, [name for name, _ in other])
        answer(as_json, found.to_data(), steps, *notes, "", *summaries)
    for name, why in found.failed:
        note(f"not predicted: {name}: {why}")
    if not found.steps:
        _none(path, "steps", len(found.failed))


COSTS = {
    "calibrated": "calibrated: matmuls by the fitted constants below, the rest as the TPU compiler "
    "estimates",
    "physical": "physical, from the chip's figures alone",
    "compiler": "as the TPU compiler estimates them, fitted to no run",
}


def _filled(result: Any) -> str:
    """Return what sources leave open, each with the runs that it is filled in for."""
    runs: dict[str, list[str]] = {}
    for row in result.rows:
        for key, text in row.filled.items():
            runs.setdefault(f"{key}: {text}", []).append(row.id)
    return "\n".join(f"  {text} ({', '.join(ids)})" for text, ids in runs.items())


def _rows(result: Any, other: Any) -> list[Table | str]:
    """Return the table of all rows, with the errors of `other` beside them if there is one."""
    from shardsim.views.evidence import published

    notes = []
    for row in result.rows:
        said = list(row.notes)
        if row.measured_ratio is not None:
            said.append(
                f"speed-up over one slice {row.measured_ratio:.2f} measured, "
                f"{row.predicted_ratio:.2f} predicted"
            )
        if said:
            notes.append((row.id, "; ".join(said)))
    lines = [f"[{number}] {name}: {text}" for number, (name, text) in enumerate(notes, 1)]
    head = "tokens/s/chip; MFU as PaLM counts it; mean-MFU: one utilisation per chip family\n"
    made = published(result, other, [name for name, _ in notes])
    return [head, made.without("family"), *lines]


def _summary(summary: dict[str, float | None]) -> str:
    def percent(key: str) -> str:
        value = summary[key]
        return "-" if value is None else show_percent(value)

    return (
        f"absolute error, all rows: median {percent('median_abs_error')}, "
        f"mean {percent('mean_abs_error')}, largest {percent('max_abs_error')}\n"
        f"rows that no constant was fitted to: median {percent('median_abs_error_unfitted')}, "
        f"mean {percent('mean_abs_error_unfitted')}; with one mean MFU per chip family instead: "
        f"median {percent('baseline_median_abs_error')}, "
        f"mean {percent('baseline_mean_abs_error')}"
    )


@click.command()
@json_option
def evidence(as_json: bool) -> None:
    """Compare predictions with kept compilations.

    They are of emitted steps and of MaxText's own programs.

    \b
    Examples:
      shardsim evidence
      shardsim evidence --json
    """
    from shardsim.views.evidence import hbm
    from shardsim.xla.tpu.agreement import held, pairs, to_data, trainers

    ours, theirs = pairs(), [*held(), *trainers()]
    data = to_data(ours, theirs)
    found = data["hbm"]
    lines = [
        f"\nHBM peaks within 5 %: {show_percent(found['within_5'])}, "
        f"within 10 %: {show_percent(found['within_10'])}\n"
        f"predicted to fit but refused: {', '.join(found['false_fits']) or 'none'}\n"
        f"predicted not to fit but compiled: {', '.join(found['false_refusals']) or 'none'}\n"
        f"operations of emitted steps: median error {show_percent(data['operations_median'])}"
    ]
    lines += [
        f"{group['model']} on {group['slice']}: {group['plans']} plans, "
        f"rank correlation of step time {group['kendall']:.2f}"
        for group in data["groups"]
    ]
    answer(as_json, data, hbm([*ours, *theirs]), *lines)
