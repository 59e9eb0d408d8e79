"""A trace of devices at work: what ran on which of them, when, and as part of which program.

TPUs have a plane each, whose line "XLA Ops" nests operations in loops, and GPUs one whose lines are
streams of kernels. Host devices have none: their operations are those events of the host's threads
that name an HLO instruction.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardsim.errors import FileError
from shardsim.xla.profile.files import Event, TraceFile, open_trace, program_name

_DEVICE = re.compile(r"/device:(TPU|GPU):\d+")
_OPS, _ASYNC, _MODULES = "XLA Ops", "Async XLA Ops", "XLA Modules"
_STREAM = "Stream #"
_HOST = "/host:CPU"
_INSTRUCTION = re.compile(r"%?([\w.\-]+)")  # what TPUs call an operation begins with its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One operation on one device, once."""

    device: str
    lane: str  # of operations of one lane the one that began last runs
    beside: bool  # whether its lane runs beside the device's work: transfers on their own
    op: str  # the HLO instruction; where nothing says it, the kernel
    kernel: str  # what a GPU calls it
    program: str
    run: str  # the run of the program, where these are numbered
    scope: str  # as JAX names it
    start_ns: float
    end_ns: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What ran on the devices of one kind: TPUs, GPUs, or host devices."""

    path: str
    kind: str  # "tpu", "gpu" or "cpu", as of `Chip`
    spans: tuple[Span, ...] = field(repr=False)
    # By device, where the profiler says it: begin and end of each run, and its program.
    runs: Mapping[str, tuple[tuple[float, float, str], ...]] = field(repr=False)
    file: TraceFile = field(repr=False)


def read_trace(path: str | Path) -> Trace:
    """Return what a file of a profiler says of the devices.

    Raises `FileError` for a file that is none, is damaged, or has no operation of a device.
    """
    file = open_trace(path)
    for kind in ("tpu", "gpu", "cpu"):
        spans, runs = _read(kind, file.events(_WANTED[kind]))
        if spans:
            return Trace(path=str(path), kind=kind, spans=spans, runs=runs, file=file)
    raise FileError(f"{path}: no operation of a TPU, GPU or host device is in this trace")


_WANTED = {
    "tpu": lambda process, thread: _plane(process) == "TPU" and thread in (_OPS, _ASYNC, _MODULES),
    "gpu": lambda process, thread: _plane(process) == "GPU" and thread.startswith(_STREAM),
    "cpu": lambda process, thread: process.endswith(_HOST),
}


def _plane(process: str) -> str:
    """Return "TPU" or "GPU" for the plane of a whole device, and not of a core beside it."""
    match = _DEVICE.search(process)
    return match[1] if match and "SparseCore" not in process else ""


def _read(
    kind: str, events: Iterable[Event]
) -> tuple[tuple[Span, ...], dict[str, tuple[tuple[float, float, str], ...]]]:
    found: list[Span] = []
    runs: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        if event.thread == _MODULES:
            program = program_name(event.name, event.stats.get("program_id"))
            runs[event.process].append((event.start_ns, event.end_ns, program))
        elif (span := _SPANS[kind](event)) is not None and span.end_ns > span.start_ns:
            found.append(span)
    ordered = {device: tuple(sorted(times)) for device, times in runs.items()}
    spans = sorted((_in_run(span, ordered) for span in found), key=lambda one: one.start_ns)
    return tuple(spans), ordered


def _in_run(span: Span, runs: Mapping[str, tuple[tuple[float, float, str], ...]]) -> Span:
    """Return a span with the program that ran when it began, if it does not say one."""
    times = runs.get(span.device, ())
    at = bisect_right(times, (span.start_ns, float("inf"), "")) - 1
    if span.program or at < 0 or span.start_ns >= times[at][1]:
        return span
    return replace(span, program=times[at][2])


def _program(event: Event) -> str:
    name = event.stats.get("hlo_module")
    return program_name(str(name), event.stats.get("program_id")) if name else ""


def _on_tpu(event: Event) -> Span | None:
    match = _INSTRUCTION.match(event.name)
    if match is None:
        return None
    return Span(
        device=event.process,
        lane=event.thread,
        beside=event.thread == _ASYNC,
        op=match[1],
        kernel="",
        program=_program(event),
        run="",
        scope=str(event.stats.get("tf_op", "")).rstrip(":"),
        start_ns=event.start_ns,
        end_ns=event.end_ns,
    )


def _on_gpu(event: Event) -> Span:
    told = event.stats.get("name") or event.stats.get("tf_op") or ""
    to_host = any(word in event.name for word in ("HtoD", "H2D", "DtoH", "D2H"))
    return Span(
        device=event.process,
        lane=event.thread,
        beside=to_host,
        op=str(event.stats.get("hlo_op", event.name)),
        kernel=event.name,
        program=_program(event),
        run="",
        scope=str(told) if "/" in str(told) else "",
        start_ns=event.start_ns,
        end_ns=event.end_ns,
    )


def _on_host(event: Event) -> Span | None:
    if "hlo_op" not in event.stats:
        return None
    return Span(
        device=f"host device {event.stats.get('device_ordinal', 0)}",
        lane=event.thread,
        beside=False,
        op=str(event.stats["hlo_op"]),
        kernel="",
        program=_program(event),
        run=str(event.stats.get("run_id", "")),
        scope="",
        start_ns=event.start_ns,
        end_ns=event.end_ns,
    )


_SPANS = {"tpu": _on_tpu, "gpu": _on_gpu, "cpu": _on_host}
