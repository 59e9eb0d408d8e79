"""Predictions beside published runs: one row each, and what they add up to."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite
from pathlib import Path
from statistics import mean, median
from typing import Any

from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import Prediction, predict
from shardsim.errors import FileError, PlanError, ShardsimError
from shardsim.files import read_yaml
from shardsim.machine import Constant, chip_names, load_chip
from shardsim.model import model_flops_per_token
from shardsim.plan import Plan, resolve
from shardsim.plan.legality import check
from shardsim.program.holds import held_by
from shardsim.program.shapes import Workload
from shardsim.validate.libraries import TRAINER
from shardsim.validate.prose import from_prose, is_prose
from shardsim.validate.rows import Run, as_launched, read_run

PUBLISHED = Path(__file__).with_name("data") / "published_runs.yaml"
FITTED_BEFORE = (
    "fits as libtpu 0.0.46 compiles it; 0.0.52 brings what layers keep back from the host's memory "
    "whole, and that does not"
)
EXPERTS = PUBLISHED.with_name("expert_runs.yaml")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: measured, predicted, and the signed error as a fraction."""

    id: str
    family: str
    measured: float | None  # tokens/s/chip
    predicted: float | None
    low: float | None  # over the plans that the source leaves open
    high: float | None
    measured_mfu: float | None
    predicted_mfu: float | None
    mfu_low: float | None
    mfu_high: float | None
    measured_ratio: float | None
    predicted_ratio: float | None
    baseline: float | None  # tokens/s/chip at the family's mean MFU
    fitted: bool
    fits: bool
    hbm_peak_bytes: float
    filled: Mapping[str, str]  # what the source leaves open, and how it is filled
    notes: tuple[str, ...]

    @property
    def error(self) -> float | None:
        """Signed error of the prediction; None where there is nothing to compare."""
        return _error(self.predicted, self.measured)

    @property
    def baseline_error(self) -> float | None:
        """Signed error of the baseline."""
        return _error(self.baseline, self.measured)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """All rows of a runs file and the constants that the predictions rest on."""

    rows: tuple[Row, ...]
    constants: tuple[Constant, ...]
    failed: tuple[tuple[str, str], ...]  # (id, why) of rows that could not be predicted
    op_costs: str = "calibrated"

    def errors(self, *, fitted: bool | None = None, baseline: bool = False) -> list[float]:
        """Return absolute errors, of all rows or of those (not) used in a fit."""
        return [
            abs(error)
            for row in self.rows
            if (error := row.baseline_error if baseline else row.error) is not None
            and (fitted is None or row.fitted == fitted)
        ]

    def summary(self) -> dict[str, float | None]:
        """Return median, mean and largest absolute error, also of unfitted rows and baseline."""
        unfitted = self.errors(fitted=False)
        plain = self.errors(fitted=False, baseline=True)
        everything = self.errors()
        return {
            "median_abs_error": median(everything) if everything else None,
            "mean_abs_error": mean(everything) if everything else None,
            "max_abs_error": max(everything) if everything else None,
            "median_abs_error_unfitted": median(unfitted) if unfitted else None,
            "mean_abs_error_unfitted": mean(unfitted) if unfitted else None,
            "baseline_median_abs_error": median(plain) if plain else None,
            "baseline_mean_abs_error": mean(plain) if plain else None,
        }

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim validate`."""
        return {
            "op_costs": self.op_costs,
            "rows": [
                {
                    "id": row.id,
                    "family": row.family,
                    "measured_tokens_per_s_per_chip": row.measured,
                    "predicted_tokens_per_s_per_chip": row.predicted,
                    "error": row.error,
                    "predicted_low": row.low,
                    "predicted_high": row.high,
                    "measured_mfu": row.measured_mfu,
                    "predicted_mfu": row.predicted_mfu,
                    "predicted_mfu_low": row.mfu_low,
                    "predicted_mfu_high": row.mfu_high,
                    "measured_speedup": row.measured_ratio,
                    "predicted_speedup": row.predicted_ratio,
                    "baseline_error": row.baseline_error,
                    "fitted": row.fitted,
                    "fits": row.fits,
                    "hbm_peak_bytes": row.hbm_peak_bytes,
                    "filled": dict(row.filled),
                    "notes": list(row.notes),
                }
                for row in self.rows
            ],
            **self.summary(),
            "failed": [{"id": name, "why": why} for name, why in self.failed],
            "constants": [
                {"name": item.name, "value": item.value, "fitted_to": item.fitted_to}
                for item in self.constants
            ],
        }


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else predicted / measured - 1.0


def read_runs(path: str | os.PathLike[str]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read a runs file; rows that cannot be understood come back with the reason."""
    return runs_from_data(read_yaml(path), str(path))


def runs_from_data(data: Any, path: str) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read what a runs file holds; `path` starts every error message."""
    rows = data.get("runs") if isinstance(data, Mapping) else data
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise FileError(f"{path}: missing key 'runs', a list of published runs")
    runs, failed = [], []
    first: dict[str, int] = {}  # row of an id
    for index, row in enumerate(rows):
        try:
            where = f"{path}: runs[{index}]"
            run = from_prose(row, where) if is_prose(row) else read_run(row, where)
            run = run if row.get("id") else replace(run, id=f"runs[{index}]")
            before = first.setdefault(run.id, index)
            if before != index:
                raise FileError(f"{where}: id: {run.id!r} is that of runs[{before}] too")
            runs.append(run)
        except FileError as error:
            name = row.get("id") if isinstance(row, Mapping) else None
            failed.append((str(name or f"runs[{index}]"), str(error)))
    if not runs and failed:
        raise FileError(failed[0][1])
    return runs, failed


def published_runs() -> list[Run]:
    """Return the published runs that ship with shardsim; their file is read once."""
    return list(_published()[0])


@cache
def _published() -> tuple[list[Run], list[tuple[str, str]]]:
    return read_runs(PUBLISHED)


def constants() -> tuple[Constant, ...]:
    """Return the fitted constants of all chips, named `chip.figure`."""
    return tuple(
        Constant(name=f"{name}.{item.name}", value=item.value, fitted_to=item.fitted_to)
        for name in chip_names()
        for item in load_chip(name).constants
    )


def validate(
    path: str | os.PathLike[str] | None = None,
    op_costs: str = "calibrated",
    chips: Collection[str] | None = None,
) -> Validation:
    """Predict every run of a file (by default the published ones) and compare; of `chips` alone,
    if they are named.

    With `op_costs` "compiler" operations take what the chip's compiler estimates. No constant of
    those was fitted to a run; chips without them keep the physical ones, and the row says so.
    """
    only = None if chips is None else frozenset(chips)
    if path is None:
        return _published_with(op_costs, only)
    runs, failed = read_runs(path)
    return _validation(_of(runs, only), failed, op_costs)


@cache
def _published_with(op_costs: str, chips: frozenset[str] | None) -> Validation:
    runs, failed = _published()
    return _validation(_of(runs, chips), failed, op_costs)


def _of(runs: Sequence[Run], chips: Collection[str] | None) -> list[Run]:
    return [run for run in runs if chips is None or run.family in chips]


def validate_data(data: Any, path: str, op_costs: str = "calibrated") -> Validation:
    """Predict every run of what a runs file holds and compare."""
    return _validation(*runs_from_data(data, path), op_costs)


def _validation(
    runs: Sequence[Run], unreadable: Sequence[tuple[str, str]], op_costs: str
) -> Validation:
    """Predict `runs`; rows that could not be read or predicted are listed with the reason."""
    failed = list(unreadable)
    fitted = constants()
    means = _mean_mfu(fitted)
    rows = []
    for run in runs:
        try:
            costed = _with_op_costs(run, op_costs)
            rows.append(_row(costed, fitted, means.get(run.family)))
        except ShardsimError as error:
            failed.append((run.id, str(error)))
    return Validation(rows=tuple(rows), constants=fitted, failed=tuple(failed), op_costs=op_costs)


def _with_op_costs(run: Run, op_costs: str) -> Run:
    if op_costs == "compiler" and load_chip(run.family).compiler is None:
        note = "physical op costs: its compiler's are not known"
        return replace(run, notes=(*run.notes, note))
    plans = [replace(plan, op_costs=op_costs) for plan in run.plans]
    return replace(run, plans=tuple(plans))


def _is_fitted(run: Run, fitted: Sequence[Constant]) -> bool:
    return any(
        item.name.startswith(f"{run.family}.")
        and run.id in item.fitted_to.replace(",", " ").split()
        for item in fitted
    )


def _mean_mfu(fitted: Sequence[Constant]) -> dict[str, float]:
    """Return each family's mean measured MFU over the rows that its constants are fitted to."""
    shares: dict[str, list[float]] = {}
    for run in published_runs():
        if (rate := run.rate()) is not None and _is_fitted(run, fitted):
            flops = model_flops_per_token(run.model, run.sequence)
            share = rate * flops / load_chip(run.family).peak("bf16")
            shares.setdefault(run.family, []).append(share)
    return {family: mean(values) for family, values in shares.items()}


def predictions_of(run: Run) -> tuple[list[Prediction], list[str]]:
    """Return the predictions of a run, and what about it is only approximate.

    A published run may split sizes that do not divide; the trainer padded them, and so do the
    formulas, which then give slightly too little work.
    """
    predictions = []
    notes = []
    for plan in map(as_launched, run.plans):
        layout = resolve(plan)
        try:
            check(plan, layout)
        except PlanError as error:
            notes.append(f"uneven: {error}")
        predictions.append(predict(plan, layout, implementation=run.implementation))
    return predictions, notes


def _row(run: Run, fitted: Sequence[Constant], mean_mfu: float | None) -> Row:
    predictions, notes = predictions_of(run)
    many = len(predictions)
    if fitting := [item for item in predictions if item.fits]:
        predictions = fitting  # of what a source leaves open; the run itself did fit
    ordered = sorted(predictions, key=lambda item: item.tokens_per_s_per_chip)
    middle = ordered[(len(ordered) - 1) // 2]
    if not all(isfinite(item.step_time_s) for item in ordered):
        raise PlanError("the predicted step takes for ever; check the row's sizes")
    flops = model_flops_per_token(run.model, run.sequence)
    peak = load_chip(run.family).peak(run.compute)
    measured = run.rate()
    if many > 1:
        those = f"{len(ordered)} of {many} plans fit" if len(ordered) < many else f"{many} plans"
        notes = [*notes, f"{those}: the source leaves sizes open; the median is shown"]
    for key, rate in run.rates().items():
        if measured and not 0.8 < rate / measured < 1.25:
            notes = [*notes, f"measured.{key} says {rate / measured:.2f} times the rate compared"]
    fits = middle.fits
    if any(not item.fits for item in ordered):
        fits = all(_fitted_before(item.plan) for item in ordered)
        notes = [*notes, FITTED_BEFORE if fits else "does not fit in HBM as predicted"]
    return Row(
        id=run.id,
        family=run.family,
        measured=measured,
        predicted=middle.tokens_per_s_per_chip,
        low=ordered[0].tokens_per_s_per_chip,
        high=ordered[-1].tokens_per_s_per_chip,
        measured_mfu=None if measured is None else measured * flops / peak,
        predicted_mfu=middle.mfu,
        mfu_low=ordered[0].mfu,
        mfu_high=ordered[-1].mfu,
        measured_ratio=run.measured.get("speedup_over_one_slice"),
        predicted_ratio=_speedup(run, middle),
        baseline=mean_mfu * peak / flops if mean_mfu and measured is not None else None,
        fitted=_is_fitted(run, fitted),
        fits=fits,
        hbm_peak_bytes=float(middle.hbm["peak_bytes"]),
        filled=run.filled,
        notes=(*run.notes, *notes),
    )


def _fitted_before(plan: Plan) -> bool:
    """Return whether a plan fits as compilers had it before they brought stacks of what layers keep
    back from the host's memory whole (`Passes.brings_back`): published runs are older."""
    passes = held_by(TRAINER, plan.machine.chip)
    scarce = passes.scarce and replace(passes.scarce, brings_back=False)
    before = replace(passes, brings_back=False, scarce=scarce)
    return bool(hbm_use(plan.machine, Workload.of(plan), resolve(plan), before).fits)


def _speedup(run: Run, all_slices: Prediction) -> float | None:
    """Return the predicted speed-up of all slices over one with its share of the batch."""
    slices = run.plans[0].machine.slices
    if "speedup_over_one_slice" not in run.measured:
        return None
    plan = _on_one_slice(as_launched(run.plans[0]))
    single = predict(plan, implementation=run.implementation)
    return slices * all_slices.tokens_per_s_per_chip / single.tokens_per_s_per_chip


def _on_one_slice(plan: Plan) -> Plan:
    mesh = [
        replace(
            axis,
            size=axis.size // axis.torus.get("dcn", 1),
            torus={name: part for name, part in axis.torus.items() if name != "dcn"},
        )
        for axis in plan.mesh
    ]
    machine = replace(plan.machine, slices=1)
    return replace(plan, machine=machine, mesh=tuple(mesh), batch=plan.batch // plan.machine.slices)
