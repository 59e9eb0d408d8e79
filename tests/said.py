"""Commands run as people run them, and what they said as scripts read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result

from shardsim.cli.main import main

Shardsim = Callable[..., Result]


def shardsim(*words: str) -> Result:
    """Run `shardsim` with some words."""
    return CliRunner().invoke(main, list(words), prog_name="shardsim")


def data(result: Result, code: int = 0) -> Any:
    """Return the JSON that a command printed; it ended with `code`."""
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(result: Result) -> str:
    """Return the one line in which a command refused its input."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    return line.removeprefix("error: ")
