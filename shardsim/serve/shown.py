"""Predictions as the page shows them: what its controls stand at, main figures, tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from shardsim.answers.slices import ALL, slices_named
from shardsim.cost.predict import LIMITING, Prediction
from shardsim.cost.words import FIGURES as FIGURE_WORDS
from shardsim.cost.words import figure_words
from shardsim.machine import Chip
from shardsim.plan import Plan
from shardsim.plan.layout import ROLES
from shardsim.plan.plan import CONTEXT_ORDERS
from shardsim.plan.resolve import AXIS_NAMES, resolve
from shardsim.planner.compare import differences
from shardsim.serve.asked import FIGURES, figure_of
from shardsim.units import GIB, show_bytes, show_count, show_percent, show_time
from shardsim.views.explain import held
from shardsim.views.explain import limits as limits_table
from shardsim.views.plans import differing, side_by_side
from shardsim.views.step import collectives, hbm, parts
from shardsim.views.write import cells

NAMES = ("pinned", "this plan")
RARE = ("tensor2",)  # roles that have a slider only where a plan has them


def controls(plan: Plan) -> dict[str, Any]:
    """Return what every control stands at for a plan, and what it may be set to."""
    chip = plan.machine.chip
    return {
        "name": plan.name,
        "devices": plan.machine.devices,
        "slices": _slices(chip.name),
        "values": {
            "model": plan.model.name,
            "machine": plan.machine.name,
            "batch": plan.batch,
            "sequence": plan.sequence,
            "remat": plan.remat.name,
            "microbatches": plan.microbatches,
            "attention": plan.attention,
            "optimizer": plan.optimizer,
            "overlap.matmul": plan.overlap.matmul,
            "overlap.weights": plan.overlap.weights,
            "overlap.gradients": plan.overlap.gradients,
            "context.keys": plan.context.keys,
            "context.order": CONTEXT_ORDERS[bool(resolve(plan).striped)],
        },
        "mesh": _mesh(plan),
        "costs": plan.op_costs,
    }


@lru_cache(maxsize=16)
def _slices(chip_name: str) -> list[str]:
    """Return the usual slices of a chip, to choose from; any other may be typed."""
    return [machine.name for machine in slices_named(f"{chip_name}{ALL}")]


def _mesh(plan: Plan) -> list[dict[str, Any]]:
    """Return the axes of a mesh in their usual order, and roles that it does not use with 1."""
    names = resolve(plan).names
    taken = {axis.name for axis in plan.mesh}
    found = []
    for role in ROLES:
        for axis in names[role]:
            size = plan.axis(axis).size
            found.append({"axis": axis, "role": role, "size": size, "there": True})
        possible = role not in RARE and (role != "expert" or plan.model.experts is not None)
        if not names[role] and possible and not taken & {role, AXIS_NAMES[role]}:
            found.append({"axis": role, "role": role, "size": 1, "there": False})
    return found


def figures(chip: Chip, slices: int) -> list[dict[str, str]]:
    """Return the figures of a chip that have a slider, with their words and values."""
    units = {"peak_flops": "FLOP/s", "hbm_bytes": ""}
    found = []
    for figure in FIGURES:
        if figure == "dcn_bytes_per_s" and slices == 1:
            continue
        words = figure_words(figure, chip) if figure in FIGURE_WORDS else "HBM"
        value = figure_of(chip, figure)
        text = show_bytes(value) if figure == "hbm_bytes" else show_count(
            value, units.get(figure, "B/s")
        )  # fmt: skip
        found.append({"figure": figure, "words": words, "text": text})
    return found


def tables(items: Sequence[Prediction]) -> dict[str, Any]:
    """Return the tables of the last prediction, and of both where there is a pinned one."""
    item = items[-1]
    limits = [one for one in item.elasticities if abs(one.elasticity) >= LIMITING]
    found = {
        "parts": parts(item),
        "hbm": hbm(item),
        "limits": limits_table(limits, item.plan.machine.chip),
        "collectives": collectives(item),
        "held": held(item.use.at_peak, item.hbm["peak_bytes"]),
    }
    if len(items) > 1:
        found["beside"] = side_by_side(items, NAMES)
        found["differs"] = differing(differences([one.plan for one in items]), NAMES)
    return {
        **{name: cells(table) for name, table in found.items()},
        "elasticities": [one.elasticity for one in limits],
    }


def headline(items: Sequence[Prediction]) -> list[dict[str, str]]:
    """Return the main figures of the last prediction, and how they differ from the pinned one."""
    item, first = items[-1], items[0]
    peak, capacity = item.hbm["peak_bytes"], item.hbm["capacity_bytes"]
    per_token = item.step_time_s / item.plan.tokens * first.plan.tokens / first.step_time_s - 1
    same = item.plan.tokens == first.plan.tokens
    rate = item.tokens_per_s_per_chip / first.tokens_per_s_per_chip - 1
    free_gib = (peak - first.hbm["peak_bytes"]) / GIB
    rows = [
        ("step", show_time(item.step_time_s),
         f"{100 * per_token:+.1f} %{'' if same else ' a token'}"),
        ("MFU (PaLM)", show_percent(item.mfu), f"{100 * (item.mfu - first.mfu):+.1f} points"),
        ("HBM of a device", f"{peak / GIB:.2f} of {capacity / GIB:.2f} GiB",
         f"{free_gib:+.2f} GiB"),
        ("tokens/s/chip", f"{item.tokens_per_s_per_chip:,.1f}", f"{100 * rate:+.1f} %"),
        ("limited by", item.limited_by, ""),
    ]  # fmt: skip
    return [
        {"what": what, "value": value, "against": against if len(items) > 1 else ""}
        for what, value, against in rows
    ]


def said(item: Prediction) -> str:
    """Return a prediction in one sentence, for who hears the page."""
    fits = "fits" if item.fits else "does not fit"
    return (
        f"{fits}: step {show_time(item.step_time_s)}, MFU {show_percent(item.mfu)}, "
        f"HBM {show_bytes(item.hbm['peak_bytes'])}, limited by {item.limited_by}"
    )
