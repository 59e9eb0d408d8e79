"""Projections: out of the residual stream, and what adds to it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, einsum, weight
from shardsim.graph.build import TOKENS, Builder, Call, vector
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole


def project_in(
    build: Builder, name: str, x: Array, out: str, dims: Dims, *, keep: str, bias: bool
) -> Array:
    """Add a projection out of the residual stream, to arrays split between the matmuls."""
    made = Array(out, (*TOKENS, *dims), keep=keep, purpose="second axis")
    vectors = [vector(f"{name}_bias", *dims)] if bias else []
    matrix = weight(name, "embed", *dims)
    build.add(einsum(x, matrix, made, *vectors))
    build.call("project_in", [x], made, weights=[matrix], biases=[v.name for v in vectors])
    return made


def project_out(
    build: Builder, name: str, x: Array, out: Array, dims: Dims, *, bias: bool
) -> Array:
    """Add a projection into an array of the residual stream; several may add to one."""
    vectors = [vector(f"{name}_bias", "embed")] if bias else []
    matrix = weight(name, *dims, "embed")
    build.add(einsum(x, matrix, out, *vectors))
    build.call("project_out", [x], out, weights=[matrix], biases=[v.name for v in vectors])
    return out


def together(calls: Iterable[Call]) -> list[Call]:
    """Return calls with the projections of one array done at once, as are those that add to one.

    The first reads what all read; the last makes what all make.
    """
    made: list[Call] = []
    for call in calls:
        before = [other for other in made if _alike(other, call)]
        if not before:
            made.append(call)
            continue
        (other,) = before
        at = made.index(other)
        both = _joined(other, call)
        if call.run == "project_in":
            made[at] = both
        else:
            del made[at]
            made.append(both)
    return made


def _alike(one: Call, other: Call) -> bool:
    if one.run != other.run:
        return False
    if one.run == "project_in":
        return one.ins == other.ins
    return one.run == "project_out" and one.outs == other.outs


def _joined(one: Call, other: Call) -> Call:
    into = one.run == "project_in"
    biases = [dict(call.options)["biases"] for call in (one, other)]
    return replace(
        one,
        ins=one.ins if into else one.ins + other.ins,
        outs=one.outs + other.outs if into else one.outs,
        keeps=one.keeps + other.keeps if into else one.keeps,
        weights=one.weights + other.weights,
        options=(("biases", biases[0] + biases[1]),),
    )


@runs("project_in")
def run_project_in(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return x @ w, [batch, tokens, ...], for each weight."""
    made = []
    for name, y in zip(call["weights"], way.project_in(x, params, call["weights"]), strict=True):
        bias = f"{name}_bias"
        made.append(way.with_bias(y, params, bias) if bias in call["biases"] else y)
    return made


@runs("project_out")
def run_project_out(way: Whole, params: Params, call: Any, *hs: Any) -> Any:
    """Return the sum of h @ w, [batch, tokens, embed], and of the biases."""
    y = way.project_out(list(hs), params, call["weights"])
    return way.add_vectors(params, y, call["biases"])
