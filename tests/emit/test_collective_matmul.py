"""The collective matmul equals the plain one, and is compiled as a ring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardsim.xla.host import QUICK, host_environment

CASES = [
    (ring, split, mode, list(range(ring)))
    for ring in (2, 4, 8)
    for split in ("sequence", "embed")
    for mode in ("unidirectional", "bidirectional", "off")
]
# A ring over two mesh axes is walked as a snake: 0 1 3 2.
CASES += [(4, split, "bidirectional", [0, 1, 3, 2]) for split in ("sequence", "embed")]
NAMES = [f"{ring} {split} {mode} {order}" for ring, split, mode, order in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    environment = (
        os.environ | host_environment(8, QUICK) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    script = Path(__file__).with_name("run_matmuls.py")
    command = [sys.executable, "-W", "error", str(script), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(zip(NAMES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("which", ["gather", "scatter"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_plain_matmuls(
    name: str, which: str, results: dict[str, Any]
) -> None:
    errors = results[name][which]["errors"]
    # Two outputs and three gradients, or one output and four gradients.
    assert len(errors) == 5
    assert max(errors) < 1e-6


@pytest.mark.parametrize("which", ["gather", "scatter"])
@pytest.mark.parametrize("name", NAMES)
def test_a_ring_is_compiled_to_permutes_and_nothing_else(
    name: str, which: str, results: dict[str, Any]
) -> None:
    ring = int(name.split()[0])
    forward, backward = (results[name][which][key] for key in ("forward", "backward"))
    if " off " in name:
        assert forward["collective-permute"] == backward["collective-permute"] == 0
        assert forward["all-gather" if which == "gather" else "reduce-scatter"] == 1
    else:
        assert forward["collective-permute"] == ring - 1
        assert forward["all-gather"] == backward["all-gather"] == 0
        assert forward["reduce-scatter"] == backward["reduce-scatter"] == 0
        # Forward and backward each go round once.
        assert backward["collective-permute"] == 2 * (ring - 1)
