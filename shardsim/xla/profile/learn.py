"""Rates of a chip from a profile: the shares of its peaks at which a real step's work runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import yaml

from shardsim.cost.costs import costs_of
from shardsim.errors import ShardsimError
from shardsim.machine import Chip, override_chip
from shardsim.xla.profile.keys import LOOP
from shardsim.xla.profile.lined import LinedUp, Row

# What is learned, from which kinds of work, in this order: a matmul streams its operands too.
LEARNED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hbm_efficiency", ("elementwise", "optimizer", "copy", LOOP)),
    ("matmul_efficiency", ("matmul",)),
)
LEAST, MOST = 0.01, 1.0  # shares of a peak
HALVINGS = 50
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One figure of the chip: what it was, and what it is for the step (None: not learned)."""

    figure: str
    was: float
    value: float | None
    why: str  # where it is not learned


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How far one kind of work is off, a fraction of what was measured, before and after."""

    kind: str
    rows: int
    measured_s: float
    before: float
    after: float
    worst: str  # the row that is off most after
    worst_after: float


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A chip with the rates of a profile."""

    chip: Chip
    rates: tuple[Rate, ...]
    residuals: tuple[Residual, ...]

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data, without the chip's other figures."""
        return {
            "chip": self.chip.name,
            "rates": [vars(rate) for rate in self.rates],
            "residuals": [vars(one) for one in self.residuals],
        }


def learn(lined: LinedUp) -> Learned:
    """Return the chip of the plan with the shares at which what is lined up took its time.

    A share is the one with which all work of some kinds, by the prediction's own costs, takes
    together what was measured. Raises `ShardsimError` for a trace of devices of another kind, and
    if there is nothing to be learned.
    """
    before = lined.prediction.plan.machine.chip
    chip: Chip = before
    rates: list[Rate] = []
    when = datetime.now(UTC).date().isoformat()
    profile = lined.profile
    if profile.kind != before.kind:
        raise ShardsimError(
            f"{lined.path}: a trace of {profile.kind} devices, from which nothing of {before.name} "
            "can be learned"
        )
    for figure, kinds in LEARNED:
        rows = _both(lined.rows, kinds)
        value, why = _share(chip, figure, rows, lined.prediction.costs)
        rates.append(
            Rate(figure=figure, was=float(before.figures[figure]["value"]), value=value, why=why)
        )
        if value is not None:
            source = (
                f"shardsim calibrate --profile, {when}, {lined.prediction.plan.name}: "
                f"{', '.join(kinds)} of {profile.steps} steps on {profile.devices} "
                f"{profile.kind} devices, {len(rows)} rows"
            )
            chip = override_chip(chip, {figure: value})
            told = {"value": value, "source": source, "status": "measured"}
            chip = replace(chip, figures={**chip.figures, figure: told})
    if all(rate.value is None for rate in rates):
        whys = "; ".join(f"{rate.figure}: {rate.why}" for rate in rates)
        raise ShardsimError(f"{lined.path}: no rate can be learned: {whys}")
    residuals = tuple(_residuals(lined, before, chip))
    return Learned(chip=chip, rates=tuple(rates), residuals=residuals)


def _both(rows: Iterable[Row], kinds: Sequence[str]) -> list[Row]:
    """Return the rows of some kinds that are planned and measured."""
    return [row for row in rows if row.kind in kinds and row.lined_up and row.works and row.ops]


def _planned_s(chip: Chip, row: Row, costs: str) -> float:
    """Return what the work of a row takes on a chip."""
    how = costs_of(costs, chip)
    return sum(float(how.operation(one.task).total_s * one.count) for one in row.works)


def _share(chip: Chip, figure: str, rows: Sequence[Row], costs: str) -> tuple[float | None, str]:
    """Return the share with which rows take what was measured; else None, and why there is none."""
    if not rows:
        return None, "nothing of the kind is both planned and measured"
    measured_s = sum(row.measured_s for row in rows)

    def taken_s(share: float) -> float:
        other = override_chip(chip, {figure: share})
        return sum(_planned_s(other, row, costs) for row in rows)

    if taken_s(LEAST) <= taken_s(MOST):
        return None, f"{costs} costs of {chip.name} do not depend on it"
    if taken_s(MOST) > measured_s:
        return None, "at the whole peak it would take longer than measured"
    if taken_s(LEAST) < measured_s:
        return None, f"less than {LEAST:.0%} of the peak"
    return round(_halved(lambda share: taken_s(share) > measured_s), DIGITS), ""


def _halved(too_slow: Callable[[float], bool]) -> float:
    low, high = LEAST, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if too_slow(middle) else (low, middle)
    return high


def _residuals(lined: LinedUp, before: Chip, after: Chip) -> Iterable[Residual]:
    costs = lined.prediction.costs
    kinds = dict.fromkeys(row.kind for row in lined.rows)
    for kind in kinds:
        rows = [row for row in _both(lined.rows, (kind,)) if row.measured_s > 0]
        if not rows:
            continue
        errors = {row.what: _planned_s(after, row, costs) / row.measured_s - 1 for row in rows}
        worst = max(errors, key=lambda what: abs(errors[what]))
        measured_s = sum(row.measured_s for row in rows)
        sums = [sum(_planned_s(chip, row, costs) for row in rows) for chip in (before, after)]
        yield Residual(
            kind=kind,
            rows=len(rows),
            measured_s=measured_s,
            before=sums[0] / measured_s - 1,
            after=sums[1] / measured_s - 1,
            worst=worst,
            worst_after=errors[worst],
        )


def hardware_file(chip: Chip) -> str:
    """Return the text of a hardware file with all figures of a chip, each with its source."""
    data: dict[str, Any] = {"name": chip.name, "title": chip.title, "kind": chip.kind}
    for name, figure in chip.figures.items():
        outer, _, inner = name.partition(".")
        if inner:
            data.setdefault(outer, {})[inner] = dict(figure)
        else:
            data[outer] = dict(figure)
    if chip.compiler is not None:
        data["compiler"] = chip.compiler.to_data()
    if chip.kernels is not None:
        data["kernels"] = chip.kernels.to_data()
    text: str = yaml.safe_dump(data, sort_keys=False, width=96)
    return text
