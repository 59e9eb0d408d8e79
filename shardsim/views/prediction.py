"""One prediction as people read it in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardsim.plan.words import mesh_text, techniques
from shardsim.units import show_bytes, show_percent, show_time
from shardsim.views.step import collectives, hbm, parts
from shardsim.views.table import Table

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction

AGREE = 0.005  # of the step: closed form and events differ by more where collectives contend
MOST = 2  # collectives that are named


def prediction_parts(item: Prediction) -> list[Table | str]:
    """Return one prediction in full, as lines and tables."""
    plan = item.plan
    peak, capacity = (show_bytes(item.hbm[f"{name}_bytes"]) for name in ("peak", "capacity"))
    verdict = "fits" if item.fits else "DOES NOT FIT"
    lean = show_bytes(item.hbm["thrifty_bytes"])
    if item.hbm["capacity_bytes"] < item.hbm["thrifty_bytes"] and lean != peak:
        verdict += f" ({lean} with the gaps between buffers)"
    found: list[Table | str] = [
        f"{plan.model.name} on {plan.machine.name} ({plan.machine.chips:,} chips), "
        f"batch {plan.batch:,} x {plan.sequence:,} tokens",
        f"mesh: {mesh_text(plan)}",
        f"plan: {techniques(plan)}",
        "",
        f"MFU {show_percent(item.mfu)} (PaLM)   HFU {show_percent(item.hfu)}   "
        f"step {show_time(item.step_time_s)}   {item.tokens_per_s_per_chip:,.1f} tokens/s/chip",
        *_real(item),
        *_beside(item),
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


def _beside(item: Prediction) -> list[str]:
    """Return what the step takes with nothing slow or broken, where it was played with that; else
    the closed form's where it differs, with who shares links with whom."""
    data = item.events.to_data() if item.events else {}
    if healthy_s := data.get("healthy_step_time_s"):
        more = item.step_time_s / healthy_s - 1
        return [f"with nothing slow or broken {show_time(healthy_s)}: this is {100 * more:+.1f} %"]
    closed_s = data.get("analytic_step_time_s") or item.step_time_s
    more = item.step_time_s / closed_s - 1
    if item.fidelity != "events" or data["perturbed"]:
        return []
    if abs(more) < AGREE:
        return ["simulated on the torus; the closed form gives the same step"]
    if more > 0:
        rows = data["contention"][:MOST]
        why = [
            f"{row['collective']} loses {show_time(row['lost_s'])} to {row['other']} on "
            f"{', '.join(row['links'])}"
            for row in rows
        ]
    else:
        rows = data["closed_form_queues"][:MOST]
        why = [
            f"{row['collective']} waits {show_time(row['less_s'])} less, as links that the "
            "closed form lets it queue for are shared"
            for row in rows
        ]
    return [f"closed form {show_time(closed_s)}: this is {100 * more:+.1f} %", *why]
