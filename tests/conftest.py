"""Settings of the whole suite. Helpers are in `building.py` and `moving.py` beside this file."""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from said import Shardsim, shardsim
from small_plan import PLAN

settings.register_profile(
    "shardsim",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shardsim")


# Tests marked `jax` are found by their own text or a fixture's: it imports JAX or starts a process
# that does. Where a whole file imports it, the fast tier does not even read the file.
STARTS_JAX = re.compile(
    r"import jax|jax\.config|importorskip\(.jax|(import|from) flax|JAX_PLATFORMS|"
    r"HostDevices|verify_host|host_environment|TpuCompiler|needs_libtpu"
)
LONG, THIRD = 9, 3  # of tables longer than that the fast tier takes a third
FEWER = 20  # of the examples that a property draws in the whole suite, one in so many
_KNOWN: dict[Callable[..., object], bool] = {}  # of each test function: see `starts_jax`
NO_JAX = Path(__file__).parent / "no_jax"

collect_ignore = [NO_JAX.name, "benchmarks", "fuzz.py", "fuzz_cases.py"]
collect_ignore += ["mutants.py", "mutations.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let who looks for what no test notices have long tables whole."""
    parser.addoption(
        "--all-parameters",
        action="store_true",
        help="take all parameters of tests where JAX is left out, too, and not a third of many",
    )


def is_fast_tier(config: pytest.Config) -> bool:
    """Return whether `-m` leaves out the tests that need JAX."""
    return "not jax" in config.option.markexpr


def pytest_configure(config: pytest.Config) -> None:
    """In the fast tier, let no test import JAX: not here, and not in a process that it starts."""
    if is_fast_tier(config):
        sys.path.insert(0, str(NO_JAX))
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(NO_JAX), *filter(None, [os.environ.get("PYTHONPATH")])]
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which no test would run: they import JAX, or all of them is slow."""
    if is_fast_tier(config) and collection_path.suffix == ".py":
        slow = "not slow" in config.option.markexpr and all_slow(collection_path)
        return slow or imports_jax(collection_path) or None
    return None


@cache
def statements(path: Path) -> list[ast.stmt]:
    """Return what stands in a file."""
    return ast.parse(path.read_text(encoding="utf-8")).body


def all_slow(path: Path) -> bool:
    """Return whether a test file says that all its tests are slow."""
    marks = [node for node in statements(path) if isinstance(node, ast.Assign)]
    return "pytestmark = pytest.mark.slow" in map(ast.unparse, marks)


@cache
def imports_jax(path: Path) -> bool:
    """Return whether a test file's own imports bring JAX."""
    names = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return any(re.match(r"jax\b|shardsim\.emit\.runtime\b", name) for name in names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that need JAX or a notebook; in the fast tier, take and draw fewer of others."""
    if is_fast_tier(config) and not config.option.all_parameters:
        sizes = Counter(map(own_id, items))
        left_out = [item for item in items if sizes[own_id(item)] > LONG and not taken(item)]
        out = set(left_out)
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if starts_jax(item):
            item.add_marker("jax")
        if item.get_closest_marker("notebook"):
            item.add_marker("slow")
        drawn = getattr(item.function, "_hypothesis_internal_use_settings", None)
        if drawn is not None and is_fast_tier(config):
            fewer = settings(drawn, max_examples=max(2, drawn.max_examples // FEWER))
            item.function._hypothesis_internal_use_settings = fewer


def pytest_collection_finish(session: pytest.Session) -> None:
    """In the fast tier, let the collector of garbage pass over what was imported, and come rarely:
    a fifteenth of its time."""
    if is_fast_tier(session.config):
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 50)


def own_id(item: pytest.Item) -> str:
    """Return the name of a test without its parameters."""
    return item.nodeid.partition("[")[0]


def taken(item: pytest.Item) -> bool:
    """Return whether the fast tier takes one of many parameters: always the same third."""
    return crc32(item.nodeid.encode()) % THIRD == 0


def starts_jax(item: pytest.Function) -> bool:
    """Return whether a test, a fixture or function that it uses, or its module starts JAX."""
    if item.function not in _KNOWN:
        functions = [item.function]
        functions += [
            fixture.func
            for name in item.fixturenames
            for fixture in item.session._fixturemanager.getfixturedefs(name, item) or ()
        ]
        for function in [own(function) for function in functions]:
            used = (item.module.__dict__.get(name) for name in function.__code__.co_names)
            functions += [one for one in used if inspect.isfunction(one)]
        starts = any(names_jax(own(one)) for one in functions)
        _KNOWN[item.function] = starts or imports_jax(item.path)
    return _KNOWN[item.function]


def own(function: Any) -> Any:
    """Return the function that was written, whatever Hypothesis or pytest made of it."""
    property_of = getattr(function, "hypothesis", None)
    return inspect.unwrap(property_of.inner_test if property_of else function)


@cache
def names_jax(function: Callable[..., object]) -> bool:
    """Return whether a function of the tests says that it starts JAX."""
    here = function.__code__.co_filename.startswith(str(NO_JAX.parent))
    return here and bool(STARTS_JAX.search(inspect.getsource(function)))


@pytest.fixture(name="shardsim")
def command() -> Shardsim:
    """Run `shardsim` with the given words."""
    return shardsim


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A plan of ViT-L on 64 chips: 16-way data with sharded parameters, 4-way tensor."""
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN, encoding="utf-8")
    return path
