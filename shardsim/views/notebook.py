"""How plans, predictions and searches show themselves in a notebook: small HTML tables."""

from __future__ import annotations

from typing import Any

from shardsim.cost.predict import Prediction
from shardsim.cost.words import PARTS
from shardsim.plan import Plan
from shardsim.plan.words import mesh_text, techniques
from shardsim.units import show_bytes, show_percent, show_time
from shardsim.views.plans import facts, found
from shardsim.views.write import html

SHOWN = 10  # of a search's plans


def shown(item: Any) -> str:
    """Return a plan, a prediction or the result of a search as HTML."""
    if isinstance(item, Plan):
        return html(facts(_plan(item), item.name))
    if isinstance(item, Prediction):
        return html(facts([*_prediction(item), *_plan(item.plan)], item.plan.name))
    counted = (
        f"{item.searched:,} plans considered, {item.fit:,} fit, {item.priced:,} of those priced, "
        f"{item.seconds:.1f} s"
    )
    if not item.predictions:
        return f"<p>No plan fits in HBM: {counted}</p>"
    slices = ", ".join(dict.fromkeys(one.plan.machine.name for one in item.predictions))
    more = len(item.predictions) - SHOWN
    tail = f"; {more} more are in predictions" if more > 0 else ""
    return html(found(item.predictions[:SHOWN], f"{slices}: {counted}{tail}"))


def _plan(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("model", plan.model.name),
        ("machine", f"{plan.machine.name}, {plan.machine.chips:,} chips"),
        ("batch", f"{plan.batch:,} x {plan.sequence:,} tokens"),
        ("mesh", mesh_text(plan)),
        ("techniques", techniques(plan)),
    ]


def _prediction(item: Prediction) -> list[tuple[str, str]]:
    parts = ", ".join(
        f"{PARTS[name]} {show_percent(value / item.step_time_s)}"
        for name, value in item.time.items()
        if value >= 5e-4 * item.step_time_s
    )
    peak, capacity = (show_bytes(item.hbm[f"{name}_bytes"]) for name in ("peak", "capacity"))
    rate = f"{item.tokens_per_s_per_chip:,.1f} tokens/s/chip"
    return [
        ("MFU", f"{show_percent(item.mfu)} (HFU {show_percent(item.hfu)})"),
        ("step", f"{show_time(item.step_time_s)}, {rate}"),
        ("time", parts),
        ("HBM", f"{peak} of {capacity} per device: {'fits' if item.fits else 'does not fit'}"),
        ("limited by", item.limited_by),
        *(("warning", text) for text in item.warnings),
    ]
