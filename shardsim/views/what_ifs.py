"""Tables of a plan with one thing switched off, varied or nudged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from shardsim.files import flow_text
from shardsim.views.plans import FITS, MFU, PEAK, PLANS, REAL, STEP
from shardsim.views.table import Column, Table, pick, table

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction
    from shardsim.cost.sensitivity import Sensitivity
    from shardsim.planner.whatif import Ablation


def ablations(base: Prediction, items: Sequence[Ablation], whole: bool = False) -> Table:
    """Return what each technique is worth; with `whole`, below a row of the plan itself."""

    def change(item: Prediction) -> float | None:
        return None if item is base else item.step_time_s / base.step_time_s - 1

    columns = [
        Column("without", "without", itemgetter(0)),
        Column("so", "instead", itemgetter(1)),
        *(one.within(itemgetter(2)) for one in (MFU, STEP)),
        Column("step_change", "step +%", change, "+.1f", "%").within(itemgetter(2)),
        *(one.within(itemgetter(2)) for one in (PEAK, FITS)),
        Column("published", "published effect", itemgetter(3)),
    ]
    rows: list[tuple[Any, ...]] = [("(the plan)", "", base, "")] if whole else []
    for item in items:
        found = item.prediction
        so = item.why if found is None else item.change
        if found is not None and not found.fits:
            so += "; does not fit"
        elif found is not None and any(said.startswith("fits only") for said in found.warnings):
            so += "; fits only as the compiler recomputes"
        rows.append((item.technique, so, found, item.published))
    return table(columns, rows)


def sensitivities(base: Prediction, items: Iterable[Sensitivity]) -> Table:
    """Return the elasticity of the step time to each figure of the chip."""
    more = attrgetter("step_time_s_at_110")
    columns = [
        Column("figure", "figure of the chip", attrgetter("figure")),
        Column("elasticity", "elasticity", attrgetter("elasticity"), "+.3f"),
        Column("step_time_s_at_110_percent", "step s with 10 % more", more, ".4g"),
        Column("change", "change", lambda item: more(item) / base.step_time_s - 1, "+.2f", "%"),
        Column("mfu_at_110_percent", "MFU then", attrgetter("mfu_at_110"), ".1f", "%"),
    ]
    return table(columns, items)


def swept(rows: Iterable[tuple[Mapping[str, Any], Prediction | None, str]]) -> Table:
    """Return a sweep, one row per combination; what makes no legal plan says why."""
    rows = list(rows)

    def varied(key: str) -> Callable[[Any], Any]:
        def cell(row: Any) -> Any:
            value = row[0][key]
            return flow_text(value) if isinstance(value, Mapping | list | tuple) else value

        return cell

    keys = dict.fromkeys(key for changes, _, _ in rows for key in changes)
    main = pick(PLANS, "mfu", "hfu", "step_time_s", "tokens_per_s_per_chip", "hbm_peak_gib", "fits")
    if any(item and item.real for _, item, _ in rows):
        main = [*main[:-2], *REAL, *main[-2:]]
    columns = [
        *(Column(key, key, varied(key), show=flow_text, right=True) for key in keys),
        *(one.within(itemgetter(1)) for one in main),
        Column("why_not", "why not", itemgetter(2)),
    ]
    return table(columns, rows)
