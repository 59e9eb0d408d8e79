"""Functions of the emitted program by the name of the op that they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = Callable[..., Any]
RUNS: dict[str, Run] = {}


def runs(name: str) -> Callable[[Run], Run]:
    """Say that a function runs the op `name`: `function(way, params, call, *inputs)`.

    It returns what the call makes: an array, or a list of them if it makes several.
    """

    def register(function: Run) -> Run:
        RUNS[name] = function
        return function

    return register
