"""The one family of errors that shardsim raises for bad input."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

MOST_CHOICES = 24  # in one line


class ShardsimError(Exception):
    """Something in the input is wrong; the message is one line that says what and where.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class FileError(ShardsimError):
    """A file cannot be read, or what it holds is not of the expected form."""


class HardwareError(ShardsimError):
    """A chip or a slice is unknown or impossible."""


class ModelError(ShardsimError):
    """A model is unknown or inconsistent."""


class PlanError(ShardsimError):
    """A plan is inconsistent, or does not suit its model or its machine."""


_WORDS = {None: "null", True: "true", False: "false"}  # as files and command lines have them


def shown(value: object) -> str:
    """Return a value for a message, as a file writes it, of bounded length and in one line.

    >>> shown(None), shown(True), shown("x")
    ('null', 'true', "'x'")
    """
    text = _WORDS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def expect(value: object, kinds: Any, what: str) -> None:
    """Raise `PlanError` for an argument that is none of some types; `what` says what it should be.

    >>> expect("64k", int, "batch: expected a whole number")
    Traceback (most recent call last):
    shardsim.errors.PlanError: batch: expected a whole number, found '64k'
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise PlanError(f"{what}, found {value!r:.80}")


LONGEST_LINE = 1000  # of an error message; a file's own text may be in it


def one_line(text: object) -> str:
    """Return a message as one line, its middle left out if it is very long."""
    line = " ".join(str(text).split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 4 :]}"
    return line


def alone(value: object) -> object:
    """Return the one value that a list or a mapping holds, or a number that stands in quotes.

    >>> alone(["adamw"]), alone({"type": "adamw"}), alone("256"), alone(256.0), alone("64k")
    ('adamw', 'adamw', 256, 256, '64k')
    """
    for _ in range(2):
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        elif isinstance(value, dict) and len(value) == 1:
            value = next(iter(value.values()))
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return {"yes": True, "true": True, "no": False, "false": False}.get(value.lower(), value)
    return value


def is_bool(value: object) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def instead(value: object, choices: Iterable[object] | Callable[[Any], bool]) -> str:
    """Return `; write x` where `value` holds one of `choices` in another form, or nothing.

    >>> instead(["adamw"], ["adamw", "sgd"]), instead("yes", is_bool), instead(["a"], ["b"])
    ('; write adamw', '; write true', '')
    """
    meant = alone(value)
    fits = choices(meant) if callable(choices) else meant in tuple(choices)
    if not fits or isinstance(meant, (list, dict)):
        return ""
    return f"; write {str(meant).lower() if isinstance(meant, bool) else meant}"


def nearest(word: object, choices: Iterable[str], listed: str = "") -> str:
    """Return `; did you mean 'x'?` for the choice closest to `word`, or the choices themselves.

    Of many it shows some, or what `listed` says to call for all of them.

    >>> nearest("vit22b", ["vit-22b", "palm-540b"])
    "; did you mean 'vit-22b'?"
    >>> nearest("zzz", ["b", "a"])
    '; choose from: a, b'
    """
    names = sorted(set(choices))
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(word).lower(), list(lowered), n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{lowered[close[0]]}'?"
    if listed and len(names) > MOST_CHOICES:
        return f"; {listed} shows all {len(names)}"
    shown = ", ".join(names[:MOST_CHOICES]) + (", ..." if len(names) > MOST_CHOICES else "")
    return f"; choose from: {shown}" if names else ""
