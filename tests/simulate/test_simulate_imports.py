"""SimPy and networkx are imported in this part only, and nothing else heavy at its top."""

from __future__ import annotations

import ast
from pathlib import Path

import shardsim

PACKAGE = Path(shardsim.__file__).parent


def imported(path: Path, *, everywhere: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_simpy_and_networkx_stay_here() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "simulate":
            assert not imported(path, everywhere=True) & {"simpy", "networkx"}, path


def test_pictures_import_matplotlib_when_they_draw() -> None:
    for path in (PACKAGE / "simulate").glob("*.py"):
        assert not imported(path, everywhere=False) & {"matplotlib", "pandas", "jax", "scipy"}, path
