"""Learned scales: of all heads of a token at once, of the residual stream, of a branch's channels,
of a token's branch, of what attention gives.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Counted, Stream, pointwise
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
# A gate of as many elements is read too; backward both, and their gradients are written.
GATE = Stream(passes=3.0, ops=9.0, gradient_passes=5.0, gradient_ops=12.0)


def heads_norm(build: Builder, name: str, x: Array, *, kind: str, bias: bool) -> Array:
    """Add one norm over all heads of a token (OLMo 2, arXiv 2501.00656, section 2.1.3), or over a
    hidden layer (sub-LN, arXiv 2210.06423): where devices have a part, its sums cross them."""
    count = ("moments",) if kind == "layernorm" else ()
    tokens, dims = x.dims[: len(TOKENS)], x.dims[len(TOKENS) :]
    sums = Array(
        f"{x.name} sums",
        (*tokens, *count),
        keep="statistics",
        wide=True,
        purpose="norm statistics",
    )
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
    scale = vector(f"{branch.name}_token_gate", "embed")
    gate = replace(x, name=f"{branch.name} gate", dims=TOKENS, keep="rest", wide=True)
    gate = replace(gate, purpose="norm statistics")
    counts = Counted("matmul", 1, (*TOKENS, "embed"))
    build.add(replace(pointwise([x], gate, scale), counts=counts))
    out = build.add(pointwise([branch, gate], stream(f"{branch.name} gated"), stream=SCALE))
    build.call("token_gate", [x, branch], out, weights=[scale])
    return out


def head_gate(build: Builder, x: Array, gate: Array) -> Array:
    """Multiply what attention gives by the sigmoid of a gate (Qwen3-Next)."""
    out = replace(gate, name="context gated", keep="rest")
    build.add(pointwise([x, gate], out, stream=GATE))
    build.call("head_gate", [x, gate], out)
    return out


@runs("token_gate")
def run_token_gate(way: Whole, params: Params, call: Any, x: Any, branch: Any) -> Any:
    """Return a branch [batch, tokens, embed] times the sigmoid of a product of each token."""
    scale = way.vector(params, call["weights"][0])
    with jax.named_scope("norm_statistics"):
        gate = way.embed_sum(jnp.einsum("bsk,k->bs", x.astype(jnp.float32), scale))
    gate = checkpoint_name(gate, "rest")
    return branch * jax.nn.sigmoid(gate).astype(branch.dtype)[..., None]


@runs("head_gate")
def run_head_gate(way: Whole, params: Params, call: Any, x: Any, gate: Any) -> Any:
    """Return what attention gives [batch, tokens, heads, head_dim] times sigmoid(gate)."""
    return x * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype).reshape(x.shape)


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
    moments = jnp.expand_dims(
        checkpoint_name(moments, "statistics"), tuple(d - 1 for d in dims[1:])
    )
    square = moments[..., :1]
    if layer:
        mean = moments[..., 1:]
        wide, square = wide - mean, square - mean * mean
    scale, *bias = (params[name].astype(jnp.float32) for name in call["weights"])
    return sum(bias, wide * lax.rsqrt(square + EPSILON) * scale).astype(x.dtype)
