"""Collectives written out: matmuls fused with a ring of neighbour exchanges, and plain ones.

A linear map whose narrow side is split over a ring of n devices needs either its input gathered
or its output summed and scattered. Cut into n steps, each exchange runs beside the product of
the piece that is there already: an "asynchronous parallel linear operation" (ViT-22B, arXiv
2302.05442). Every ring here moves n - 1 pieces per device, as the plain collective does.

Shapes: x [batch, tokens, embed], its piece either a range of tokens ("sequence") or of embed
("embed"); weights [embed, wide] and [wide, embed] are whole in embed, local in wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from shardsim.emit.runtime.config import Group

Array = Any
SLICED = {"sequence": 1, "rows": 1, "embed": 2}  # the dimension of x that is in pieces
SUBLANES, LANES = 8, 128  # the last two dimensions of a TPU's tile


def member(group: Group) -> Array:
    """Return this device's index in the group."""
    return lax.axis_index(group.axes) if group.size > 1 else 0


def gather(x: Array, group: Group, dim: int) -> Array:
    """Return the pieces of all members side by side along `dim`."""
    return lax.all_gather(x, group.axes, axis=dim, tiled=True) if group.size > 1 else x


def gather_matrix(w: Array, group: Group, dim: int) -> Array:
    """Return a weight whole along `dim`, as `gather` does, in a form that a TPU lays out well.

    In HBM the last two dimensions are tiles of at least 8 x 128: shards of whole tiles come out as
    a matmul reads them. A shard of 6 rows would travel as 8; cut into lanes, each of its rows is
    whole tiles.
    """
    if group.size == 1 or w.shape[dim] % SUBLANES == 0:
        return gather(w, group, dim)
    rows = jnp.moveaxis(w, dim, 0)
    shape = rows.shape[1:]
    if math.prod(shape) % LANES == 0:
        rows = rows.reshape(len(rows), -1, LANES)
    return jnp.moveaxis(gather(rows, group, 0).reshape(-1, *shape), 0, dim)


def scatter_matrix(x: Array, group: Group, dim: int) -> Array:
    """Return this member's piece, along `dim`, of the sum over the group, as `scatter` does.

    Pieces of 52 rows are no whole tiles: side by side they would be summed in parts, and sent on.
    So each is cut out first. Over all devices of a slice the compiler makes an all-reduce of
    either.
    """
    length = x.shape[dim] // group.size
    tiled = dim >= x.ndim - 2 or x.shape[-1] % LANES
    if group.size == 1 or group.whole or not tiled or length % SUBLANES == 0:
        return scatter(x, group, dim)
    rows = jnp.moveaxis(x, dim, 0)
    pieces = rows.reshape(group.size, length, -1)
    mine = lax.psum_scatter(pieces, group.axes, scatter_dimension=0, tiled=False)
    return jnp.moveaxis(mine.reshape(length, *rows.shape[1:]), 0, dim)


def scatter(x: Array, group: Group, dim: int) -> Array:
    """Return this member's piece, along `dim`, of the sum over the group."""
    if group.size == 1:
        return x
    return lax.psum_scatter(x, group.axes, scatter_dimension=dim, tiled=True)


def total(x: Array, group: Group) -> Array:
    """Return the sum over the group."""
    return lax.psum(x, group.axes) if group.size > 1 else x


def turn(x: Array, group: Group, split: int, joined: int) -> Array:
    """Send each member its piece along `split`; return theirs side by side along `joined`."""
    if group.size == 1:
        return x
    return lax.all_to_all(x, group.axes, split, joined, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared_total(x: Array, group: Group) -> Array:
    """Return the sum over the group, of which all members go on to compute the same.

    Each then has an equal share of the gradient, so its transpose needs no communication.
    """
    return total(x, group)


shared_total.defvjp(
    lambda x, group: (total(x, group), None),
    lambda group, _, gradient: (gradient * group.size,),
)


def own(x: Array, group: Group, dim: int) -> Array:
    """Return this member's piece of an array that all have whole."""
    if group.size == 1:
        return x
    length = x.shape[dim] // group.size
    return lax.dynamic_slice_in_dim(x, member(group) * length, length, dim)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def gather_weight(w: Array, group: Group, dim: int, compute: Any, reduce: Any) -> Array:
    """Return a weight whole along `dim`, in the compute format.

    Its gradient is summed and scattered back to the shards in the `reduce` format.
    """
    return gather_matrix(w.astype(compute), group, dim)


def _gather_weight(w: Array, group: Group, dim: int, compute: Any, reduce: Any) -> Array:
    return gather_weight(w, group, dim, compute, reduce), jnp.zeros((), w.dtype)


def _scatter_gradient(
    group: Group, dim: int, compute: Any, reduce: Any, like: Array, gradient: Array
) -> Array:
    return (scatter_gradient(gradient, group, dim, reduce).astype(like.dtype),)


def scatter_gradient(gradient: Array, group: Group, dim: int, reduce: Any) -> Array:
    """Return this member's shard of the summed gradient of a weight, in the `reduce` format."""
    with jax.named_scope("scatter_gradients"):
        gradient = gradient.astype(reduce)
        if gradient.ndim == 3:  # with embed densest, the TPU compiler would make an all-reduce
            gradient = with_layout_constraint(gradient, Layout((0, 1, 2)))
        return scatter_matrix(gradient, group, dim)


gather_weight.defvjp(_gather_weight, _scatter_gradient)


# Rings. Position p of the ring sends to p + 1 ("clockwise") or to p - 1.


def _send(x: Array, group: Group, step: int) -> Array:
    ring = group.ring
    pairs = [(ring[p], ring[(p + step) % group.size]) for p in range(group.size)]
    return lax.ppermute(x, group.axes, pairs)


def _member_at(group: Group, offset: int) -> Array:
    """Return the member that stands `offset` positions after this device on the ring."""
    position = [0] * group.size
    for at, who in enumerate(group.ring):
        position[who] = at
    ahead = [group.ring[(at + offset) % group.size] for at in position]
    return jnp.array(ahead, jnp.int32)[member(group)]


def _pieces(x: Array, group: Group, both: bool) -> Iterator[tuple[Array, Array]]:
    """Yield (whose, piece) for every member: first this device's, then what comes round.

    With `both` directions, half of the pieces come from either side in half the time.
    """
    yield _member_at(group, 0), x
    clockwise = group.size // 2 if both else group.size - 1
    up = down = x
    for step in range(1, clockwise + 1):
        up = _send(up, group, 1)
        yield _member_at(group, -step), up
        if both and step <= (group.size - 1) // 2:
            down = _send(down, group, -1)
            yield _member_at(group, step), down


def _place(whole: Array, piece: Array, who: Array, dim: int) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, piece, who * piece.shape[dim], dim)


def _part(whole: Array, who: Array, parts: int, dim: int) -> Array:
    length = whole.shape[dim] // parts
    return lax.dynamic_slice_in_dim(whole, who * length, length, dim)


def by_rows(x: Array, split: str) -> Array:
    """Return [batch, tokens, wide], of a ring that passes rows laid out with `wide` densest.

    Left to itself the TPU compiler lays out pieces as their readers like them, each otherwise, and
    copies them in between.
    """
    return with_layout_constraint(x, Layout((0, 1, 2))) if split == "rows" else x


def ring_gather_matmul(
    x: Array, weights: tuple[Array, ...], group: Group, split: str, both: bool, dtype: Any
) -> tuple[tuple[Array, ...], Array]:
    """Return x @ w for each weight, and x whole: an all-gather beside the products.

    A piece of the sequence gives rows of the product. A piece of embed gives a summand of every
    row; the sums are float32, and adding to them costs HBM traffic.
    """
    n, dim = group.size, SLICED[split]
    rows = x.shape[1] * (n if dim == 1 else 1)
    outs = [lax.empty((x.shape[0], rows, w.shape[1]), dtype) for w in weights]
    shape = tuple(size * n if i == dim else size for i, size in enumerate(x.shape))
    whole = lax.empty(shape, x.dtype)
    for number, (who, piece) in enumerate(_pieces(by_rows(x, split), group, both)):
        piece = by_rows(piece, split)
        whole = _place(whole, piece, who, dim)
        for i, w in enumerate(weights):
            if dim == 1:
                rows_of_piece = by_rows(_matmul(piece, w).astype(dtype), split)
                outs[i] = _place(outs[i], rows_of_piece, who, 1)
            else:
                summand = _matmul(piece, _part(w, who, n, 0))
                outs[i] = outs[i] + summand if number else summand
    outs = [by_rows(out.astype(dtype), split) for out in outs]
    return tuple(outs), by_rows(whole, split)


def ring_matmul_scatter(
    hs: tuple[Array, ...], weights: tuple[Array, ...], group: Group, split: str, both: bool
) -> Array:
    """Return this device's piece of the sum over devices and pairs of h @ w.

    The sum for each device travels to it and takes up a product at every stop, so that a
    product is computed while the sum it joins is on its way.
    """
    n, dtype = group.size, hs[0].dtype

    def product(offset: int) -> Array:
        """Return the product meant for the device `offset` positions ahead."""
        who = _member_at(group, offset)
        if SLICED[split] == 1:
            pieces = [by_rows(_part(by_rows(h, split), who, n, 1), split) for h in hs]
            pairs = list(zip(pieces, weights, strict=True))
        else:
            pairs = [(h, _part(w, who, n, 1)) for h, w in zip(hs, weights, strict=True)]
        return by_rows(sum(_matmul(h, w) for h, w in pairs), split)

    def travel(stops: int, step: int) -> Array:
        """Return the sum of the `stops` devices on one side of this one."""
        carried = product(step * stops)
        for stop in range(1, stops):
            arrived = _send(carried.astype(dtype), group, step)
            carried = arrived.astype(jnp.float32) + product(step * (stops - stop))
        return _send(carried.astype(dtype), group, step).astype(jnp.float32)

    result = travel(n // 2 if both else n - 1, 1)
    if both and n > 2:
        result = result + travel((n - 1) // 2, -1)
    return by_rows((result + product(0)).astype(dtype), split)


def _matmul(x: Array, w: Array) -> Array:
    return jnp.einsum("bsk,kn->bsn", x, w, preferred_element_type=jnp.float32)


def _weight_gradient(x: Array, dy: Array, dtype: Any) -> Array:
    product = jnp.einsum("bsk,bsn->kn", x, dy, preferred_element_type=jnp.float32)
    return product.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def gather_linear(
    x: Array,
    weights: tuple[Array, ...],
    group: Group,
    split: str,
    both: bool,
    dtype: Any,
    trained: int,
) -> tuple[Array, ...]:
    """Return x @ w for each weight: x comes in pieces and is gathered in a ring.

    Backward: the gradient of x is summed and scattered in a ring, beside its own products; the
    gradients of the weights need x whole, which the recomputed forward ring leaves behind. The
    first `trained` products have gradients.
    """
    return ring_gather_matmul(x, weights, group, split, both, dtype)[0]


def _gather_linear(
    x: Array, weights: Any, group: Group, split: str, both: bool, dtype: Any, trained: int
) -> Any:
    outs, whole = ring_gather_matmul(x, weights, group, split, both, dtype)
    return outs, (whole, weights)


def _gather_linear_gradient(
    group: Group, split: str, both: bool, dtype: Any, trained: int, kept: Any, dys: Any
) -> Any:
    whole, every = kept
    weights, still = every[:trained], every[trained:]
    dys = tuple(dy.astype(whole.dtype) for dy in dys[:trained])
    back = tuple(w.T for w in weights)
    with jax.named_scope("input_gradient"):
        dx = ring_matmul_scatter(dys, back, group, split, both)
    made = (_weight_gradient(whole, dy, w.dtype) for dy, w in zip(dys, weights, strict=True))
    return dx, (*made, *map(jnp.zeros_like, still))


gather_linear.defvjp(_gather_linear, _gather_linear_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def scatter_linear(
    hs: tuple[Array, ...], weights: tuple[Array, ...], group: Group, split: str, both: bool
) -> Array:
    """Return this device's piece of the sum of h @ w: summed and scattered in a ring.

    Backward: the pieces of the gradient are gathered in a ring, beside the products with them.
    """
    return ring_matmul_scatter(hs, weights, group, split, both)


def _scatter_linear(hs: Any, weights: Any, group: Group, split: str, both: bool) -> Any:
    return ring_matmul_scatter(hs, weights, group, split, both), (hs, weights)


def _scatter_linear_gradient(group: Group, split: str, both: bool, kept: Any, dy: Any) -> Any:
    hs, weights = kept
    back = tuple(w.T for w in weights)
    with jax.named_scope("output_gradient"):
        dhs, whole = ring_gather_matmul(dy, back, group, split, both, dy.dtype)
    return dhs, tuple(_weight_gradient(h, whole, w.dtype) for h, w in zip(hs, weights, strict=True))


scatter_linear.defvjp(_scatter_linear, _scatter_linear_gradient)


# A context axis, of whose ring and order attention must know.


def next_member(x: Array, group: Group) -> Array:
    """Send x to the next member of the ring; return what the one before has sent."""
    return _send(x, group, 1)


def member_before(group: Group, hops: int) -> Array:
    """Return the member that stands so many hops before this device on the ring."""
    return _member_at(group, -hops)


def own_stripes(x: Array, group: Group, dim: int) -> Array:
    """Return this device's part of x where tokens lie striped along `dim`: two parts in a row, as
    far from the start as from the end (`place_of` says where each token stands)."""
    who, many = member(group), 2 * group.size
    return jnp.concatenate([_part(x, one, many, dim) for one in (who, many - 1 - who)], dim)


def in_order(x: Array, group: Group) -> Array:
    """Return [batch, tokens, ...] in order that was gathered of striped parts."""
    parts = x.reshape(x.shape[0], group.size, 2, -1, *x.shape[2:])
    early, late = parts[:, :, 0], parts[:, ::-1, 1]
    return jnp.concatenate([early, late], 1).reshape(x.shape)
