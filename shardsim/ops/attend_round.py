"""Ring attention: keys and values pass round the members of a context axis (arXiv 2310.01889).

Each member attends to its own keys, then to those that came, and sums what they give with a running
maximum of the scores: in the TPU's kernel (`attend_pieces`), else as `attend_blocks` does. Backward
the gradients of what came travel on with it and end where it is stored.

Of a striped order (after arXiv 2311.09431) a member has an early part of the tokens and a late one.
Under a causal mask its queries then see of the keys of an earlier member only the early part, and
only its late queries see those of a later member, all of them: two quarters of the pairs each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardsim.ops.attend_blocks import (
    _added,
    _block_gradients,
    _blocks,
    _from_blocks,
    _group,
    _product,
    made_beside,
    seen,
)
from shardsim.ops.attend_pieces import (
    add_gradients,
    add_piece,
    gradient_of_queries,
    merged_pieces,
    rows_of_pieces,
)
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax

NOT_THERE = -1  # the place of a key that pads a block
QUERIES = (1, 1, 3, 3, 0)  # their dimension in queries, d result, logarithms, shares and places


@dataclass(frozen=True)
class Round:
    """The members of a context axis as a ring: of one device, all arrays are its own.

    `places(n)` are the positions [tokens] in the sequence of the tokens of the member n hops
    before this one, `later(n)` says whether that member's number is larger than its own. `kernel`:
    whether members attend in the TPU's kernel.
    """

    members: int
    send: Callable[[Any], Any]  # to the next member
    places: Callable[[int], Any]
    later: Callable[[int], Any]
    striped: bool
    overlap: bool
    kernel: bool


def round_attention(q: Any, k: Any, v: Any, mask: Any, ring: Round) -> Any:
    """Return attention of a member's queries to the keys of all members.

    q [batch, tokens, heads, head_dim]; k and v [batch, tokens, kv_heads, head_dim]; every member
    has equally many tokens.
    """
    attention = jax.custom_vjp(lambda *inputs: _forward(mask, ring, *inputs)[0])
    attention.defvjp(
        lambda *inputs: _forward(mask, ring, *inputs),
        lambda kept, gradient: _backward(mask, ring, kept, gradient),
    )
    return attention(q, k, v)


def _forward(mask: Any, ring: Round, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    out, logs = (_in_kernel if ring.kernel else _by_blocks)(mask, ring, q, k, v)
    out = checkpoint_name(out.reshape(q.shape).astype(q.dtype), "context")
    logs = checkpoint_name(logs, "context")
    return out, (q, k, v, out, logs)


def _in_kernel(mask: Any, ring: Round, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    split, halved = _group(q, k), ring.striped and mask["causal"]
    keys, values, sums = k, v, ()
    for hops in range(ring.members):
        here = keys, values
        if hops + 1 < ring.members:
            keys, values = _passed(ring, here, sums)
        sums = add_piece(mask, sums, split, here, ring.later(hops), halved)
    return merged_pieces(sums, split)


def _by_blocks(mask: Any, ring: Round, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    split, own = _group(q, k), ring.places(0)
    shape = (*split.shape[:1], *split.shape[2:4], split.shape[1])
    sums: Any = (
        jnp.full(shape, jnp.finfo(jnp.float32).min),
        jnp.zeros(shape),
        jnp.zeros((*shape, q.shape[-1])),
    )
    keys, values = k, v
    for hops in range(ring.members):
        here = keys, values, ring.places(hops)
        if hops + 1 < ring.members:
            keys, values = _passed(ring, (keys, values), sums)
        if hops and ring.striped and mask["causal"]:
            sums = _attend_striped(mask, ring.later(hops), sums, (split, own), here)
        else:
            sums = _attend(mask, sums, (split, own), here)
    top, norm, total = sums
    return jnp.moveaxis(total / norm[..., None], 3, 1), top + jnp.log(norm)


def _backward(mask: Any, ring: Round, kept: Any, gradient: Any) -> tuple[Any, Any, Any]:
    q, k, v, out, logs = kept
    split, d_out = _group(q, k), _group(gradient, k)
    both = out.astype(jnp.float32) * gradient.astype(jnp.float32)
    rows = split, d_out, logs, jnp.moveaxis(_group(both, k).sum(-1), 1, 3)
    # They come round again: what came forward, or as that runs again, does not stay. Host devices
    # know no barriers, but take arrays of another shape for others.
    (keys, values), _ = lax.optimization_barrier(((k[None], v[None]), gradient))
    add = partial(_add_in_kernel if ring.kernel else _add_by_blocks, mask, ring, rows)
    dq: Any = () if ring.kernel else jnp.zeros(split.shape)
    mine: Any = ()
    carried: Any = ()  # gradients of what came, on their way
    for hops in range(ring.members):
        here = keys[0], values[0]
        if hops + 1 < ring.members:
            keys, values = _passed(ring, (keys, values), dq)
        carried = tuple(map(ring.send, carried))
        dq, made = add(hops, here, dq)
        if not hops:
            mine = made
        elif carried:
            made = [x.astype(jnp.float32) + y for x, y in zip(carried, made, strict=True)]
        carried = tuple(x.astype(k.dtype) for x in made) if hops else ()
    home = [ring.send(x).astype(jnp.float32) for x in carried]
    dk, dv = (x + y for x, y in zip(mine, home, strict=True))
    if ring.kernel:
        dq = gradient_of_queries(dq, split)
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _add_in_kernel(mask: Any, ring: Round, rows: Any, hops: int, here: Any, dq: Any) -> Any:
    halved = ring.striped and mask["causal"]
    return add_gradients(mask, dq, rows_of_pieces(*rows), here, ring.later(hops), halved)


def _add_by_blocks(mask: Any, ring: Round, rows: Any, hops: int, here: Any, dq: Any) -> Any:
    rows, here = (*rows, ring.places(0)), (*here, ring.places(hops))
    if hops and ring.striped and mask["causal"]:
        dq, *made = _gradients_striped(mask, ring.later(hops), rows, here, dq)
    else:
        dq, *made = _gradients(mask, rows, here, dq)
    return dq, made


def _attend_striped(mask: Any, later: Any, sums: Any, rows: Any, here: Any) -> Any:
    """Add what the keys of another member give: those pairs of halves that a causal mask leaves."""
    early, late = zip(*(_halves(x, 3) for x in sums), strict=True)
    (first, at), (last, end) = zip(*(_halves(x, 1 - n) for n, x in enumerate(rows)), strict=True)
    start, rest = _half_keys(here)
    # The early keys with the queries that see them, then what else the late queries see.
    made = _attend(
        mask, _either(later, late, early), _either(later, (last, end), (first, at)), start
    )
    early, late = _either(later, early, made), _either(later, made, late)
    late = _attend(mask, late, (last, end), _either(later, rest, start))
    return tuple(jnp.concatenate(pair, 3) for pair in zip(early, late, strict=True))


def _gradients_striped(mask: Any, later: Any, rows: Any, here: Any, dq: Any) -> Any:
    """Return the gradients of the same: `dq` with those of queries added, those of all keys and
    values."""
    d_early, d_late = _halves(dq, 1)
    early, late = zip(*(_halves(x, dim) for x, dim in zip(rows, QUERIES, strict=True)), strict=True)
    start, rest = _half_keys(here)
    first = _either(later, d_late, d_early)
    first, *made = _gradients(mask, _either(later, late, early), start, first)
    d_early, d_late = _either(later, d_early, first), _either(later, first, d_late)
    d_late, *more = _gradients(mask, late, _either(later, rest, start), d_late)
    dq = jnp.concatenate([d_early, d_late], 1)
    halves = (
        (x + jnp.where(later, 0, y), jnp.where(later, y, 0))
        for x, y in zip(made, more, strict=True)
    )
    return dq, *(jnp.concatenate(pair, 1) for pair in halves)


def _passed(ring: Round, pieces: Any, beside: Any) -> Any:
    """Send pieces on: beside the attention to them, or after all that is done by now."""
    if not ring.overlap:
        pieces, _ = lax.optimization_barrier((pieces, beside))
    return tuple(map(ring.send, pieces))


def _halves(x: Any, dim: int) -> Any:
    return jnp.split(x, 2, dim)


def _either(later: Any, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(later, x, y), one, other)


def _half_keys(here: Any) -> Any:
    """Return the early and the late half of keys, values and their places."""
    keys, values, places = here
    halves = _halves(keys, 1), _halves(values, 1), _halves(places, 0)
    return tuple(x[0] for x in halves), tuple(x[1] for x in halves)


def _in_blocks(here: Any) -> tuple[Any, Any, Any]:
    """Return keys, values and their places in blocks of some keys, the last one padded."""
    keys, values, places = here
    blocks = _blocks(keys), _blocks(values)
    missing = blocks[0].shape[0] * blocks[0].shape[2] - places.shape[0]
    padded = jnp.pad(places, (0, missing), constant_values=NOT_THERE)
    return *blocks, padded.reshape(blocks[0].shape[0], -1)


def _pairs(mask: Any, split: Any, keys: Any, own: Any, places: Any) -> tuple[Any, Any]:
    """Return scores [batch, kv_heads, heads of each, queries, keys], and which ones count."""
    scores = _product("bqhgd,bkhd->bhgqk", split, keys) * split.shape[-1] ** -0.5
    places = made_beside(places, keys)
    there = places != NOT_THERE
    return scores, there & seen(mask, own, places) if mask["causal"] else there


def _attend(mask: Any, sums: Any, rows: Any, here: Any) -> Any:
    """Add to the running (maximum, norm, sums) of queries at their places what some keys give."""
    split, own = rows

    def block(carry: Any, inputs: Any) -> tuple[Any, None]:
        keys, values, places = inputs
        return _added(carry, *_pairs(mask, split, keys, own, places), values), None

    return lax.scan(block, sums, _in_blocks(here))[0]


def _gradients(mask: Any, rows: Any, here: Any, dq: Any) -> tuple[Any, Any, Any]:
    """Return `dq` with what some keys give to float32 gradients of queries (`rows`: see `QUERIES`)
    added, and the gradients of those keys and their values."""
    *queries, own = rows

    def block(dq: Any, inputs: Any) -> tuple[Any, Any]:
        keys, values, places = inputs
        pairs = _pairs(mask, queries[0], keys, own, places)
        more, of_keys = _block_gradients(queries, *pairs, keys, values)
        return dq + more, of_keys

    dq, pieces = lax.scan(block, dq, _in_blocks(here))
    return dq, *_from_blocks(pieces, here[0])
