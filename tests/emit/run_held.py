"""Bytes that one device holds of emitted steps: plan data on standard input, a list; JSON out.

What `jax.sharding` itself makes of each emitted shape and spec on a mesh without devices. With
`step` in the data also the formats of weights and state before and after one.
"""

from __future__ import annotations

import json
import sys
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from shardsim.emit.runtime.train import Trainer


def held(data: dict[str, Any]) -> dict[str, Any]:
    """Return bytes of parameters and state; counters and place holders of one element apart."""
    axes = data["plan"]["mesh"]
    mesh = AbstractMesh(tuple(axis["size"] for axis in axes), tuple(axis["name"] for axis in axes))
    trainer = Trainer(data)
    params, state, batch = trainer.shapes()

    def local_bytes(shape: Any, spec: Any) -> int:
        part = NamedSharding(mesh, spec).shard_shape(shape.shape)
        return prod(part) * shape.dtype.itemsize

    sizes = jax.tree.map(local_bytes, state, trainer.state_places())
    single = jax.tree.map(lambda leaf: leaf.size == 1, state)
    pairs = list(zip(jax.tree.leaves(sizes), jax.tree.leaves(single), strict=True))
    formats = {}
    if data.get("step"):
        after = jax.eval_shape(trainer.step, params, state, batch)[:2]
        for when, trees in (("before", (params, state)), ("after", after)):
            formats[when] = [str(leaf.dtype) for leaf in jax.tree.leaves(trees)]
    return {
        **formats,
        "parameters": sum(jax.tree.leaves(jax.tree.map(local_bytes, params, trainer.specs))),
        "optimizer": sum(size for size, one in pairs if not one),
        "counters": sum(size for size, one in pairs if one),
    }


if __name__ == "__main__":
    json.dump([held(data) for data in json.load(sys.stdin)], sys.stdout)
