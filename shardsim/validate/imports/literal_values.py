"""Values of a config that is read without running it, and what is done with them.

Operators and methods take plain numbers, short texts and lists; all that is more is `Unknown`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST = 10_000  # characters of a string
LARGEST = 2_000  # items of a list or a config, with those inside
_FIELD = re.compile(r"\{\w*\}|\{\{|\}\}")  # of a text to format: a name alone
_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_PLAIN = (int, float, str, list, tuple, dict)
# A switch for tests on one machine that such configs have; off where nothing says it.
_OFF = "runlocal"


@dataclass(frozen=True)
class Unknown:
    """A value that the file does not say; `by` is what decides it, or nothing."""

    by: str = ""


@dataclass
class Arguments:
    """The argument of `get_config`: what was given, and after `parse_arg` the defaults."""

    given: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    assigned: dict[str, Any] = field(default_factory=dict)  # where the config is made of them

    def value(self, name: str) -> Any:
        """Return what was assigned, given, or is the default."""
        if name in self.assigned:
            return self.assigned[name]
        self.used.add(name)
        default = self.defaults.get(name, False if name == _OFF else Unknown(f"arg.{name}"))
        if isinstance(default, tuple) and len(default) == 2:  # (default, a function's name)
            default = default[0]
        return _typed(self.given[name], default) if name in self.given else default

    def config(self) -> dict[str, Any]:
        """Return all of them as a config."""
        return {name: self.value(name) for name in self.defaults} | self.assigned


def _typed(text: str, default: Any) -> Any:
    """Return an argument's text in the type of its default."""
    if isinstance(default, bool) or text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if not isinstance(default, str):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def bounded(value: Any) -> Any:
    """Return a list or a config, or `Unknown` for one that is too large."""
    waiting, seen = [value], 0
    while waiting:
        seen += 1
        if seen > LARGEST:
            return Unknown("too much")
        one = waiting.pop()
        inside = (
            one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
        )
        waiting += inside
    return value


def first_unknown(values: Sequence[Any]) -> Unknown | None:
    found = [value for value in values if isinstance(value, Unknown)]
    return next((value for value in found if value.by), found[0] if found else None)


def method(text: str, name: str, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    if missing := first_unknown([*args, *keywords.values()]):
        return missing
    if name == "join" and len(args) == 1 and isinstance(args[0], list | tuple):
        inner = first_unknown(args[0])
        texts = [item for item in args[0] if isinstance(item, str)]
        whole = len(texts) == len(args[0])
        return inner or (text.join(texts)[:LONGEST] if whole else Unknown())
    try:
        if name == "format" and not _FIELD.sub("", text).count("{"):
            return text.format(*args, **keywords)[:LONGEST]
        if name in ("split", "startswith", "endswith", "lower", "strip", "partition"):
            return getattr(text, name)(*args)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        pass
    return Unknown()


def applied(kind: ast.AST, left: Any, right: Any) -> Any:
    """Return an operator's value; only plain numbers and short texts and lists are taken."""
    if missing := first_unknown([left, right]):
        return missing
    if isinstance(left, Arguments):
        if right is None and isinstance(kind, ast.Is | ast.IsNot):
            return bool(left.given) != isinstance(kind, ast.Is)
        return Unknown("arg")
    numbers = all(isinstance(x, int | float) for x in (left, right))
    if isinstance(kind, ast.Pow) and not (numbers and 0 < left <= 1e6 and abs(right) <= 16):
        return Unknown()
    if isinstance(kind, ast.Mult | ast.Mod) and not numbers:
        return Unknown()
    if type(kind) not in _OPERATORS:
        return Unknown()
    if not all(x is None or isinstance(x, _PLAIN) for x in (left, right)):
        return Unknown()
    try:
        made = _OPERATORS[type(kind)](left, right)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return Unknown()
    long = isinstance(made, str) and len(made) > LONGEST
    huge = isinstance(made, int) and abs(made) > 10**18
    return Unknown() if long or huge else bounded(made)
