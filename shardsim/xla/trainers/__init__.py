"""Exported plans in the trainers they were exported to: their own code places the arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shardsim.errors import PlanError, nearest
from shardsim.plan import PlanOrPath, as_plan
from shardsim.xla.trainers.big_vision import verify_big_vision
from shardsim.xla.trainers.language_models import verify_axlearn, verify_levanter
from shardsim.xla.trainers.libraries import verify_flax, verify_keras
from shardsim.xla.trainers.maxtext import verify_maxtext
from shardsim.xla.trainers.result import TrainerResult

__all__ = ["TRAINERS", "TrainerResult", "verify_trainer"]

TRAINERS: dict[str, Callable[..., TrainerResult]] = {
    "maxtext": verify_maxtext,
    "big_vision": verify_big_vision,
    "flax": verify_flax,
    "keras": verify_keras,
    "axlearn": verify_axlearn,
    "levanter": verify_levanter,
}


def verify_trainer(
    plan: PlanOrPath,
    against: str,
    *,
    python: str | None = None,
    path: Path | None = None,
    scale: str = "tiny",
    devices: int = 8,
) -> TrainerResult:
    """Give `plan` to a trainer and return what it made of it.

    "tiny" runs the plan's tiny copy on host devices, "full" compiles the plan itself for its
    slice. `python` is the interpreter of the trainer's environment, `path` its source.
    """
    if against not in TRAINERS:
        raise PlanError(f"verify: against {against!r} is not possible{nearest(against, TRAINERS)}")
    return TRAINERS[against](as_plan(plan), python=python, path=path, scale=scale, devices=devices)
