"""`shardsim verify` against other people's trainers, and `shardsim import` of their configs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.output import (
    STDOUT,
    YAML,
    FilePath,
    answer,
    check_output,
    emit_json,
    json_option,
    note,
    write_output,
)
from shardsim.views.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardsim.carried import NotCarried
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
    answer(as_json, result, *_parts(result))
    sys.exit(0 if result["ok"] else 1)


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
    type=click.Choice(["maxtext", "big_vision", "axlearn", "levanter", "hf"]),
    help="maxtext: YAML, or a script or command line with key=value; big_vision: a config, as "
    "vit_i1k.py:variant=L/16; axlearn: a run's trainer_config, or fuji-7B-v2-flash; "
    "levanter: YAML; "
    "hf: a config.json, or a folder with one, as a model.",
)
@click.option("--on", "machine", help="The slice, where the config does not say: v5p:4x4x4.")
@click.option("--image", type=click.IntRange(1, 10_000), help="big_vision: pixels of an image.")
@click.option(
    "--base",
    type=FilePath(path_type=Path, dir_okay=False),
    help="maxtext: the base.yml of the release that the config was written for.",
)
@click.option(
    "-o", "--output", type=FilePath(dir_okay=False), help="Write the plan here; - is stdout."
)
@json_option
def import_(
    path: str,
    form: str,
    machine: str | None,
    image: int | None,
    base: Path | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Read someone's trainer config as a plan, or a model. Nothing in the config is executed.

    Each key is in what comes out, refused with the reason, or listed as not carried.

    \b
    Examples:
      shardsim import --from maxtext my_config.yml --on v5p:4x4x4 -o plan.yaml
      shardsim predict plan.yaml
      shardsim import --from hf Llama-3.1-8B/config.json -o model.yaml
    """
    from shardsim.plan.io import dump_plan, plan_to_data
    from shardsim.validate.imports import import_config

    check_output(output, as_json, text=YAML)
    if form == "hf":
        for name, value in (("--on", machine), ("--image", image), ("--base", base)):
            if value is not None:
                raise click.UsageError(f"{name}: a config.json is a model, not a run")
        _model(path, output, as_json)
        return
    found = import_config(path, form, machine=machine, image=image, base=base)
    data = {"plan": plan_to_data(found.plan), "notes": list(found.notes)}
    _give(data, dump_plan(found.plan), found.notes, found.not_carried, output, as_json)
    if output and output != STDOUT:
        note(f"for a step as the trainer runs it: shardsim predict {output} --as trainer")


def _model(path: str, output: str | None, as_json: bool) -> None:
    """Write the model of a Hugging Face config."""
    from shardsim.model import load_hf
    from shardsim.plan.io import dump_yaml

    found = load_hf(path)
    mapping = found.model.to_mapping()
    notes = [f"{found.model.parameters_all:,} parameters"]
    notes += [found.assumed] if found.assumed else []
    data = {
        "model": mapping,
        "parameters": found.model.parameters_all,
        "carried": list(found.carried),
        "notes": notes,
    }
    _give(data, dump_yaml(mapping), notes, found.not_carried, output, as_json)


def _give(
    data: dict[str, Any],
    text: str,
    notes: Sequence[str],
    left: Sequence[NotCarried],
    output: str | None,
    as_json: bool,
) -> None:
    """Write what was imported; say beside it what was not, with reasons where it could matter."""
    harmless = [item.key for item in left if not item.could_change]
    for told in (*notes, *(str(item) for item in left if item.could_change)):
        note(told)
    if harmless:
        note(f"not carried, and no part of a step: {', '.join(harmless)} (--json says why)")
    if output or not as_json:
        write_output(output or STDOUT, text)
    if as_json:
        emit_json({**data, "not_carried": [item.to_data() for item in left]})
