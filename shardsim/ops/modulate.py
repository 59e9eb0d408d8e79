"""Layers that a condition shifts, scales and gates: adaLN-zero (DiT, arXiv 2212.09748, 3.2).

A norm without weights of its own is scaled by 1 + s and shifted, with numbers that an example has
for each channel, and a gate scales what a branch adds to the residual stream. A layer projects the
condition to these numbers by itself, or adds a table of its own to a projection that all share.

Shapes: x [batch, tokens, embed]; modulation [batch, parts, embed].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Apart, Array, Op, Stream, linear, pointwise
from shardsim.graph.build import Builder, vector
from shardsim.ops.add import ADD
from shardsim.ops.conditions import (
    condition,
    of_example,
    project_condition,
    projected,
    run_projection,
)
from shardsim.ops.lazy import jax, jnp, lax
from shardsim.ops.norm import GRADIENT_SUMS, NORM, normalised, statistics
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# As a norm with a scale and a bias: their gradients are sums over tokens, here of each example.
MODULATED = replace(
    NORM, gradient_passes=NORM.gradient_passes + 1.0, gradient_ops=NORM.gradient_ops + 1.0
)
# The gate's own gradient reads the branch again; that of the branch is written.
GATED = Stream(passes=ADD.passes, ops=2.0, gradient_passes=3.0, gradient_ops=3.0)


def modulation(build: Builder, kind: str, *, final: bool = False) -> Array:
    """Add the numbers of a layer, or of the `final` norm; `kind`: a "layer" has its own projection,
    or the "model" has one."""
    name, parts = ("final_modulation", "two") if final else ("modulation", "modulation")
    out = of_example("final numbers" if final else "numbers", parts, "embed")
    if kind == "layer":
        project_condition(build, name, condition(), out, parts, purpose="ends" if final else "")
        build.call("own_modulation", [condition()], out, name=name)
        return out
    read = condition() if final else projected()
    build.add(linear([read], out, vector(f"{name}_table", parts, "norm")))
    build.call("shared_modulation", [read], out, name=f"{name}_table")
    return out


def modulated_norm(
    build: Builder,
    x: Array,
    out: Array,
    made: Array,
    *,
    kind: str,
    first: int = 0,
    stored: bool = False,
) -> Array:
    """Add a norm, shifted and scaled by two parts of a modulation, from the `first` on."""
    moments = 2.0 if kind == "layernorm" else 1.0
    apart = Apart(
        passes=MODULATED.passes + moments,
        gradient_passes=MODULATED.gradient_passes + GRADIENT_SUMS,
        sums=True,
    )
    sums = statistics(build, x, out, kind=kind)
    build.add(pointwise([x, sums, made], out, stream=replace(MODULATED, apart=apart)))
    build.call("modulated_norm", [x, made], out, kind=kind, first=first, stored=stored)
    return out


def gated_add(build: Builder, x: Array, branch: Array, made: Array, out: Array, at: int) -> Array:
    """Add a branch to the residual stream, scaled by part `at` of a modulation."""
    apart = Apart(passes=GATED.passes + 1.0, gradient_passes=GATED.gradient_passes)
    stream = replace(GATED, apart=apart)
    build.add(Op((x, branch, made), out, (branch, made), stream=stream))
    build.call("gated_add", [x, branch, made], out, at=at)
    return out


@runs("own_modulation")
def run_own_modulation(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return the modulation [batch, 1, parts, embed] of a condition [batch, 1, embed]."""
    with jax.named_scope("conditions"):
        return way.own_embed(run_projection(way, params, call["name"], x))


@runs("shared_modulation")
def run_shared_modulation(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return a projection [batch, 1, parts, embed], or a condition, with a table added."""
    x = x if x.ndim == 4 else x[:, :, None]
    return way.own_embed(x + params[call["name"]].astype(x.dtype))


@runs("modulated_norm")
def run_modulated_norm(way: Whole, params: Params, call: Any, x: Any, made: Any) -> Any:
    """Normalise over embed, shift and scale, in float32."""
    first = call["first"]
    shift, scale = made[:, :, first].astype(jnp.float32), made[:, :, first + 1].astype(jnp.float32)
    wide, share = normalised(way, call["kind"], x)
    y = (wide * share * (1.0 + scale) + shift).astype(x.dtype)
    return lax.optimization_barrier(y) if call["stored"] else y


@runs("gated_add")
def run_gated_add(way: Whole, params: Params, call: Any, x: Any, branch: Any, made: Any) -> Any:
    """Return the sum of the residual stream and a scaled branch."""
    return way.residual(x + made[:, :, call["at"]] * branch)
