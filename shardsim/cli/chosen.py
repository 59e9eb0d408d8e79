"""The plan that a command is about: a file, or a model, a slice and a mesh in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from shardsim.cli.amounts import check_wholes
from shardsim.cli.catalog import read_model
from shardsim.cli.output import note
from shardsim.kinds import PLAN, kind_of


def load(path: str, changes: Sequence[str] = ()) -> Any:
    """Return the plan of a file, or a shipped one by its name, with some keys changed."""
    from shardsim.plan import load_plan
    from shardsim.planner.changes import changed, parse_assignment

    plan = load_plan(path)
    return changed(plan, dict(map(parse_assignment, changes))) if changes else plan


def _is_plan(name: str) -> bool:
    """Return whether a file called .json, as configs of models are, is a plan."""
    try:
        with open(name, encoding="utf-8") as file:
            return kind_of(json.load(file)) == PLAN
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it as a config says why


def chosen_plan(name: str, words: dict[str, Any], changes: Sequence[str] = ()) -> Any:
    """Return the plan of a file or of words, with some keys changed.

    Raises `PlanError` for a model without slice or batch, and for a plan with either.
    """
    from shardsim.errors import PlanError
    from shardsim.machine import explain, parse_machine
    from shardsim.model import model_names
    from shardsim.model.hf import config_path
    from shardsim.plan import plan_names
    from shardsim.planner.changes import changed, parse_assignment
    from shardsim.planner.presets import parse_mesh, plan_of_mesh

    given = [f"--{key}" for key, value in words.items() if value is not None]
    shipped = name in plan_names()
    config = bool(config_path(name)) and not _is_plan(name)
    if not given and (shipped or (name not in model_names() and not config)):
        return load(name, changes)
    if shipped:
        raise PlanError(f"{given[0]}: {name} is a plan; change it with --set, or name a model")
    model = read_model(name)
    for key, example in (("on", "v4:8x8x16"), ("batch", "1024")):
        if words[key] is None:
            raise PlanError(f"--{key}: missing; a model needs it, such as --{key} {example}")
    check_wholes({"--batch": words["batch"], "--seq": words["seq"]})
    mesh = None if words["mesh"] is None else parse_mesh(words["mesh"])
    machine = parse_machine(words["on"])
    if told := explain(words["on"]):
        note(told)
    made = plan_of_mesh(model, machine, words["batch"], mesh, words["seq"])
    return changed(made, dict(map(parse_assignment, changes)))
