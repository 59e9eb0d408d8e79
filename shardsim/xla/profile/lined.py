"""A profile beside a prediction: what each part of the step takes, planned and measured.

Both sides are sums by what is done. Matmuls are lined up by their sizes, collectives by kind and
mesh axes, all else by the function of the emitted program that it comes from. What is measured and
lines up with nothing stays in rows of its own, so that the rows add up to the step on both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import ComputeCost
from shardsim.errors import FileError
from shardsim.plan import Plan
from shardsim.xla.profile.keys import INSIDE, NOT_LINED_UP, Key, Keys
from shardsim.xla.profile.products import sizes_of
from shardsim.xla.profile.program import COLLECTIVE, CONTAINER, program_of
from shardsim.xla.profile.steps import OpTime, Profile, longest_program, profile_of
from shardsim.xla.profile.trace import read_trace

IDLE, OTHERS = "idle", "other programs"
MOST_NAMES = 4  # of tasks in one row


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part of the step, on one device."""

    kind: str  # as of `What`, or `IDLE`, `OTHERS`
    what: str
    predicted_s: float
    measured_s: float
    lined_up: bool = True
    works: tuple[ComputeCost, ...] = ()  # what was planned, where it is work
    ops: tuple[OpTime, ...] = ()  # what was measured, longest first

    @property
    def difference_s(self) -> float:
        """Seconds that are measured beyond what is predicted."""
        return self.measured_s - self.predicted_s


@dataclass(frozen=True, kw_only=True)
class LinedUp:
    """A profile beside the prediction of its plan; `rows` are sorted by difference."""

    path: str
    prediction: Prediction
    profile: Profile
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    @cached_property
    def by_kind(self) -> tuple[Row, ...]:
        """One row for each kind of work; what is not lined up counts too."""
        sums: dict[str, tuple[float, float]] = {}
        for row in self.rows:
            planned_s, found_s = sums.get(row.kind, (0.0, 0.0))
            sums[row.kind] = planned_s + row.predicted_s, found_s + row.measured_s
        rows = [
            Row(kind=kind, what=kind, predicted_s=planned_s, measured_s=found_s)
            for kind, (planned_s, found_s) in sums.items()
        ]
        return tuple(sorted(rows, key=_difference))


def _difference(row: Row) -> tuple[float, str]:
    return -abs(row.difference_s), row.what


def line_up(plan: Plan, path: str | Path, hlo: str | Path | None = None) -> LinedUp:
    """Return the trace at `path` of the plan's step beside its prediction.

    `hlo` is a file with the compiled program's text, for traces that do not hold it. Raises
    `FileError` for files that cannot be read or are of another program.
    """
    trace = read_trace(path)
    name = longest_program(trace)
    mesh = {axis.name: axis.size for axis in plan.mesh}
    program, warnings = program_of(trace, name, mesh, None if hlo is None else _text(hlo))
    profile = profile_of(trace, name, program)
    prediction = predict(plan)
    fine = program.module is not None
    rows = tuple(sorted(_rows(prediction, profile, fine), key=_difference))
    if not any(row.lined_up and row.works and row.ops for row in rows if row.kind == "matmul"):
        warnings += ("no matmul of the plan is in the trace: is it one of this plan's step?",)
    if trace.kind != plan.machine.chip.kind:
        warnings += (f"a trace of {trace.kind} devices, and a plan for {plan.machine.name}",)
    if profile.devices > plan.machine.devices:
        raise FileError(
            f"{path}: a step on {profile.devices} devices, but the plan has {plan.machine.devices}"
        )
    if fewer := plan.machine.devices - profile.devices:  # those of other hosts
        warnings += (f"the trace has {profile.devices} devices, {fewer} fewer than the plan",)
    return LinedUp(
        path=str(path), prediction=prediction, profile=profile, rows=rows, warnings=warnings
    )


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file (UTF-8)") from None


def _rows(prediction: Prediction, profile: Profile, fine: bool) -> Iterable[Row]:
    """Yield the rows; `fine`: the program is known, not names alone."""
    works: dict[Key, list[ComputeCost]] = defaultdict(list)
    planned_s: dict[Key, float] = defaultdict(float)
    keys = Keys(prediction, (op.what for op in profile.ops), fine)
    for cost in prediction.price.computes:
        if float(cost.count):
            key = keys.planned(cost.task)
            works[key].append(cost)
            planned_s[key] += float(cost.time_s)
    for move in prediction.price.collectives:
        if float(move.count):
            planned_s[keys.moved(move.task)] += float(move.exposed_s)
    planned_s[IDLE,] += float(prediction.price.bubble_s)
    planned_s[CONTAINER,] += 0.0
    planned_s[OTHERS,] += 0.0
    ops: dict[Key, list[OpTime]] = defaultdict(list)
    for op in profile.ops:
        foreign = op.program not in (profile.program, "")
        ops[(OTHERS,) if foreign else keys.measured(op.what, planned_s)].append(op)
    for key in {**planned_s, **ops}:
        mine = tuple(ops.get(key, ()))
        measured_s = sum(op.own_s for op in mine) + (profile.idle_s if key == (IDLE,) else 0.0)
        if measured_s or planned_s.get(key):
            yield Row(
                kind=str(key[0]),
                what=_title(key, works.get(key, ()), mine),
                predicted_s=planned_s.get(key, 0.0),
                measured_s=measured_s,
                lined_up=key[-1] != NOT_LINED_UP,
                works=tuple(works.get(key, ())),
                ops=mine,
            )


def _title(key: Key, works: Sequence[ComputeCost], ops: Iterable[OpTime]) -> str:
    """Return what a row is called."""
    kind = str(key[0])
    if key[-1] == NOT_LINED_UP:
        return f"{NOT_LINED_UP}: {kind}"
    if key[-1] == INSIDE:
        return f"{key[1]}, {INSIDE}"
    if kind == COLLECTIVE:
        axes = key[2] if len(key) > 2 else ()
        assert isinstance(axes, tuple)
        others = sorted({op.what.collective for op in ops} - {str(key[1])})
        run_as = f" (also run as {', '.join(others)})" if others else ""
        return str(key[1]) + (f" over {', '.join(axes)}" if axes else "") + run_as
    names = sorted(dict.fromkeys(cost.task.name for cost in works), key=len)
    short: list[str] = []
    for name in names:
        if not any(name.startswith(f"{other} ") for other in short):
            short.append(name)
    if len(key) == 1 or not short:
        return kind
    shown = ", ".join(short[:MOST_NAMES]) + (", ..." if len(short) > MOST_NAMES else "")
    if kind == "matmul":
        sizes = sorted({sizes_of(cost.task) for cost in works})
        return f"{shown} ({'; '.join(map(str, sizes))})"
    return f"{key[1]}: {shown}" if kind == "elementwise" and key[1] not in short else shown
