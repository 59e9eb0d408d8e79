"""A config written in Python, read without running it: literals, branches, and its own functions.

What a value depends on that the file does not say stays `Unknown`, with what decides it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardsim.errors import FileError, nearest
from shardsim.validate.imports.literal_values import (
    LARGEST,
    LONGEST,
    Arguments,
    Unknown,
    applied,
    bounded,
    first_unknown,
    method,
)

CHANGES = "(config)"  # behind the name of a function that changes a config unseen
_STEPS = 20_000  # statements; a config has some hundred
_DEPTH = 12  # of calls
_MODULES = 16  # looked for
_CALLS: Mapping[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "len": len,
    "min": min,
    "max": max,
    "repr": lambda value: repr(value)[:LONGEST],
    "range": lambda *args: list(range(*args)[:LARGEST]),
    "tuple": tuple,
    "list": list,
}


@dataclass(frozen=True)
class _Function:
    """A function of another module, or a lambda, with the names that it sees."""

    node: ast.FunctionDef | ast.Lambda
    names: Mapping[str, Any]


@dataclass(frozen=True)
class _Module:
    """What another file of the same tree assigns and defines."""

    names: Mapping[str, Any]


class _Return(Exception):
    """The end of a function, with its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


Modules = Callable[[str], str | None]


def read_python(
    text: str, arguments: str, modules: Modules = lambda name: None
) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Return what `get_config` returns, over what the module assigns to `config`, nested; what the
    module assigns; and which keys of the config are its arguments alone. Without a `get_config`
    it is what `apply` makes of an empty config.

    `arguments` are those of a command line, as `variant=L/16,runlocal=False`; `modules` returns the
    text of a module of the same tree, or nothing. Raises `FileError`
    for a file that is no Python, and `ValueError` and such for none that can be read.
    """
    tree = ast.parse(text)
    parts = [part.partition("=") for part in arguments.split(",") if part]
    given = Arguments({name: value if equals else "True" for name, equals, value in parts})
    reader = _Reader(given, modules)
    module: dict[str, Any] = {"config": {}}
    reader.run(tree.body, module)
    own: set[str] = set()
    config = module["config"] if isinstance(module["config"], dict) else {}
    if "get_config" in reader.functions:
        made = reader.call(reader.functions["get_config"], [given], {}, module)
        if isinstance(made, Arguments):
            own = set(made.defaults) - set(made.assigned)
            made = made.config()
        config = {**config, **(made if isinstance(made, dict) else {})}
    elif "apply" in reader.functions:  # what an export writes: a change of any config
        reader.call(reader.functions["apply"], [config], {}, module)
    if strange := sorted(set(given.given) - given.used):
        names = nearest(strange[0], sorted(given.used) or ["none"])
        raise FileError(f"argument {strange[0]!r}: the config does not read it{names}")
    return config, module, own


class _Reader:
    def __init__(self, arguments: Arguments, modules: Modules) -> None:
        self.arguments = arguments
        self.modules = modules
        self.loaded: dict[str, _Module | None] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.steps = 0
        self.depth = 0  # of calls

    def run(self, body: Sequence[ast.stmt], names: dict[str, Any]) -> None:
        """Go through statements in order."""
        for node in body:
            self.steps += 1
            if self.steps > _STEPS:
                raise FileError("too long to be a config")
            self.statement(node, names)

    def statement(self, node: ast.stmt, names: dict[str, Any]) -> None:
        if isinstance(node, ast.FunctionDef):
            self.functions[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self.imported(node, names)
        elif isinstance(node, ast.Assign):
            value = self.value(node.value, names)
            for target in node.targets:
                self.assign(target, value, names)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value, names), names)
        elif isinstance(node, ast.AugAssign):
            both = ast.BinOp(node.target, node.op, node.value)
            self.assign(node.target, self.value(both, names), names)
        elif isinstance(node, ast.Expr):
            if isinstance(self.value(node.value, names), Unknown):
                self.unseen(node.value, names)
        elif isinstance(node, ast.If):
            test = self.value(node.test, names)
            if isinstance(test, Unknown):
                self.lose([*node.body, *node.orelse], test, names)
            else:
                self.run(node.body if test else node.orelse, names)
        elif isinstance(node, ast.Return):
            raise _Return(self.value(node.value, names) if node.value else None)
        elif isinstance(node, ast.Raise):
            raise FileError(f"line {node.lineno}: the config raises an error there")
        elif isinstance(node, ast.With):
            self.run(node.body, names)
        elif isinstance(node, ast.For):
            self.loop(node, names)
        elif isinstance(node, ast.While | ast.Try):
            self.lose([node], Unknown("a loop"), names)

    def unseen(self, node: ast.expr, names: dict[str, Any]) -> None:
        """Note in a config that a function which cannot be read was given it, to change it."""
        if not isinstance(node, ast.Call) or (name := ast.unparse(node.func)) == "print":
            return
        for arg in node.args:
            if isinstance(arg, ast.Name) and isinstance(given := names.get(arg.id), dict):
                given[name + CHANGES] = Unknown()

    def imported(self, node: ast.Import | ast.ImportFrom, names: dict[str, Any]) -> None:
        """Set what other files of the same tree say; of others nothing is known."""
        for alias in node.names:
            if isinstance(node, ast.Import):
                found: Any = self.module(alias.name)
            elif (outer := self.module(node.module or "")) is not None:
                found = outer.names.get(alias.name)
            else:
                found = self.module(f"{node.module}.{alias.name}")
            if found is not None:
                names[alias.asname or alias.name] = found

    def module(self, name: str) -> _Module | None:
        """Return a module of the same tree; its functions see its own names."""
        if name not in self.loaded and len(self.loaded) < _MODULES:
            self.loaded[name] = None
            text = self.modules(name)
            if text is not None:
                inside: dict[str, Any] = {}
                outer, self.functions = self.functions, {}
                self.run(ast.parse(text).body, inside)
                own, self.functions = self.functions, outer
                inside.update((one, _Function(node, inside)) for one, node in own.items())
                self.loaded[name] = _Module(inside)
        return self.loaded.get(name)

    def loop(self, node: ast.For, names: dict[str, Any]) -> None:
        """Go through what the file says to go through; what an early end would leave is lost."""
        items = self.value(node.iter, names)
        inner = [one for outer in node.body for one in ast.walk(outer)]
        ends = any(isinstance(one, ast.Break | ast.Continue) for one in inner)
        if ends or not isinstance(items, list | tuple | dict):
            why = items if isinstance(items, Unknown) and items.by else Unknown("a loop")
            self.lose([node], why, names)
            return
        for item in list(items):
            self.assign(node.target, item, names)
            self.run(node.body, names)
        self.run(node.orelse, names)

    def lose(self, body: Sequence[ast.stmt], why: Unknown, names: dict[str, Any]) -> None:
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
                self.assign(target, why, names)

    def assign(self, target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        """Set a name, or a key of a config; configs on the way there are made."""
        if isinstance(target, ast.Name):
            names[target.id] = value
            return
        if isinstance(target, ast.Tuple | ast.List):
            for number, one in enumerate(target.elts):
                known = isinstance(value, list | tuple) and number < len(value)
                self.assign(one, value[number] if known else Unknown(), names)
            return
        if isinstance(target, ast.Attribute):
            key: Any = target.attr
        elif isinstance(target, ast.Subscript):
            key = self.value(target.slice, names)
        else:
            return
        holder = self.value(target.value, names)
        if isinstance(holder, Unknown) and not holder.by:
            holder = {}
            self.assign(target.value, holder, names)
        if isinstance(holder, Arguments) and isinstance(key, str):
            holder.assigned[key] = value
        if isinstance(holder, dict) and isinstance(key, str):
            holder[key] = value

    def call(
        self,
        function: ast.FunctionDef | ast.Lambda,
        args: Sequence[Any],
        keywords: Mapping[str, Any],
        module: Mapping[str, Any],
    ) -> Any:
        """Return what one of the file's own functions returns."""
        if self.depth >= _DEPTH:
            return Unknown()
        wanted = function.args
        every = [*wanted.posonlyargs, *wanted.args]
        names = {**module, **{arg.arg: Unknown() for arg in (*every, *wanted.kwonlyargs)}}
        late = every[len(every) - len(wanted.defaults) :]
        for arg, default in zip(late, wanted.defaults, strict=True):
            names[arg.arg] = self.value(default, names)
        for arg, written in zip(wanted.kwonlyargs, wanted.kw_defaults, strict=True):
            if written is not None:
                names[arg.arg] = self.value(written, names)
        names |= {arg.arg: value for arg, value in zip(every, args, strict=False)} | dict(keywords)
        if wanted.vararg:
            names[wanted.vararg.arg] = tuple(args[len(every) :])
        if wanted.kwarg:
            known = {arg.arg for arg in (*every, *wanted.kwonlyargs)}
            more = {key: value for key, value in keywords.items() if key not in known}
            names[wanted.kwarg.arg] = more
        self.depth += 1
        try:
            if isinstance(function, ast.Lambda):
                return self.value(function.body, names)
            self.run(function.body, names)
        except _Return as end:
            return end.value
        finally:
            self.depth -= 1
        return None

    def value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """Return the value of an expression, or `Unknown`."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return names.get(node.id, Unknown())
        if isinstance(node, ast.Attribute | ast.Subscript):
            return self.part(node, names)
        if isinstance(node, ast.Dict):
            made: dict[Any, Any] = {}
            for key, item in zip(node.keys, node.values, strict=True):
                value = self.value(item, names)
                if key is None:
                    made |= value if isinstance(value, dict) else {}
                elif isinstance(name := self.value(key, names), str | int | float):
                    made[name] = value
            return bounded(made)
        if isinstance(node, ast.List | ast.Tuple):
            items = self.items(node.elts, names)
            if isinstance(items, Unknown):
                return items
            return bounded(items if isinstance(node, ast.List) else tuple(items))
        if isinstance(node, ast.JoinedStr):
            parts = [self.value(part, names) for part in node.values]
            return first_unknown(parts) or "".join(map(str, parts))[:LONGEST]
        if isinstance(node, ast.FormattedValue):
            plain = node.format_spec is None and node.conversion == -1
            return self.value(node.value, names) if plain else Unknown()
        if isinstance(node, ast.Call):
            return self.called(node, names)
        if isinstance(node, ast.Lambda):
            return _Function(node, names)
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self.comprehension(node, names)
        return self.operation(node, names)

    def items(self, nodes: Sequence[ast.expr], names: dict[str, Any]) -> list[Any] | Unknown:
        """Return the items of a list, those of lists inside with a star too."""
        found: list[Any] = []
        for node in nodes:
            starred = isinstance(node, ast.Starred)
            value = self.value(node.value if isinstance(node, ast.Starred) else node, names)
            if starred and not isinstance(value, list | tuple):
                return value if isinstance(value, Unknown) else Unknown()
            found += value if starred else [value]
            if len(found) > LARGEST:
                return Unknown("too much")
        return found

    def comprehension(self, node: ast.ListComp | ast.GeneratorExp, names: dict[str, Any]) -> Any:
        """Return the list that a comprehension of one loop makes."""
        first = node.generators[0]
        items = self.value(first.iter, names)
        if len(node.generators) > 1 or not isinstance(items, list | tuple | dict):
            return items if isinstance(items, Unknown) else Unknown()
        made = []
        for item in list(items)[:LARGEST]:
            self.steps += 1
            inner = dict(names)
            self.assign(first.target, item, inner)
            tests = [self.value(test, inner) for test in first.ifs]
            if missing := first_unknown(tests):
                return missing
            if all(tests) and self.steps <= _STEPS:
                made.append(self.value(node.elt, inner))
        return bounded(made)

    def operation(self, node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.IfExp):
            test = self.value(node.test, names)
            if isinstance(test, Unknown):
                return test
            return self.value(node.body if test else node.orelse, names)
        if isinstance(node, ast.BoolOp):
            wanted = isinstance(node.op, ast.Or)
            value: Any = not wanted
            for item in node.values:
                value = self.value(item, names)
                if isinstance(value, Unknown) or bool(value) == wanted:
                    break
            return value
        if isinstance(node, ast.UnaryOp):
            value = self.value(node.operand, names)
            if isinstance(value, Unknown):
                return value
            if isinstance(node.op, ast.Not):
                return not value
            number = isinstance(value, int | float) and isinstance(node.op, ast.USub)
            return -value if number else Unknown()
        if isinstance(node, ast.BinOp):
            return applied(node.op, self.value(node.left, names), self.value(node.right, names))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            sides = (node.left, node.comparators[0])
            return applied(node.ops[0], *(self.value(side, names) for side in sides))
        return Unknown()

    def part(self, node: ast.Attribute | ast.Subscript, names: dict[str, Any]) -> Any:
        holder = self.value(node.value, names)
        if isinstance(node, ast.Attribute):
            key: Any = node.attr
        else:
            key = self.value(node.slice, names)
        if isinstance(holder, Arguments):
            return holder.value(key) if isinstance(key, str) else Unknown()
        if isinstance(holder, _Module):
            return holder.names.get(key, Unknown()) if isinstance(key, str) else Unknown()
        if isinstance(holder, Unknown):
            return holder
        if isinstance(key, Unknown):
            return key
        try:
            return holder[key] if isinstance(holder, dict | list | tuple) else Unknown()
        except (KeyError, IndexError, TypeError):
            return Unknown()

    def called(self, node: ast.Call, names: dict[str, Any]) -> Any:
        args = self.items(node.args, names)
        if isinstance(args, Unknown):
            return args
        keywords: dict[str, Any] = {}
        for word in node.keywords:
            value = self.value(word.value, names)
            if word.arg is None:
                keywords |= value if isinstance(value, dict) else {}
            else:
                keywords[word.arg] = value
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        called = names.get(name)
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
            holder = self.value(node.func.value, names)
            if isinstance(holder, _Module):
                called = holder.names.get(name) if name != "parse_arg" else None
            if isinstance(holder, dict) and name == "update":
                holder.update(*(arg for arg in args if isinstance(arg, dict)), **keywords)
                return None
            if isinstance(holder, dict) and name in ("items", "keys", "values") and not args:
                return list(getattr(holder, name)())
            if isinstance(holder, dict) and name == "get" and args and isinstance(args[0], str):
                return holder.get(args[0], args[1] if len(args) > 1 else None)
            if isinstance(holder, str):
                return method(holder, name, args, keywords)
        if isinstance(called, _Function):
            return self.call(called.node, args, keywords, called.names)
        if isinstance(node.func, ast.Name) and name in self.functions:
            return self.call(self.functions[name], args, keywords, names)
        if name in ("dict", "ConfigDict", "FrozenConfigDict"):
            made: dict[str, Any] = {}
            for arg in args:
                made |= arg if isinstance(arg, dict) else {}
            return bounded(made | keywords)
        if name == "parse_arg":
            defaults = {k: v for k, v in keywords.items() if k != "lazy"}
            if not args or not isinstance(args[0], Arguments):
                return defaults  # of no arguments
            self.arguments.defaults = defaults
            return self.arguments
        if name == "sorted" and len(args) == 1 and isinstance(args[0], dict | list | tuple):
            return Unknown() if first_unknown(list(args[0])) else sorted(map(str, args[0]))
        if name in _CALLS and not first_unknown([*args, *keywords.values()]):
            try:
                return _CALLS[name](*args, **keywords)
            except (TypeError, ValueError, OverflowError):
                return Unknown()
        return first_unknown(args) or Unknown()
