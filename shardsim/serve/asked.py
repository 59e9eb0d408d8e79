"""What the page asks: a plan with some keys changed, read from a request and checked.

Changes are said as `--set` takes them, so messages are those of the command line. No request names
a file: plans and models are chosen by names that are known before.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from shardsim.answers.trials import set_text
from shardsim.errors import PlanError, nearest
from shardsim.files import check_keys
from shardsim.machine import Chip, Machine, parse_machine
from shardsim.plan.plan import Plan
from shardsim.planner.changes import axis_called, changed, check_root, parse_assignment

KEYS = ("plan", "set", "mesh", "rest", "chip", "costs", "as", "pinned", "form")
MOST_CHANGES = 100
LONGEST_CHANGE = 2000  # characters
# Figures of the chip with a slider; all others are there for --set.
FIGURES = ("peak_flops", "hbm_bytes", "hbm_bytes_per_s", "link_bytes_per_s", "dcn_bytes_per_s")
LEAST_FACTOR, MOST_FACTOR = 0.01, 100.0
DIGITS = 6  # of a figure that a slider says


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A plan of the desk and what is changed in it."""

    name: str
    changes: Mapping[str, Any]

    @property
    def texts(self) -> list[str]:
        """The changes as --set takes them."""
        return [set_text({key: value}) for key, value in self.changes.items()]

    def plan(self, base: Plan) -> Plan:
        """Return the changed plan; raises `ShardsimError` where it is none."""
        return changed(base, self.changes) if self.changes else base

    def machine(self, base: Plan) -> Machine:
        """Return the slice, its chip as it is: before a slider changes it."""
        return _machine(base, self.changes)

    def command(self, path: str, costs: str | None, implementation: str | None) -> str:
        """Return the command that predicts the same."""
        words = ["shardsim", "predict", path]
        for text in self.texts:
            words += ["--set", text]
        words += ["--op-costs", costs] if costs else []
        words += ["--as", implementation] if implementation else []
        return shlex.join(words)


def read(data: Any, base_of: Callable[[str], Plan], model_names: tuple[str, ...]) -> Asked:
    """Return what a request asks; `base_of` gives the plan of a name, or raises `PlanError`.

    `set` holds texts as --set takes them, `mesh` sizes by axis or role, of which the axis `rest`
    takes what others leave of the slice, `chip` factors of the chip's figures.
    """
    data = check_keys(data, where="request", allowed=KEYS, error=PlanError)
    name = word(data, "plan") or ""
    base = base_of(name)
    changes: dict[str, Any] = {}
    for text in _texts(data.get("set") or []):
        key, value = parse_assignment(text)
        check_root(key)
        if key == "model" and value not in model_names:
            raise PlanError(f"model: {str(value)[:60]!r} is not known{nearest(value, model_names)}")
        changes[key] = value
    for axis, size in _mapping(data, "mesh").items():
        changes[f"mesh.{axis}"] = size
    if rest := word(data, "rest"):
        changes |= _filled(base, changes, rest)
    chip = _machine(base, changes).chip
    for figure, factor in _mapping(data, "chip").items():
        changes[f"chip.{figure_key(figure)}"] = _scaled(chip, figure, factor)
    return Asked(name=name, changes=changes)


def word(data: Mapping[str, Any], key: str) -> str | None:
    """Return a word of a request; None where it says nothing."""
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise PlanError(f"request: {key}: expected a name")
    return value or None


def figure_key(figure: str) -> str:
    """Return the key of a figure with a slider, as `chip.KEY` says it."""
    return "peak_flops.bf16" if figure == "peak_flops" else figure


def figure_of(chip: Chip, figure: str) -> float:
    """Return a figure of a chip that has a slider."""
    return {
        "peak_flops": chip.peak_flops["bf16"],
        "hbm_bytes": chip.hbm_bytes,
        "hbm_bytes_per_s": chip.hbm_bytes_per_s,
        "link_bytes_per_s": chip.link_bytes_per_s,
        "dcn_bytes_per_s": chip.dcn_bytes_per_s,
    }[figure]


def _texts(given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise PlanError("request: set: expected a list of texts, such as microbatches=4")
    if len(given) > MOST_CHANGES or any(len(text) > LONGEST_CHANGE for text in given):
        raise PlanError(f"request: set: at most {MOST_CHANGES} of {LONGEST_CHANGE} characters")
    return given


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict) or len(value) > MOST_CHANGES:
        raise PlanError(f"request: {key}: expected names with numbers")
    return value


def _machine(base: Plan, changes: Mapping[str, Any]) -> Machine:
    name = changes.get("machine")
    return parse_machine(name) if isinstance(name, str) else base.machine


def _filled(base: Plan, changes: Mapping[str, Any], rest: str) -> dict[str, Any]:
    """Return the size of the axis `rest` for which the mesh fills the slice; none if none does."""
    named: dict[str, Any] = {}
    for key, value in changes.items():
        root, _, axis = key.partition(".")
        if root == "mesh" and axis and "." not in axis:
            named[axis_called(base, axis)] = value
    if (taker := axis_called(base, rest)) in named:
        return {}
    sizes = {axis.name: axis.size for axis in base.mesh if axis.name != taker} | named
    whole = [size for size in sizes.values() if isinstance(size, int) and size > 0]
    left, over = divmod(_machine(base, changes).devices, prod(whole))
    return {} if over or len(whole) < len(sizes) else {f"mesh.{rest}": left}


def _scaled(chip: Chip, figure: str, factor: Any) -> float:
    if figure not in FIGURES:
        raise PlanError(f"chip: {figure[:60]!r} has no slider{nearest(figure, FIGURES)}")
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not number or not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise PlanError(f"chip: {figure}: expected a factor from {LEAST_FACTOR:g} to "
                        f"{MOST_FACTOR:g}")  # fmt: skip
    value = float(f"{factor * figure_of(chip, figure):.{DIGITS}g}")
    return int(value) if value.is_integer() else value
