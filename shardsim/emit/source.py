"""The text of an emitted program: the runtime's modules, and of the ops what they and calls need.

A file of `shardsim.ops` has a half for planning and one for the emitted program. Only definitions
that the program reaches are taken: from what runs its calls, and from what the runtime imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources

RUNTIME, _OPS = "shardsim.emit.runtime", "shardsim.ops"
# In the order in which an emitted program has them; ops stand before what calls them.
_BEFORE = ("host", "config", "collectives")
_AFTER = (
    *("data", "explicit", "partitioned", "model", "apart"),
    *("lending", "turns", "phases", "optimizer", "train"),
)
_WHOLE_OPS = ("registry", "whole")  # modules of ops that planning has no part in
_GIVEN = ("jax", "numpy", "optax")  # packages that the program needs
_LAZY = f"{_OPS}.lazy"  # what ops use of JAX; the runtime's own imports bring the same names


def program_text(runs: Iterable[str]) -> tuple[str, list[str]]:
    """Return the import statements of a program that calls the ops `runs`, and its sections."""
    modules = [f"{RUNTIME}.{name}" for name in (*_BEFORE, *_AFTER)]
    whole = [f"{_OPS}.{name}" for name in _WHOLE_OPS]
    wanted = _reached(runs, [*modules, *whole])
    order = [
        *(f"{RUNTIME}.{name}" for name in _BEFORE),
        whole[0],
        *sorted(wanted),
        whole[1],
        *(f"{RUNTIME}.{name}" for name in _AFTER),
    ]
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    for name in [*modules, *whole]:
        for node in _tree(name).body:
            if isinstance(node, ast.Import):
                plain |= {
                    f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                    for alias in node.names
                }
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                if not node.module.startswith(("shardsim", "__future__")):
                    named.setdefault(node.module, set()).update(a.name for a in node.names)
    for name in wanted:
        for node in _tree(name).body:
            if isinstance(node, ast.ImportFrom) and node.module == "functools":
                named.setdefault("functools", set()).update(a.name for a in node.names)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in named.items()]
    groups = [
        sorted(x for x in plain if (x.split()[1].split(".")[0] in _GIVEN) == given)
        + sorted(x for x in lines if (x.split()[1].split(".")[0] in _GIVEN) == given)
        for given in (False, True)
    ]
    sections = [_section(name, wanted.get(name)) for name in order]
    texts = ["from __future__ import annotations", *("\n".join(group) for group in groups)]
    return "\n\n".join(texts), sections


def _reached(runs: Iterable[str], modules: Iterable[str]) -> dict[str, set[str]]:
    """Return by module of ops the definitions that a program reaches."""
    runners = {
        name: (module, function) for module in op_modules() for name, function in _runners(module)
    }
    todo = [runners[run] for run in dict.fromkeys(runs)]
    for name in modules:
        todo += [(module, found) for module, found in _imported(name) if _divided(module)]
    reached: dict[str, set[str]] = {}
    while todo:
        module, name = todo.pop()
        if name in reached.setdefault(module, set()):
            continue
        reached[module].add(name)
        todo += _used(module, name)
    return reached


@cache
def _used(module: str, name: str) -> tuple[tuple[str, str], ...]:
    """Return the (module, definition) of ops that a definition uses."""
    there = _definitions(module)
    known = {item: origin for origin, item in _imported(module)}
    used = _names(there[name])
    imported = [(known[item], item) for item in sorted(used & known.keys() - there.keys())]
    return (
        *((module, item) for item in sorted(used & there.keys())),
        *((origin, item) for origin, item in imported if _divided(origin)),
    )


@cache
def op_modules() -> tuple[str, ...]:
    """Return the modules that have a half for planning and one for programs."""
    names = sorted(
        path.name.removesuffix(".py")
        for path in resources.files(_OPS).iterdir()
        if path.name.endswith(".py") and path.name != "__init__.py"
    )
    return tuple(f"{_OPS}.{name}" for name in names if _divided(f"{_OPS}.{name}"))


def _divided(module: str) -> bool:
    return module.startswith(f"{_OPS}.") and module not in (
        _LAZY,
        *(f"{_OPS}.{name}" for name in _WHOLE_OPS),
    )


@cache
def module_text(module: str) -> str:
    package, _, name = module.rpartition(".")
    return resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(module_text(module))


@cache
def _definitions(module: str) -> Mapping[str, ast.stmt]:
    """Return the functions, classes and constants of a module by name."""
    found: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def _runners(module: str) -> Iterator[tuple[str, str]]:
    """Yield (op, function that runs it) of a module."""
    for name, node in _definitions(module).items():
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "runs":
                yield ast.literal_eval(call.args[0]), name


@cache
def _imported(module: str) -> tuple[tuple[str, str], ...]:
    """Return the (module, name) of what a module imports from the project."""
    return tuple(
        (str(node.module), alias.name)
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardsim.")
        for alias in node.names
    )


def _names(node: ast.stmt) -> set[str]:
    """Return the names that a definition uses when it runs: those of annotations it never does."""
    inner: list[ast.AST] = [node]
    found: set[str] = set()
    while inner:
        item = inner.pop()
        if isinstance(item, ast.Name):
            found.add(item.id)
        for key, value in ast.iter_fields(item):
            if key not in ("annotation", "returns"):
                many = value if isinstance(value, list) else [value]
                inner += [one for one in many if isinstance(one, ast.AST)]
    return found


def _section(module: str, only: set[str] | None) -> str:
    """Return a module as a part of a program: its docstring as a comment, then its text."""
    text, tree = module_text(module), _tree(module)
    lines = text.splitlines()
    doc = ast.get_docstring(tree) or ""
    banner = "\n".join(f"# {line}".rstrip() for line in doc.splitlines())
    if only is None:
        last = 0
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                last = max(last, node.end_lineno or 0)
        rest = "\n".join(lines[last:]).strip("\n")
    else:
        parts = []
        end = 0
        for node in tree.body:
            start, end = end, node.end_lineno or 0
            if any(found is node and name in only for name, found in _definitions(module).items()):
                parts.append("\n".join(lines[start:end]).strip("\n"))
        rest = "\n\n\n".join(parts)
    return f"\n# {'-' * 78}\n{banner}\n\n\n{rest}\n"
