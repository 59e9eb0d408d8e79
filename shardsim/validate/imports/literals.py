"""A config written in Python, read without running it: literals, branches, and its own functions.

What a value depends on that the file does not say stays `Unknown`, with what decides it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardsim.errors import FileError, nearest

_STEPS = 20_000  # statements; a config has some hundred
_DEPTH = 12  # of calls
_LONGEST = 10_000  # characters of a string
_LARGEST = 2_000  # items of a list or a config, with those inside
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
_CALLS: Mapping[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "len": len,
    "min": min,
    "max": max,
    "range": lambda *args: list(range(*args)[:_LARGEST]),
    "tuple": tuple,
    "list": list,
}
_PLAIN = (int, float, str, list, tuple, dict)
# A switch for tests on one machine that such configs have; off where nothing says it.
_OFF = "runlocal"


@dataclass(frozen=True)
class Unknown:
    """A value that the file does not say; `by` is what decides it, or nothing."""

    by: str = ""


@dataclass
class _Arguments:
    """The argument of `get_config`: what was given, and after `parse_arg` the defaults."""

    given: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def value(self, name: str) -> Any:
        self.used.add(name)
        default = self.defaults.get(name, False if name == _OFF else Unknown(f"arg.{name}"))
        if isinstance(default, tuple) and len(default) == 2:  # (default, a function's name)
            default = default[0]
        return _typed(self.given[name], default) if name in self.given else default


class _Return(Exception):
    """The end of a function, with its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


def read_python(text: str, arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `get_config` returns, over what the module assigns to `config`, nested; and what
    the module assigns.

    `arguments` are those of a command line, as `variant=L/16,runlocal=False`. Raises `FileError`
    for a file that is no Python, and `ValueError` and such for none that can be read.
    """
    tree = ast.parse(text)
    parts = [part.partition("=") for part in arguments.split(",") if part]
    given = _Arguments({name: value if equals else "True" for name, equals, value in parts})
    reader = _Reader(given)
    module: dict[str, Any] = {"config": {}}
    reader.run(tree.body, module, 0)
    config = module["config"] if isinstance(module["config"], dict) else {}
    if "get_config" in reader.functions:
        made = reader.call(reader.functions["get_config"], [given], {}, module, 0)
        config = {**config, **(made if isinstance(made, dict) else {})}
    if strange := sorted(set(given.given) - given.used):
        names = nearest(strange[0], sorted(given.used) or ["none"])
        raise FileError(f"argument {strange[0]!r}: the config does not read it{names}")
    return config, module


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


class _Reader:
    def __init__(self, arguments: _Arguments) -> None:
        self.arguments = arguments
        self.functions: dict[str, ast.FunctionDef] = {}
        self.steps = 0

    def run(self, body: Sequence[ast.stmt], names: dict[str, Any], depth: int) -> None:
        """Go through statements in order."""
        for node in body:
            self.steps += 1
            if self.steps > _STEPS:
                raise FileError("too long to be a config")
            self.statement(node, names, depth)

    def statement(self, node: ast.stmt, names: dict[str, Any], depth: int) -> None:
        if isinstance(node, ast.FunctionDef):
            self.functions[node.name] = node
        elif isinstance(node, ast.Assign):
            value = self.value(node.value, names, depth)
            for target in node.targets:
                self.assign(target, value, names, depth)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value, names, depth), names, depth)
        elif isinstance(node, ast.AugAssign):
            both = ast.BinOp(node.target, node.op, node.value)
            self.assign(node.target, self.value(both, names, depth), names, depth)
        elif isinstance(node, ast.Expr):
            self.value(node.value, names, depth)
        elif isinstance(node, ast.If):
            test = self.value(node.test, names, depth)
            if isinstance(test, Unknown):
                self.lose([*node.body, *node.orelse], test, names, depth)
            else:
                self.run(node.body if test else node.orelse, names, depth)
        elif isinstance(node, ast.Return):
            raise _Return(self.value(node.value, names, depth) if node.value else None)
        elif isinstance(node, ast.Raise):
            raise FileError(f"line {node.lineno}: the config raises an error there")
        elif isinstance(node, ast.With):
            self.run(node.body, names, depth)
        elif isinstance(node, ast.For):
            self.loop(node, names, depth)
        elif isinstance(node, ast.While | ast.Try):
            self.lose([node], Unknown("a loop"), names, depth)

    def loop(self, node: ast.For, names: dict[str, Any], depth: int) -> None:
        """Go through what the file says to go through; what an early end would leave is lost."""
        items = self.value(node.iter, names, depth)
        inner = [one for outer in node.body for one in ast.walk(outer)]
        ends = any(isinstance(one, ast.Break | ast.Continue) for one in inner)
        if ends or not isinstance(items, list | tuple | dict):
            why = items if isinstance(items, Unknown) and items.by else Unknown("a loop")
            self.lose([node], why, names, depth)
            return
        for item in list(items):
            self.assign(node.target, item, names, depth)
            self.run(node.body, names, depth)
        self.run(node.orelse, names, depth)

    def lose(
        self, body: Sequence[ast.stmt], why: Unknown, names: dict[str, Any], depth: int
    ) -> None:
        """Take what statements assign as unknown."""
        for node in (inner for outer in body for inner in ast.walk(outer)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            elif isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if name in self.functions:
                    raise FileError(
                        f"{name}: whether it is called is decided by {why.by or 'more'}"
                    )
                if isinstance(node.func, ast.Attribute) and node.func.attr == "update":
                    targets = [node.func.value]
            for target in targets:
                self.assign(target, why, names, depth)

    def assign(self, target: ast.expr, value: Any, names: dict[str, Any], depth: int) -> None:
        """Set a name, or a key of a config; configs on the way there are made."""
        if isinstance(target, ast.Name):
            names[target.id] = value
            return
        if isinstance(target, ast.Tuple | ast.List):
            for number, one in enumerate(target.elts):
                known = isinstance(value, list | tuple) and number < len(value)
                self.assign(one, value[number] if known else Unknown(), names, depth)
            return
        if isinstance(target, ast.Attribute):
            key: Any = target.attr
        elif isinstance(target, ast.Subscript):
            key = self.value(target.slice, names, depth)
        else:
            return
        holder = self.value(target.value, names, depth)
        if isinstance(holder, Unknown) and not holder.by:
            holder = {}
            self.assign(target.value, holder, names, depth)
        if isinstance(holder, dict) and isinstance(key, str):
            holder[key] = value

    def call(
        self,
        function: ast.FunctionDef,
        args: Sequence[Any],
        keywords: Mapping[str, Any],
        module: Mapping[str, Any],
        depth: int,
    ) -> Any:
        """Return what one of the file's own functions returns."""
        if depth >= _DEPTH:
            return Unknown()
        wanted = function.args
        every = [*wanted.posonlyargs, *wanted.args]
        names = {**module, **{arg.arg: Unknown() for arg in (*every, *wanted.kwonlyargs)}}
        late = every[len(every) - len(wanted.defaults) :]
        for arg, default in zip(late, wanted.defaults, strict=True):
            names[arg.arg] = self.value(default, names, depth)
        for arg, written in zip(wanted.kwonlyargs, wanted.kw_defaults, strict=True):
            if written is not None:
                names[arg.arg] = self.value(written, names, depth)
        names |= {arg.arg: value for arg, value in zip(every, args, strict=False)} | dict(keywords)
        try:
            self.run(function.body, names, depth + 1)
        except _Return as end:
            return end.value
        return None

    def value(self, node: ast.expr, names: dict[str, Any], depth: int) -> Any:
        """Return the value of an expression, or `Unknown`."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return names.get(node.id, Unknown())
        if isinstance(node, ast.Attribute | ast.Subscript):
            return self.part(node, names, depth)
        if isinstance(node, ast.Dict):
            made: dict[Any, Any] = {}
            for key, item in zip(node.keys, node.values, strict=True):
                value = self.value(item, names, depth)
                if key is None:
                    made |= value if isinstance(value, dict) else {}
                elif isinstance(name := self.value(key, names, depth), str | int | float):
                    made[name] = value
            return _bounded(made)
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, names, depth) for item in node.elts]
            return _bounded(items if isinstance(node, ast.List) else tuple(items))
        if isinstance(node, ast.JoinedStr):
            parts = [self.value(part, names, depth) for part in node.values]
            return _first_unknown(parts) or "".join(map(str, parts))[:_LONGEST]
        if isinstance(node, ast.FormattedValue):
            return self.value(node.value, names, depth)
        if isinstance(node, ast.Call):
            return self.called(node, names, depth)
        return self.operation(node, names, depth)

    def operation(self, node: ast.expr, names: dict[str, Any], depth: int) -> Any:
        if isinstance(node, ast.IfExp):
            test = self.value(node.test, names, depth)
            if isinstance(test, Unknown):
                return test
            return self.value(node.body if test else node.orelse, names, depth)
        if isinstance(node, ast.BoolOp):
            wanted = isinstance(node.op, ast.Or)
            value: Any = not wanted
            for item in node.values:
                value = self.value(item, names, depth)
                if isinstance(value, Unknown) or bool(value) == wanted:
                    break
            return value
        if isinstance(node, ast.UnaryOp):
            value = self.value(node.operand, names, depth)
            if isinstance(value, Unknown):
                return value
            if isinstance(node.op, ast.Not):
                return not value
            number = isinstance(value, int | float) and isinstance(node.op, ast.USub)
            return -value if number else Unknown()
        if isinstance(node, ast.BinOp):
            return _applied(
                node.op, self.value(node.left, names, depth), self.value(node.right, names, depth)
            )
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            sides = (node.left, node.comparators[0])
            return _applied(node.ops[0], *(self.value(side, names, depth) for side in sides))
        return Unknown()

    def part(self, node: ast.Attribute | ast.Subscript, names: dict[str, Any], depth: int) -> Any:
        holder = self.value(node.value, names, depth)
        if isinstance(node, ast.Attribute):
            key: Any = node.attr
        else:
            key = self.value(node.slice, names, depth)
        if isinstance(holder, _Arguments):
            return holder.value(key) if isinstance(key, str) else Unknown()
        if isinstance(holder, Unknown):
            return holder
        if isinstance(key, Unknown):
            return key
        try:
            return holder[key] if isinstance(holder, dict | list | tuple) else Unknown()
        except (KeyError, IndexError, TypeError):
            return Unknown()

    def called(self, node: ast.Call, names: dict[str, Any], depth: int) -> Any:
        args = [self.value(arg, names, depth) for arg in node.args]
        keywords: dict[str, Any] = {}
        for word in node.keywords:
            value = self.value(word.value, names, depth)
            if word.arg is None:
                keywords |= value if isinstance(value, dict) else {}
            else:
                keywords[word.arg] = value
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
            holder = self.value(node.func.value, names, depth)
            if isinstance(holder, dict) and name == "update":
                holder.update(*(arg for arg in args if isinstance(arg, dict)), **keywords)
                return None
            if isinstance(holder, dict) and name in ("items", "keys", "values") and not args:
                return list(getattr(holder, name)())
            if isinstance(holder, dict) and name == "get" and args and isinstance(args[0], str):
                return holder.get(args[0], args[1] if len(args) > 1 else None)
            if isinstance(holder, str):
                return _method(holder, name, args, keywords)
        elif name in self.functions:
            return self.call(self.functions[name], args, keywords, names, depth)
        if name in ("dict", "ConfigDict", "FrozenConfigDict"):
            made: dict[str, Any] = {}
            for arg in args:
                made |= arg if isinstance(arg, dict) else {}
            return _bounded(made | keywords)
        if name == "parse_arg":
            self.arguments.defaults = {k: v for k, v in keywords.items() if k != "lazy"}
            return self.arguments
        if name in _CALLS and not _first_unknown([*args, *keywords.values()]):
            try:
                return _CALLS[name](*args, **keywords)
            except (TypeError, ValueError, OverflowError):
                return Unknown()
        return _first_unknown(args) or Unknown()


def _bounded(value: Any) -> Any:
    """Return a list or a config, or `Unknown` for one that is too large."""
    waiting, seen = [value], 0
    while waiting:
        seen += 1
        if seen > _LARGEST:
            return Unknown("too much")
        one = waiting.pop()
        inside = (
            one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
        )
        waiting += inside
    return value


def _first_unknown(values: Sequence[Any]) -> Unknown | None:
    found = [value for value in values if isinstance(value, Unknown)]
    return next((value for value in found if value.by), found[0] if found else None)


def _method(text: str, name: str, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    if missing := _first_unknown([*args, *keywords.values()]):
        return missing
    try:
        if name == "format" and not _FIELD.sub("", text).count("{"):
            return text.format(*args, **keywords)[:_LONGEST]
        if name in ("split", "startswith", "endswith", "lower", "strip", "partition"):
            return getattr(text, name)(*args)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        pass
    return Unknown()


def _applied(kind: ast.AST, left: Any, right: Any) -> Any:
    """Return an operator's value; only plain numbers and short texts and lists are taken."""
    if missing := _first_unknown([left, right]):
        return missing
    if isinstance(left, _Arguments):
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
    long = isinstance(made, str) and len(made) > _LONGEST
    huge = isinstance(made, int) and abs(made) > 10**18
    return Unknown() if long or huge else _bounded(made)
