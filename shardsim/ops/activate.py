"""The MLP's activation, with or without a gate (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Op, Stream, pointwise
from shardsim.graph.build import Builder
from shardsim.ops.lazy import jax, lax
from shardsim.ops.registry import runs
from shardsim.ops.whole import stored_gradient

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# In the end of the matmul before it; its derivative reads what the activation read.
ACTIVATE = Stream(fused=12.0, fused_gradient=12.0, fused_reads=1.0)
# The product with the gate reads the other projection.
GATE = replace(
    ACTIVATE,
    passes=1.0,
    ops=1.0,
    gradient_passes=3.0,
    gradient_ops=4.0,
    joined=1.0,
    joined_gradient=3.0,
)


def activate(build: Builder, parts: Sequence[Array], function: str, name: str = "hidden") -> Array:
    """Add the activation of a hidden layer, or of the second of two, times the first."""
    out = build.add(activation(parts, name))
    build.call("activate", parts, out, function=function)
    return out


def activation(parts: Sequence[Array], name: str) -> Op:
    """Return the op that makes the activated layer `name` of a projection, or of two."""
    out = replace(parts[0], name=name, keep="rest")
    return pointwise(parts, out, stream=GATE if len(parts) > 1 else ACTIVATE)


@runs("activate")
def run_activate(way: Whole, params: Params, call: Any, hidden: Any, gate: Any = None) -> Any:
    """Return the activated (and gated) hidden layer."""
    active = getattr(jax.nn, call["function"])
    if gate is None:
        return active(hidden)
    # Two matmuls read the product, and each gradient: written once, not computed again in them.
    return lax.optimization_barrier(active(stored_gradient(gate)) * stored_gradient(hidden))
