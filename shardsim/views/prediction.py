"""One prediction as people read it in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardsim.plan.words import mesh_text, techniques
from shardsim.units import show_bytes, show_percent, show_time
from shardsim.views.step import collectives, hbm, parts
from shardsim.views.table import Table

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction


def prediction_parts(item: Prediction) -> list[Table | str]:
    """Return one prediction in full, as lines and tables."""
    plan = item.plan
    peak, capacity = (show_bytes(item.hbm[f"{name}_bytes"]) for name in ("peak", "capacity"))
    verdict = "fits" if item.fits else "DOES NOT FIT"
    if item.hbm["peak_bytes"] <= item.hbm["capacity_bytes"] < item.hbm["thrifty_bytes"]:
        verdict += f" ({show_bytes(item.hbm['thrifty_bytes'])} with the gaps between buffers)"
    found: list[Table | str] = [
        f"{plan.model.name} on {plan.machine.name} ({plan.machine.chips:,} chips), "
        f"batch {plan.batch:,} x {plan.sequence:,} tokens",
        f"mesh: {mesh_text(plan)}",
        f"plan: {techniques(plan)}",
        "",
        f"MFU {show_percent(item.mfu)} (PaLM)   HFU {show_percent(item.hfu)}   "
        f"step {show_time(item.step_time_s)}   {item.tokens_per_s_per_chip:,.1f} tokens/s/chip",
        *_real(item),
        *_healthy(item),
        f"HBM {peak} of {capacity} per device, at the {item.peak_moment}: {verdict}",
        f"limited by: {item.limited_by}",
        "",
        parts(item),
        "",
        hbm(item),
    ]
    if item.collectives:
        found += ["", collectives(item)]
    return [*found, *(f"warning: {text}" for text in item.warnings)]


def _real(item: Prediction) -> list[str]:
    """Return what the step is worth without padding, where sequences have many lengths."""
    real = item.real
    if real is None:
        return []
    return [
        f"MFU over real tokens {show_percent(real.mfu_over_real_tokens)}   "
        f"padding {show_percent(real.padding_share)}   "
        f"{real.real_tokens_per_s_per_chip:,.1f} real tokens/s/chip   "
        f"{real.sequences_per_s:,.1f} sequences/s",
        *([f"the fullest device has {real.load:.2f} of the mean"] if real.load > 1 else []),
    ]


def _healthy(item: Prediction) -> list[str]:
    """Return what the step takes with nothing slow or broken, where it was played with that."""
    data = item.events.to_data() if item.events else {}
    if not (healthy_s := data.get("healthy_step_time_s")):
        return []
    more = item.step_time_s / healthy_s - 1
    return [f"with nothing slow or broken {show_time(healthy_s)}: this is {100 * more:+.1f} %"]
