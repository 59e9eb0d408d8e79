"""Norms: of the residual stream over embed, and of each head of queries or keys."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Apart, Array, Stream, pointwise, weight
from shardsim.graph.build import Builder, vector, width_of
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax
from shardsim.ops.registry import runs
from shardsim.ops.whole import stored_gradient

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# A norm reads its row and writes it; its gradient reads both, and the gradient of the stream.
# With passes of their own each moment reads the row; so do the two sums of the gradient.
# The TPU compiler makes the sums in a pass that reads, then the result in one that reads and
# writes: the first, as it estimates, in 0.38 to 0.44 of the time (ViT-22B on v4 and v5p, of the
# stream and of heads).
NORM = Stream(passes=2.0, ops=8.0, gradient_passes=4.0, gradient_ops=8.0, sums=0.8)
# Of heads the gradient's sums cost what they read: both arrays, which lie in two orders. That
# of a bias is one more pass; of the stream's norm it is added up in the end of the product before.
HEAD_NORM = replace(NORM, gradient_passes=5.0, by_head=True)
GRADIENT_SUMS = 2.0


def norm(
    build: Builder, name: str, x: Array, out: Array, *, kind: str, bias: bool, stored: bool = False
) -> Array:
    """Add a norm: "layernorm" sums two statistics over embed in float32, "rmsnorm" one.

    `stored`: matmuls read the result, so it is written once. Fused into their operand, the TPU
    compiler would compute it again for every tile of each of them.
    """
    sums = statistics(build, x, out, kind=kind)
    vectors = [weight(f"{name}_scale", "norm", kind="vector")]
    stream = replace(NORM, apart=_apart(NORM, kind))
    if bias:
        vectors.append(weight(f"{name}_bias", "norm", kind="vector"))
        stream = replace(stream, gradient_ops=NORM.gradient_ops + 1.0)
    build.add(pointwise([x, sums], out, *vectors, stream=stream))
    build.call("norm", [x], out, weights=vectors, kind=kind, stored=stored)
    return out


def statistics(build: Builder, x: Array, out: Array, *, kind: str) -> Array:
    """Add the sums over embed, in float32, of a norm that makes `out`."""
    dims = tuple(d for d in x.dims if d != "embed")
    count = ("moments",) if kind == "layernorm" else ()
    purpose = "norm statistics" if x.stream else x.purpose
    own = replace(x, original=None, renamed=(), purpose=purpose)  # of a view too
    sums = replace(own, name=f"{out.name} sums", dims=(*dims, *count), keep="statistics", wide=True)
    return build.add(pointwise([x], sums))


def head_norm(
    build: Builder,
    name: str,
    x: Array,
    *,
    kind: str,
    bias: bool,
    stored: bool = False,
    scale: bool = True,
    out: str = "",
) -> Array:
    """Add a norm of each head, to an array called `out`; without a `scale` it has no weight.

    `stored`: x, which a matmul has made, is written before. In the end of the matmul, in tiles that
    suit its rows of float32, the TPU compiler would slow that down.
    """
    parts = ("scale", "bias")[: scale + bias]
    vectors = [vector(f"{name}_{part}", x.dims[-1]) for part in parts]
    made = replace(x, name=out or f"{x.name} normed", keep="rest")
    passes, ops = HEAD_NORM.gradient_passes + bias, HEAD_NORM.gradient_ops + bias
    stream = replace(HEAD_NORM, gradient_passes=passes, gradient_ops=ops)
    stream = replace(stream, apart=_apart(stream, kind))
    count = ("moments",) if kind == "layernorm" else ()
    sums = replace(made, name=f"{made.name} sums", dims=(*x.dims[:-1], *count), wide=True)
    sums = build.add(pointwise([x], replace(sums, keep="statistics")))
    build.add(pointwise([x, sums], made, *vectors, stream=stream))
    more = width_of(x)
    build.call("head_norm", [x], made, weights=vectors, kind=kind, stored=stored, **more)
    return made


def _apart(stream: Stream, kind: str) -> Apart:
    """Return what a norm moves where each of its sums is a pass of its own."""
    moments = 2.0 if kind == "layernorm" else 1.0
    gradient_passes = stream.gradient_passes + GRADIENT_SUMS * (not stream.by_head)
    return Apart(passes=stream.passes + moments, gradient_passes=gradient_passes, sums=True)


EPSILON = 1e-6


def centred(way: Whole, kind: str, x: Any) -> Any:
    """Return x, of a layernorm less its mean, and the mean of its squares over embed, in float32;
    the sums may have to cross devices."""
    wide = x.astype(jnp.float32)
    layer = kind == "layernorm"
    sums = [jnp.sum(wide * wide, -1)] + ([jnp.sum(wide, -1)] if layer else [])
    with jax.named_scope("norm_statistics"):
        moments = way.embed_sum(jnp.stack(sums, -1)) / way.model["embed"]
    moments = checkpoint_name(moments, "statistics")
    square = moments[..., :1]
    if layer:
        mean = moments[..., 1:]
        wide, square = wide - mean, square - mean * mean
    return wide, square


@runs("norm")
def run_norm(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Normalise over embed, with a learned scale and bias."""
    wide, square = centred(way, call["kind"], x)
    scale, *bias = (way.vector(params, name) for name in call["weights"])
    y = wide * lax.rsqrt(square + EPSILON) * scale
    y = sum(bias, y).astype(x.dtype)
    return lax.optimization_barrier(y) if call["stored"] else y


@runs("head_norm")
def run_head_norm(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Normalise each head of queries or keys [batch, tokens, heads, head_dim]."""
    x = stored_gradient(way.by_head(x, call))
    if call["stored"]:
        x = lax.optimization_barrier(x)
    wide = x.astype(jnp.float32)
    square = checkpoint_name(jnp.mean(wide * wide, -1), "statistics")[..., None]
    if call["kind"] == "layernorm":  # both moments in one pass over x
        mean = checkpoint_name(wide.mean(-1), "statistics")[..., None]
        wide, square = wide - mean, square - mean * mean
    y = wide * lax.rsqrt(square + EPSILON)
    for name in call["weights"]:  # a scale, and a bias
        value = params[name].astype(jnp.float32)
        y = y * value if name.endswith("_scale") else y + value
    return y.astype(x.dtype)
