"""Runs every collective matmul beside the plain one on host devices; prints JSON.

Started by test_collective_matmul.py with eight host devices.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from shardsim.emit.runtime import collectives
from shardsim.emit.runtime.config import Group

BATCH, TOKENS, EMBED, WIDE = 2, 16, 32, 48


def expand(x: Any, ws: Any, group: Group, split: str, mode: str) -> Any:
    """Return x @ w for each weight, x in pieces."""
    if mode != "off":
        both = mode == "bidirectional"
        return collectives.gather_linear(x, ws, group, split, both, x.dtype, len(ws))
    x = collectives.gather(x, group, collectives.SLICED[split])
    return tuple(x @ w for w in ws)


def contract(hs: Any, ws: Any, group: Group, split: str, mode: str) -> Any:
    """Return the sum of h @ w, in pieces."""
    if mode != "off":
        return collectives.scatter_linear(hs, ws, group, split, mode == "bidirectional")
    y = sum(h @ w for h, w in zip(hs, ws, strict=True))
    return collectives.scatter(y, group, collectives.SLICED[split])


def case(ring: int, split: str, mode: str, order: tuple[int, ...]) -> dict[str, Any]:
    """Compare both linear maps with plain matmuls: errors, and what was compiled."""
    group = Group(("model",), ring, order)
    auto = (AxisType.Auto,) * 2
    mesh = Mesh(
        np.array(jax.devices()).reshape(8 // ring, ring), ("data", "model"), axis_types=auto
    )
    keys = jax.random.split(jax.random.key(ring), 8)
    x = jax.random.normal(keys[0], (8 * BATCH, TOKENS, EMBED))
    ins = tuple(jax.random.normal(key, (EMBED, WIDE)) for key in keys[1:3])
    hs = tuple(jax.random.normal(key, (8 * BATCH, TOKENS, WIDE)) for key in keys[3:5])
    outs = tuple(jax.random.normal(key, (WIDE, EMBED)) for key in keys[5:7])
    pieces = PartitionSpec("data", *((None, "model") if split == "embed" else ("model", None)))
    wide, columns, rows = (
        PartitionSpec(*spec) for spec in (("data", None, "model"), (None, "model"), ("model", None))
    )
    into = jax.shard_map(
        partial(expand, group=group, split=split, mode=mode),
        mesh=mesh,
        in_specs=(pieces, columns),
        out_specs=wide,
        check_vma=False,
    )
    out = jax.shard_map(
        partial(contract, group=group, split=split, mode=mode),
        mesh=mesh,
        in_specs=(wide, rows),
        out_specs=pieces,
        check_vma=False,
    )

    def plain_into(x: Any, ws: Any) -> Any:
        return tuple(x @ w for w in ws)

    def plain_out(hs: Any, ws: Any) -> Any:
        return sum(h @ w for h, w in zip(hs, ws, strict=True))

    result: dict[str, Any] = {}
    for name, ours, theirs, arguments in (
        ("gather", into, plain_into, (x, ins)),
        ("scatter", out, plain_out, (hs, outs)),
    ):
        with jax.set_mesh(mesh):
            compiled = jax.jit(both_ways(ours)).lower(*arguments).compile()
            forward = jax.jit(ours).lower(*arguments).compile().as_text()
        found = jax.tree.leaves(compiled(*arguments))
        wanted = jax.tree.leaves(jax.jit(both_ways(theirs))(*arguments))
        result[name] = {
            "errors": [
                float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for a, b in zip(map(np.asarray, found), map(np.asarray, wanted), strict=True)
            ],
            "forward": kinds(forward),
            "backward": kinds(compiled.as_text()),
        }
    return result


def both_ways(function: Any) -> Any:
    """Return a function that gives the outputs and all gradients."""

    def run(*arguments: Any) -> Any:
        outputs, transpose = jax.vjp(function, *arguments)
        weights = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size)).reshape(y.shape), outputs)
        return outputs, transpose(weights)

    return run


def kinds(text: str) -> dict[str, int]:
    """Return how many collectives of each kind an HLO text has."""
    names = ("collective-permute", "all-gather", "reduce-scatter", "all-reduce")
    return {name: text.count(f" {name}(") for name in names}


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    print(json.dumps([case(*request[:3], tuple(request[3])) for request in cases]))
