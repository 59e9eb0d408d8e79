"""Published effects: what one change did to a measured step, beside what is predicted of it.

A ratio of two runs is free of what both have in common, a fitted rate for instance, so it tests
what the formulas say of the change alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import FileError, ShardsimError, nearest
from shardsim.files import check_keys, read_yaml
from shardsim.plan import Plan, load_plan, plan_from_data, plan_names
from shardsim.planner.changes import changed
from shardsim.validate.libraries import implementation_of, library_of
from shardsim.validate.runs import published_runs

EFFECTS = Path(__file__).with_name("data") / "published_effects.yaml"
KEYS = ("id", "what", "quantity", "before", "after", "published", "source", "filled")
CLOSE = 1.0 / 3.0  # of the published effect: as near as a prediction of it must be
NOISE = 0.01  # a smaller published effect is none: one run moves by more between two dates

QUANTITIES: Mapping[str, Callable[[Prediction], float]] = {
    "step_time_s": lambda item: item.step_time_s,
    "tokens_per_s_per_chip": lambda item: item.tokens_per_s_per_chip,
    "mfu": lambda item: item.mfu,
    "hbm_peak_bytes": lambda item: item.hbm["peak_bytes"],
}


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One change, published and predicted, as fractions: 0.09 is nine per cent more."""

    id: str
    what: str
    quantity: str
    published: float
    predicted: float
    source: str
    filled: Mapping[str, str]

    @property
    def sign(self) -> bool:
        """Whether it goes the right way; either will do where none was seen."""
        return abs(self.published) < NOISE or self.published * self.predicted > 0

    @property
    def close(self) -> bool:
        """Whether it is within a third of the published size, or within noise of none."""
        return abs(self.predicted - self.published) <= max(CLOSE * abs(self.published), NOISE)

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "id": self.id,
            "what": self.what,
            "quantity": self.quantity,
            "published": self.published,
            "predicted": self.predicted,
            "sign": self.sign,
            "close": self.close,
            "source": self.source,
            "filled": dict(self.filled),
        }


def effects(path: str | os.PathLike[str] | None = None) -> list[Effect]:
    """Predict the effects of a file, or the published ones; raise `FileError` for what is none."""
    path = path or EFFECTS
    data = check_keys(read_yaml(path), where=str(path), allowed=("effects",), required=("effects",))
    if not isinstance(data["effects"], list):
        raise FileError(f"{path}: effects: expected a list")
    rows = {run.id: run.plans for run in published_runs()}
    return [_effect(row, f"{path}: effect {n}", rows) for n, row in enumerate(data["effects"], 1)]


def _effect(data: Any, where: str, rows: Mapping[str, tuple[Plan, ...]]) -> Effect:
    try:
        given = check_keys(data, where="effect", allowed=KEYS, required=KEYS[:-1])
        quantity = given["quantity"]
        if quantity not in QUANTITIES:
            raise FileError(f"quantity: {quantity!r:.40} is none{nearest(quantity, QUANTITIES)}")
        before, after = _measured(given["published"])
        first = _plan(given["before"], rows, where)
        then = given["after"]
        second = _plan(then, rows, where) if isinstance(then, str) else changed(first, then)
        made = implementation_of(library_of(str(given["source"])), first.machine.chip)
        values = [
            QUANTITIES[quantity](predict(plan, implementation=made)) for plan in (first, second)
        ]
    except ShardsimError as error:
        raise FileError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    return Effect(
        id=str(given["id"]),
        what=str(given["what"]),
        quantity=quantity,
        published=after / before - 1.0,
        predicted=values[1] / values[0] - 1.0,
        source=str(given["source"]),
        filled={str(key): str(text) for key, text in (given.get("filled") or {}).items()},
    )


def _measured(value: Any) -> tuple[float, float]:
    good = isinstance(value, list) and len(value) == 2
    if not good or not all(isinstance(x, int | float) and isfinite(x) and x > 0 for x in value):
        raise FileError(f"published: expected two numbers, before and after, not {value!r:.40}")
    return float(value[0]), float(value[1])


def _plan(data: Any, rows: Mapping[str, tuple[Plan, ...]], where: str) -> Plan:
    if isinstance(data, str):
        if data in plan_names():
            return load_plan(data)
        if data not in rows:
            raise FileError(f"no published run or plan {data[:60]!r}{nearest(data, rows)}")
        return rows[data][0]
    return plan_from_data(data, where, uneven=True)
