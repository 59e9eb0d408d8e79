"""What divides what: the conditions under which a layout can be run at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shardsim.errors import PlanError
from shardsim.graph.place import RULES
from shardsim.model import Model
from shardsim.plan.layout import Layout, Number
from shardsim.plan.plan import Plan
from shardsim.plan.split import dimension, lengths, named

_WHAT = {
    "batch": "sequences",
    "seq": "tokens",
    "heads": "attention heads",
    "mlp": "the MLP's width",
    "embed": "embed",
    "layers": "layers",
}
_OVER = {
    ("data", "fsdp"): "data, fsdp and microbatches",
    ("context",): "the context axis",
    ("tokens",): "the context and tensor axes",
    ("tensor",): "the tensor axis",
    ("tensor", "tensor2"): "the tensor axes",
    ("tensor2",): "the second tensor axis",
    ("embed",): "the tensor axes",
    ("tensor2", "gather"): "the axes that shard parameters",
    ("pipeline",): "pipeline stages",
}
_KEYS = {"batch": "batch", "seq": "sequence"}  # else it is the mesh that a plan can change


def conditions(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> Iterator[tuple[str, str, Number, Number]]:
    """Yield (key, what is divided, its size, by what) for each division that must be exact.

    They are the dimensions of activations and weights that `dimension` calls exact, each once.
    """
    rounds = interleave * model.round_layers
    also: Mapping[str, Number] = {"batch": layout.microbatches, "layers": rounds}
    sizes = lengths(model, batch, sequence)
    dimensions = [("inside", axis, sizes[axis]) for axis in RULES["inside"]]
    for tensor in model.tensors:
        kind, axes, shape = named(tensor)
        dimensions += [(kind, axis, size) for axis, size in zip(axes, shape, strict=True)]
    dimensions += [("residual", axis, sizes[axis]) for axis in RULES["residual"]]
    seen = set()
    for kind, axis, size in dimensions:
        roles = RULES[kind].get(axis, ())
        if (axis, size, roles) in seen:
            continue
        seen.add((axis, size, roles))
        found = dimension(kind, axis, size, layout)
        if found.exact:
            what = f"{_WHAT[axis]} over {_OVER[roles]}"
            yield _KEYS.get(axis, "mesh"), what, size, found.ways * also.get(axis, 1)
    # Where each device has the key-value heads of its own queries.
    kv_shards = np.minimum(layout.tensor.size, model.kv_heads)
    yield "mesh", "key-value heads over the tensor axis", model.kv_heads, kv_shards


def divides(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where every division is exact, broadcast over the layout."""
    result: Any = np.True_
    for _, _, size, by in conditions(model, batch, sequence, layout, interleave):
        result = result & (np.mod(size, by) == 0)
    return np.asarray(result)


def legal(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where `layout` can be run: every division exact, and every pipeline stage filled."""
    exact = divides(model, batch, sequence, layout, interleave)
    return np.asarray(exact & (layout.microbatches >= layout.pipeline.size))


def check(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for the first division of a single plan that is not exact."""
    for key, what, size, by in conditions(
        plan.model, plan.batch, plan.sequence, layout, plan.pipeline_interleave
    ):
        if int(size) % int(by):
            raise PlanError(
                f"{key}: {what}: {int(size)} does not divide by {int(by)}"
                f"{_nearest_multiple(key, int(size), int(by))}"
            )
    if plan.microbatches < int(layout.pipeline.size):
        raise PlanError(
            f"microbatches: {plan.microbatches} cannot fill {int(layout.pipeline.size)} pipeline "
            "stages; use at least as many microbatches as stages"
        )


def _nearest_multiple(key: str, size: int, by: int) -> str:
    if key != "batch":
        return ""
    below = size // by * by
    choices = [str(value) for value in (below, below + by) if value]
    return f"; the nearest that do: {' and '.join(choices)}"
