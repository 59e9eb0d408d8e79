"""Imports exported modules of specs on eight host devices; started by `test_specs.py`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def load(path: Path) -> Any:
    """Return an exported module."""
    spec = importlib.util.spec_from_file_location("laid", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["laid"] = module
    spec.loader.exec_module(module)
    return module


def answer(path: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Lay a tree of arrays out as the module says; return specs, places and what check says."""
    laid = load(path)
    mesh = laid.build_mesh()
    params = {"layers": {name: jnp.zeros(shape) for name, shape in shapes.items()}}
    placed = jax.device_put(params, laid.shardings(params, mesh))
    found = laid.specs(params)["layers"]
    split = [name for name, spec in found.items() if any(spec)]
    wrong = {}
    for name in split[:2]:
        whole = jax.device_put(placed["layers"][name], jax.NamedSharding(mesh, jax.P()))
        wrong[name] = laid.check({"layers": {**placed["layers"], name: whole}}, mesh)
    steps = itertools.product(*(laid._walk(name, parts) for name, _, parts in laid.AXES))
    residual = jax.ShapeDtypeStruct((16, 16, 64), jnp.float32)

    def layer(x: Any) -> Any:
        return laid.constrain(jnp.sin(x), "residual").sum()

    with jax.set_mesh(mesh):
        made = jax.jit(jax.grad(jax.checkpoint(layer, policy=laid.remat_policy())))
        lowered = made.lower(residual).as_text()
    return {
        "mesh": dict(mesh.shape),
        "specs": {name: [_axes(part) for part in spec] for name, spec in found.items()},
        "states": {
            name: [_axes(part) for part in spec]
            for name, spec in laid.specs(params, state=True)["layers"].items()
        },
        "check": laid.check(placed, mesh),
        "wrong": wrong,
        "places": [[int(sum(part)) for part in zip(*step, strict=True)] for step in steps],
        "constrained": lowered.count("sharding_constraint"),
        "unnamed": laid.check({"odd": np.zeros((999, 997))}, mesh),
    }


def _axes(part: Any) -> list[str]:
    return [] if part is None else [part] if isinstance(part, str) else list(part)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "asked.json").read_text())
    told = {name: answer(folder / file, shapes) for name, (file, shapes) in asked.items()}
    (folder / "told.json").write_text(json.dumps(told))
