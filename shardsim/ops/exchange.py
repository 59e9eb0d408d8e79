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

from shardsim.graph.arrays import Array, Dims, Op, Stream, einsum, linear
from shardsim.graph.build import TOKENS, Builder

# Copies are read and written as they are sorted; so are their gradients, which are summed.
SORT = Stream(passes=2.0, ops=1.0, gradient_passes=2.0, gradient_ops=1.0)
MASK = Stream(passes=1.0, ops=2.0)  # which place is whose
SHARES = Stream(passes=1.0, ops=2.0, gradient_passes=1.0, gradient_ops=2.0)


ROUTED = "experts"  # the purpose of moving what experts read and make


def reach(build: Builder, x: Array, name: str) -> Array:
    """Add what brings an array of tokens to where experts choose from it."""
    return relay(build, x, Array(name, x.dims, keep="", lies="tokens", purpose=ROUTED))


def relay(build: Builder, x: Array, out: Array) -> Array:
    """Add what brings an array to where another is stored."""
    return build.add(replace(linear([x], out), relay=True))


def dispatch(build: Builder, x: Array, chances: Array, *, grouped: bool, capacity: bool) -> Array:
    """Add what brings tokens to experts: [experts, batch, slots, embed].

    `chances` are where `reach` brings them. With a `capacity` that counts in groups of a sequence
    those are a dimension of their own.
    """
    tokens = reach(build, x, "tokens")
    dims = slots(grouped)
    copies = Array("copies", ("expert", *dims, "embed"), keep="", lies="copies", purpose=ROUTED)
    if capacity:
        mask = replace(_mask("dispatch mask", grouped), trained=False)
        build.add(linear([_grouped(chances, grouped)], mask, stream=MASK))
        product = einsum(mask, _grouped(tokens, grouped), copies)
        build.add(replace(product, counted=False, needs=(mask,)))
    else:
        view = tokens.view("expert", "batch", "slot", "embed", seq="slot")
        build.add(linear([view], copies, stream=SORT))
    return relay(build, copies, replace(copies, name="slots", keep="rest", lies="slots"))


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
        # All copies are brought back in order, then read, weighted and added.
        each = 3.0 * top + 1.0
        taken = Stream(
            passes=each, ops=2.0 * top, gradient_passes=each + top, gradient_ops=4.0 * top
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
