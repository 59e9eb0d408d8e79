"""Runs a plan's step on the devices that JAX finds, and times it; started by `shardsim.xla.device`.

Reads one JSON object, {"tiny": ..., "full": ..., "budget_s": ...} with what
`shardsim.emit.specs.plan_data` gives or null, and answers with one. One process a plan: the
runtime's peak of memory is that of the process.
"""

from __future__ import annotations

import math
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from shardsim.emit.runtime.config import build_mesh
from shardsim.emit.runtime.train import Trainer
from shardsim.xla import worker
from shardsim.xla.worker import serve

LEARNING_RATE = 1e-6  # random labels must not make a long run diverge
WARM_UP, BLOCKS = 3, 5  # steps before any is timed; blocks of steps, of which the median counts
PACKAGES = ("jax", "jaxlib", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


def run(tiny: Any, full: Any, budget_s: float) -> dict[str, Any]:
    """Return what the devices are, how far the tiny copy is from its reference, and the times."""
    found: dict[str, Any] = {"devices": devices()}
    if tiny:
        # The reference of a comparison in float32 has its full precision.
        with jax.default_matmul_precision("highest"):
            found["compared"] = worker.run(tiny, steps=2)
    if full:
        found["measured"] = measure(full, budget_s)
    return found


def devices() -> dict[str, Any]:
    """Return what JAX finds here."""
    first = jax.devices()[0]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    backend = getattr(first.client, "platform_version", "").splitlines()[:1]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "versions": versions | ({"backend": backend[0]} if backend and backend[0] else {}),
    }


def measure(data: dict[str, Any], budget_s: float) -> dict[str, Any]:
    """Return the seconds of a step, the median of blocks of them, and the peak of memory.

    Steps follow each other without waiting, as in training; `spread` is the slowest block over the
    fastest, less one.
    """
    count = math.prod(axis["size"] for axis in data["plan"]["mesh"])
    mesh = build_mesh(data["plan"], jax.devices()[:count])
    trainer = Trainer(data, mesh, learning_rate=LEARNING_RATE)
    with jax.set_mesh(mesh):
        begun = time.perf_counter()
        params, state = trainer.start(jax.random.key(0))
        batch = trainer.batch(0)
        step = trainer.compiled(trainer.step, params, state, batch)
        compile_s = time.perf_counter() - begun

        def steps(many: int) -> float:
            nonlocal params, state
            start = time.perf_counter()
            for _ in range(many):
                params, state, loss = step(params, state, batch)
            jax.tree.map(lambda x: x.block_until_ready(), (params, state, loss))
            return (time.perf_counter() - start) / many

        one_s = steps(WARM_UP)
        many = max(1, int(budget_s / BLOCKS / one_s))
        times = [steps(many) for _ in range(BLOCKS)]
    memory = step.memory_analysis()
    program = (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    runtime = jax.devices()[0].memory_stats() or {}
    return {
        "step_time_s": statistics.median(times),
        "spread": max(times) / min(times) - 1.0,
        "steps": many * BLOCKS,
        "compile_s": compile_s,
        "program_peak_bytes": program,
        "peak_bytes": runtime.get("peak_bytes_in_use"),
    }


if __name__ == "__main__":
    serve(run)
