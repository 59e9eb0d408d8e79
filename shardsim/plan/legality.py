"""What divides what: the conditions under which a layout can be run at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from shardsim.errors import PlanError
from shardsim.model import Model
from shardsim.plan.layout import Layout, Number
from shardsim.plan.plan import Plan


def conditions(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> Iterator[tuple[str, str, Number, Number]]:
    """Yield (key, what is divided, its size, by what) for each division that must be exact."""
    groups = layout.data.size * layout.fsdp.size
    shards = layout.gather.size
    inner = layout.tensor.size * layout.tensor2.size
    yield (
        "batch",
        "sequences over data, fsdp and microbatches",
        batch,
        groups * layout.microbatches,
    )
    yield "sequence", "tokens over the context axis", sequence, layout.context.size
    yield "mesh", "attention heads over the tensor axes", model.heads, inner
    yield "mesh", "the MLP's width over the tensor axes", model.mlp, inner
    kv_shards = np.minimum(layout.tensor.size, model.kv_heads)
    yield "mesh", "key-value heads over the tensor axis", model.kv_heads, kv_shards
    yield (
        "mesh",
        "embed over the axes that shard parameters",
        model.embed,
        shards * layout.tensor2.size,
    )
    # A residual split over the tensor axis is split on the sequence or on embed.
    on_sequence = np.where(np.equal(layout.residual, 1), layout.tensor.size, 1)
    on_embed = np.where(np.equal(layout.residual, 2), layout.tensor.size, 1)
    yield "mesh", "tokens over the tensor axis", sequence, layout.context.size * on_sequence
    yield "mesh", "embed over the tensor axes", model.embed, layout.tensor2.size * on_embed
    yield "mesh", "layers over pipeline stages", model.layers, layout.pipeline.size * interleave


def legal(
    model: Model, batch: int, sequence: int, layout: Layout, interleave: int = 1
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where every division is exact, broadcast over the layout."""
    result: Any = np.True_
    for _, _, size, by in conditions(model, batch, sequence, layout, interleave):
        result = result & (np.mod(size, by) == 0)
    # A pipeline needs at least one microbatch per stage to be worth its name.
    return np.asarray(result & (layout.microbatches >= layout.pipeline.size))


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
