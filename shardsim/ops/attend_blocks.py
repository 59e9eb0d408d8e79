"""Attention block by block of keys, with a running maximum of the scores, as no kernel is needed.

q [batch, queries, heads, head_dim]; k and v [batch, keys, kv_heads, head_dim]; sinks [heads].
"""

from __future__ import annotations

from functools import partial
from typing import Any

from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax

KEYS_AT_ONCE = 512
NO_SEGMENT = -1  # of what pads a sequence


def seen(mask: Any, positions: Any, keys: Any) -> Any:
    """Return which keys a query sees, [queries, keys], by the positions of both."""
    return seen_of(mask, positions[:, None], keys)


def seen_of(mask: Any, queries: Any, keys: Any) -> Any:
    """Return whether queries see keys, by positions that are laid out against each other."""
    back = queries - keys
    if mask.get("chunked"):
        return (back >= 0) & (queries // mask["window"] == keys // mask["window"])
    return (back >= 0) & (back < mask["window"]) if mask["window"] else back >= 0


def place_of(mask: Any, at: Any, keys: int) -> Any:
    """Return where among the tokens the keys stand that are `at` these places of all `keys`.

    They follow each other; or, of as many members as the mask has `stripes`, each one's early part
    is followed by its late one, which is as far from the end.
    """
    stripes = mask.get("stripes", 0)
    if not stripes:
        return at
    part = keys // (2 * stripes)
    member, late = at // part // 2, at // part % 2
    return (member + late * (2 * stripes - 1 - 2 * member)) * part + at % part


def same_sequence(one: Any, other: Any) -> Any:
    """Return which pairs of tokens are of one sequence: [batch, 1, 1, queries, keys]."""
    return (one[:, :, None] == other[:, None, :])[:, None, None]


def blockwise_attention(
    q: Any, k: Any, v: Any, mask: Any, positions: Any, segments: Any = None, sinks: Any = None
) -> Any:
    """Return attention, summed over blocks of keys with a running maximum of the scores."""
    attention = jax.custom_vjp(lambda *inputs: _attend_blocks(mask, *inputs)[0])
    attention.defvjp(partial(_attend_blocks, mask), partial(_attend_blocks_gradient, mask))
    return attention(q, k, v, positions, segments, sinks)


def _attend_blocks(
    mask: Any, q: Any, k: Any, v: Any, positions: Any, segments: Any = None, sinks: Any = None
) -> tuple[Any, Any]:
    split = _group(q, k)
    blocks = _blocks(k), _blocks(v)
    shape = (*split.shape[:1], *split.shape[2:4], split.shape[1])

    def block(carry: Any, inputs: Any) -> tuple[Any, None]:
        index, keys, values = inputs
        scores = _scores(split, keys, index, mask, positions, k.shape[1], segments)
        return _added(carry, *scores, values), None

    start = (
        jnp.full(shape, jnp.finfo(jnp.float32).min),
        jnp.zeros(shape),
        jnp.zeros((*shape, q.shape[-1])),
    )
    (top, norm, sums), _ = lax.scan(block, start, (jnp.arange(blocks[0].shape[0]), *blocks))
    if sinks is not None:
        last = sinks.reshape(*shape[1:3], 1)
        new = jnp.maximum(top, last)
        shrink = jnp.exp(top - new)
        top, norm, sums = new, norm * shrink + jnp.exp(last - new), sums * shrink[..., None]
    out = jnp.moveaxis(sums / norm[..., None], 3, 1).reshape(q.shape).astype(q.dtype)
    out = checkpoint_name(out, "context")
    logs = checkpoint_name(top + jnp.log(norm), "context")
    return out, (q, k, v, positions, segments, sinks, out, logs)


def _attend_blocks_gradient(mask: Any, kept: Any, gradient: Any) -> tuple[Any, ...]:
    q, k, v, positions, segments, sinks, out, logs = kept
    split, d_out = _group(q, k), _group(gradient, k)
    both = out.astype(jnp.float32) * gradient.astype(jnp.float32)
    shares = jnp.moveaxis(_group(both, k).sum(-1), 1, 3)

    def block(dq: Any, inputs: Any) -> tuple[Any, Any]:
        index, keys, values = inputs
        scores = _scores(split, keys, index, mask, positions, k.shape[1], segments)
        more, of_keys = _block_gradients((split, d_out, logs, shares), *scores, keys, values)
        return dq + more, of_keys

    inputs = (jnp.arange(_blocks(k).shape[0]), _blocks(k), _blocks(v))
    dq, pieces = lax.scan(block, jnp.zeros(split.shape), inputs)
    dk, dv = _from_blocks(pieces, k)
    made = (dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))
    d_sinks = None
    if sinks is not None:
        chances = jnp.exp(sinks.reshape(*logs.shape[1:3], 1) - logs)
        d_sinks = -(chances * shares).sum((0, 3)).reshape(sinks.shape)
    return *made, None, None, d_sinks


def _added(sums: Any, scores: Any, pairs: Any, values: Any) -> Any:
    """Add to the running (maximum, norm, sums) of queries what a block of keys gives."""
    top, norm, total = sums
    scores = jnp.where(pairs, scores, jnp.finfo(jnp.float32).min)
    new = jnp.maximum(top, scores.max(-1))
    weights = jnp.where(pairs, jnp.exp(scores - new[..., None]), 0)
    part = _product("bhgqk,bkhd->bhgqd", weights.astype(values.dtype), values)
    shrink = jnp.exp(top - new)
    return new, norm * shrink + weights.sum(-1), total * shrink[..., None] + part


def _block_gradients(rows: Any, scores: Any, pairs: Any, keys: Any, values: Any) -> Any:
    """Return what a block of keys gives to the float32 gradient of queries, and those of its keys
    and values.

    `rows` are the queries, the gradient of their result, logarithms of their norms, and by how much
    the gradient of each weight is too large: the sum of that result times its gradient.
    """
    split, d_out, logs, shares = rows
    weights = jnp.where(pairs, jnp.exp(scores - logs[..., None]), 0)
    d_weights = _product("bqhgd,bkhd->bhgqk", d_out, values)
    d_scores = weights * (d_weights - shares[..., None]) * split.shape[-1] ** -0.5
    d_scores, weights = d_scores.astype(split.dtype), weights.astype(split.dtype)
    dk = _product("bhgqk,bqhgd->bkhd", d_scores, split)
    dv = _product("bhgqk,bqhgd->bkhd", weights, d_out)
    return _product("bhgqk,bkhd->bqhgd", d_scores, keys), (dk, dv)


def made_beside(positions: Any, keys: Any) -> Any:
    """Return positions as something that is known no earlier than the keys.

    JAX makes what depends on no input once, for all layers and blocks: of a mask one bit for each
    pair of tokens of every head, which would lie in HBM all through the step.
    """
    return lax.optimization_barrier((positions, keys[(0,) * keys.ndim]))[0]


def _product(equation: str, a: Any, b: Any) -> Any:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _group(q: Any, k: Any) -> Any:
    """Return q as [batch, queries, kv_heads, heads of each, head_dim]."""
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])


def _blocks(k: Any) -> Any:
    """Return keys or values as [block, batch, keys of it, kv_heads, head_dim], padded."""
    size = min(KEYS_AT_ONCE, k.shape[1])
    k = jnp.pad(k, ((0, 0), (0, -k.shape[1] % size), (0, 0), (0, 0)))
    return jnp.moveaxis(k.reshape(k.shape[0], -1, size, *k.shape[2:]), 1, 0)


def _from_blocks(pieces: Any, k: Any) -> list[Any]:
    """Return arrays like keys k [batch, keys, ...] from their blocks, without what pads them."""
    return [
        jnp.moveaxis(x, 0, 1).reshape(k.shape[0], -1, *k.shape[2:])[:, : k.shape[1]] for x in pieces
    ]


def _scores(
    split: Any, keys: Any, index: Any, mask: Any, positions: Any, total: int, segments: Any
) -> tuple[Any, Any]:
    """Return scores [batch, kv_heads, heads of each, queries, keys], and which ones count."""
    scores = _product("bqhgd,bkhd->bhgqk", split, keys) * split.shape[-1] ** -0.5
    at = made_beside(index * keys.shape[1] + jnp.arange(keys.shape[1]), keys)
    pairs, place = at < total, place_of(mask, at, total)
    if positions is not None:
        pairs = seen(mask, positions, place) & pairs
    if segments is not None:
        here = jnp.take(segments, place, axis=1, fill_value=NO_SEGMENT)
        pairs = same_sequence(segments, here) & pairs
    return scores, pairs
