"""`shardsim verify` against other people's trainers, and `shardsim import` of their configs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.output import (
    STDOUT,
    check_output,
    command_errors,
    emit_json,
    json_option,
    note,
    show,
    write_output,
)
from shardsim.views.table import Table

if TYPE_CHECKING:
    from shardsim.plan import Plan


def verify_against(
    plan: Plan,
    against: str,
    python: str | None,
    path: Path | None,
    scale: str,
    devices: int,
    as_json: bool,
) -> None:
    """Give a plan to a trainer and show what it made of it; exit with 1 if that differs."""
    from shardsim.xla.trainers import verify_trainer

    what = "its tiny copy on host devices" if scale == "tiny" else f"for {plan.machine.name}"
    note(f"{against}: {what}")
    result = verify_trainer(
        plan, against, python=python, path=path, scale=scale, devices=devices
    ).to_data()
    if as_json:
        emit_json(result)
    else:
        show(*_parts(result))
    if not result["ok"]:
        sys.exit(1)


def _parts(result: dict[str, Any]) -> list[Table | str]:
    from shardsim.views.evidence import collectives, trained

    placed = result["parameters"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines: list[Table | str] = ["verified" if result["ok"] else "NOT VERIFIED"]
    lines.append(f"with {versions}")
    same = sum(row["same"] for row in placed)
    wrong = result["not_as_exported"]
    lines.append(
        f"{len(placed)} parameters and moments: {len(placed) - len(wrong)} as exported, "
        f"{same} just as in the plan"
    )
    lines += [f"not as exported: {name}" for name in wrong]
    lines += [f"never shown: {name}" for name in result["missing"]]
    if result["losses"]:
        lines.append("losses " + ", ".join(f"{loss:.4g}" for loss in result["losses"]))
    if result["state"]["compiled_bytes"] is not None:
        lines += ["", trained(result)]
    if result["collectives"]:
        lines += ["", *collectives(result["collectives"])]
    for title, texts in (
        ("the trainer differs", result["differences"]),
        ("beside the plan", result["remarks"]),
    ):
        lines += [f"{title}: {text}" for text in texts]
    return lines


@click.command("import")
@click.argument("path", metavar="CONFIG")
@click.option(
    "--from",
    "form",
    required=True,
    type=click.Choice(["maxtext", "big_vision"]),
    help="maxtext: YAML, or a script or command line with key=value; big_vision: a config.",
)
@click.option("--on", "machine", help="The slice, where the config does not say: v5p:4x4x4.")
@click.option("--image", type=click.IntRange(1, 10_000), help="big_vision: pixels of an image.")
@click.option(
    "--base",
    type=click.Path(path_type=Path, dir_okay=False),
    help="maxtext: the base.yml of the release that the config was written for.",
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help="Write the plan here; - is stdout."
)
@json_option
@command_errors
def import_(
    path: str,
    form: str,
    machine: str | None,
    image: int | None,
    base: Path | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Read someone's trainer config as a plan. Nothing in the config is executed.

    \b
    Example:
      shardsim import --from maxtext my_config.yml --on v5p:4x4x4 -o plan.yaml
      shardsim predict plan.yaml
    """
    from shardsim.plan.io import dump_plan, plan_to_data
    from shardsim.validate.imports import import_config

    check_output(output, as_json)
    found = import_config(path, form, machine=machine, image=image, base=base)
    for text in found.notes:
        note(text)
    if output or not as_json:
        write_output(output or STDOUT, dump_plan(found.plan))
    if as_json:
        emit_json({"plan": plan_to_data(found.plan), "notes": list(found.notes)})
