"""Attention in blocks and by the TPU's kernel, and gathers in lanes, equal the plain forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from shardsim.xla.host import QUICK, host_environment


def test_errors_are_those_of_rounding() -> None:
    environment = host_environment(8, QUICK) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("run_attention.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 37
    for case, error in errors.items():
        assert error < 1e-6, case
