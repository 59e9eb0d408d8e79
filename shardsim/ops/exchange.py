"""Tokens on their way to the experts that they chose, and back.

Two forms. With a capacity an expert has so many places for the tokens of a group, and products with
masks [tokens, experts, places] put tokens in them and take results out: real products, that no
model FLOPs count (GShard, arXiv 2006.16668, section 3.2). Without one tokens are copied for each
expert that they chose, and sorted by it: none is dropped (MegaBlocks, arXiv 2211.15841).

Either way copies lie by token first; then, over the expert axis, by expert: an all-to-all. In a
ring of experts all tokens of the ring are gathered before, each device copies those that chose its
experts, and what experts make is scattered as it is summed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardsim.graph.arrays import Array, Dims, Op, Stream, einsum, linear
from shardsim.graph.build import TOKENS, Builder
from shardsim.ops.lazy import jax, jnp

# Copies are read and written as they are sorted; of their gradients those of a token are looked up,
# and added. Where results are added so are they, and what each counts is a sum over its width.
SORT = Stream(passes=2.0, ops=1.0, gradient_passes=3.0, gradient_ops=1.0)
# Copies of one token lie apart, choice by choice. Side by side they lie in the eight sublanes of a
# vector register, whose rest is empty; then libtpu 0.0.42.1 counts so many passes more of whole
# sublanes on tpu7x: to repeat tokens, to add the gradients of copies, to add results, and for the
# gradients of those (MaxText's `permute` and `unpermute`, 8 copies of 4,096 and 7,168, 2 and 4 of
# 4,096; a third as many to as many on v5p and v6e).
SUBLANES = 8
REPEATED, REPEATED_GRADIENT, ADDED, ADDED_GRADIENT = 4.1, 11.8, 3.4, 2.9
MASK = Stream(passes=1.0, ops=2.0)  # which place is whose
SHARES = Stream(passes=1.0, ops=2.0, gradient_passes=1.0, gradient_ops=2.0)


ROUTED = "experts"  # the purpose of moving what experts read and make


def sublanes(top: int) -> float:
    """Return the sublanes over which the copies of a token are added up.

    >>> [sublanes(top) for top in (1, 2, 8, 10)]
    [0.0, 8.0, 8.0, 16.0]
    """
    return float(-(-top // SUBLANES) * SUBLANES) if top > 1 else 0.0


def reach(build: Builder, x: Array, name: str) -> Array:
    """Add what brings an array of tokens to where experts choose from it."""
    out = replace(x, name=f"{name} whole", stream=False, keep="", purpose=ROUTED)
    whole = relay(build, for_experts(x), out, call=ROUTED)
    return relay(build, whole, replace(out, name=name, lies="tokens"))


def for_experts(x: Array) -> Array:
    """Return an array as experts read it: gathered apart from what an MLP beside them reads."""
    return replace(x, purpose=ROUTED)


def relay(build: Builder, x: Array, out: Array, *others: Array, call: str = "") -> Array:
    """Add what brings an array to where another is stored, once `others` are there."""
    return build.add(replace(linear([x, *others], out), relay=True, call=call))


def dispatch(
    build: Builder, x: Array, choices: Array, *, top: int, grouped: bool, capacity: bool
) -> Array:
    """Add what brings tokens to experts: [experts, batch, slots, embed].

    `choices` are where `reach` brings them. With a `capacity` that counts in groups of a sequence
    those are a dimension of their own.
    """
    tokens = reach(build, x, "tokens")
    dims = slots(grouped)
    copies = Array("copies", ("expert", *dims, "embed"), keep="", lies="copies", purpose=ROUTED)
    if capacity:
        mask = replace(_mask("dispatch mask", grouped), trained=False)
        build.add(linear([_grouped(choices, grouped)], mask, stream=MASK))
        product = einsum(mask, _grouped(tokens, grouped), copies)
        build.add(replace(product, counted=False, needs=(mask,)))
    else:
        view = tokens.view("expert", "batch", "slot", "embed", seq="slot")
        order = choices.view("batch", "slot", "top", seq="slot")
        share = sublanes(top) / top
        more, back = REPEATED * share, REPEATED_GRADIENT * share
        stream = replace(SORT, beside=more, beside_gradient=back)
        build.add(Op((view, order), copies, (order,), stream=stream))
    brought = replace(copies, name="slots", keep="rest", lies="slots")
    if capacity:
        return relay(build, copies, brought)
    # Which expert a copy is for travels with it.
    names = Array("names", copies.dims[:-1], keep="", wide=True, trained=False, lies="copies")
    build.add(linear([order], replace(names, purpose=ROUTED)))
    there = replace(names, name="names of slots", lies="slots", purpose=ROUTED)
    relay(build, replace(names, purpose=ROUTED), there)
    return relay(build, copies, brought, there)


def combine(
    build: Builder,
    made: Array,
    chances: Array,
    out: Array,
    *,
    top: int,
    grouped: bool,
    capacity: bool,
) -> None:
    """Add the sum of what the experts of a token made of it, each as much as it counts."""
    returned = replace(made, name="returned", keep="rest", lies="returned")
    relay(build, made, returned)
    total = Array(
        "sum of experts", (*_places(grouped), "embed"), keep="", lies="sum", purpose=ROUTED
    )
    if capacity:
        shares = _mask("shares", grouped)
        build.add(linear([_grouped(chances, grouped)], shares, stream=SHARES))
        build.add(replace(einsum(shares, returned, total), counted=False))
    else:
        view = returned.view("expert", "batch", "seq", "embed", slot="seq")
        # All copies are brought back in order, then read, weighted and added. Back the gradient is
        # looked up for each, then read with what it goes to, and written.
        taken = Stream(
            passes=3.0 * top + 1.0,
            ops=0.5 * top,
            gradient_passes=5.0 * top,
            gradient_ops=2.0 * top,
            beside=ADDED * sublanes(top),
            beside_gradient=ADDED_GRADIENT * sublanes(top),
        )
        build.add(Op((view, chances), total, (view, chances), stream=taken))
    relay(build, total if not grouped else total.view(*out.dims, chunk="seq"), out)


def _mask(name: str, grouped: bool) -> Array:
    dims = (*_places(grouped), "expert", slots(grouped)[-1])
    return Array(name, dims, lies="masks", purpose=ROUTED)


def slots(grouped: bool) -> Dims:
    """Return the dimensions of the places of an expert."""
    return ("batch", "slot") if not grouped else ("batch", "chunk", "place")


def _places(grouped: bool) -> Dims:
    return TOKENS if not grouped else ("batch", "chunk", "member")


def _grouped(array: Array, grouped: bool) -> Array:
    """Return an array of tokens as one of groups of them."""
    if not grouped:
        return array
    return array.view(*_places(grouped), *array.dims[2:], seq="chunk")


def masks(chances: Any, choices: Any, number: int, places: int) -> tuple[Any, Any]:
    """Return which token of a group is in which place of an expert, and how much it counts there:
    both [groups, tokens, experts, places], for chances and choices [groups, tokens, top].

    First choices come first, then second ones, each in the order of tokens; those that find no
    place are in neither.
    """
    groups, tokens, top = choices.shape
    chosen = jax.nn.one_hot(choices, number, dtype=jnp.int32)
    queue = chosen.swapaxes(1, 2).reshape(groups, top * tokens, number)
    before = (jnp.cumsum(queue, 1) - queue).reshape(groups, top, tokens, number).swapaxes(1, 2)
    place = jnp.sum(before * chosen, -1)
    # one_hot of a place beyond the last is 0.
    there = jax.nn.one_hot(place, places, dtype=chances.dtype)[..., None, :]
    each = chosen[..., None].astype(chances.dtype) * there
    return each.sum(2), (each * chances[..., None, None]).sum(2)


def rooms(copies: int, members: int, padding: float) -> int:
    """Return how many of so many copies there is room for where each member gets its share."""
    return min(copies, int(-(-copies * padding // members)))


def places_of(member: Any, members: int, room: int) -> Any:
    """Return the place of each copy among rooms of equal size, one for the `member` that it goes
    to; those for which there is none, which are dropped, are beyond the last."""
    one = jax.nn.one_hot(member, members, dtype=jnp.int32)
    before = jnp.sum((jnp.cumsum(one, 0) - one) * one, -1)
    return jnp.where(before < room, member * room + before, members * room)


def look_up(rows: Any, places: Any, all_there: bool) -> Any:
    """Return rows [rows, n] at `places`; where not `all_there`, 0 for places beyond the last."""
    return rows[places] if all_there else rows.at[places].get(mode="fill", fill_value=0)


def by_choice(rows: Any, places: Any, tokens: int, all_there: bool) -> list[Any]:
    """Return [tokens, n] in float32 for each choice of a token, from where its copies are; what
    has no place is masked only as it is added, so that no array of float32 is written."""
    near = places if all_there else jnp.minimum(places, len(rows) - 1)
    copies = rows[near].reshape(-1, tokens, rows.shape[-1])
    there = (places < len(rows)).reshape(-1, tokens, 1)
    kept = (
        copies
        if all_there
        else [jnp.where(mask, one, 0) for mask, one in zip(there, copies, strict=True)]
    )
    return [one.astype(jnp.float32) for one in kept]


def copies_in_order(x: Any, order: Any, places: Any, all_there: bool) -> Any:
    """Return copies of tokens x [tokens, n] in an `order` of their numbers, [rows, n].

    Copy c is of token c % tokens: first choices come first. `places` are the rows of all copies.
    Where not `all_there` rows of a number, and copies with a place, beyond the last are empty. The
    gradient is looked up and added; that of a look-up would be scattered.
    """
    tokens = len(x)

    def run(x: Any, order: Any, places: Any) -> Any:
        token = order % tokens
        token = token if all_there else jnp.where(order < len(places), token, tokens)
        return look_up(x, token, all_there)

    def gradient(kept: Any, g: Any) -> Any:
        return sum(by_choice(g, kept, tokens, all_there)).astype(g.dtype), None, None

    taken = jax.custom_vjp(run)
    taken.defvjp(lambda x, order, places: (run(x, order, places), places), gradient)
    return taken(x, order, places)


def combined(made: Any, chances: Any, order: Any, places: Any, all_there: bool) -> Any:
    """Return the sum over the copies of a token of each row of `made` [rows, n] times its chance,
    of chances [tokens, choices]; `order` and `places` are as in `copies_in_order`."""
    tokens, top = chances.shape

    def run(made: Any, chances: Any, order: Any, places: Any) -> Any:
        copies = by_choice(made, places, tokens, all_there)
        wide = chances.astype(jnp.float32)
        return sum(copies[i] * wide[:, i, None] for i in range(top)).astype(made.dtype)

    def gradient(kept: Any, g: Any) -> Any:
        made, chances, order, places = kept
        back = g[order % tokens].astype(jnp.float32)
        each = look_up(chances.T.reshape(-1, 1).astype(jnp.float32), order, all_there)
        counts = jnp.sum(back * made.astype(jnp.float32), -1, keepdims=True)
        of_chances = look_up(counts, places, all_there).reshape(top, tokens).T
        return (back * each).astype(made.dtype), of_chances.astype(chances.dtype), None, None

    adding = jax.custom_vjp(run)
    adding.defvjp(lambda *given: (run(*given), given), gradient)
    return adding(made, chances, order, places)
