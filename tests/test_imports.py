"""Imports point one way, and planning needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import shardsim

PACKAGE = Path(shardsim.__file__).parent
# Lowest first; a part may import from its own level's others only if that makes no circle.
ORDER = (
    ("units", "errors", "files", "memory", "executors", "carried", "kinds", "records"),
    ("graph",),
    ("ops",),
    ("machine", "model"),
    ("plan",),
    ("program",),
    ("cost",),
    ("simulate",),
    ("planner",),
    ("emit", "xla", "validate"),
    ("answers",),
    ("views",),
    ("report", "serve"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Parts that need an extra; planning reaches none of them.
NEED_EXTRAS = ("emit", "xla", "simulate", "report")
HEAVY = ("jax", "jaxlib", "flax", "optax", "pandas", "matplotlib", "scipy", "simpy", "networkx")
HEAVY += ("rich",)


def part_of(path: Path) -> str:
    """Return the part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path, *, top_level: bool = False) -> tuple[str, ...]:
    """Return the dotted names that a file imports; with `top_level`, those run on import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


@cache
def edges() -> set[tuple[str, str, str]]:
    """Return (file, its part, the part it imports) for every import inside the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            outer, _, rest = name.partition(".")
            if outer == "shardsim" and (inner := rest.partition(".")[0]) in LEVEL:
                found.add((str(path.relative_to(PACKAGE)), part_of(path), inner))
    return found


def test_every_part_has_its_place():
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts <= set(LEVEL), "a new part: say in ORDER where it stands"
    assert {"machine", "model", "plan", "program", "cost", "planner", "cli"} <= parts


def test_imports_point_one_way():
    assert len(edges()) > 50
    for path, here, there in sorted(edges()):
        if here in ("__init__", there):
            continue
        assert LEVEL[there] <= LEVEL[here], f"{path} imports {there}, which stands above it"


def test_no_circles_between_parts():
    graph: dict[str, set[str]] = {}
    for _, here, there in edges():
        if here != there:
            graph.setdefault(here, set()).add(there)
    done: set[str] = set()
    while rest := [part for part in LEVEL if part not in done]:
        free = [part for part in rest if graph.get(part, set()) <= done]
        assert free, f"a circle among {rest}"
        done.update(free)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if part_of(path) not in NEED_EXTRAS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_heavy_is_imported_at_the_top(path):
    for name in imports(path, top_level=True):
        assert name.split(".")[0] not in HEAVY


def test_only_the_simulation_imports_simpy_and_networkx():
    for path in PACKAGE.rglob("*.py"):
        if part_of(path) != "simulate":
            found = {name.split(".")[0] for name in imports(path)}
            assert not found & {"simpy", "networkx"}, path


def test_pictures_of_the_simulation_import_matplotlib_when_they_draw():
    for path in (PACKAGE / "simulate").glob("*.py"):
        found = {name.split(".")[0] for name in imports(path, top_level=True)}
        assert not found & {"matplotlib", "pandas", "jax", "scipy"}, path


def loaded(code: str) -> set[str]:
    """Return the top-level modules that are loaded after `code` ran in a new interpreter."""
    ending = "\nimport sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", code + ending], capture_output=True, text=True, check=True
    )
    return set(run.stdout.splitlines()[-1].split())


SEARCH = """
import shardsim.cli.main
from click.testing import CliRunner
run = CliRunner().invoke(
    shardsim.cli.main.main,
    ["plan", "vit-l-16", "--on", "v4:2x2x1", "--batch", "256", "--json"],
)
assert run.exit_code == 0, run.output
"""


def test_planning_loads_nothing_heavy():
    modules = loaded(SEARCH)
    assert modules >= {"click", "numpy", "yaml"}
    assert not modules.intersection(HEAVY)
