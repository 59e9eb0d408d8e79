"""Measures kernels on the device that JAX finds; started by `shardsim.xla.calibrate_gpu`.

Reads one JSON object a line, {"bench": name, ...}, and answers with seconds. Every bench repeats
its operation within one program, so that starting a program is not in the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardsim.xla.device_worker import devices
from shardsim.xla.worker import serve

# Neither is typed in JAX.
barrier: Any = lax.optimization_barrier
wait: Any = jax.block_until_ready

BUDGET_S = 1.0  # for each bench: the power of a GPU settles within it
BLOCKS = 5


def seconds(step: Callable[[Any], Any], start: Any, repeats: int = 8) -> float:
    """Return the seconds of one `step`, the median of blocks that run one after another."""

    @jax.jit
    def many(x: Any) -> Any:
        return lax.fori_loop(0, repeats, lambda _, y: step(y), x)

    x = wait(many(start))
    begun = time.perf_counter()
    x = wait(many(x))
    one_s = time.perf_counter() - begun
    rounds = max(1, int(BUDGET_S / BLOCKS / one_s))
    times = []
    for _ in range(BLOCKS):
        begun = time.perf_counter()
        for _ in range(rounds):
            x = many(x)
        wait(x)
        times.append((time.perf_counter() - begun) / rounds / repeats)
    return statistics.median(times)


def noise(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Return random numbers: zeros would take less power."""
    return jax.random.normal(jax.random.key(len(shape)), shape, dtype)


def matmul(m: int, k: int, n: int) -> float:
    """Return the seconds of a bf16 matmul [m, k] by [k, n], with that of the way back."""
    there, back = noise(k, n), noise(n, k)
    return seconds(lambda x: ((x @ there) @ back) * (k * n) ** -0.5, noise(m, k)) / 2.0


def stream(elements: int) -> float:
    """Return the seconds of reading a bf16 array and writing it."""
    return seconds(lambda x: x * 1.0009765625 + 0.5, noise(elements))


def sums(rows: int, columns: int) -> float:
    """Return the seconds of a layer norm: two sums of each row, and the row read and written."""

    def norm(x: Any) -> Any:
        wide = x.astype(jnp.float32)
        square = barrier(jnp.mean(wide * wide, -1, keepdims=True))
        mean = barrier(jnp.mean(wide, -1, keepdims=True))
        return ((wide - mean) * lax.rsqrt(square - mean * mean + 1e-6)).astype(x.dtype)

    return seconds(norm, noise(rows, columns))


def copy(elements: int) -> float:
    """Return the seconds of copying a bf16 array into one place of a stack."""

    def update(x: Any) -> Any:
        stack, part = x
        return lax.dynamic_update_index_in_dim(stack, part, 1, 0), part

    return seconds(update, (noise(2, elements), noise(elements)))


def transpose(rows: int, heads: int, depth: int) -> float:
    """Return the seconds of laying bf16 [rows, heads, depth] out by head, and back."""

    def turn(x: Any) -> Any:
        turned = barrier(jnp.swapaxes(x, 0, 1) + 1.0)
        return jnp.swapaxes(turned, 0, 1) - 1.0

    return seconds(turn, noise(rows, heads, depth)) / 2.0


def optimizer(elements: int) -> float:
    """Return the seconds of an AdamW update of float32 parameters."""

    def update(x: Any) -> Any:
        value, first, second, gradient = x
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient * gradient
        return value - 1e-3 * first / (jnp.sqrt(second) + 1e-6), first, second, gradient

    return seconds(update, tuple(noise(elements, dtype=jnp.float32) for _ in range(4)), 4)


def scores(heads: int, tokens: int, depth: int) -> float:
    """Return the seconds of [heads, tokens, depth] times itself, in float32, and of reading it."""

    def product(q: Any) -> Any:
        pairs = jnp.einsum("hqd,hkd->hqk", q, q, preferred_element_type=jnp.float32)
        pairs = barrier(pairs).astype(q.dtype)
        return jnp.einsum("hqk,hkd->hqd", barrier(pairs), q) * tokens**-0.5

    return seconds(product, noise(heads, tokens, depth))


def attention(batch: int, tokens: int, heads: int, depth: int, gradient: bool) -> float:
    """Return the seconds of cuDNN's attention without a mask, or of it and its gradient."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def run(x: Any) -> Any:
        q, k, v = x
        if not gradient:
            return attend(q, k, v), k, v
        return jax.grad(lambda *y: jnp.sum(attend(*y).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    return seconds(run, tuple(noise(batch, tokens, heads, depth) for _ in range(3)))


BENCHES: dict[str, Callable[..., float]] = {
    "matmul": matmul,
    "stream": stream,
    "sums": sums,
    "copy": copy,
    "transpose": transpose,
    "optimizer": optimizer,
    "scores": scores,
    "attention": attention,
}


def measure(bench: str, **request: Any) -> dict[str, Any]:
    """Return what one of `BENCHES` found, or what the devices are."""
    return devices() if bench == "devices" else {"seconds": BENCHES[bench](**request)}


if __name__ == "__main__":
    serve(measure)
