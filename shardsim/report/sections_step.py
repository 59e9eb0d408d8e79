"""The sections of a report about one step: time, HBM, collectives, matmuls, one layer."""

from __future__ import annotations

from shardsim.cost.words import links_words
from shardsim.report.document import Beside, Drawing, Section, Text
from shardsim.report.links import axis_use
from shardsim.report.moments import moments
from shardsim.report.plots_plan import hbm_over_step, step_breakdown
from shardsim.report.plots_roofline import roofline
from shardsim.report.plots_timeline import layer_timeline
from shardsim.report.roofline import matmuls
from shardsim.report.study import Study
from shardsim.report.timeline import spans
from shardsim.units import show_percent, show_time
from shardsim.views.step import collectives, operations, parts

LONGEST = 12


def time_section(study: Study) -> Section:
    """Return where the step's time goes."""
    item = study.prediction
    return Section(
        "Where the time goes",
        [
            Beside(
                [
                    Drawing(
                        step_breakdown(item),
                        "The step by what it is made of. Exposed communication is what "
                        "nothing hides; waiting for HBM is what memory adds to the units' own "
                        "time.",
                    ),
                    parts(item),
                ]
            ),
            Text(f"The {LONGEST} longest computations of a step, on one device:"),
            operations(item).head(LONGEST).only("task", "block", "count", "time_s", "share"),
        ],
    )


def hbm_section(study: Study) -> Section:
    """Return where HBM goes over the step."""
    item = study.prediction
    return Section(
        "Where HBM goes",
        [
            moments(item),
            Drawing(
                hbm_over_step(item),
                f"HBM of one device at five moments of the step; it peaks at the "
                f"{item.peak_moment}. The dashed line is what programs may use.",
            ),
        ],
    )


def collectives_section(study: Study) -> Section:
    """Return the collectives of a step with their axes."""
    item = study.prediction
    if not item.collectives:
        return Section("Collectives", [Text("None: one device needs no links.")])
    total = sum(use.time_s for use in item.collectives)
    hidden = 1.0 - item.time["exposed_comm_s"] / total if total else 0.0
    return Section(
        "Collectives",
        [
            Text(
                f"Alone they would take {show_time(total)} of a step of "
                f"{show_time(item.step_time_s)}; {show_percent(max(hidden, 0.0))} of that is "
                "hidden behind computation."
            ),
            collectives(item),
            Text(_links(study)),
        ],
    )


def _links(study: Study) -> str:
    """Return how busy the links of each axis of the machine are."""
    parts = [
        f"{links_words(study.plan.machine, name)} for {100 * busy:.0f} %"
        for name, busy in axis_use(study.prediction).items()
    ]
    return f"Links carry traffic of collectives, hidden or not: of {', '.join(parts)} of the step."


def roofline_section(study: Study) -> Section:
    """Return every matmul against the roofline."""
    item = study.prediction
    return Section(
        "Roofline of every matmul",
        [
            Drawing(
                roofline(item),
                "Rate against arithmetic intensity; the area of a mark is its share of the "
                "step. Left of the knee HBM is the roof, right of it the matrix unit.",
            ),
            matmuls(item).only(
                *("matmul", "shape", "count", "share", "flops_per_byte", "flops_per_s"),
                *("of_peak", "roof"),
            ),
        ],
    )


def layer_section(study: Study) -> Section:
    """Return the timeline of one layer."""
    item = study.prediction
    return Section(
        "Timeline of one layer",
        [
            Drawing(
                layer_timeline(item),
                "One layer of one microbatch on one device: computation in the Program's "
                "order, below it what its links do meanwhile. Recomputation is part of the "
                "backward pass.",
            ),
            Text("Tasks of at least 1 % of their pass:"),
            spans(item, least=0.01).only("pass", "stream", "task", "start_s", "duration_s"),
        ],
    )
