"""Relative positions as a bias of scores: a learned number of each head for each bucket of
distances, the same in all layers of a stack (T5, arXiv 1910.10683, section 2.1).

The bias [heads, queries, keys] is looked up once, before the layers; each of them adds it to its
scores, in HBM, and adds to its gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Op, Stream
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.graph.place import EVERY
from shardsim.ops.attend import HEADS, attention_ops
from shardsim.ops.attend_blocks import seen
from shardsim.ops.attend_mask import Mask
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

LOOK_UP = Stream(passes=1.0, ops=1.0, gradient_passes=1.0, gradient_ops=1.0)
FARTHEST = 128  # tokens; beyond them all distances are in the last bucket


def position_bias() -> Array:
    """Return the bias of scores, as layers read it."""
    dims = ("kv", "group", "seq", "keys")
    return Array("position bias", dims, keep="", handed=True, owed=EVERY)


def relative_bias(build: Builder, *, causal: bool, buckets: int) -> Array:
    """Add the look-up of the bias."""
    table = vector("relative_bias", "bucket", "kv", "group")
    out = position_bias()
    build.add(Op((), out, vectors=(table,), stream=LOOK_UP))
    build.call("relative_bias", [], out, weights=[table], causal=causal, buckets=buckets)
    return out


def attend_biased(build: Builder, q: Array, k: Array, v: Array, bias: Array, mask: Mask) -> Array:
    """Add attention with a bias of its scores, which are in HBM."""
    dims = (*TOKENS, *HEADS)
    context = Array("context", dims, keep="context", purpose="second axis", lies="attended")
    attention_ops(build, q, k, v, context, mask=mask, kernel="unfused", sinks=False, bias=bias)
    # Its gradient is a sum of the scores' over sequences.
    for at, op in enumerate(build.made):
        if bias in op.ins:
            passes = op.stream.gradient_passes + 1.0
            build.made[at] = replace(op, stream=replace(op.stream, gradient_passes=passes))
    build.call("attend_biased", [q, k, v, bias], context, mask=mask.to_data())
    return context


@runs("relative_bias")
def run_relative_bias(way: Whole, params: Params, call: Any) -> Any:
    """Return the bias [heads, queries, keys] of this device's heads and queries, in float32."""
    (name,) = call["weights"]
    tokens = jnp.arange(way.plan["sequence"])
    ahead = way.key_tokens(tokens[None]) - way.query_tokens(tokens, 0)[:, None]
    places = buckets_of(ahead, call["causal"], call["buckets"])
    table = params[name].astype(jnp.float32)
    return jnp.moveaxis(way.own_queries(table)[places], -1, 0)


def buckets_of(ahead: Any, causal: bool, buckets: int) -> Any:
    """Return the bucket of each distance of keys `ahead` of queries: one for each short distance,
    then ever wider ones; half of them for each direction, unless none is ahead."""
    first = 0
    if not causal:
        buckets //= 2
        first = jnp.where(ahead > 0, buckets, 0)
    back = jnp.maximum(-ahead, 0) if causal else jnp.abs(ahead)
    exact = buckets // 2
    grown = jnp.log(jnp.maximum(back, 1) / exact) / math.log(FARTHEST / exact)
    far = exact + (grown * (buckets - exact)).astype(jnp.int32)
    return first + jnp.where(back < exact, back, jnp.minimum(far, buckets - 1))


@runs("attend_biased")
def run_attend_biased(
    way: Whole, params: Params, call: Any, q: Any, k: Any, v: Any, bias: Any
) -> Any:
    """Return the weighted values [batch, tokens, heads, head_dim], before their projection."""
    q, k, v = (way.by_head(x) for x in (q, k, v))
    k, v = way.all_keys(k), way.all_keys(v)
    batch, queries, heads, depth = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], depth)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * depth**-0.5 + bias.reshape(*scores.shape[1:])
    if call["mask"]["causal"]:
        here = way.query_tokens(jnp.arange(way.plan["sequence"]), 0)
        pairs = seen(call["mask"], here, way.key_tokens(k))
        scores = jnp.where(pairs, scores, jnp.finfo(jnp.float32).min)
    chances = checkpoint_name(jax.nn.softmax(scores, axis=-1).astype(q.dtype), "rest")
    v = lax.optimization_barrier(v)
    return lax.optimization_barrier(jnp.einsum("bhgqk,bkhd->bqhgd", chances, v).reshape(q.shape))
