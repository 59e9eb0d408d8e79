"""What ran when: a trace for Perfetto and chrome://tracing, and a picture of one layer."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsim.cost.predict import Prediction
from shardsim.errors import FileError
from shardsim.files import write_bytes, write_text
from shardsim.plan.io import PlanOrPath
from shardsim.simulate.collective import Span
from shardsim.simulate.outcome import engine_of
from shardsim.simulate.step import simulate_plan

US = 1e6
OF_A_LETTER = 0.0055  # of a picture's width, of a name on a bar
OF_A_CHIP = {"unit": "layer", "compute": "compute", "host": "host link"}  # rows, by what they show


@dataclass(frozen=True, kw_only=True)
class Track:
    """One row: spans that do not overlap."""

    process: str
    name: str
    spans: tuple[Span, ...]


def watched(plan: PlanOrPath, **options: Any) -> tuple[Prediction, list[Span]]:
    """Simulate `plan` and return what was seen too."""
    spans: list[Span] = []
    return simulate_plan(plan, watch=spans.append, **options), spans


def tracks(simulation: Prediction, spans: Iterable[Span]) -> list[Track]:
    """Return one row for every class of chips, every collective under way, every direction.

    Where spans of one row overlap, the row gets a second one.
    """
    engine = engine_of(simulation)
    rows: dict[tuple[int, str, str], list[Span]] = {}
    seen: set[tuple[str, str, int, float]] = set()
    for span in spans:
        if span.role in OF_A_CHIP:
            count = int(engine.folded.device_counts[span.group])
            example = engine.topology.coordinates(int(engine.folded.devices[span.group]))
            process = f"{count} chips like {example}"
            rows.setdefault((0, process, span.role), []).append(span)
            continue
        where = f"groups over {engine.where(span.role)}" + (
            f", class {span.group}" if span.group else ""
        )
        if not span.leg:
            key = (span.name, span.role, span.group, span.start_s)
            if key not in seen:
                seen.add(key)
                rows.setdefault((1, where, "collectives"), []).append(span)
            continue
        for port in sorted(span.ports):
            rows.setdefault((2, where, f"link {engine.topology.port_name(port)}"), []).append(span)
    found = []
    for (_, process, name), row in sorted(rows.items(), key=lambda item: item[0]):
        for number, lane in enumerate(_lanes(row)):
            title = OF_A_CHIP.get(name, name)
            found.append(
                Track(
                    process=process,
                    name=title if number == 0 else f"{title} ({number + 1})",
                    spans=tuple(lane),
                )
            )
    return found


def _lanes(row: list[Span]) -> list[list[Span]]:
    lanes: list[list[Span]] = []
    for span in sorted(row, key=lambda span: (span.start_s, -span.end_s)):
        for lane in lanes:
            if lane[-1].end_s <= span.start_s + 1e-12:
                lane.append(span)
                break
        else:
            lanes.append([span])
    return lanes


def trace_events(simulation: Prediction, spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Return a step as trace events; times in microseconds."""
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    for thread, track in enumerate(tracks(simulation, spans), start=1):
        if track.process not in processes:
            processes[track.process] = len(processes) + 1
            events.append(
                {
                    "name": "process_name",
                    "ph": "M",
                    "pid": processes[track.process],
                    "args": {"name": track.process},
                }
            )
        pid = processes[track.process]
        named = {"name": track.name}
        events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": thread, "args": named})
        for span in track.spans:
            arguments: dict[str, Any] = {}
            if span.role not in OF_A_CHIP:
                arguments = {"bytes": round(span.bytes), "role": span.role}
                if span.leg:
                    arguments["axis"] = span.leg
            events.append(
                {
                    "name": span.name,
                    "cat": span.role,
                    "ph": "X",
                    "ts": span.start_s * US,
                    "dur": (span.end_s - span.start_s) * US,
                    "pid": pid,
                    "tid": thread,
                    "args": arguments,
                }
            )
    return events


def write_trace(plan: PlanOrPath, path: str | os.PathLike[str], **options: Any) -> Prediction:
    """Simulate a step of `plan` and write it for Perfetto or chrome://tracing.

    Rows: what one chip of each class computes, the collectives of each kind of group, and each
    link direction, with the bytes that one chip's link carries. `options` as in `simulate_plan`.
    """
    simulation, spans = watched(plan, **options)
    write_text(path, trace_text(simulation, spans))
    return simulation


def trace_text(simulation: Prediction, spans: Iterable[Span]) -> str:
    """Return what was seen of a step as trace events, in JSON."""
    plan = simulation.plan
    data = {
        "displayTimeUnit": "ms",
        "otherData": {
            "plan": plan.name,
            "model": plan.model.name,
            "machine": plan.machine.name,
            "step_time_s": simulation.step_time_s,
            "mfu": simulation.mfu,
        },
        "traceEvents": trace_events(simulation, spans),
    }
    return json.dumps(data)


def draw_layer(plan: PlanOrPath, path: str | os.PathLike[str], **options: Any) -> Prediction:
    """Simulate a step and draw a layer from the middle, forward and backward, as PNG or SVG."""
    picture_format(path)
    simulation, spans = watched(plan, **options)
    save_layer(simulation, spans, path)
    return simulation


def save_layer(simulation: Prediction, spans: Iterable[Span], path: str | os.PathLike[str]) -> None:
    """Draw a layer from the middle of a step, forward and backward, as it was seen."""
    from matplotlib.figure import Figure

    plan = simulation.plan
    rows = tracks(simulation, spans)
    first = rows[0].process
    units = [
        span for row in rows if row.process == first and row.name == "layer" for span in row.spans
    ]
    windows = []
    for name in engine_of(simulation).layers():
        named = [span for span in units if span.name == name]
        windows.append(named[len(named) // 2])
    shown = [row for row in rows if not row.name.startswith("layer")]
    shown = [row for row in shown if row.process == first or not row.process.endswith("like")]
    shown = [row for row in shown if any(_within(span, w) for span in row.spans for w in windows)]
    colours = _Colours()
    figure = Figure(figsize=(13, 1.2 + 2 * (0.8 + 0.34 * len(shown))), layout="constrained")
    for place, window in enumerate(windows):
        axes = figure.add_subplot(len(windows), 1, place + 1)
        for number, row in enumerate(shown):
            bars: dict[Any, list[tuple[float, float]]] = {}
            for span in row.spans:
                begin, end = max(span.start_s, window.start_s), min(span.end_s, window.end_s)
                if end > begin:
                    bars.setdefault(colours.of(span), []).append(
                        ((begin - window.start_s) * 1e3, (end - begin) * 1e3)
                    )
                    _label(axes, span, begin, end, window, number)
            for colour, pieces in bars.items():
                axes.broken_barh(
                    pieces, (number - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.3
                )
        length_ms = (window.end_s - window.start_s) * 1e3
        axes.set_xlim(0, length_ms)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_yticks(range(len(shown)), [_row_name(row, first) for row in shown], fontsize=8)
        axes.set_title(f"{window.name}: {length_ms:.4g} ms", fontsize=10, loc="left")
        axes.set_xlabel("ms", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = colours.legend()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        f"{plan.name} on {plan.machine.name}: step {simulation.step_time_s:.4g} s, "
        f"MFU {100 * simulation.mfu:.1f} %",
        fontsize=11,
    )
    save_figure(figure, path)


def _within(span: Span, window: Span) -> bool:
    return span.end_s > window.start_s and span.start_s < window.end_s


def _row_name(row: Track, first: str) -> str:
    if row.process == first:
        return row.name
    return f"{row.process.removeprefix('groups over ')}: {row.name}"


def _label(axes: Any, span: Span, begin: float, end: float, window: Span, row: int) -> None:
    """Write a span's name on its bar where there is room."""
    if span.role != "compute":
        return
    share = (end - begin) / (window.end_s - window.start_s)
    if share > OF_A_LETTER * len(span.name):
        middle = ((begin + end) / 2 - window.start_s) * 1e3
        axes.text(middle, row, span.name, ha="center", va="center", fontsize=7, color="white")


class _Colours:
    """Grey-blue for compute, one strong colour for each collective, whole or by its hops."""

    palette = (
        "#d1495b", "#edae49", "#00798c", "#66a182", "#8d6a9f", "#e07a5f", "#3d5a80", "#9a8c98",
        "#b5838d", "#588157", "#bc6c25", "#219ebc",
    )  # fmt: skip

    def __init__(self) -> None:
        self.names = {"compute": "#4a5a6a"}

    def of(self, span: Span) -> str:
        if span.role == "compute":
            blocks = span.name.endswith("blocks")
            name = "compute, in blocks beside hops" if blocks else "compute"
            return self.names.setdefault(name, "#6c8197")
        name = span.name.partition(", ")[0]
        return self.names.setdefault(name, self.palette[len(self.names) % len(self.palette)])

    def legend(self) -> tuple[list[Any], list[str]]:
        from matplotlib.patches import Patch

        return [Patch(facecolor=colour) for colour in self.names.values()], list(self.names)


def picture_format(path: str | os.PathLike[str]) -> str:
    """Return the format that the ending of a picture's name stands for."""
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise FileError(f"cannot draw {path}: the name must end in .png, .svg or .pdf")
    return kind


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a picture whole or not at all; the ending of `path` says which format."""
    kind = picture_format(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    write_bytes(Path(path), buffer.getvalue())
