"""How a search's result shows itself in a notebook: its best plans, every name escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from shardsim.plan.words import mesh_text
from shardsim.units import GIB

if TYPE_CHECKING:
    from shardsim.planner.search import SearchResult

SHOWN = 10


def search_html(result: SearchResult) -> str:
    """Return the best plans of a search as an HTML table."""
    counted = (
        f"{result.searched:,} plans considered, {result.priced:,} priced, {result.fit:,} fit, "
        f"{result.seconds:.1f} s"
    )
    if not result.predictions:
        return f"<p>No plan fits in HBM: {escape(counted)}</p>"
    headers = (
        "",
        "slice",
        "mesh (torus axes)",
        "remat",
        "microbatches",
        "MFU %",
        "step s",
        "HBM GiB",
        "limited by",
    )
    left = ' style="text-align:left"'
    rows = []
    for number, item in enumerate(result.predictions[:SHOWN], 1):
        plan = item.plan
        cells = (
            str(number),
            plan.machine.name,
            mesh_text(plan),
            plan.remat.name,
            str(plan.microbatches),
            f"{100 * item.mfu:.1f}",
            f"{item.step_time_s:.4g}",
            f"{item.hbm['peak_bytes'] / GIB:.1f}",
            item.limited_by,
        )
        rows.append("<tr>" + "".join(f"<td{left}>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th{left}>{escape(name)}</th>" for name in headers)
    more = len(result.predictions) - SHOWN
    tail = f"; {more} more are in predictions" if more > 0 else ""
    return (
        f"<table><caption{left}>{escape(counted + tail)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
