"""What the files of profilers hold: events by process and thread, and the programs that ran.

XPlane files (`*.xplane.pb`, XProf's; schema: openxla/xprof, `xplane.proto`) are read with
`jax.profiler.ProfileData`, Chrome traces (`*.trace.json.gz`, `perfetto_trace.json.gz`) as the JSON
that they are. Both name processes and threads alike.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardsim.errors import FileError, ShardsimError

Wanted = Callable[[str, str], bool]  # whether the events of a process and thread are
Buffer = bytes | memoryview

_PROGRAMS = "/host:metadata"  # the plane whose events are the programs, each with its "Hlo Proto"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a trace, with what the profiler says of it."""

    process: str
    thread: str
    name: str
    start_ns: float
    end_ns: float
    stats: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TraceFile:
    """A file's text or bytes; `events` goes through them."""

    path: str
    xplane: bool
    data: bytes

    def events(self, wanted: Wanted) -> Iterator[Event]:
        """Yield the events of the processes and threads that are wanted."""
        return _xplane(self, wanted) if self.xplane else _chrome(self, wanted)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The spans and names of a Chrome trace, as its JSON has them."""
        data = json.loads(self.data)
        rows = data["traceEvents"] if isinstance(data, dict) else data
        return [row for row in rows if row.get("ph") in ("X", "M")]

    def programs(self) -> Mapping[str, bytes]:
        """Return the serialized HLO module of each program by its name and number.

        Chrome traces hold none.
        """
        try:
            return dict(_programs(memoryview(self.data))) if self.xplane else {}
        except (ValueError, IndexError):
            raise FileError(f"{self.path}: a damaged XPlane file") from None


def open_trace(path: str | Path) -> TraceFile:
    """Read a file; which of both it is shows at its beginning.

    Raises `FileError` for what cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    if not data:
        raise FileError(f"{path}: an empty file")
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise FileError(f"{path}: a damaged gzip file") from None
    return TraceFile(path=str(path), xplane=data.lstrip()[:1] not in (b"{", b"["), data=data)


def _xplane(file: TraceFile, wanted: Wanted) -> Iterator[Event]:
    if find_spec("jax") is None:
        raise ShardsimError(f"{file.path}: XPlane files need JAX: pip install 'shardsim[jax]'")
    reader = import_module("jax.profiler").ProfileData
    try:
        planes = list(reader.from_serialized_xspace(file.data).planes)
    except RuntimeError:
        raise FileError(f"{file.path}: neither an XPlane file nor a Chrome trace") from None
    for plane in planes:
        for line in plane.lines:
            if wanted(plane.name, line.name):
                for event in line.events:
                    yield Event(
                        plane.name,
                        line.name,
                        event.name,
                        event.start_ns,
                        event.start_ns + event.duration_ns,
                        {key: value for key, value in event.stats if key is not None},
                    )


def _chrome(file: TraceFile, wanted: Wanted) -> Iterator[Event]:
    try:
        rows = file.rows
        names: dict[tuple[str, Any, Any], str] = {}
        for row in rows:
            if row["ph"] == "M" and row["name"] in ("process_name", "thread_name"):
                thread = row.get("tid") if row["name"] == "thread_name" else None
                names[row["name"], row["pid"], thread] = str(row["args"]["name"])
        for row in rows:
            if row["ph"] != "X":
                continue
            process = names.get(("process_name", row["pid"], None), "")
            thread_name = names.get(("thread_name", row["pid"], row.get("tid")), "")
            if wanted(process, thread_name):
                start_ns = 1e3 * float(row["ts"])
                end_ns = start_ns + 1e3 * float(row.get("dur", 0.0))
                stats = row.get("args") or {}
                yield Event(process, thread_name, str(row["name"]), start_ns, end_ns, stats)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileError(f"{file.path}: not a Chrome trace, or a damaged one") from None


# The programs of an XPlane file are in the metadata of events, which `ProfileData` does not give.


def _fields(data: Buffer) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message: whole numbers and byte strings."""
    place, end = 0, len(data)

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < end:
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = number() if key & 7 == 2 else {1: 8, 5: 4}.get(key & 7, 0)
        if (not size and key & 7 != 2) or place + size > end:
            raise ValueError("not a protobuf message")
        yield key >> 3, data[place : place + size]
        place += size


def _all(data: Buffer, number: int) -> Iterator[Buffer]:
    return (value for key, value in _fields(data) if key == number and not isinstance(value, int))


def _programs(space: Buffer) -> Iterator[tuple[str, bytes]]:
    """Yield name and HLO module of each event's metadata: XSpace.planes, XPlane.event_metadata,
    its entry's value, XEventMetadata.stats, XStat.bytes_value, HloProto.hlo_module."""
    for plane in _all(space, 1):
        if bytes(next(_all(plane, 2), b"")).decode() != _PROGRAMS:
            continue
        for entry in _all(plane, 4):
            for metadata in _all(entry, 2):
                name = bytes(next(_all(metadata, 2), b"")).decode()
                for stat in _all(metadata, 5):
                    for proto in _all(stat, 6):
                        if module := bytes(next(_all(proto, 1), b"")):
                            yield name, module


def hlo_text(module: bytes) -> str | None:
    """Return a serialized HLO module as text, or None where this JAX has no way to."""
    try:
        read = import_module("jaxlib._hlo").HloModule.from_serialized_hlo_module_proto
        return str(read(module).to_string())
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None


_NUMBERED = re.compile(r"(.+?)\((\d+)\)")


def program_name(name: str, number: Any = None) -> str:
    """Return a program's name with its number, as the metadata has it: `jit_step(8)`.

    >>> program_name("jit_step", 8), program_name("jit_step(8)")
    ('jit_step(8)', 'jit_step(8)')
    """
    return name if number in (None, "") or _NUMBERED.fullmatch(name) else f"{name}({number})"
