"""Attention that never holds all its scores: a fused kernel on TPU, blocks of keys elsewhere.

Both keep for their backward pass the output and one logarithm a query, named "context" for the
remat policy, and compute the probabilities again from them (arXiv 2205.14135; 2307.08691,
section 3.1). So memory grows with the sequence, not with its square.

Shapes: q [batch, queries, heads, head_dim]; k and v [batch, keys, kv_heads, head_dim], each
key-value head serving heads / kv_heads queries in turn; positions [queries] of the queries among
the keys, where a query must not see later keys, or None where it sees all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Array = Any
KEYS_AT_ONCE = 512
KERNEL_MULTIPLE = 128  # of the kernel's sequence and head_dim


def flash_attention(q: Array, k: Array, v: Array, positions: Array | None, platform: str) -> Array:
    """Return softmax(q k^T / sqrt(head_dim)) v, [batch, queries, heads, head_dim].

    The kernel's mask is as long as the queries, and a causal one is fixed when it is compiled, so
    it needs all queries of a sequence; a part of them takes the blocks of keys.
    """
    if platform == "tpu" and q.shape[1] == k.shape[1]:
        return kernel_attention(q, k, v, positions is not None)
    return blockwise_attention(q, k, v, positions)


def kernel_attention(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """Return attention by JAX's splash attention kernel; tokens and head_dim are padded for it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    tokens, heads, depth = q.shape[1:]
    length = -(-tokens // KERNEL_MULTIPLE) * KERNEL_MULTIPLE
    missing = ((0, 0), (0, length - tokens), (0, 0), (0, -depth % KERNEL_MULTIPLE))
    q = (q.astype(jnp.float32) * depth**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, missing).swapaxes(1, 2) for x in (q, k, v))
    block = next(size for size in (512, 256, KERNEL_MULTIPLE) if length % size == 0)
    blocks: dict[str, Any] = dict.fromkeys(
        [f"block_{name}" for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")], block
    )
    form = splash.CausalMask if causal else splash.FullMask
    mask = splash.MultiHeadMask([form((length, length)) for _ in range(heads)])
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="context",
    )
    segments = None
    if length > tokens and not causal:  # tokens see tokens, padding sees padding
        padding = (jnp.arange(length) >= tokens).astype(jnp.int32)
        segments = splash.SegmentIds(q=padding, kv=padding)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :tokens, :, :depth]


@jax.custom_vjp
def blockwise_attention(q: Array, k: Array, v: Array, positions: Array | None) -> Array:
    """Return attention, summed over blocks of keys with a running maximum of the scores."""
    return _attend_blocks(q, k, v, positions)[0]


def _attend_blocks(q: Array, k: Array, v: Array, positions: Array | None) -> tuple[Array, Any]:
    split = _group(q, k)
    blocks = _blocks(k), _blocks(v)
    shape = (*split.shape[:1], *split.shape[2:4], split.shape[1])

    def block(carry: Any, inputs: Any) -> tuple[Any, None]:
        top, norm, sums = carry
        index, keys, values = inputs
        scores, seen = _scores(split, keys, index, positions, k.shape[1])
        new = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new[..., None]), 0)
        part = _product("bhgqk,bkhd->bhgqd", weights.astype(q.dtype), values)
        shrink = jnp.exp(top - new)
        return (new, norm * shrink + weights.sum(-1), sums * shrink[..., None] + part), None

    start = (
        jnp.full(shape, jnp.finfo(jnp.float32).min),
        jnp.zeros(shape),
        jnp.zeros((*shape, q.shape[-1])),
    )
    (top, norm, sums), _ = lax.scan(block, start, (jnp.arange(blocks[0].shape[0]), *blocks))
    out = jnp.moveaxis(sums / norm[..., None], 3, 1).reshape(q.shape).astype(q.dtype)
    out = checkpoint_name(out, "context")
    logs = checkpoint_name(top + jnp.log(norm), "context")
    return out, (q, k, v, positions, out, logs)


def _attend_blocks_gradient(kept: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, positions, out, logs = kept
    split, d_out = _group(q, k), _group(gradient, k)
    both = out.astype(jnp.float32) * gradient.astype(jnp.float32)
    shares = jnp.moveaxis(_group(both, k).sum(-1), 1, 3)

    def block(dq: Array, inputs: Any) -> tuple[Array, Any]:
        index, keys, values = inputs
        scores, seen = _scores(split, keys, index, positions, k.shape[1])
        weights = jnp.where(seen, jnp.exp(scores - logs[..., None]), 0)
        d_weights = _product("bqhgd,bkhd->bhgqk", d_out, values)
        d_scores = weights * (d_weights - shares[..., None]) * q.shape[-1] ** -0.5
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        dk = _product("bhgqk,bqhgd->bkhd", d_scores, split)
        dv = _product("bhgqk,bqhgd->bkhd", weights, d_out)
        return dq + _product("bhgqk,bkhd->bqhgd", d_scores, keys), (dk, dv)

    inputs = (jnp.arange(_blocks(k).shape[0]), _blocks(k), _blocks(v))
    dq, pieces = lax.scan(block, jnp.zeros(split.shape), inputs)
    dk, dv = (
        jnp.moveaxis(x, 0, 1).reshape(k.shape[0], -1, *k.shape[2:])[:, : k.shape[1]] for x in pieces
    )
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise_attention.defvjp(_attend_blocks, _attend_blocks_gradient)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _group(q: Array, k: Array) -> Array:
    """Return q as [batch, queries, kv_heads, heads of each, head_dim]."""
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])


def _blocks(k: Array) -> Array:
    """Return keys or values as [block, batch, keys of it, kv_heads, head_dim], padded."""
    size = min(KEYS_AT_ONCE, k.shape[1])
    k = jnp.pad(k, ((0, 0), (0, -k.shape[1] % size), (0, 0), (0, 0)))
    return jnp.moveaxis(k.reshape(k.shape[0], -1, size, *k.shape[2:]), 1, 0)


def _scores(
    split: Array, keys: Array, index: Array, positions: Array | None, total: int
) -> tuple[Array, Array]:
    """Return scores [batch, kv_heads, heads of each, queries, keys], and which ones count."""
    scores = _product("bqhgd,bkhd->bhgqk", split, keys) * split.shape[-1] ** -0.5
    at = index * keys.shape[1] + jnp.arange(keys.shape[1])
    seen = at < total if positions is None else positions[:, None] >= at
    return jnp.where(seen, scores, jnp.finfo(jnp.float32).min), seen
