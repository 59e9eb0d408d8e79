"""Steps measured on real devices beside their predictions.

A results file has a line of JSON for each measured step (`shardsim verify --against device
--measure --results FILE` appends one), so an interrupted session loses nothing:

    {"id", "date", "device", "versions", "step_time_s", "peak_bytes", "plan": {a plan file's keys},
     "other_program": "what the measured program did otherwise than the export does now"}
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shardsim.cost.predict import predict
from shardsim.errors import FileError, ShardsimError
from shardsim.files import check_keys
from shardsim.plan import plan_from_data

SHIPPED = Path(__file__).parent / "data" / "measured_gpu.jsonl"
KEYS = ("id", "date", "device", "versions", "step_time_s", "peak_bytes", "other_program", "plan")
OPTIONAL = ("peak_bytes", "other_program")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was measured, and its prediction; times in seconds, HBM of one device."""

    id: str
    date: str
    device: str
    attention: str
    measured_s: float
    predicted_s: float
    measured_peak_bytes: float | None
    predicted_peak_bytes: float
    other_program: str  # how the measured program differs from what is predicted, if it does

    @property
    def error(self) -> float:
        """Predicted time over measured, less one."""
        return self.predicted_s / self.measured_s - 1.0

    @property
    def peak_error(self) -> float | None:
        """The same of the peak of HBM."""
        if self.measured_peak_bytes is None:
            return None
        return self.predicted_peak_bytes / self.measured_peak_bytes - 1.0

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"error": self.error, "peak_error": self.peak_error}


@dataclass(frozen=True)
class Measured:
    """Measured steps beside predictions; summaries leave out those of another program."""

    steps: tuple[Step, ...]
    failed: tuple[tuple[str, str], ...] = field(default=())

    @cached_property
    def alike(self) -> tuple[Step, ...]:
        """The steps whose program is the predicted one."""
        return tuple(step for step in self.steps if not step.other_program)

    def summary(self) -> dict[str, float | int | None]:
        """Return counts, absolute errors as fractions and the rank correlation."""
        errors = [abs(step.error) for step in self.alike]
        peaks = [abs(step.peak_error) for step in self.alike if step.peak_error is not None]
        times = [[s.predicted_s for s in self.alike], [s.measured_s for s in self.alike]]
        return {
            "steps": len(self.alike),
            "of_another_program": len(self.steps) - len(self.alike),
            "median_abs_error": statistics.median(errors) if errors else None,
            "max_abs_error": max(errors, default=None),
            "median_abs_peak_error": statistics.median(peaks) if peaks else None,
            "max_abs_peak_error": max(peaks, default=None),
            "rank_correlation": rank_correlation(*times) if len(self.alike) > 1 else None,
        }

    def by_attention(self) -> dict[str, dict[str, float | int | None]]:
        """Return the summary of each kind of attention."""
        kinds = sorted({step.attention for step in self.alike})
        return {
            kind: Measured(tuple(s for s in self.alike if s.attention == kind)).summary()
            for kind in kinds
        }

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim validate --measured`."""
        return {
            "steps": [step.to_data() for step in self.steps],
            "failed": [{"id": name, "why": why} for name, why in self.failed],
            "summary": self.summary(),
            "by_attention": self.by_attention(),
        }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two lists without ties.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    """
    if len(a) != len(b) or len(a) < 2:
        raise ShardsimError("a rank correlation needs two lists of one length, two or more")
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    apart = float(np.sum((ranks[0] - ranks[1]) ** 2))
    return float(1.0 - 6.0 * apart / (len(a) * (len(a) ** 2 - 1)))


def measured(path: str | os.PathLike[str] | None = None) -> Measured:
    """Predict the measured steps of a results file; of those that ship with shardsim if None.

    Raises `FileError` for a file that is not one. A plan that cannot be predicted is in `failed`.
    """
    where = str(path or SHIPPED)
    steps, failed = [], []
    for number, row in enumerate(read_results(path or SHIPPED), 1):
        name = str(row["id"])
        try:
            plan = plan_from_data(row["plan"], f"{where}: line {number}")
            found = predict(plan)
        except ShardsimError as error:
            failed.append((name, str(error)))
            continue
        peak = row.get("peak_bytes")
        steps.append(
            Step(
                id=name,
                date=str(row["date"]),
                device=str(row["device"]),
                attention=plan.attention,
                measured_s=float(row["step_time_s"]),
                predicted_s=found.step_time_s,
                measured_peak_bytes=None if peak is None else float(peak),
                predicted_peak_bytes=found.hbm["peak_bytes"],
                other_program=str(row.get("other_program", "")),
            )
        )
    return Measured(tuple(steps), tuple(failed))


def read_results(path: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    """Return the rows of a results file, checked."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise FileError(f"{where}: is no JSON") from None
        required = tuple(key for key in KEYS if key not in OPTIONAL)
        check_keys(row, where=where, allowed=KEYS, required=required)
        for key in ("step_time_s", "peak_bytes"):
            value = row.get(key)
            number_like = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key in row and not (number_like and 0 < value < 1e18):
                raise FileError(f"{where}: {key} must be a positive number, not {value!r:.40}")
        if not isinstance(row["plan"], Mapping):
            raise FileError(f"{where}: plan must be the keys of a plan file")
        rows.append(row)
    return rows


def append_result(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Add a row to a results file; the file is made if it is not there."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
