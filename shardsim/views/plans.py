"""Tables of plans with what is predicted of them: found by a search, or set side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from shardsim.plan.words import context_text, hosted_text, mesh_text
from shardsim.units import GIB
from shardsim.views.step import OPERATIONS, STEP_PARTS, step_columns
from shardsim.views.table import Column, Table, pick, table, yes_no

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction
    from shardsim.planner.compare import Difference
    from shardsim.xla.tpu.compiled import Ranked


# How a prediction's main figures show, wherever they stand.
MFU = Column("mfu", "MFU", lambda item: item.mfu, ".1f", "%")
STEP = Column("step_time_s", "step", lambda item: item.step_time_s, ".4g", "s")
PEAK = Column("hbm_peak_gib", "HBM", lambda item: item.hbm["peak_bytes"] / GIB, ".1f", "GiB")
FITS = Column("fits", "fits", lambda item: item.fits, show=yes_no)

PLANS = (
    Column("plan", "plan", lambda item: item.plan.name),
    Column("machine", "slice", lambda item: item.plan.machine.name),
    Column("chips", "chips", lambda item: item.plan.machine.chips, ",d"),
    Column("mesh", "mesh (torus axes)", lambda item: mesh_text(item.plan)),
    Column("remat", "remat", lambda item: item.plan.remat.name),
    Column("hosted", "in the host's memory", lambda item: hosted_text(item.plan) or None),
    Column("microbatches", "microbatches", lambda item: item.plan.microbatches, "d"),
    Column(
        "collective_matmul",
        "collective matmul",
        lambda item: item.plan.overlap.matmul if item.plan.parameters.get("heads") else None,
    ),
    Column("context", "context", lambda item: context_text(item.plan) or None),
    Column("costs", "priced", attrgetter("costs")),
    MFU,
    Column("hfu", "HFU", lambda item: item.hfu, ".1f", "%"),
    STEP,
    Column(
        "tokens_per_s_per_chip", "tokens/s/chip", lambda item: item.tokens_per_s_per_chip, ",.1f"
    ),
    *STEP_PARTS,
    OPERATIONS,
    Column(
        "exposed",
        "exposed",
        lambda item: item.time["exposed_comm_s"] / item.step_time_s,
        ".1f",
        "%",
    ),
    PEAK,
    Column(
        "hbm_free_gib",
        "HBM free",
        lambda item: (item.hbm["capacity_bytes"] - item.hbm["peak_bytes"]) / GIB,
        ".1f",
        "GiB",
    ),
    FITS,
    Column("limited_by", "limited by", lambda item: item.limited_by),
)
# What steps are worth whose sequences have many lengths.
REAL = (
    Column(
        "mfu_over_real_tokens",
        "MFU over real tokens",
        lambda item: item.real and item.real.mfu_over_real_tokens,
        ".1f",
        "%",
    ),
    Column("padding", "padding", lambda item: item.real and item.real.padding_share, ".1f", "%"),
    Column(
        "real_tokens_per_s_per_chip",
        "real tokens/s/chip",
        lambda item: item.real and item.real.real_tokens_per_s_per_chip,
        ",.1f",
    ),
)
ON_NODES = "mesh (node, dcn between nodes)"  # GPUs lie on no torus
FOUND = (
    *("mesh", "remat", "microbatches", "collective_matmul", "mfu", "step_time_s", "exposed"),
    *("hbm_peak_gib", "limited_by"),
)
DETAILS = ("collective_matmul", "exposed")  # what gives way to more columns


def beyond(items: Sequence[Prediction]) -> list[str]:
    """Return what is said of plans, numbered as in `found`, whose MFU is above 100 %, or above HFU:
    a line for each reason, with the figures of the first that it holds for."""
    said: dict[str, list[tuple[int, str]]] = {}
    for number, item in enumerate(items, 1):
        for text in item.warnings:
            if text.startswith("MFU is above"):
                reason, _, figure = text.partition("; ")
                said.setdefault(reason, []).append((number, figure))
    lines = []
    for reason, rows in said.items():
        first, figure = rows[0]
        of = f" in row {first}" if figure and len(rows) > 1 else ""
        numbers = "row" + "s" * (len(rows) > 1) + " "
        numbers += ", ".join(str(number) for number, _ in rows)
        numbers = "all rows" if len(rows) == len(items) > 1 else numbers
        lines.append(f"{numbers}: {reason}" + (f"; {figure}{of}" if figure else ""))
    return lines


def columns(items: Iterable[Prediction], *keys: str) -> list[Column]:
    """Return columns of plans by their keys, the mesh's named for the machines that there are."""
    switched = {item.plan.machine.chip.interconnect == "switch" for item in items}
    heading = ON_NODES if switched == {True} else ""
    return [
        replace(one, heading=heading) if heading and one.key == "mesh" else one
        for one in pick(PLANS, *keys)
    ]


def several(values: Iterable[Any]) -> bool:
    """Return whether values differ."""
    return len(set(values)) > 1


def plans(items: Iterable[Prediction]) -> Table:
    """Return all that is known of some plans, one row per plan."""
    return table(PLANS, items)


def found(
    items: Sequence[Prediction],
    title: str = "",
    *,
    slices: bool = False,
    more: Sequence[Column] = (),
) -> Table:
    """Return the plans of a search, numbered, with `more` columns of predictions.

    Costs are named where they differ, and slices, which `slices` names in any case.
    """
    named = slices or several(item.plan.machine.name for item in items)
    first = ["machine"] if named else []
    first += ["costs"] if several(item.costs for item in items) else []
    shown = [key for key in FOUND if not more or key not in DETAILS]
    if any(context_text(item.plan) for item in items):
        shown.insert(1, "context")
    if any(hosted_text(item.plan) for item in items):
        shown.insert(shown.index("remat") + 1, "hosted")
    own = [one.within(itemgetter(1)) for one in (*columns(items, *first, *shown), *more)]
    return table([Column("number", "#", itemgetter(0), "d"), *own], enumerate(items, 1), title)


def named(items: Iterable[tuple[str, Prediction]], columns: Iterable[Column]) -> Table:
    """Return plans under names of their own, with some columns of predictions."""
    own = [one.within(itemgetter(1)) for one in columns]
    return table([Column("name", "plan", itemgetter(0)), *own], items)


def ranked(outcomes: Iterable[Ranked]) -> Table:
    """Return plans that a search found as re-ranked by the compiler."""
    searched, compiled = attrgetter("searched"), attrgetter("compiled")
    plan = [one.within(searched) for one in pick(PLANS, "mesh", "remat", "microbatches")]
    columns = [
        Column("number", "#", lambda row: row[0] if row[1].compiled else None, "d"),
        *(one.within(itemgetter(1)) for one in (*plan, *both(searched, compiled))),
        Column("problem", "", lambda row: row[1].problem or ""),
    ]
    return table(columns, enumerate(outcomes, 1))


def both(
    predicted: Callable[[Any], Any],
    compiled: Callable[[Any], Any],
    columns: Iterable[Column] = (MFU, STEP, PEAK),
) -> Iterable[Column]:
    """Yield columns of rows that hold a prediction and what a compiler made of it."""
    for one in columns:
        heading = f"{one.label} predicted"
        yield one.within(predicted, f"predicted_{one.key}", heading)
        yield one.within(compiled, f"compiled_{one.key}", "compiled")


SIDE_BY_SIDE = (
    *("machine", "mesh", "context", "remat", "microbatches", "collective_matmul", "mfu", "hfu"),
    *("step_time_s", "tokens_per_s_per_chip"),
)


def side_by_side(
    items: Sequence[Prediction], names: Sequence[str], more: Sequence[Column] = ()
) -> Table:
    """Return plans as columns under their `names`, their figures as rows, and `more` of them.

    Steps of different batches are compared by what a token takes, the first plan's beside others'.
    """
    batches = several(item.plan.tokens for item in items)

    def change(item: Prediction) -> float:
        return _per_token(item) / _per_token(items[0]) - 1

    context = any(context_text(item.plan) for item in items)
    rows = columns(items, *(key for key in SIDE_BY_SIDE if context or key != "context"))
    rows += REAL if any(item.real for item in items) else ()
    rows.append(
        Column("change", f"{'time per token' if batches else 'step'} +%", change, "+.1f", "%")
    )
    if several(item.plan.machine.chips for item in items):
        rows.append(Column("chips", "chips", lambda item: item.plan.machine.chips, ",d"))
        rows.append(Column("chip_time", "chip-time per token +%", _chip_time(items), "+.1f", "%"))
    rows += more
    rows += [one for one in step_columns(items) if any(one.get(item) for item in items)]
    rows += pick(PLANS, "hbm_peak_gib", "hbm_free_gib", "fits", "limited_by")
    shown = [Column("figure", "", lambda row: row.label)]
    both = zip(names, items, strict=True)
    shown += [Column(name, name, _shown(item)) for name, item in both]
    return table(shown, rows)


def _per_token(item: Prediction) -> float:
    return item.step_time_s / item.plan.tokens


def _chip_time(items: Sequence[Prediction]) -> Callable[[Prediction], float]:
    def of(item: Prediction) -> float:
        return _per_token(item) * item.plan.machine.chips

    return lambda item: of(item) / of(items[0]) - 1


def _shown(item: Prediction) -> Callable[[Column], str]:
    return lambda row: row.text(row.get(item))


def differing(rows: Iterable[Difference], names: Sequence[str]) -> Table:
    """Return the keys in which plan files differ, with the value that each has."""
    columns = [Column("key", "differs", lambda row: row.key)]
    for index, name in enumerate(names):
        columns.append(Column(name, name, itemgetter(index), show=_said).within(_values))
    return table(columns, rows)


def _values(row: Difference) -> tuple[Any, ...]:
    return row.values


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_said(one)}" for key, one in value.items() if one != [])
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def facts(pairs: Iterable[tuple[str, str]], title: str = "") -> Table:
    """Return pairs of what and value as a table without headings."""
    columns = [Column("what", "", itemgetter(0)), Column("value", "", itemgetter(1))]
    return table(columns, pairs, title)
