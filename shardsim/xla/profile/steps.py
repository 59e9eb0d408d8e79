"""The steps in a trace: how long one takes, and which operation each instant of it belongs to.

A device may do several things at once. An instant belongs to what computes then; where nothing
does, to a collective, else to what was started to run beside others (copies, as a rule), else to a
loop or call that holds nothing that runs; several of the same class share it. So the operations of
a step and the time in which none runs add up to the step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shardsim.errors import FileError
from shardsim.xla.profile.names import is_container
from shardsim.xla.profile.program import COLLECTIVE, CONTAINER, Program, What, by_name
from shardsim.xla.profile.trace import Span, Trace

NS = 1e-9

Key = tuple[str, str, str]  # program, operation, kernel
Describe = Callable[[Span], What]


@dataclass(frozen=True, kw_only=True)
class OpTime:
    """One operation in a step on one device: means over the steps and the devices."""

    program: str
    op: str
    kernel: str
    what: What
    own_s: float  # in which the step's time belongs to it
    count: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The steps of one program; `idle_s` and the `own_s` of all operations add up to `step_s`."""

    kind: str  # as of `Trace`
    program: str
    devices: int
    steps: int
    step_s: float
    idle_s: float
    ops: tuple[OpTime, ...]  # longest first


def longest_program(trace: Trace) -> str:
    """Return the program whose operations took longest; nothing if no operation names one."""
    times: Counter[str] = Counter()
    for span in trace.spans:
        if span.program and not is_container(span.op):
            times[span.program] += round(span.end_ns - span.start_ns)
    return max((seconds, name) for name, seconds in times.items())[1] if times else ""


def profile_of(trace: Trace, name: str, program: Program) -> Profile:
    """Return the steps of the program called `name`, whose operations `program` knows.

    A step lasts from the begin of a run to that of the next, so the last run of several only ends
    one. Raises `FileError` if the trace has no run.
    """

    def describe(span: Span) -> What:
        if span.program in (name, ""):
            return program.what(span.op, span.kernel, span.scope)
        return by_name(span.op, span.kernel, span.scope)

    by_device: dict[str, list[Span]] = defaultdict(list)
    for span in trace.spans:
        by_device[span.device].append(span)
    windows = {
        device: window
        for device, spans in by_device.items()
        if (window := _window(trace, device, spans, name))
    }
    if not windows:
        raise FileError(f"{trace.path}: no step of {name or 'a program'} is in this trace")
    own: dict[Key, float] = defaultdict(float)
    counts: dict[Key, float] = defaultdict(float)
    whats: dict[Key, What] = {}
    step_s = idle_s = 0.0
    for device, (start_ns, end_ns, steps) in windows.items():
        share = 1.0 / (steps * len(windows))
        busy_s = 0.0
        for span, seconds in _owners(by_device[device], start_ns, end_ns, describe):
            own[_key(span)] += seconds * share
            busy_s += seconds
        for span in by_device[device]:
            if start_ns <= span.start_ns < end_ns:
                counts[_key(span)] += share
                whats.setdefault(_key(span), describe(span))
        step_s += (end_ns - start_ns) * NS * share
        idle_s += ((end_ns - start_ns) * NS - busy_s) * share
    ops = [
        OpTime(
            program=key[0], op=key[1], kernel=key[2], what=whats[key], own_s=own[key], count=count
        )
        for key, count in counts.items()
    ]
    return Profile(
        kind=trace.kind,
        program=name,
        devices=len(windows),
        steps=min(steps for _, _, steps in windows.values()),
        step_s=step_s,
        idle_s=idle_s,
        ops=tuple(sorted(ops, key=lambda one: (-one.own_s, one.op))),
    )


def _key(span: Span) -> Key:
    return span.program, span.op, span.kernel


def _window(
    trace: Trace, device: str, spans: Sequence[Span], program: str
) -> tuple[float, float, int] | None:
    """Return begin and end of the steps on a device, and how many they are."""
    mine = [span for span in spans if span.program in (program, "") and not span.beside]
    if not mine:
        return None
    starts = [start for start, _, name in trace.runs.get(device, ()) if name == program]
    if not starts and all(span.run for span in mine):
        begins: dict[str, float] = {}
        for span in mine:
            begins.setdefault(span.run, span.start_ns)
        starts = sorted(begins.values())
    starts = starts or _rare(mine)
    if len(starts) > 1:
        return starts[0], starts[-1], len(starts) - 1
    return mine[0].start_ns, max(span.end_ns for span in mine), 1


def _rare(spans: Sequence[Span]) -> list[float]:
    """Return when steps begin that nothing numbers: at the first of what runs once in each.

    It runs as rarely as anything that is not alone in that.
    """
    times: dict[Key, list[float]] = defaultdict(list)
    for span in spans:
        times[_key(span)].append(span.start_ns)
    usual = Counter(len(starts) for starts in times.values())
    shared = [count for count, several in usual.items() if several > 1]
    once = min(shared or usual)
    return next(starts for starts in times.values() if len(starts) == once)


def _rank(span: Span, what: What) -> int:
    """Return the class of a span: an instant belongs to the lowest that is there."""
    if what.kind == CONTAINER:
        return 3
    if what.kind == COLLECTIVE:
        return 1
    return 2 if span.beside or what.beside else 0


def _owners(
    spans: Sequence[Span], start_ns: float, end_ns: float, describe: Describe
) -> Iterator[tuple[Span, float]]:
    """Yield operations and seconds that belong to them between two times."""
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    # When each span comes on top of its lane, and when it no longer is.
    changes: list[tuple[float, int, Span]] = []
    for lane in lanes.values():
        for begin, end, span in _tops(lane):
            begin, end = max(begin, start_ns), min(end, end_ns)
            if end > begin:
                changes += [(begin, 1, span), (end, -1, span)]
    changes.sort(key=lambda change: (change[0], change[1]))
    active: tuple[list[Span], ...] = ([], [], [], [])
    now = start_ns
    for time, change, span in changes:
        if time > now and (first := next(filter(None, active), None)):
            for one in first:
                yield one, (time - now) * NS / len(first)
        now = time
        mine = active[_rank(span, describe(span))]
        if change > 0:
            mine.append(span)
        else:
            mine.remove(span)


def _tops(lane: Sequence[Span]) -> Iterator[tuple[float, float, Span]]:
    """Yield the pieces of time in which each span of a lane is the one that began last."""
    stack: list[Span] = []
    now = 0.0
    for span in sorted(lane, key=lambda one: (one.start_ns, -one.end_ns)):
        while stack and stack[-1].end_ns <= span.start_ns:
            top = stack.pop()
            if top.end_ns > now:
                yield now, top.end_ns, top
                now = top.end_ns
        if stack and span.start_ns > now:
            yield now, span.start_ns, stack[-1]
        now = max(now, span.start_ns)
        stack.append(span)
    while stack:
        top = stack.pop()
        if top.end_ns > now:
            yield now, top.end_ns, top
            now = top.end_ns
