"""Compiles the emitted step of a plan until its buffers are assigned, and says what HBM holds.

Runs in a process of its own, as `worker` does: what comes after, the generation of code, takes most
of a compilation and changes no buffer.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from shardsim.xla.hlo.buffers import Assignment, Buffer
from shardsim.xla.tpu.worker import STEP, assignment_of, compile_step, serve, versions

LISTED = 16  # of what is live at the peak, largest first
_POLL_S = 0.5
_OF = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def compile_held(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Compile until the assignment is written; ends this process with its answer then."""
    threading.Thread(target=_answer_when_assigned, args=(folder,), daemon=True).start()
    compile_step(folder, request)
    return held(folder / "dump")


def _answer_when_assigned(folder: Path) -> None:
    """Wait for the last of the dumps that buffers are read from; answer, and end."""
    while not any((folder / "dump").glob(f"{STEP}_after_buffer_assignment.txt")):
        time.sleep(_POLL_S)
    time.sleep(4 * _POLL_S)  # it may still be written
    result = versions() | held(folder / "dump")
    part = folder / "part.json"
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(folder / "result.json")
    os._exit(0)


def held(dump: Path) -> dict[str, Any]:
    """Return what a step holds in HBM at its fullest moment, and what HBM and host must have."""
    found = assignment_of(dump)
    memory = {
        "peak_memory": found.peak_bytes,
        "argument_size": found.arguments_bytes,
        "host_size": found.host_bytes,
        "allocated_size": found.allocated_bytes,
    }
    text = sorted(dump.glob(f"{STEP}.txt"))[-1].read_text(encoding="utf-8")
    return {"memory": memory, "at_peak": _largest(found, text)}


def _largest(found: Assignment, text: str) -> list[list[Any]]:
    """Return the largest buffers at the peak: bytes, shape, and the JAX operation of each."""
    there = sorted(found.at(found.fullest[0]), key=lambda buffer: -buffer.size_bytes)[:LISTED]
    made_by = {match[1]: match[2] for match in _OF.finditer(text)}
    return [[buffer.size_bytes, buffer.shape, _short(made_by, buffer)] for buffer in there]


def _short(made_by: dict[str, str], buffer: Buffer) -> str:
    """Return the last parts of the name of what makes a buffer."""
    return "/".join(made_by.get(buffer.name, buffer.name).split("/")[-3:])


if __name__ == "__main__":
    serve(compile_held)
