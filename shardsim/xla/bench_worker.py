"""Measures host devices, or a plan's step on them; started by `shardsim.xla.host`.

Reads one JSON object a line, {"bench": name, ...}, and answers with one. All devices work at the
same time, because on a host they share its cores.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from shardsim.emit.runtime.config import build_mesh
from shardsim.emit.runtime.train import Trainer
from shardsim.xla.worker import serve


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def taken(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of `run`: of all cores, and by the clock.

    Those of all cores are what this process used of them, over their number. Others' work is in
    none of it, and where devices keep the cores busy the clock of a quiet machine says the same.
    """
    begun, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return (time.process_time() - used) / cores(), time.perf_counter() - begun


def seconds(run: Callable[[], Any], least: int = 5, budget_s: float = 0.5) -> float:
    """Return the seconds of all cores that `run` takes: the least of repeats for `budget_s`."""
    taken(run)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < budget_s:
        times.append(taken(run)[0])
    return min(times)


def everywhere(function: Any, *shapes: tuple[int, ...]) -> Callable[[], Any]:
    """Return a call that runs `function` on every device at once, on its own random arrays."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("all")
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(spec,) * len(shapes), out_specs=spec, check_vma=False
    )
    random = np.random.default_rng(0)
    place = jax.sharding.NamedSharding(mesh, spec)
    arrays = [
        jax.device_put(
            random.normal(size=(len(devices) * shape[0], *shape[1:])).astype(np.float32), place
        )
        for shape in shapes
    ]
    compiled = jax.jit(mapped).lower(*arrays).compile()
    return lambda: compiled(*arrays)


barrier: Any = lax.optimization_barrier  # not typed in JAX
REPEATS = 8  # in one program: starting a program on all devices costs more than one operation


def matmul(m: int, k: int, n: int) -> float:
    """Return the seconds of one float32 matmul [m, k] by [k, n], with those of the way back."""

    def run(x: Any, b: Any, c: Any) -> Any:
        return lax.fori_loop(0, REPEATS, lambda _, y: (y @ b) @ c / (k * n) ** 0.5, x)

    return seconds(everywhere(run, (m, k), (k, n), (n, k))) / (2 * REPEATS)


def stream(elements: int) -> float:
    """Return the seconds of reading and writing an array of `elements` once."""
    return seconds(everywhere(lambda x: x * 1.5 + 1.0, (elements,)))


def transpose(side: int) -> float:
    """Return the seconds of transposing a matrix of `side` x `side`."""

    def run(x: Any) -> Any:
        return lax.fori_loop(0, REPEATS, lambda _, y: barrier(y.T * 1.0001), x)

    return seconds(everywhere(run, (side, side))) / REPEATS


def activate(elements: int) -> float:
    """Return the seconds of gelu on `elements` that fit in a cache."""

    def run(x: Any) -> Any:
        return lax.fori_loop(0, REPEATS, lambda _, y: barrier(jax.nn.gelu(y)), x)

    return seconds(everywhere(run, (elements,))) / REPEATS


def collective(kind: str, elements: int, group: int) -> float:
    """Return the seconds of one collective of a whole float32 array of `elements`.

    Every `group` neighbours have one of their own, all at the same time.
    """
    devices = range(jax.device_count())
    groups = [list(devices[start : start + group]) for start in devices[::group]]
    share = elements // group
    around = [
        (member, members[(i + 1) % group]) for members in groups for i, member in enumerate(members)
    ]

    def one(i: Any, x: Any) -> Any:
        if kind == "all-gather":
            whole = lax.all_gather(x, "all", axis_index_groups=groups, tiled=True)
            return lax.dynamic_slice_in_dim(whole, (i % group) * share, share)
        if kind == "reduce-scatter":
            part = lax.psum_scatter(x, "all", axis_index_groups=groups, tiled=True)
            return lax.dynamic_update_slice_in_dim(x, part, 0, 0)
        if kind == "all-reduce":
            return lax.psum(x, "all", axis_index_groups=groups)
        return lax.ppermute(x, "all", around)

    size = share if kind == "all-gather" else elements
    call = everywhere(lambda x: lax.fori_loop(0, REPEATS, one, x), (size,))
    return seconds(call) / REPEATS


STEPS = 9  # and one before them, which is not counted


def step(data: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of one training step of a plan, the least of `STEPS`: of all cores, and
    by the clock."""
    used_devices = math.prod(axis["size"] for axis in data["plan"]["mesh"])
    mesh = build_mesh(data["plan"], jax.devices()[:used_devices])
    trainer = Trainer(data, mesh)
    with jax.set_mesh(mesh):
        params, state = trainer.start(jax.random.key(0))
        batch = trainer.batch(0)
        compiled = trainer.compiled(trainer.step, params, state, batch)

        def one() -> Any:
            nonlocal params, state
            params, state, loss = compiled(params, state, batch)
            return params, state, loss

        times = [taken(one) for _ in range(STEPS + 1)][1:]
    return {"seconds": min(own_s for own_s, _ in times), "clock_s": min(s for _, s in times)}


BENCHES: dict[str, Callable[..., float | dict[str, float]]] = {
    "matmul": matmul,
    "stream": stream,
    "transpose": transpose,
    "activate": activate,
    "collective": collective,
    "step": step,
}


def measure(bench: str, **request: Any) -> dict[str, Any]:
    """Return what one of `BENCHES` found."""
    found = BENCHES[bench](**request)
    return found if isinstance(found, dict) else {"seconds": found}


if __name__ == "__main__":
    serve(measure)
