"""Traces made by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

US = 1e-6

Row = tuple[str, float, float, Mapping[str, Any]]  # name, begin and length in us, arguments


def chrome(path: Path, threads: Mapping[tuple[str, str], Iterable[Row]]) -> Path:
    """Write a Chrome trace of the rows of threads, by process and thread."""
    processes = list(dict.fromkeys(process for process, _ in threads))
    events: list[dict[str, Any]] = [{}]
    for number, process in enumerate(processes):
        named = {"ph": "M", "name": "process_name", "args": {"name": process}}
        events.append({"pid": number, **named})
    for tid, ((process, thread), rows) in enumerate(threads.items()):
        where = {"pid": processes.index(process), "tid": tid}
        events.append({**where, "ph": "M", "name": "thread_name", "args": {"name": thread}})
        for name, start, length, stats in rows:
            times = {"ts": start, "dur": length}
            events.append({**where, **times, "ph": "X", "name": name, "args": dict(stats)})
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path
