"""How a prediction shows itself in a notebook: a small table, every name escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardsim.cost.words import PARTS
from shardsim.plan.rich import plan_rows, table_html
from shardsim.units import show_bytes, show_percent, show_time

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction


def prediction_html(item: Prediction) -> str:
    """Return a prediction as a small HTML table."""
    parts = ", ".join(
        f"{PARTS[name]} {show_percent(value / item.step_time_s)}"
        for name, value in item.time.items()
        if value >= 5e-4 * item.step_time_s
    )
    capacity = show_bytes(item.hbm["capacity_bytes"])
    verdict = "fits" if item.fits else "does not fit"
    rows = [
        ("MFU", f"{show_percent(item.mfu)} (HFU {show_percent(item.hfu)})"),
        (
            "step",
            f"{show_time(item.step_time_s)}, {item.tokens_per_s_per_chip:,.1f} tokens/s/chip",
        ),
        ("time", parts),
        ("HBM", f"{show_bytes(item.hbm['peak_bytes'])} of {capacity} per device: {verdict}"),
        ("limited by", item.limited_by),
        *(("warning", text) for text in item.warnings),
        *plan_rows(item.plan),
    ]
    return table_html(rows, caption=item.plan.name)
