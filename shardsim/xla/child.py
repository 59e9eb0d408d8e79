"""A process that answers requests, a line of JSON each way: JAX lives there, not here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Self

from shardsim.errors import ShardsimError

# How XLA's log begins its lines: severity and date, time, thread, file and line.
_LOGGED = re.compile(r"^(?P<severity>[IWEF])\d{4} .*?\] (?P<text>.*)$", re.MULTILINE)
_LAST_BYTES = 20_000


class Child:
    """A process that runs `module`, one that calls `shardsim.xla.worker.serve`.

    `called` names it in errors, `failing` says what did not happen where it answers with an error.
    """

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        *,
        called: str,
        failing: str,
        options: Sequence[str] = (),
    ) -> None:
        self._called = called
        self._failing = failing
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, *options, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ
            | {
                "TF_CPP_MIN_LOG_LEVEL": "2",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            | dict(environment),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it keeps nothing
        self._process.communicate()
        self._log.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return the answer; raises `ShardsimError` where there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise ShardsimError(self._why_it_ended())
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ShardsimError(f"{self._failing}: {told['error']}")
        return told

    def _why_it_ended(self) -> str:
        """Return one line on a process that gives no more answers, with its last message."""
        if missing := [name for name in ("jax", "optax") if find_spec(name) is None]:
            return f"{self._called} needs {' and '.join(missing)}: pip install 'shardsim[jax]'"
        code = self._process.wait()
        how = f"ended with exit status {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LAST_BYTES))
        text = self._log.read().decode(errors="replace")
        logged = [(line["severity"], line["text"]) for line in _LOGGED.finditer(text)]
        said = (
            [words for severity, words in logged if severity == "F"]
            or [words for severity, words in logged if severity == "E"]
            or [line.strip() for line in text.splitlines() if line.strip()]
        )
        return f"{self._called} {how}{f': {said[-1]}' if said else ''}"
