"""Compiles one emitted train.py for a TPU slice; started by `shardsim.xla.tpu.service`.

`python -m shardsim.xla.tpu.worker FOLDER` reads FOLDER/request.json (topology, options) and
FOLDER/train.py, and leaves FOLDER/result.json and, if it compiled, FOLDER/hlo.txt, the scheduled
program. No TPU is touched. What goes wrong is a result too: {"error": kind, "message": text}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from shardsim.xla.hlo.buffers import Assignment, read_assignment

STEP = "*jit_step*after_optimizations"  # the dumps of the step
REPORT_LINES = 40  # of the compiler's list of what fills HBM, largest first


def load(path: Path) -> Any:
    """Return the emitted module at `path`."""
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def compile_step(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Compile the train step; return memory, seconds and versions."""
    module = load(folder / "train.py")
    begun = time.perf_counter()
    topology = topologies.get_topology_desc(platform="tpu", **request["topology"])
    mesh = module.build_mesh(module.FULL["plan"], list(topology.devices))
    trainer = module.Trainer(module.FULL, mesh)
    shapes = trainer.shapes()  # outside of the mesh: nothing may run inside
    with jax.set_mesh(mesh):
        lowered = jax.jit(trainer.step, donate_argnums=(0, 1)).lower(*shapes)
        lowered_s = time.perf_counter() - begun
        say(f"lowered in {lowered_s:.0f} s")
        compiled = lowered.compile(compiler_options=request["options"])
    text: str = compiled.as_text()  # type: ignore[assignment]
    (folder / "hlo.txt").write_text(text, encoding="utf-8")
    return {
        "memory": memory_of(compiled.memory_analysis(), assignment_of(folder / "dump")),
        "lower_s": lowered_s,
        "compile_s": time.perf_counter() - begun - lowered_s,
        "largest_buffers": largest_buffers(folder / "dump"),
    }


def memory_of(analysis: Any, assigned: Assignment) -> dict[str, int]:
    """Return the figures of the compiler's memory analysis, in bytes of a device.

    "assigned_peak" is not of them: the most that is in use of HBM alone.
    """
    names = "argument_size output_size alias_size temp_size generated_code_size peak_memory"
    return {
        name: int(getattr(analysis, f"{name}_in_bytes"))
        for name in (*names.split(), "host_argument_size", "host_temp_size")
    } | {"assigned_peak": assigned.peak_bytes}


def assignment_of(dump: Path, program: str = STEP) -> Assignment:
    """Return a program's buffer assignment, as the compiler dumped it."""
    assignment, live = (
        sorted(dump.glob(f"{program}{ending}.txt"))[-1].read_text(encoding="utf-8")
        for ending in ("-buffer-assignment", "-live-range")
    )
    return read_assignment(assignment, live)


def largest_buffers(dump: Path) -> list[str]:
    """Return the head of the compiler's memory-usage report, if it wrote one."""
    for path in sorted(dump.glob("*memory-usage-report.txt")):
        with path.open(encoding="utf-8") as lines:
            return [line.rstrip()[:160] for line in islice(lines, REPORT_LINES)]
    return []


def versions() -> dict[str, Any]:
    """Return what compiles, as a part of the answer."""
    return {"versions": {name: version(name) for name in ("jax", "libtpu")}}


def say(text: str) -> None:
    """Tell the parent how far it is."""
    print(text, flush=True)


def end_with_parent() -> None:
    """End this process when its standard input closes: then nobody waits for the answer."""
    sys.stdin.read()
    os._exit(1)


def serve(compile_one: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """Do the request in the folder named on the command line, and leave what came out there."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = versions()
    try:
        result.update(compile_one(folder, request))
    except Exception as error:  # the parent reports it
        result.update(error=type(error).__name__, message=str(error)[:20_000])
        result["largest_buffers"] = largest_buffers(folder / "dump")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    serve(compile_step)
