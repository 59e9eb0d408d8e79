"""How well predictions agree with the compiled evidence.

`python -m shardsim.views.evidence` prints it, with the tables of docs/compiled.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import price
from shardsim.plan import plan_from_data, resolve
from shardsim.xla.compare import Account, settle
from shardsim.xla.tpu.rows import HELD, as_compiled, load_rows
from shardsim.xla.trainers.programs import both


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One plan of the evidence: what the compiler said, and what is predicted."""

    row: dict[str, Any]
    predicted: Prediction

    @cached_property
    def calibrated_s(self) -> float:
        """Seconds of a step as `shardsim plan` prices and ranks it: with calibrated costs.

        `predicted` has the compiler's own, to be compared with what it compiled.
        """
        plan = self.predicted.plan
        costs = costs_of("calibrated", plan.machine.chip)
        return float(price(plan.machine, resolve(plan), self.predicted.schedule, costs).step_time_s)

    @property
    def peak_error(self) -> float | None:
        """Predicted over compiled HBM peak, less one."""
        if not self.row["peak_bytes"]:
            return None
        return float(self.predicted.hbm["peak_bytes"] / self.row["peak_bytes"] - 1.0)

    @property
    def operations_error(self) -> float | None:
        """Predicted over compiled time of operations, less one."""
        if "operations_s" not in self.row:
            return None
        return float(self.predicted.operations_s / self.row["operations_s"] - 1.0)

    @property
    def accounted(self) -> float:
        """The share of the compiled collectives' bytes that are planned, in whatever form."""
        return settle(map(Account.of_data, self.row["collectives"])).share

    @property
    def wrongly_fitting(self) -> bool:
        """Whether it is predicted to fit, and the compiler refuses it."""
        return self.predicted.fits and self.row["does_not_fit"]

    @property
    def wrongly_refused(self) -> bool:
        """Whether it compiles, and is predicted not to fit."""
        return self.row["compiled"] and not self.predicted.fits


def pairs(rows: Sequence[dict[str, Any]] | None = None) -> list[Pair]:
    """Return rows, by default all of the evidence, with predictions made now."""
    if rows is None:
        return list(_kept())
    return [
        Pair(row=row, predicted=predict(as_compiled(plan_from_data(row["plan"], "plan"))))
        for row in rows
    ]


@cache
def _kept() -> tuple[Pair, ...]:
    return tuple(pairs(load_rows()))


@cache
def trainers() -> tuple[Pair, ...]:
    """Return the trainers' compiled programs, as `pairs` does, priced as their programs."""
    found = []
    for program, row in both():
        same = {key: row.get(key) for key in ("compiled", "problem", "peak_bytes", "versions")}
        same |= {"date": row["date"], "does_not_fit": not row["compiled"]}
        same |= {"group": f"MaxText on {program.slice}", "kind": program.id}
        found.append(Pair(row=same, predicted=predict(program.plan, implementation="trainer")))
    return tuple(found)


@cache
def held() -> tuple[Pair, ...]:
    """Return the steps that were compiled until their buffers were assigned, as `pairs` does: those
    of which a peak is known, and not those that were compiled to the end since."""
    whole = {(row["group"], row["kind"]) for row in load_rows()}
    rows = (row for row in load_rows(HELD) if (row["group"], row["kind"]) not in whole)
    return tuple(pairs([row for row in rows if row["peak_bytes"]]))


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's rank correlation tau-b: agreeing less disagreeing pairs, ties left out.

    Kendall 1945, "The treatment of ties in ranking problems": over the square root of the pairs
    that are no tie in the one times those that are none in the other.

    >>> round(kendall([1, 2, 3], [10, 30, 20]), 3)
    0.333
    """
    pairs = list(combinations(range(len(first)), 2))
    one, other = (
        np.array([np.sign(values[i] - values[j]) for i, j in pairs]) for values in (first, second)
    )
    untied = float(np.sqrt(np.abs(one).sum() * np.abs(other).sum()))
    return float((one * other).sum()) / untied if untied else float("nan")


def summary(found: Sequence[Pair]) -> dict[str, Any]:
    """Return the figures of the whole evidence and of each group."""
    peaks = [abs(e) for pair in found if (e := pair.peak_error) is not None]
    operations = [abs(e) for pair in found if (e := pair.operations_error) is not None]
    explicit = [
        pair
        for pair in found
        if "collectives" in pair.row and pair.predicted.plan.execution == "explicit"
    ]
    groups = {}
    for name in dict.fromkeys(pair.row["group"] for pair in found):
        read = [p for p in found if p.row["group"] == name and "step_time_s" in p.row]
        groups[name] = {
            "plans": sum(p.row["group"] == name for p in found),
            "compiled": len(read),
            "rank_correlation": kendall(
                [p.calibrated_s for p in read], [p.row["step_time_s"] for p in read]
            ),
        }
    return {
        "plans": len(found),
        "compiled": sum(pair.row["compiled"] for pair in found),
        "peak_within_10_percent": float(np.mean([e <= 0.1 for e in peaks])) if peaks else None,
        "peak_median_abs_error": float(np.median(peaks)) if peaks else None,
        "wrongly_fitting": [_name(pair) for pair in found if pair.wrongly_fitting],
        "wrongly_refused": [_name(pair) for pair in found if pair.wrongly_refused],
        "operations_median_abs_error": float(np.median(operations)) if operations else None,
        "explicit_plans": len(explicit),
        "accounted_least": min((pair.accounted for pair in explicit), default=None),
        "accounted_whole": sum(pair.accounted == 1.0 for pair in explicit),
        "groups": groups,
    }


def to_data(ours: Sequence[Pair], theirs: Sequence[Pair]) -> dict[str, Any]:
    """Return the JSON of `shardsim evidence`: our emitted steps, and the trainers' own programs.

    Errors of HBM are of peaks that compiled, as fractions of them; those of what did not fit are
    verdicts only.
    """
    everything = [*ours, *theirs]
    found = [(pair, abs(e)) for pair in everything if (e := pair.peak_error) is not None]
    errors = [error for pair, error in found if pair.row["compiled"]]
    figures = summary(ours)
    versions = {name for pair in everything for name in pair.row["versions"]}
    return {
        "plans": [_plan_data(pair) for pair in everything],
        "groups": [
            {
                "model": name.partition(" on ")[0],
                "slice": name.partition(" on ")[2],
                "plans": group["plans"],
                "kendall": group["rank_correlation"],
            }
            for name, group in figures["groups"].items()
        ],
        "hbm": {
            "within_5": float(np.mean([error <= 0.05 for error in errors])) if errors else None,
            "within_10": float(np.mean([error <= 0.1 for error in errors])) if errors else None,
            "false_fits": [_name(pair) for pair in everything if pair.wrongly_fitting],
            "false_refusals": [_name(pair) for pair in everything if pair.wrongly_refused],
        },
        "operations_median": figures["operations_median_abs_error"],
        "versions": {
            name: sorted({pair.row["versions"].get(name, "") for pair in everything} - {""})
            for name in sorted(versions)
        },
    }


def _plan_data(pair: Pair) -> dict[str, Any]:
    """Return a plan of the evidence: the compiler's figures beside the predicted ones."""
    row, predicted = pair.row, pair.predicted
    compiled = {key: row.get(key) for key in ("peak_bytes", "operations_s", "step_time_s", "mfu")}
    return {
        "group": row["group"],
        "plan": row["kind"],
        "as": predicted.implementation,
        "fits": {"compiled": not row["does_not_fit"], "predicted": predicted.fits},
        "compiled": compiled,
        "predicted": {
            **{key: predicted.hbm[key] for key in ("peak_bytes", "thrifty_bytes", "lavish_bytes")},
            "operations_s": predicted.operations_s,
            "step_time_s": predicted.step_time_s,
            "calibrated_step_time_s": pair.calibrated_s,
            "mfu": predicted.mfu,
        },
        "hbm_error": pair.peak_error,
        "versions": row["versions"],
        "date": row["date"],
    }


def _name(pair: Pair) -> str:
    return f"{pair.row['group']}: {pair.row['kind']}"


def headline(found: Sequence[Pair]) -> str:
    """Return the summary in words."""
    figures = summary(found)
    lines = [
        f"{figures['plans']} plans, {figures['compiled']} compiled",
        f"HBM peak within 10 %: {100 * (figures['peak_within_10_percent'] or 0):.0f} % of them, "
        f"median error {100 * (figures['peak_median_abs_error'] or 0):.1f} %",
        f"predicted to fit but refused: {', '.join(figures['wrongly_fitting']) or 'none'}",
        f"predicted not to fit but compiled: {', '.join(figures['wrongly_refused']) or 'none'}",
        f"operations: median error {100 * (figures['operations_median_abs_error'] or 0):.1f} %",
        f"bytes of collectives as planned: all in {figures['accounted_whole']} of "
        f"{figures['explicit_plans']} explicit plans, at least "
        f"{100 * (figures['accounted_least'] or 0):.1f} %",
        "",
    ]
    lines += [
        f"{name}: {group['compiled']} of {group['plans']} compiled, rank correlation of step "
        f"time {group['rank_correlation']:.2f}"
        for name, group in figures["groups"].items()
    ]
    return "\n".join(lines)
