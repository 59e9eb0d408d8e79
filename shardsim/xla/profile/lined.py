"""A profile beside a prediction: what each part of the step takes, planned and measured.

Both sides are sums by what is done. Matmuls are lined up by their sizes, collectives by kind and
mesh axes, all else by the function of the emitted program that it comes from. What is measured and
lines up with nothing stays in rows of its own, so that the rows add up to the step on both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import ComputeCost
from shardsim.errors import FileError
from shardsim.graph.build import Part
from shardsim.model import Model
from shardsim.model.blocks import graph_of
from shardsim.plan import Plan, resolve
from shardsim.program.schedule import Copy, Move, Work
from shardsim.xla.profile.program import (
    CAST,
    COLLECTIVE,
    CONTAINER,
    GRADIENTS,
    KEPT,
    What,
    program_of,
)
from shardsim.xla.profile.steps import OpTime, Profile, longest_program, profile_of
from shardsim.xla.profile.trace import read_trace

Key = tuple[object, ...]  # the kind of work, and what tells it from others of its kind

IDLE, OTHERS = "idle", "other programs"
NOT_LINED_UP = "not lined up"
INSIDE = "planned inside others"
# What a layer's loop does, as `program/partition.py` calls it.
STACKS: Mapping[str, str] = {
    KEPT: "keep for backward",
    GRADIENTS: "accumulate gradients",
    CAST: "cast weights",
}
# Work of these kinds is done alike wherever it stands.
_ALIKE: Mapping[str, str] = {"copy": "copy", "transpose": "copy", "transfer": "copy"}
# What else a planned collective over the same axes may have been run as, likeliest first.
_FORMS: Mapping[str, tuple[str, ...]] = {
    "reduce-scatter": ("all-reduce", "permute"),
    "all-gather": ("all-reduce", "permute"),
    "all-reduce": ("reduce-scatter", "all-gather"),
    "permute": ("all-gather", "reduce-scatter"),
}
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
    keys = _Keys(prediction, fine)
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


class _Keys:
    """What tells the parts of a step apart, on both sides."""

    def __init__(self, prediction: Prediction, fine: bool) -> None:
        plan = prediction.plan
        self._fine = fine
        self._layout = resolve(plan)
        self._mesh = {axis.name: axis.size for axis in plan.mesh}
        self._owner = owners(plan.model, plan.attention)
        self._kinds: dict[str, set[str]] = defaultdict(set)  # of planned work, by op
        for cost in prediction.price.computes:
            self._kinds[self._owner(cost.task.name)].add(cost.task.kind)
        # The scores of a fused kernel never leave it: its products are not apart from the rest.
        self._whole = any(
            cost.task.kind == "attention" and cost.task.fused for cost in prediction.price.computes
        )

    def planned(self, task: Work) -> Key:
        """Return the key of planned work."""
        kind = _ALIKE.get(task.kind, task.kind)
        if not self._fine or kind in ("optimizer", "copy"):
            return (kind,)
        products = not (isinstance(task.matmuls, int) and task.matmuls == 0)
        if kind == "attention":
            return self._attention(products)
        if kind == "matmul":
            return self._matmul(task.m, task.k, task.n, task.batch)
        return kind, self._owner(task.name)

    def moved(self, task: Move | Copy) -> Key:
        """Return the key of a planned collective, or of a copy to or from the host."""
        if isinstance(task, Copy):
            return ("copy",)
        if not self._fine:
            return COLLECTIVE, task.kind
        axes = self._layout.mesh_axes(task.role)
        return COLLECTIVE, task.kind, tuple(a for a in self._mesh if a in axes)

    def measured(self, what: What, planned: Mapping[Key, float]) -> Key:
        """Return the key of a measured operation: one of `planned`, or of what has none there.

        What an op of the plan does, though the plan has it inside others, stands on its own.
        """
        key = self._measured(what)
        if key in planned:
            return key
        if what.kind == COLLECTIVE:
            others = ((key[0], kind, *key[2:]) for kind in _FORMS.get(what.collective, ()))
            return next((other for other in others if other in planned), (key[0], NOT_LINED_UP))
        if self._fine and what.run and not what.matmuls:
            return key[0], what.run, INSIDE
        return key[0], NOT_LINED_UP

    def _kind(self, what: What) -> str:
        """Return what a measured operation is: of an op that attends, what is not planned apart."""
        planned = self._kinds.get(what.run, set())
        apart = "matmul" if what.matmuls else "elementwise"
        several = bool(what.matmuls) and what.matmuls[0].batch > 1
        if what.kind == apart and "attention" in planned and (several or apart not in planned):
            return "attention"
        return what.kind

    def _measured(self, what: What) -> Key:
        kind = self._kind(what)
        if kind == COLLECTIVE:
            return (
                (kind, what.collective, what.mesh_axes) if self._fine else (kind, what.collective)
            )
        if not self._fine or kind in ("optimizer", "copy", CONTAINER):
            return (kind,)
        if kind == "attention":
            return self._attention(bool(what.matmuls))
        if what.matmuls:
            first = what.matmuls[0]
            return self._matmul(first.m, first.k, first.n, first.batch)
        return kind, STACKS.get(what.stack, what.run)

    def _attention(self, products: bool) -> Key:
        part = "whole" if self._whole else ("products" if products else "between")
        return "attention", part

    @staticmethod
    def _matmul(m: float, k: float, n: float, batch: float) -> Key:
        """Return the key of a product and of the gradients of its operands."""
        return (
            "matmul",
            tuple(sorted(round(float(size)) for size in (m, k, n))),
            round(float(batch)),
        )


def owners(model: Model, attention: str) -> Callable[[str], str]:
    """Return what says which op of the emitted program a planned task belongs to.

    Tasks are named after what their op makes or multiplies with; those of a layer's loop, which
    belong to none, keep their name.
    """
    graph = graph_of(model, attention)
    layers = [layer.part for stack in graph.stacks for layer in stack.layers]
    known: dict[str, str] = {}
    for part in (graph.before, *layers, graph.after):
        for name, run in _runs(part):
            known.setdefault(name, run)
    longest = sorted(known, key=len, reverse=True)

    def owner(task: str) -> str:
        mine = (name for name in longest if task == name or task.startswith(f"{name} "))
        return known.get(next(mine, ""), task)

    return owner


def _runs(part: Part) -> Iterable[tuple[str, str]]:
    """Yield the names of ops and the calls that run them: a call ends with the op that makes its
    last result."""
    calls = list(part.calls)
    for op in part.ops:
        if not calls:
            return
        yield op.name, calls[0].run
        yield op.out.name, calls[0].run
        if op.out.name == calls[0].outs[-1]:
            del calls[0]


def _title(key: Key, works: Iterable[ComputeCost], ops: Iterable[OpTime]) -> str:
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
    sizes = key[1]
    if kind == "matmul" and isinstance(sizes, tuple):
        several = f", {key[2]} of them" if key[2] != 1 else ""
        return f"{shown} ({' x '.join(map(str, sizes))}{several})"
    return f"{key[1]}: {shown}" if kind == "elementwise" and key[1] not in short else shown
