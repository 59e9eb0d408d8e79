"""Running a trainer's own programs in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardsim.errors import ShardsimError
from shardsim.xla.host import host_environment
from shardsim.xla.tpu.service import without_tpu

LONGEST_S = 1800
_UNSET = ("PYTHONPATH", "XLA_FLAGS")  # of the trainer's own environment nothing is known


def trainer_python(given: str | None) -> str:
    """Return the interpreter of a trainer's environment: the one given, or this one."""
    if given is None:
        return sys.executable
    path = Path(given)
    candidate = path / "bin" / "python" if os.path.isdir(path) else path
    if not os.path.isfile(candidate):
        raise ShardsimError(f"--trainer-python: no Python at {given}")
    return str(candidate)


def run(
    command: Sequence[str],
    folder: str,
    *,
    devices: int = 1,
    more: Mapping[str, str] | None = None,
    path: Sequence[str] = (),
) -> tuple[int, str]:
    """Run a command in `folder`; return its exit code and all that it printed.

    `devices` host devices are made of the processor; `path` is where Python looks for modules.
    """
    environment = {key: value for key, value in without_tpu().items() if key not in _UNSET}
    environment |= {"PYTHONUNBUFFERED": "1", **(more or {})}
    if devices > 1:
        environment |= host_environment(devices)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    try:
        done = subprocess.run(
            list(command),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LONGEST_S,
        )
    except subprocess.TimeoutExpired:
        raise ShardsimError(f"{command[0]}: no end after {LONGEST_S} s") from None
    except OSError as error:
        raise ShardsimError(f"{command[0]}: {error.strerror or error}") from None
    return done.returncode, done.stdout


def versions(python: str, packages: Sequence[str], folder: str) -> dict[str, str]:
    """Return the versions of those `packages` that an environment has."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    _, text = run([python, "-c", code, *packages], folder)
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in packages}


def failure(text: str) -> str:
    """Return the line of a failed program's output that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "E0"))]
    return (errors or lines or ["it printed nothing"])[-1][:400]


def answered(trainer: str, code: int, text: str) -> dict[str, Any]:
    """Return the JSON object that a worker printed last; it ended with exit code `code`."""
    last = text.strip().rpartition("\n")[2]
    if code or not last.startswith("{"):
        raise ShardsimError(f"{trainer} did not take the exported file: {failure(text)}")
    answer: dict[str, Any] = json.loads(last)
    return answer
