"""What events make of the compiled programs that the tests keep; the table of docs/events.md.

    python tests/xla/hlo/compiled_events.py

Prints it; test_compiled_events.py holds the page to it.
"""

from __future__ import annotations

import hlo_samples as samples

from shardsim.simulate import what_if
from shardsim.simulate.compiled import simulate_compiled

HEAD = (
    "| program, of 3 layers | slice | closed form, ms | events | a chip 10 % slow | "
    "a wire at half its rate | a dead wire |\n| --- | --- | --- | --- | --- | --- | --- |"
)


def row(name: str) -> str:
    """Return what a kept program takes, healthy and with one thing slow or broken."""
    plan, made = samples.plan_of(name), samples.compiled(name)
    first = ",".join("0" * len(plan.machine.shape))
    wire = f"{first}-1{first[1:]}"
    found = [
        simulate_compiled(
            plan.machine, plan, made.schedule, perturbation=what_if(plan.machine, **broken)
        )
        for broken in (
            {},
            {"stragglers": [f"{first}=1.1"]},
            {"slow_links": [f"{wire}=0.5"]},
            {"dead_links": [wire]},
        )
    ]
    closed = float(found[0].closed.price.step_time_s)
    changes = [f"{100 * (one.step_time_s / closed - 1):+.1f} %" for one in found]
    return f"| `{name}` | {plan.machine.name} | {1e3 * closed:.3f} | {' | '.join(changes)} |"


def table() -> str:
    """Return the rows of all programs."""
    return "\n".join([HEAD, *map(row, samples.DATA)])


if __name__ == "__main__":
    print(table())
