"""Projections: out of the residual stream, and what adds to it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, einsum, weight
from shardsim.graph.build import TOKENS, Builder, Call, vector
from shardsim.ops.lazy import checkpoint_name, jax, jnp
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole


def project_in(
    build: Builder,
    name: str,
    x: Array,
    out: str,
    dims: Dims,
    *,
    keep: str,
    bias: bool,
    adapted: bool = False,
) -> Array:
    """Add a projection out of the residual stream, to arrays split between the matmuls; if it is
    `adapted`, with a narrow one beside it, whose sum with it is its result."""
    made = Array(out, (*TOKENS, *dims), keep=keep, purpose="second axis")
    vectors = [vector(f"{name}_bias", *dims)] if bias else []
    matrix = weight(name, "embed", *dims)
    build.add(einsum(x, matrix, made, *vectors))
    weights, more = [matrix], dict[str, Any]()
    if adapted:
        into, back = (
            weight(f"{name}{INTO}", "embed", "rank"),
            vector(f"{name}{BACK}", "rank", *dims),
        )
        low = build.add(einsum(x, into, Array(f"{out} low", (*TOKENS, "rank"), keep=keep)))
        build.add(einsum(low, back, made))
        weights, more = [matrix, into, back], {"adapted": [name]}
    biases = [v.name for v in vectors]
    build.call("project_in", [x], made, weights=weights, biases=biases, **more)
    return made


def project_out(
    build: Builder,
    name: str,
    x: Array,
    out: Array,
    dims: Dims,
    *,
    bias: bool,
    adapted: bool = False,
) -> Array:
    """Add a projection into an array of the residual stream; several may add to one, and so does a
    narrow one if it is `adapted`."""
    vectors = [vector(f"{name}_bias", "embed")] if bias else []
    matrix = weight(name, *dims, "embed")
    weights, more = [matrix], dict[str, Any]()
    if adapted:  # first: where the sum goes the other one says
        into, back = (
            vector(f"{name}{INTO}", *dims, "rank"),
            weight(f"{name}{BACK}", "rank", "embed"),
        )
        narrow = Array(f"{out.name} low", (*TOKENS, "rank"), purpose="adapters")
        low = build.add(einsum(x, into, narrow))
        build.add(einsum(low, back, out))
        weights, more = [matrix, into, back], {"adapted": [name]}
    build.add(einsum(x, matrix, out, *vectors))
    biases = [v.name for v in vectors]
    build.call("project_out", [x], out, weights=weights, biases=biases, **more)
    return out


# Ends of the names of a projection's narrow ones.
INTO = "_lora_in"
BACK = "_lora_out"


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
    options = {
        key: [*dict(one.options).get(key, ()), *dict(other.options).get(key, ())]
        for key in dict(one.options) | dict(other.options)
    }
    return replace(
        one,
        ins=one.ins if into else one.ins + other.ins,
        outs=one.outs + other.outs if into else one.outs,
        keeps=one.keeps + other.keeps if into else one.keeps,
        weights=one.weights + other.weights,
        options=tuple(options.items()),
    )


@runs("project_in")
def run_project_in(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return x @ w, [batch, tokens, ...], for each weight."""
    if "adapted" in call:
        return adapted_in(way, params, call, x)
    made = []
    for name, y in zip(call["weights"], way.project_in(x, params, call["weights"]), strict=True):
        bias = f"{name}_bias"
        made.append(way.with_bias(y, params, bias) if bias in call["biases"] else y)
    return made


@runs("project_out")
def run_project_out(way: Whole, params: Params, call: Any, *hs: Any) -> Any:
    """Return the sum of h @ w, [batch, tokens, embed], and of the biases."""
    if "adapted" in call:
        return adapted_out(way, params, call, *hs)
    y = way.project_out(list(hs), params, call["weights"])
    return way.add_vectors(params, y, call["biases"])


def adapted_in(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return projections with what adapters add to them; all narrow ones read x as it is there."""
    names = [name for name in call["weights"] if not name.endswith(BACK)]
    found = dict(zip(names, way.project_in(x, params, names), strict=True))
    made = []
    bases = [name for name in names if not name.endswith(INTO)]
    for name, keep in zip(bases, call["keeps"], strict=True):
        y, bias = found[name], f"{name}_bias"
        y = way.with_bias(y, params, bias) if bias in call["biases"] else y
        if name in call["adapted"]:
            back = way.matrix(params, f"{name}{BACK}")
            low = checkpoint_name(found[f"{name}{INTO}"], keep)
            more = jnp.einsum("bsr,rn->bsn", low, back)
            y = y + more.reshape(y.shape)
        made.append(y)
    return made


def adapted_out(way: Whole, params: Params, call: Any, *hs: Any) -> Any:
    """Return the sum of h @ w and of what adapters add, where the residual stream lies."""
    names = [name for name in call["weights"] if not name.endswith((INTO, BACK))]
    y = way.add_vectors(params, way.project_out(list(hs), params, names), call["biases"])
    for name, h in zip(names, hs, strict=True):
        if name in call["adapted"]:
            flat = h.reshape(*h.shape[:2], -1)
            low = flat @ way.matrix(params, f"{name}{INTO}")
            with jax.named_scope("adapters"):
                low = checkpoint_name(way.tensor_sum(low), "rest")
            low = way.residual_tokens(low)
            y = y + low @ way.end_matrix(params, f"{name}{BACK}")
    return y
