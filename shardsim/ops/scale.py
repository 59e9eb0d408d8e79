"""Learned scales: of all heads of a token at once, of the residual stream, of a branch's channels,
of a token's branch.

The last only has a place in a graph: the emitted program has none, and says so.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, einsum, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, stream, vector
from shardsim.graph.place import has_groups
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax
from shardsim.ops.norm import EPSILON, NORM
from shardsim.ops.registry import runs
from shardsim.ops.whole import stored_gradient

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# In the addition that reads a branch; the scale's own gradient reads the branch again.
SCALE = Stream(ops=1.0, gradient_passes=2.0, gradient_ops=3.0)


def heads_norm(build: Builder, name: str, x: Array, *, kind: str, bias: bool) -> Array:
    """Add one norm over all heads of a token (OLMo 2, arXiv 2501.00656, section 2.1.3), or over a
    hidden layer (sub-LN, arXiv 2210.06423): where devices have a part, its sums cross them."""
    count = ("moments",) if kind == "layernorm" else ()
    tokens, dims = x.dims[: len(TOKENS)], x.dims[len(TOKENS) :]
    sums = Array(f"{x.name} sums", (*tokens, *count), wide=True, purpose="norm statistics")
    build.add(pointwise([x], sums))
    vectors = [vector(f"{name}_{part}", *dims) for part in ("scale", "bias")[: 1 + bias]]
    out = replace(x, name=f"{x.name} normed", keep="rest")
    build.add(pointwise([x, sums], out, *vectors, stream=NORM))
    heads = "heads" if has_groups(dims) else "kv_heads"
    widths = [dims[0]] if len(dims) == 1 else [heads, "head_dim"]
    build.call("heads_norm", [x], out, weights=vectors, kind=kind, over=widths)
    return out


def residual_scale(build: Builder, x: Array) -> Array:
    """Add one learned number that the residual stream is multiplied by."""
    scale, out = vector("residual_scale", "one"), stream("x scaled", keep="")
    build.add(pointwise([x], out, scale, stream=SCALE))
    build.call("residual_scale", [x], out, weights=[scale])
    return out


def layer_scale(build: Builder, branch: Array) -> Array:
    """Add a learned scale of each channel of a branch (arXiv 2103.17239, section 2)."""
    scale, out = vector(f"{branch.name}_scale", "embed"), stream(f"{branch.name} scaled")
    build.add(pointwise([branch], out, scale, stream=SCALE))
    build.call("layer_scale", [branch], out, weights=[scale])
    return out


def token_gate(build: Builder, x: Array, branch: Array) -> Array:
    """Scale a branch by the sigmoid of a learned product of each token (Qwen 1.5's experts)."""
    gate = Array(f"{branch.name} gate", TOKENS, wide=True, purpose=branch.purpose)
    build.add(einsum(x, weight(f"{branch.name}_token_gate", "embed"), gate))
    return build.add(pointwise([branch, gate], stream(f"{branch.name} gated"), stream=SCALE))


@runs("residual_scale")
def run_residual_scale(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return the residual stream times one number."""
    return x * params[call["weights"][0]].astype(x.dtype)


@runs("layer_scale")
def run_layer_scale(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return a branch with each channel times its scale."""
    return x * way.vector(params, call["weights"][0]).astype(x.dtype)


@runs("heads_norm")
def run_heads_norm(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Normalise all heads of a token at once [batch, tokens, heads, head_dim], or its hidden
    layer [batch, tokens, mlp]."""
    over = call["over"]
    x = stored_gradient(way.by_head(x) if len(over) > 1 else x)
    wide = x.astype(jnp.float32)
    layer, dims = call["kind"] == "layernorm", tuple(range(-len(over), 0))
    sums = [jnp.sum(wide * wide, dims)] + ([jnp.sum(wide, dims)] if layer else [])
    width = math.prod(way.model[name] for name in over)
    with jax.named_scope("norm_statistics"):
        moments = way.tensor_sum(jnp.stack(sums, -1)) / width
    moments = jnp.expand_dims(checkpoint_name(moments, "rest"), tuple(d - 1 for d in dims[1:]))
    square = moments[..., :1]
    if layer:
        mean = moments[..., 1:]
        wide, square = wide - mean, square - mean * mean
    scale, *bias = (params[name].astype(jnp.float32) for name in call["weights"])
    return sum(bias, wide * lax.rsqrt(square + EPSILON) * scale).astype(x.dtype)
