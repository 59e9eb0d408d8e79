"""Tables of predictions beside what was published, compiled or run."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, itemgetter
from statistics import median
from typing import TYPE_CHECKING, Any

from shardsim.units import GIB, show_bytes, show_percent, show_time
from shardsim.views.plans import MFU, PEAK, STEP
from shardsim.views.step import OPERATIONS, STEP_PARTS
from shardsim.views.table import Column, Table, names, pick, table, yes_no
from shardsim.views.write import markdown

if TYPE_CHECKING:
    from shardsim.validate.effects import Effect
    from shardsim.validate.measured import Measured, Step
    from shardsim.validate.runs import Row, Validation
    from shardsim.xla.tpu.agreement import Pair

UNPLANNED_ROWS = 12


def published(
    result: Validation, other: Validation | None = None, noted: Sequence[str] = ()
) -> Table:
    """Return published runs beside their predictions, in tokens/s/chip; errors are fractions.

    `other` is the same by the compiler's op costs; runs that are `noted` get the number of a note.
    """
    errors = {row.id: row.error for row in other.rows} if other else {}

    def span(row: Row) -> str:
        low, high = row.mfu_low, row.mfu_high
        if low is None or high is None or low == high:
            return ""
        return f"{100 * low:.1f} to {100 * high:.1f}"

    columns = [
        Column("run", "run", attrgetter("id")),
        Column("family", "family", attrgetter("family")),
        Column("measured", "measured", attrgetter("measured"), ",.1f"),
        Column("predicted", "predicted", attrgetter("predicted"), ",.1f"),
        Column("error", "error", attrgetter("error"), "+.1f", "%"),
        *(
            [Column("compiler_error", "by compiler", lambda row: errors.get(row.id), "+.1f", "%")]
            if other
            else []
        ),
        Column("measured_mfu", "MFU", attrgetter("measured_mfu"), ".1f", "%"),
        Column("predicted_mfu", "predicted", attrgetter("predicted_mfu"), ".1f", "%"),
        Column("range", "range", span, right=True),
        Column("mean_mfu_error", "mean-MFU error", attrgetter("baseline_error"), "+.1f", "%"),
        Column("fitted", "fitted", attrgetter("fitted"), show=lambda value: "yes" * value),
        Column("note", "", lambda row: f"[{noted.index(row.id) + 1}]" if row.id in noted else ""),
    ]
    return table(columns, result.rows, spare=("range", "mean_mfu_error", "fitted"))


def measured_steps(found: Measured, noted: Sequence[str] = ()) -> Table:
    """Return steps measured on devices beside their predictions; errors are fractions."""

    def size(key: str) -> Callable[[Step], float | None]:
        def value(step: Step) -> float | None:
            peak = getattr(step, key)
            return None if peak is None else float(peak) / GIB

        return value

    columns = [
        Column("step", "step", attrgetter("id")),
        Column("measured_s", "measured", attrgetter("measured_s"), ".4f", "s"),
        Column("predicted_s", "predicted", attrgetter("predicted_s"), ".4f", "s"),
        Column("error", "error", attrgetter("error"), "+.1f", "%"),
        Column("measured_peak", "peak", size("measured_peak_bytes"), ".2f", "GiB"),
        Column("predicted_peak", "predicted", size("predicted_peak_bytes"), ".2f", "GiB"),
        Column("peak_error", "error", attrgetter("peak_error"), "+.1f", "%"),
        Column("note", "", lambda row: f"[{noted.index(row.id) + 1}]" if row.id in noted else ""),
    ]
    return table(columns, found.steps)


def changes(found: Sequence[Effect]) -> Table:
    """Return published effects of single changes beside their predictions, as fractions."""
    columns = [
        Column("id", "effect", attrgetter("id")),
        Column("quantity", "of", attrgetter("quantity")),
        Column("published", "published", attrgetter("published"), "+.1f", "%"),
        Column("predicted", "predicted", attrgetter("predicted"), "+.1f", "%"),
        Column("sign", "sign", attrgetter("sign"), show=yes_no),
        Column("close", "within a third", attrgetter("close"), show=yes_no),
    ]
    return table(columns, found)


def changes_words(found: Sequence[Effect]) -> list[str]:
    """Return how many are right, and what each change and its source are."""
    right, close = (sum(getattr(one, name) for one in found) for name in ("sign", "close"))
    lines = [f"{right} of {len(found)} go the right way, {close} are within a third of their size"]
    for one in found:
        lines.append(f"{one.id}: {one.what} ({one.source})")
        lines += [f"  {key}: {text}" for key, text in one.filled.items()]
    return lines


def measured_words(kind: str, summary: Mapping[str, Any]) -> str:
    """Return a summary of measured steps in a line."""

    def percent(key: str) -> str:
        return "-" if summary[key] is None else show_percent(summary[key])

    rank = summary["rank_correlation"]
    return (
        f"{kind} ({summary['steps']}): step time median {percent('median_abs_error')}, worst "
        f"{percent('max_abs_error')}; HBM median {percent('median_abs_peak_error')}, worst "
        f"{percent('max_abs_peak_error')}; rank correlation "
        + ("-" if rank is None else f"{rank:.3f}")
    )


def measured_page() -> str:
    """Return the steps that ship with shardsim as docs/gpu.md has them."""
    from shardsim.validate.measured import measured

    found = measured()
    other = [(step.id, step.other_program) for step in found.steps if step.other_program]
    notes = [f"[{n}] measured with {text}" for n, (_, text) in enumerate(other, 1)]
    parts = {"all": found.summary(), **found.by_attention()}
    lines = [measured_words(kind, summary) for kind, summary in parts.items()]
    shown = markdown(measured_steps(found, [name for name, _ in other]))
    return "\n\n".join([shown.rstrip(), "  \n".join(notes), "  \n".join(lines)])


def hbm(pairs: Iterable[Pair]) -> Table:
    """Return HBM peaks, compiled and predicted, of emitted steps and of trainers' programs."""

    def size(key: str) -> Callable[[Pair], float]:
        return lambda pair: pair.predicted.hbm[key] / GIB

    def verdict(pair: Pair) -> str:
        fits = pair.predicted.fits
        said = "fits" if fits else "does not fit"
        return said if fits == (not pair.row["does_not_fit"]) else f"{said}: wrong"

    columns = [
        Column("group", "group", lambda pair: pair.row["group"]),
        Column("plan", "plan", lambda pair: pair.row["kind"]),
        Column("as", "as", lambda pair: pair.predicted.implementation),
        Column("capacity_bytes", "HBM GiB", size("capacity_bytes"), ".1f"),
        Column(
            "compiled_bytes",
            "compiled",
            lambda pair: (pair.row["peak_bytes"] or 0.0) / GIB or None,
            ".1f",
        ),
        Column("peak_bytes", "predicted", size("peak_bytes"), ".1f"),
        Column("thrifty_bytes", "thrifty", size("thrifty_bytes"), ".1f"),
        Column("lavish_bytes", "lavish", size("lavish_bytes"), ".1f"),
        Column("error", "error", attrgetter("peak_error"), "+.1f", "%"),
        Column("fits", "predicted", verdict),
        Column("libtpu", "libtpu", lambda pair: pair.row["versions"].get("libtpu", "")),
    ]
    return table(columns, pairs, spare=("libtpu", "lavish_bytes", "thrifty_bytes", "as"))


SECONDS = [replace(one, form=".3g") for one in (OPERATIONS, *pick(STEP_PARTS, "exposed_comm_s"))]
PFLOP = Column("pflop", "PFLOP", lambda item: float(item.price.flops) / 1e15, ".4g")


def compiled(pairs: Iterable[Pair]) -> Table:
    """Return kept compilations of the TPU compiler beside their predictions."""

    def kept(column: Column, name: str, unit: float = 1.0) -> Iterable[Column]:
        """Yield a column of the prediction, and of the row's figure `name` in `unit`s."""

        def figure(pair: Pair) -> float | None:
            value: float | None = pair.row.get(name)
            return None if value is None else value / unit

        heading, key = f"{column.label} predicted", column.key
        yield column.within(attrgetter("predicted"), f"predicted_{key}", heading)
        yield replace(column, key=f"compiled_{key}", heading="compiled", get=figure)

    columns = [
        Column("group", "group", lambda pair: pair.row["group"]),
        Column("plan", "plan", lambda pair: pair.row["kind"]),
        Column("compiled", "compiles", lambda pair: pair.row["compiled"], show=yes_no),
        *kept(PEAK, "peak_bytes", GIB),
        *kept(PFLOP, "flops", 1e15),
        *(column for one in SECONDS for column in kept(one, one.key)),
        *kept(MFU, "mfu"),
        *kept(STEP, "step_time_s"),
        Column("collectives", "collectives", _planned),
    ]
    return table(columns, pairs)


def _planned(pair: Pair) -> str:
    """Return how much of the compiled collectives is planned, or why there are none."""
    if "step_time_s" not in pair.row:
        if pair.row["compiled"]:
            return "HBM alone"
        return "does not fit" if pair.row["does_not_fit"] else str(pair.row["problem"])[:60]
    if pair.predicted.plan.execution == "partitioned":
        return "the compiler's own"
    return f"{100 * pair.accounted:.2f} % planned"


def collectives(rows: Sequence[Mapping[str, Any]], *, exact: bool = False) -> list[Table | str]:
    """Return planned beside compiled collectives, `exact`ly to the byte or in round figures.

    After the table, in words: what the compiler wrote in another form, and how much is planned.
    """
    from shardsim.xla.compare import Account, settle

    columns = [
        Column("kind", "collective", itemgetter("kind")),
        Column("mesh_axes", "mesh axes", itemgetter("mesh_axes"), show=names),
    ]
    for side in ("planned", "compiled"):
        get = itemgetter(f"{side}_bytes")
        if exact:
            columns.append(Column(f"{side}_bytes", f"{side} bytes", get, ",.0f"))
        else:
            columns.append(Column(f"{side}_bytes", side, get, "bytes"))
    for side in ("planned", "compiled"):
        key = f"{side}_count"
        columns.append(Column(key, f"{side} count", itemgetter(key), ",.0f"))
    found: list[Table | str] = [table(columns, rows)]
    settled = settle(map(Account.of_data, rows))
    if settled.renamed:
        renamed = [
            f"{one.planned} over {names(one.mesh_axes)} as {one.compiled} "
            f"({show_bytes(one.planned_bytes)} planned)"
            for one in settled.renamed
        ]
        found.append(f"in another form: {'; '.join(renamed)}")
    if settled.beyond_bytes:
        found.append(f"{100 * settled.share:.2f} % of the bytes sent are planned, in some form")
    return found


def figures(data: Mapping[str, Any]) -> Table:
    """Return the figures of `verify --against tpu`: predicted and compiled side by side."""
    hbm, step, mfu = data["hbm"], data["step"], data["mfu"]
    compute, flops = data["compute"], data["flops"]
    peak = f"HBM peak of {show_bytes(hbm['capacity_bytes'])}"
    rows: list[tuple[str, float, float | None, Callable[[float], str]]] = [
        (peak, hbm["predicted_peak_bytes"], hbm["compiled_peak_bytes"], show_bytes),
        ("FLOPs of a device", flops["predicted"], flops["compiled"], "{:.5g}".format),
        ("operations", compute["predicted_s"], compute["compiled_s"], show_time),
    ]
    if exposed := data.get("exposed_comm"):
        pair = exposed["predicted_s"], exposed["replayed_s"]
        rows.append(("exposed communication", *pair, show_time))
    rows.append(("step", step["predicted_s"], step["replayed_s"], show_time))
    rows.append(("MFU", mfu["predicted"], mfu["replayed"], show_percent))

    def change(row: Sequence[Any]) -> float | None:
        return row[2] / row[1] - 1 if row[1] and row[2] is not None else None

    columns = [
        Column("what", "", itemgetter(0)),
        Column("predicted", "predicted", lambda row: row[3](row[1]), right=True),
        Column("compiled", "compiled", lambda row: row[2] and row[3](row[2]), right=True),
        Column("difference", "difference", change, "+.1f", "%"),
    ]
    return table(columns, rows)


def unplanned(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the costliest unplanned collectives and copies, and the sum of the rest."""
    shown, rest = list(rows[:UNPLANNED_ROWS]), rows[UNPLANNED_ROWS:]
    if rest:
        sums = {key: sum(row[key] for row in rest) for key in ("bytes", "exposed_s", "mfu_points")}
        shown.append({"kind": f"{len(rest)} more", "mesh_axes": (), "source": "", **sums})
    columns = [
        Column("kind", "unplanned", itemgetter("kind")),
        Column("mesh_axes", "mesh axes", itemgetter("mesh_axes"), show=names),
        Column("bytes", "bytes", itemgetter("bytes"), "bytes"),
        Column("exposed_s", "costs", itemgetter("exposed_s"), "time"),
        Column("mfu_points", "MFU points", itemgetter("mfu_points"), ".2f"),
        Column("source", "from", itemgetter("source")),
    ]
    return table(columns, shown)


def timed(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return plans of a small ViT that were timed on this machine beside their predictions."""
    columns = [
        Column("plan", "plan of a small ViT", itemgetter("plan")),
        Column("predicted_s", "predicted", itemgetter("predicted_s"), ".4f", "s"),
        Column("measured_s", "measured", itemgetter("measured_s"), ".4f", "s"),
        Column("error", "error", itemgetter("error"), "+.0f", "%"),
        Column("clock_s", "by the clock", itemgetter("clock_s"), ".4f", "s"),
    ]
    return table(columns, rows)


def trained(result: Mapping[str, Any]) -> Table:
    """Return what a trainer holds on one device, in bytes, beside the plan."""
    state, temporaries = result["state"], result["temporaries"]
    rows = [
        ("state", state["planned_bytes"], state["exported_bytes"], state["compiled_bytes"]),
        ("temporaries", temporaries["predicted_bytes"], None, temporaries["compiled_bytes"]),
    ]
    columns = [Column("what", "bytes on one device", itemgetter(0))]
    for index, side in enumerate(("plan", "as exported", "compiled"), 1):
        columns.append(Column(side, side, itemgetter(index), ",.0f"))
    return table(columns, rows)


def main() -> None:
    """Print the kept evidence as the tables of docs/compiled.md, with "held", "techniques" or
    "blocks" its own tables there; with "trainers" that of trainers' programs in docs/trainers.md.
    """
    from shardsim.xla.tpu.agreement import headline, held, pairs, trainers
    from shardsim.xla.tpu.rows import BLOCKS, TECHNIQUES, load_rows

    pages: dict[str, Callable[[], str]] = {
        "trainers": lambda: markdown(hbm(trainers()).without("as")),
        "held": lambda: markdown(held_by_group(held())),
        "techniques": lambda: by_group(pairs(load_rows(TECHNIQUES))),
        "blocks": lambda: in_one(pairs(load_rows(BLOCKS))),
        "": lambda: f"{headline(pairs())}\n\n{by_group(pairs())}",
    }
    parser = ArgumentParser(description="Print the kept evidence as tables of docs/compiled.md.")
    parser.add_argument("page", nargs="?", default="", choices=pages)
    print(pages[parser.parse_args().page]())


def held_by_group(pairs: Sequence[Pair]) -> Table:
    """Return how far predicted HBM peaks are from compiled ones, by model and slice."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for pair in pairs:
        if pair.peak_error is not None:
            found = groups.setdefault(pair.row["group"], [])
            found.append((pair.peak_error, pair.row["kind"]))

    def share(most: float) -> Callable[[Any], float]:
        return lambda item: sum(abs(e) <= most for e, _ in item[1]) / len(item[1])

    def worst(item: Any) -> tuple[float, str]:
        found: tuple[float, str] = max(item[1], key=lambda one: abs(one[0]))
        return found

    columns = [
        Column("group", "model and slice", itemgetter(0)),
        Column("plans", "plans", lambda item: len(item[1]), ",d"),
        Column("median", "median error", lambda i: median(abs(e) for e, _ in i[1]), ".1f", "%"),
        Column("within_5", "within 5 %", share(0.05), ".0f", "%"),
        Column("within_10", "within 10 %", share(0.1), ".0f", "%"),
        Column("worst", "worst", lambda item: worst(item)[0], "+.1f", "%"),
        Column("worst_plan", "of", lambda item: worst(item)[1]),
    ]
    return table(columns, sorted(groups.items()))


def by_group(pairs: Sequence[Pair]) -> str:
    """Return the evidence as Markdown, one table for each model and slice."""
    parts = []
    for group in dict.fromkeys(pair.row["group"] for pair in pairs):
        whole = compiled(pair for pair in pairs if pair.row["group"] == group)
        parts += [f"**{group}**", "", markdown(whole.without(*_BESIDE)), ""]
    return "\n".join(parts)


def in_one(pairs: Sequence[Pair]) -> str:
    """Return the evidence as one Markdown table, of models that have a plan or two each."""
    return markdown(compiled(pairs).without(*_BESIDE[1:]))


_BESIDE = ("group", "compiled", "predicted_step_time_s", "compiled_step_time_s")

if __name__ == "__main__":
    main()
