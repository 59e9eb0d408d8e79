"""What was compiled for a TPU in this run of the tests, by whichever worker of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardsim.xla.tpu import Cache


@pytest.fixture(scope="session")
def compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for `SHARDSIM_CACHE` that all workers of this run share."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return folder / "compiled for TPUs"


@pytest.fixture(scope="session")
def compilations(compiled_here: Path) -> Cache:
    """Return the cache in that folder: a plan of several tests is compiled once."""
    return Cache(compiled_here / "tpu")
