"""Plans side by side, like with like: priced by the same costs, and what differs in their files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError
from shardsim.plan.io import PlanOrPath, as_plan, plan_to_data
from shardsim.plan.plan import Plan

HOW = {
    "calibrated": "with costs calibrated to published runs",
    "compiler": "as the TPU compiler estimates",
    "physical": "from the chips' figures",
}


def how_priced(plans: Iterable[Plan], costs: str) -> str:
    """Return in words how plans with the same op costs are priced."""
    measured = all(plan.machine.chip.kernels is not None for plan in plans)
    return "from kernels measured on the chip" if measured and costs == "calibrated" else HOW[costs]


def priced_alike(plans: Sequence[PlanOrPath], costs: str | None = None) -> tuple[list[Plan], str]:
    """Return plans with the same op costs, and which those are.

    Without `costs` they are those that all plans have, or else "calibrated". Raises `PlanError` if
    they are to be the compiler's and a chip has none of its compiler.
    """
    given = [as_plan(plan) for plan in plans]
    if costs is None:
        said = {plan.op_costs for plan in given}
        costs = said.pop() if len(said) == 1 else "calibrated"
    return [replace(plan, op_costs=costs) for plan in given], costs


def compare(*plans: PlanOrPath, costs: str | None = None) -> list[Prediction]:
    """Return the predictions of two plans or more, priced alike: `priced_alike` says how.

    >>> [item.costs for item in compare("vit-22b-published-tp2", "vit-22b-published-tp8")]
    ['calibrated', 'calibrated']
    """
    if len(plans) < 2:
        raise PlanError("compare: name at least two plans, such as: compare a.yaml b.yaml")
    return [predict(plan) for plan in priced_alike(plans, costs)[0]]


@dataclass(frozen=True)
class Difference:
    """A key of plan files whose values are not the same; None where a file does not have it."""

    key: str
    values: tuple[Any, ...]


def differences(plans: Sequence[PlanOrPath]) -> list[Difference]:
    """Return the keys in which plan files differ, dots into mappings, in the files' order.

    What is only said of a plan (its `note`) is no difference.
    """
    files = [{**plan_to_data(as_plan(plan)), "note": None} for plan in plans]
    return list(_differing("", files))


def _differing(key: str, values: Sequence[Any]) -> Iterator[Difference]:
    """Yield the keys below one: a mapping beside what is none is one value."""
    given = [value for value in values if value is not None]
    if any(given) and all(isinstance(value, Mapping) for value in given):
        for name in dict.fromkeys(name for value in given for name in value):
            below = [None if value is None else value.get(name) for value in values]
            yield from _differing(f"{key}.{name}" if key else name, below)
    elif any(value != values[0] for value in values):
        yield Difference(key, tuple(values))
