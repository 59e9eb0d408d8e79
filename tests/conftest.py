"""Settings of the whole suite. Helpers are in `building.py` and `moving.py` beside this file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings
from small_plan import PLAN

from shardsim.cli.main import main

settings.register_profile(
    "shardsim",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shardsim")

Shardsim = Callable[..., Result]


@pytest.fixture
def shardsim() -> Shardsim:
    """Run `shardsim` with the given words."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, list(words), prog_name="shardsim")

    return run


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A plan of ViT-L on 64 chips: 16-way data with sharded parameters, 4-way tensor."""
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN, encoding="utf-8")
    return path
