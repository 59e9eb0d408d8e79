"""How a plan shows itself in a notebook: a small table, every name escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from shardsim.plan.plan import Plan
from shardsim.plan.words import mesh_text, techniques


def table_html(rows: Iterable[tuple[str, str]], caption: str = "") -> str:
    """Return two columns as an HTML table; everything is escaped.

    >>> "a&lt;b" in table_html([("a<b", "1")])
    True
    """
    left = ' style="text-align:left"'
    head = f"<caption{left}><b>{escape(caption)}</b></caption>" if caption else ""
    body = "".join(
        f"<tr><th{left}>{escape(what)}</th><td{left}>{escape(value)}</td></tr>"
        for what, value in rows
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return what a plan is, as pairs of what and value."""
    return [
        ("model", plan.model.name),
        ("machine", f"{plan.machine.name}, {plan.machine.chips:,} chips"),
        ("batch", f"{plan.batch:,} x {plan.sequence:,} tokens"),
        ("mesh", mesh_text(plan)),
        ("techniques", techniques(plan)),
    ]


def plan_html(plan: Plan) -> str:
    """Return a plan as a small HTML table."""
    return table_html(plan_rows(plan), caption=plan.name)
