"""Compiles single operations for one TPU chip; started by `shardsim.xla.tpu.op_service`.

The first line on standard input is {"topology": ..., "options": ...}, every other line an
operation as `shardsim.validate.ops.Op.text` writes it. Each is answered with one line of JSON:
{"op": text, "cycles": the compiler's estimate} or {"op": text, "error": one line}. No TPU is
touched. The process ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from shardsim.validate.ops import HEADS, Op, parse_op
from shardsim.xla.hlo import read_hlo

DTYPES: dict[str, Any] = {"bf16": jnp.bfloat16, "f32": jnp.float32}
Array = jax.Array
Shapes = list[tuple[tuple[int, ...], Any]]


def code_of(op: Op) -> tuple[Callable[..., Any], Shapes]:
    """Return a function that does `op`, and the shapes of what it is called with."""
    dtype = DTYPES[op.dtype]
    if op.name == "matmul" or op.name.startswith("matmul_"):
        return _matmul(op, dtype)
    if op.name in ("layer_norm", "rms_norm"):
        array, row = (op.m, op.n), (op.n,)
        return (
            _layer_norm if op.name == "layer_norm" else _rms_norm,
            [(array, dtype), (row, jnp.float32)],
        )
    if op.name == "adamw":
        return _adamw, [((op.m, op.n), jnp.float32)] * 4
    if op.name == "attention":
        return _attention, [((op.batch, op.m, HEADS, op.k), jnp.bfloat16)] * 3
    if op.name == "softmax":
        return _softmax, [((op.batch, op.m, op.n), dtype)]
    if op.name == "split_heads":
        return lambda x: jnp.swapaxes(x, 1, 2), [((op.batch, op.m, op.k, op.n), dtype)]
    array = (op.m, op.n)
    plain: dict[str, tuple[Callable[..., Any], Shapes]] = {
        "add": (jnp.add, [(array, dtype)] * 2),
        "gelu": (jax.nn.gelu, [(array, dtype)]),
        "column_sum": (lambda x: jnp.sum(x, axis=0, dtype=jnp.float32), [(array, dtype)]),
        "transpose": (jnp.transpose, [(array, dtype)]),
    }
    return plain[op.name]


def _matmul(op: Op, dtype: Any) -> tuple[Callable[..., Any], Shapes]:
    batch = () if op.batch == 1 else (op.batch,)
    batches = tuple(range(len(batch)))
    left, right = (*batch, op.m, op.k), (*batch, op.k, op.n)
    ends: dict[str, tuple[Callable[..., Array], Shapes]] = {
        "matmul": (lambda y: y, []),
        "matmul_dw": (lambda y: y, []),
        "matmul_bias": (lambda y, bias: y + bias, [((op.n,), dtype)]),
        "matmul_gelu": (jax.nn.gelu, []),
        "matmul_residual": (lambda y, x: y + x, [((*batch, op.m, op.n), dtype)]),
    }
    end, more = ends[op.name]
    contracted, contracted_right = len(batch) + 1, len(batch)
    if op.name == "matmul_dw":
        left, contracted = (*batch, op.k, op.m), len(batch)

    def run(a: Array, b: Array, *rest: Array) -> Array:
        numbers = (((contracted,), (contracted_right,)), (batches, batches))
        return end(jax.lax.dot_general(a, b, numbers, preferred_element_type=dtype), *rest)

    return run, [(left, jnp.bfloat16), (right, jnp.bfloat16), *more]


def _layer_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    squares = (wide * wide).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(squares - mean * mean + 1e-6) * scale).astype(x.dtype)


def _rms_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    squares = (wide * wide).mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(squares + 1e-6) * scale).astype(x.dtype)


def _softmax(x: Array) -> Array:
    return jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)


def _attention(q: Array, k: Array, v: Array) -> Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    return jnp.einsum("bhqk,bkhd->bqhd", _softmax(scores), v)


def _adamw(p: Array, g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    return p - 1e-3 * (m / (jnp.sqrt(v) + 1e-8) + 0.1 * p), m, v


def cycles_of(op: Op, sharding: Any, options: dict[str, Any]) -> int:
    """Return the cycles that the compiler estimates for all of `op`'s instructions."""
    run, shapes = code_of(op)
    struct: Any = jax.ShapeDtypeStruct
    given = [struct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    compiled = jax.jit(run).lower(*given).compile(compiler_options=options)
    text: str = compiled.as_text()  # type: ignore[assignment]
    return read_hlo(text, {}).cycles


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.loads(sys.stdin.readline())
    topology = topologies.get_topology_desc(platform="tpu", **request["topology"])
    sharding = SingleDeviceSharding(topology.devices[0])
    for line in sys.stdin:
        answer: dict[str, Any] = {"op": line.strip()}
        try:
            answer["cycles"] = cycles_of(parse_op(line.strip()), sharding, request["options"])
        except Exception as error:  # the parent reports it
            answer["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
