"""Measures host devices, or a plan's step on them; started by `shardsim.xla.host`.

Reads one JSON object a line, {"bench": name, ...}, and answers with one. All devices work at the
same time, because on a host they share its cores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from shardsim.emit.runtime.config import build_mesh
from shardsim.emit.runtime.train import Trainer


def seconds(run: Callable[[], Any], least: int = 5, budget_s: float = 1.0) -> float:
    """Return the shortest time of `run`, repeated for about `budget_s`: others may use the CPU."""
    jax.block_until_ready(run())
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < budget_s:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
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


def matmul(size: int) -> float:
    """Return the seconds of one float32 matmul of a square of `size`, of eight in a row."""

    def run(a: Any, b: Any) -> Any:
        return lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x[:1, :1]) + x @ b, a)

    return seconds(everywhere(run, (size, size), (size, size))) / 8


def stream(elements: int) -> float:
    """Return the seconds of reading and writing an array of `elements` once."""
    return seconds(everywhere(lambda x: x * 1.5 + 1.0, (elements,)))


def vector(elements: int) -> float:
    """Return the seconds of 64 multiply-adds on each of `elements` that fit in a cache."""

    def run(x: Any) -> Any:
        return lax.fori_loop(0, 8, lambda _, y: sum(y * (0.1 * i) + 0.5 for i in range(8)), x)

    return seconds(everywhere(run, (elements,)))


def collective(kind: str, elements: int) -> float:
    """Return the seconds of one collective of a whole float32 array of `elements`."""
    count = jax.device_count()
    if kind == "all-gather":
        one = everywhere(
            lambda x: lax.all_gather(x, "all", tiled=True)[: elements // count],
            (elements // count,),
        )
    elif kind == "reduce-scatter":
        one = everywhere(lambda x: lax.psum_scatter(x, "all", tiled=True), (elements,))
    else:
        one = everywhere(lambda x: lax.psum(x, "all"), (elements,))
    return seconds(one)


def step(data: dict[str, Any]) -> float:
    """Return the seconds of one training step of a plan, the shortest of five."""
    mesh = build_mesh(data["plan"])
    trainer = Trainer(data, mesh)
    with jax.set_mesh(mesh):
        params, state = trainer.start(jax.random.key(0))
        batch = trainer.batch(0)
        compiled = trainer.compiled(trainer.step, params, state, batch)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            params, state, loss = compiled(params, state, batch)
            jax.block_until_ready((params, state, loss))
            times.append(time.perf_counter() - start)
    return min(times[1:])


BENCHES: dict[str, Callable[..., float]] = {
    "matmul": matmul,
    "stream": stream,
    "vector": vector,
    "collective": collective,
    "step": step,
}


def main() -> None:
    """Answer each line of standard input with one on standard output."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"seconds": BENCHES[request.pop("bench")](**request)}
        except Exception as error:  # the parent reports it
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
