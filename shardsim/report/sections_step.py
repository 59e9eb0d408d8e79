"""The sections of a report about one step: time, HBM, collectives, matmuls, one layer."""

from __future__ import annotations

from shardsim.cost.words import HBM, PARTS
from shardsim.report.document import Beside, Drawing, Section, Table, Text
from shardsim.report.links import axis_use
from shardsim.report.moments import hbm_moments
from shardsim.report.plots_plan import hbm_over_step, step_breakdown
from shardsim.report.plots_roofline import roofline
from shardsim.report.plots_timeline import layer_timeline
from shardsim.report.roofline import matmul_points
from shardsim.report.study import Study
from shardsim.report.timeline import layer_timelines
from shardsim.units import GIB, show_bytes, show_percent, show_time

LONGEST = 12


def time_section(study: Study) -> Section:
    """Return where the step's time goes."""
    item = study.prediction
    rows = [
        [PARTS[part], f"{value:.4g}", f"{100 * value / item.step_time_s:.1f}"]
        for part, value in item.time.items()
    ]
    rows.append(["step", f"{item.step_time_s:.4g}", "100.0"])
    return Section(
        title="Where the time goes",
        items=[
            Beside(
                items=[
                    Drawing(
                        figure=step_breakdown(item),
                        caption="The step by what it is made of. Exposed communication is what "
                        "nothing hides; waiting for HBM is what memory adds to the units' own "
                        "time.",
                    ),
                    Table(headers=["part of the step", "seconds", "share %"], rows=rows),
                ]
            ),
            Text(text=f"The {LONGEST} longest computations of a step, on one device:"),
            Table(
                headers=["computation", "in", "times", "seconds", "share %"],
                rows=_longest(study),
            ),
        ],
    )


def _longest(study: Study) -> list[list[str]]:
    item = study.prediction
    costs = sorted(item.price.computes, key=lambda cost: -float(cost.time_s))
    return [
        [
            cost.task.name,
            cost.block,
            f"{float(cost.count):,.0f}",
            f"{float(cost.time_s):.4g}",
            f"{100 * float(cost.time_s) / item.step_time_s:.1f}",
        ]
        for cost in costs[:LONGEST]
        if float(cost.time_s) > 0
    ]


def hbm_section(study: Study) -> Section:
    """Return where HBM goes over the step."""
    item = study.prediction
    moments = hbm_moments(item)
    rows = [
        [moment.name]
        + [f"{moment.uses[use] / GIB:.2f}" for use in HBM]
        + [f"{moment.total_bytes / GIB:.2f}"]
        for moment in moments
    ]
    return Section(
        title="Where HBM goes",
        items=[
            Table(headers=["GiB on one device", *HBM.values(), "together"], rows=rows),
            Drawing(
                figure=hbm_over_step(item),
                caption=f"HBM of one device at five moments of the step; it peaks at the "
                f"{item.peak_moment}. The dashed line is what the compiler offers.",
            ),
        ],
    )


def collectives_section(study: Study) -> Section:
    """Return the collectives of a step with their axes."""
    item = study.prediction
    if not item.collectives:
        return Section(title="Collectives", items=[Text(text="None: one device needs no links.")])
    rows = [
        [
            use.kind,
            ", ".join(use.mesh_axes) or "host link",
            use.purpose,
            show_bytes(use.bytes_per_chip),
            f"{use.count:,.0f}",
            f"{use.time_s:.4g}",
            f"{use.exposed_s:.4g}",
        ]
        for use in item.collectives
    ]
    total = sum(use.time_s for use in item.collectives)
    hidden = 1.0 - item.time["exposed_comm_s"] / total if total else 0.0
    headers = ["collective", "over", "of", "sent per device", "count", "seconds alone", "exposed"]
    return Section(
        title="Collectives",
        items=[
            Text(
                text=f"Alone they would take {show_time(total)} of a step of "
                f"{show_time(item.step_time_s)}; {show_percent(max(hidden, 0.0))} of that is "
                "hidden behind computation."
            ),
            Table(headers=headers, rows=rows),
            Text(text=_links(study)),
        ],
    )


def _links(study: Study) -> str:
    """Return how busy the links of each torus axis are."""
    parts = [
        f"{'the data-centre network' if name == 'dcn' else f'torus axis {name}'} for "
        f"{100 * busy:.0f} %"
        for name, busy in axis_use(study.prediction).items()
    ]
    return f"Links carry traffic of collectives, hidden or not: of {', '.join(parts)} of the step."


def roofline_section(study: Study) -> Section:
    """Return every matmul against the roofline."""
    item = study.prediction
    rows = [
        [
            point.name,
            point.shape,
            f"{point.count:,.0f}",
            f"{point.step_s / item.step_time_s * 100:.2f}",
            f"{point.flops_per_byte:,.0f}",
            f"{point.flops_per_s / 1e12:,.1f}",
            f"{100 * point.of_peak:.1f}",
            point.bound,
        ]
        for point in matmul_points(item)
    ]
    headers = [
        "matmul",
        "m x k x n on a device",
        "times",
        "step %",
        "FLOP/byte",
        "TFLOP/s",
        "of peak %",
        "roof",
    ]
    return Section(
        title="Roofline of every matmul",
        items=[
            Drawing(
                figure=roofline(item),
                caption="Rate against arithmetic intensity; the area of a mark is its share of the "
                "step. Left of the knee HBM is the roof, right of it the matrix unit.",
            ),
            Table(headers=headers, rows=rows),
        ],
    )


def layer_section(study: Study) -> Section:
    """Return the timeline of one layer."""
    item = study.prediction
    rows = []
    for one in layer_timelines(item):
        for span in one.spans:
            if span.duration_s >= 0.01 * one.total_s:
                rows.append(
                    [
                        one.block,
                        span.stream,
                        span.name,
                        f"{span.start_s * 1e3:.4g}",
                        f"{span.duration_s * 1e3:.4g}",
                    ]
                )
    return Section(
        title="Timeline of one layer",
        items=[
            Drawing(
                figure=layer_timeline(item),
                caption="One layer of one microbatch on one device: computation in the Program's "
                "order, below it what its links do meanwhile. Recomputation is part of the "
                "backward pass.",
            ),
            Text(text="Tasks of at least 1 % of their pass:"),
            Table(headers=["pass", "stream", "task", "starts at ms", "takes ms"], rows=rows),
        ],
    )
