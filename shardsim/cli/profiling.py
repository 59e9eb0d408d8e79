"""`shardsim verify --profile` and `calibrate --profile`: traces of real steps, read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.output import STDOUT, FilePath, answer, emit_json, note, show, write_output
from shardsim.units import show_time

if TYPE_CHECKING:
    from shardsim.plan import Plan
    from shardsim.xla.profile.lined import LinedUp

hlo_option = click.option(
    "--hlo",
    type=FilePath(dir_okay=False),
    help="With --profile: the compiled step's text, for traces that do not hold it.",
)


def compare_profile(plan: Plan, path: str, hlo: str | None, as_json: bool) -> None:
    """Show a trace of the plan's step beside its prediction."""
    from shardsim.views import profile as views
    from shardsim.xla.profile.lined import Row, line_up

    lined = line_up(plan, path, hlo)
    whole = Row(
        kind="",
        what="step",
        predicted_s=lined.prediction.step_time_s,
        measured_s=lined.profile.step_s,
    )
    unknown = views.not_lined_up(lined)
    answer(
        as_json,
        _data(lined),
        _title(lined),
        "",
        views.shown(views.kinds(lined), whole),
        "",
        views.shown(views.rows(lined), whole),
        *(("", unknown.head(views.MOST_OPS)) if unknown.rows else ()),
    )
    for text in lined.warnings if not as_json else ():
        note(f"warning: {text}")


def _title(lined: LinedUp) -> str:
    found, predicted = lined.profile, lined.prediction
    return (
        f"{found.program or 'the step'}: {show_time(found.step_s)} measured, "
        f"{show_time(predicted.step_time_s)} predicted for {predicted.plan.machine.name}; means of "
        f"{found.steps} steps on {found.devices} {found.kind} devices"
    )


def _data(lined: LinedUp) -> dict[str, Any]:
    from shardsim.views import profile as views

    found, predicted = lined.profile, lined.prediction
    return {
        "profile": lined.path,
        "device": found.kind,
        "program": found.program,
        "devices": found.devices,
        "steps": found.steps,
        "measured_step_s": found.step_s,
        "predicted_step_s": predicted.step_time_s,
        "costs": predicted.costs,
        "as": predicted.implementation,
        "kinds": views.kinds(lined).data(),
        "rows": views.rows(lined).data(),
        "operations": views.operations(found.ops).data(),
        "not_lined_up": views.not_lined_up(lined).data(),
        "warnings": list(lined.warnings),
    }


def learn_from_profile(
    plan: Plan, path: str, hlo: str | None, output: str | None, as_json: bool
) -> None:
    """Write a hardware file with the rates of a trace of the plan's step."""
    from shardsim.views import profile as views
    from shardsim.xla.profile.learn import hardware_file, learn
    from shardsim.xla.profile.lined import line_up

    lined = line_up(plan, path, hlo)
    learned = learn(lined)
    text = hardware_file(learned.chip)
    for warning in lined.warnings:
        note(f"warning: {warning}")
    if as_json:
        emit_json({**learned.to_data(), "path": output, "text": None if output else text})
    elif output:
        tables = views.rates(learned.rates), "", views.residuals(learned.residuals)
        show(*tables, err=output == STDOUT)
    if output or not as_json:
        write_output(output or STDOUT, text, "hardware file")
