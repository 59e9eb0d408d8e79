"""Queries, keys and values of latent attention (arXiv 2405.04434, section 2.1), as a graph.

The emitted program has no latent attention, and says so.
"""

from __future__ import annotations

from shardsim.graph.arrays import Array, Stream, einsum, linear, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.attend import HEADS, KV
from shardsim.ops.norm import NORM
from shardsim.ops.rotate import ROTATE

# Keys are put together of a part of each head and one that all heads share.
TOGETHER = Stream(passes=2.0, gradient_passes=2.0, gradient_ops=1.0)
NOPE = (*KV[:-1], "nope")
VALUES = (*KV[:-1], "value_dim")
OUT = (*HEADS[:-1], "value_dim")  # of the heads' results


def latent_heads(build: Builder, x: Array, *, queries: bool) -> tuple[Array, Array, Array]:
    """Add queries and keys [.., head_dim] and values [.., value_dim] of the normed stream `x`.

    With `queries` those too come from a compressed vector, behind a norm as the others' is.
    """
    source = _compressed(build, "query", x) if queries else x
    q = Array("q", (*TOKENS, *HEADS), keep="qkv", purpose="second axis")
    rank = "query_latent" if queries else "embed"
    q = build.add(einsum(source, weight("query", rank, *HEADS), q))
    q = build.add(linear([q], Array("q turned", q.dims, purpose=q.purpose), stream=ROTATE))
    latent = _compressed(build, "key_value", x)
    shared = Array("shared key", (*TOKENS, "rotary"), purpose="second axis")
    shared = build.add(einsum(x, weight("shared_key", "embed", "rotary"), shared))
    turned = Array("shared key turned", shared.dims, purpose="second axis")
    shared = build.add(linear([shared], turned, stream=ROTATE))
    parts = []
    for name, dims in (("key", NOPE), ("value", VALUES)):
        made = Array(name[0], (*TOKENS, *dims), keep="qkv", purpose="second axis")
        parts.append(build.add(einsum(latent, weight(name, "key_value_latent", *dims), made)))
    k = Array("k together", (*TOKENS, *KV), purpose="second axis")
    return q, build.add(linear([parts[0], shared], k, stream=TOGETHER)), parts[1]


def _compressed(build: Builder, name: str, x: Array) -> Array:
    """Add a compressed vector of each token, behind a norm, as what is made of it reads it."""
    rank = f"{name}_rank"
    small = Array(f"compressed {name}", (*TOKENS, rank), purpose="second axis")
    build.add(einsum(x, weight(f"{name}_down", "embed", rank), small))
    sums = Array(f"{small.name} sums", TOKENS, wide=True, purpose="norm statistics")
    build.add(pointwise([small], sums))
    normed = Array(f"{small.name} normed", small.dims, purpose="second axis")
    build.add(
        pointwise([small, sums], normed, vector(f"{name}_down_norm_scale", rank), stream=NORM)
    )
    return normed.view(**{rank: f"{name}_latent"})
