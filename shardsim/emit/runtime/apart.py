"""The way back as two programs: what others wait for, and products that are gradients of weights.

A way back has two kinds of results: the gradient of what layers read, which the stage before waits
for, and those of weights, for which nobody does (arXiv 2401.10241). Of its jaxpr, products of
gradients and collectives that only the second kind needs, and what follows from them, run `later`;
all else, with what is computed again, runs at once and hands on what those read. A loop over layers
is cut into two loops, and what crosses from one to the other is stacked by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
)

from shardsim.ops.whole import Array, Params

# Calls of a jaxpr in a jaxpr, and the parameter that has it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_MOVES = {"all_gather", "ppermute", "all_to_all"}


class Apart:
    """A way back, `back` of what was kept and of a gradient, as two functions.

    What crosses from one to the other waits in arrays [place, ...] like `waiting`, in which several
    microbatches have their places: loops over layers write it there, and read it from there.
    """

    def __init__(
        self,
        back: Callable[[list[Array], Array], tuple[Params, Array]],
        kept: Sequence[Any],
        gradient: Any,
    ) -> None:
        """Take shapes of what was kept, and of a gradient."""
        whole, shape = jax.make_jaxpr(back, return_shape=True)(list(kept), gradient)
        self._flat, self._tree = _flat(whole), jax.tree.structure(shape)
        jaxpr, self._outs = self._flat.jaxpr, range(len(whole.out_avals))
        outs, of_x = self._outs, jax.tree.unflatten(self._tree, self._outs)[1]
        self._cut = _cut(jaxpr, [place == of_x for place in outs], jaxpr.invars[-1:], ())
        self._here = [place for place in outs if place not in self._cut.later_outs]
        shapes: list[Any] = [one.aval for one in self._cut.crossing]
        self.waiting = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in shapes]

    def at_once(
        self, kept: Sequence[Array], gradient: Array, wait: Sequence[Array], place: Array
    ) -> tuple[Params, Array, list[Array]]:
        """Return the gradients of weights that are there at once, that of what the layers read,
        and what waits, with that of this microbatch in its place."""
        made, wait = self._run(self._cut.first, self._here, [*kept, gradient], wait, place)
        own, x = self._named(self._here, made)
        return own, x, wait

    def later(self, kept: Sequence[Array], wait: Sequence[Array], place: Array) -> Params:
        """Return the other gradients of weights, of the microbatch in a place."""
        outs = self._cut.later_outs
        return self._named(outs, self._run(self._cut.later, outs, kept, wait, place)[0])[0]

    def _named(self, outs: Sequence[int], values: Sequence[Array]) -> tuple[Params, Any]:
        there = dict(zip(outs, values, strict=True))
        every = [there.get(place) for place in self._outs]
        own, x = jax.tree.unflatten(self._tree, every)
        return {name: value for name, value in own.items() if value is not None}, x

    def _run(
        self,
        equations: Sequence[JaxprEqn],
        outs: Sequence[int],
        reads: Sequence[Array],
        wait: Sequence[Array],
        place: Array,
    ) -> tuple[list[Array], list[Array]]:
        """Run some equations; return some results, and what waits."""
        jaxpr, crossing = self._flat.jaxpr, self._cut.crossing
        names = [*jaxpr.constvars, *jaxpr.invars[: len(reads)]]
        there = dict(zip(names, [*self._flat.consts, *reads], strict=True))
        held = dict(zip(crossing, wait, strict=True))

        def value(one: Any) -> Any:
            if isinstance(one, Literal):
                return one.val
            return _of(held[one], place) if one in held else there[one]

        for equation in equations:
            if equation.primitive.name == "scan":
                made = _loop(equation, value, held, place)
            else:
                made = _alone(equation, value)
                for name, result in zip(equation.outvars, made, strict=True):
                    if name in held:
                        held[name] = _put(held[name], result, place)
            there.update(zip(equation.outvars, made, strict=True))
        results = [value(jaxpr.outvars[out]) for out in outs]
        return results, [held[name] for name in crossing]


def _loop(
    loop: JaxprEqn, value: Callable[[Any], Any], held: dict[Any, Array], place: Array
) -> list[Any]:
    """Run a loop whose steps read and write what is `held` at [place, step]; return its results,
    of what is held nothing."""
    params, run = loop.params, jaxpr_as_fun(loop.params["jaxpr"])
    consts, carried = params["num_consts"], params["num_carry"]
    given, stacks = loop.invars[: consts + carried], loop.invars[consts + carried :]
    fixed, carry = [value(one) for one in given[:consts]], [value(one) for one in given[consts:]]
    waits = [not isinstance(one, Literal) and one in held for one in stacks]
    rows = [None if waiting else value(one) for one, waiting in zip(stacks, waits, strict=True)]
    read = {one: held[one] for one, waiting in zip(stacks, waits, strict=True) if waiting}
    written = [at for at, one in enumerate(loop.outvars) if one in held]
    others = [at for at in range(carried, len(loop.outvars)) if at not in written]

    def step(state: Any, at: Any) -> tuple[Any, list[Any]]:
        carry, own = state
        number, rows = at
        rows = [
            _of(read[one], place, number) if waiting else row
            for one, row, waiting in zip(stacks, rows, waits, strict=True)
        ]
        made = run(*fixed, *carry, *rows)
        own = [_put(one, made[at], place, number) for one, at in zip(own, written, strict=True)]
        return (made[:carried], own), [made[at] for at in others]

    state = carry, [held[loop.outvars[at]] for at in written]
    numbers = jnp.arange(params["length"])
    (carry, own), ys = lax.scan(step, state, (numbers, rows), reverse=params["reverse"])
    held.update(zip((loop.outvars[at] for at in written), own, strict=True))
    results: list[Any] = [*carry, *([None] * (len(loop.outvars) - carried))]
    for at, stacked in zip(others, ys, strict=True):
        results[at] = stacked
    return results


def _of(waiting: Array, *places: Array) -> Array:
    """Return what is in a place."""
    starts = [*places, *[0] * (waiting.ndim - len(places))]
    sizes = [*[1] * len(places), *waiting.shape[len(places) :]]
    return lax.dynamic_slice(waiting, starts, sizes).reshape(sizes[len(places) :])


def _put(waiting: Array, value: Array, *places: Array) -> Array:
    """Return all that waits with a value in its place."""
    starts = [*places, *[0] * value.ndim]
    return lax.dynamic_update_slice(waiting, value[(None,) * len(places)], starts)


@dataclass
class _Cut:
    """The equations of a jaxpr in two groups."""

    first: list[JaxprEqn]
    later: list[JaxprEqn]
    crossing: list[Var]  # what the first make, or loops carry, and the later read
    later_outs: list[int]  # which results the later make


def _cut(
    jaxpr: Jaxpr, now: Sequence[bool], gradients: Iterable[Var], carried: Iterable[Var]
) -> _Cut:
    """Cut a jaxpr without calls whose results `now` are needed at once; of what it reads, some are
    `gradients`, and what a loop has `carried` crosses like what is made."""
    of_gradients = set(gradients)
    for equation in jaxpr.eqns:
        if of_gradients & _reads(equation):
            of_gradients |= set(equation.outvars)
    wanted_now = zip(jaxpr.outvars, now, strict=True)
    needed = {out for out, wanted in wanted_now if wanted and isinstance(out, Var)}
    parts: list[tuple[JaxprEqn, bool]] = []  # last first, with whether it is needed at once
    products: set[int] = set()  # of those that are not, products of gradients and moves
    for equation in reversed(jaxpr.eqns):
        at_once = bool(needed & set(equation.outvars))
        loop = equation.primitive.name == "scan" and bool(of_gradients & _reads(equation))
        if at_once and loop:
            equation, rest = _cut_loop(equation, needed, of_gradients)
            if rest is not None:
                products.add(len(parts))
                parts.append((rest, False))
        elif not at_once and (
            equation.primitive.name in _MOVES
            or (of_gradients & _reads(equation) and _multiplies(equation))
        ):
            products.add(len(parts))
        if at_once:
            needed |= _reads(equation)
        parts.append((equation, at_once))
    behind: set[Var] = set()  # what these make, and what follows from it
    first, later = [], []
    for place in reversed(range(len(parts))):
        equation, _ = parts[place]
        if place in products or behind & _reads(equation):
            behind |= set(equation.outvars)
            later.append(equation)
        else:
            first.append(equation)
    outs = {out for out in jaxpr.outvars if isinstance(out, Var)}
    wanted = outs | {read for equation in later for read in _reads(equation)}
    kept: list[JaxprEqn] = []
    for equation in reversed(first):
        if wanted & set(equation.outvars) or equation.effects:
            wanted |= _reads(equation)
            kept.append(equation)
    made = {out for equation in kept for out in equation.outvars} | set(carried)
    read = dict.fromkeys(one for equation in later for one in _ordered(equation))
    return _Cut(
        first=kept[::-1],
        later=later,
        crossing=[one for one in read if one in made],
        later_outs=[place for place, out in enumerate(jaxpr.outvars) if out in behind],
    )


def _cut_loop(
    loop: JaxprEqn, needed: set[Var], of_gradients: set[Var]
) -> tuple[JaxprEqn, JaxprEqn | None]:
    """Return a loop without the products of gradients that only weights need, and a loop of them
    over what the first one stacks; none if there are no such products.

    All that the loop carries is needed at once.
    """
    params, consts = loop.params, loop.params["num_consts"]
    carried = loop.params["num_carry"]
    flat = _flat(params["jaxpr"])
    body = flat.jaxpr
    now = [place < carried or out in needed for place, out in enumerate(loop.outvars)]
    gradients = [
        own
        for place, (own, out) in enumerate(zip(body.invars, loop.invars, strict=True))
        if consts <= place < consts + carried or (isinstance(out, Var) and out in of_gradients)
    ]
    cut = _cut(body, now, gradients, body.invars[consts : consts + carried])
    if not cut.later_outs:
        return loop, None
    here = [place for place in range(len(loop.outvars)) if place not in cut.later_outs]
    read_by_layer: list[Any] = [one.aval for one in cut.crossing]
    stacked = [Var(one.update(shape=(params["length"], *one.shape))) for one in read_by_layer]
    first = loop.replace(
        outvars=[*(loop.outvars[place] for place in here), *stacked],
        params={**params, "jaxpr": _closed(flat, cut.first, body.invars, here, cut.crossing)},
    )
    read = {one for equation in cut.later for one in _reads(equation)}
    inside = [
        place
        for place, one in enumerate(body.invars)
        if one in read and not consts <= place < consts + carried
    ]
    rest = loop.replace(
        invars=[*(loop.invars[place] for place in inside), *stacked],
        outvars=[loop.outvars[place] for place in cut.later_outs],
        params={
            **params,
            "num_carry": 0,
            "num_consts": sum(place < consts for place in inside),
            "jaxpr": _closed(
                flat,
                cut.later,
                [*(body.invars[place] for place in inside), *cut.crossing],
                cut.later_outs,
                (),
            ),
        },
    )
    return first, rest


def _closed(
    whole: ClosedJaxpr,
    equations: Sequence[JaxprEqn],
    reads: Sequence[Var],
    outs: Iterable[int],
    more: Iterable[Var],
) -> ClosedJaxpr:
    """Return some equations of a jaxpr, with some of its results and `more`."""
    made = [*(whole.jaxpr.outvars[place] for place in outs), *more]
    return _jaxpr(whole.jaxpr.constvars, reads, made, equations, whole.consts)


def _jaxpr(
    constvars: Sequence[Var],
    reads: Sequence[Var],
    made: Sequence[Any],
    equations: Sequence[JaxprEqn],
    consts: Sequence[Any] = (),
) -> ClosedJaxpr:
    effects = frozenset(effect for equation in equations for effect in equation.effects)
    told = DebugInfo("apart", "apart", None, None)
    return ClosedJaxpr(Jaxpr(constvars, reads, made, equations, effects, told), consts)


def _reads(equation: JaxprEqn) -> set[Var]:
    return set(_ordered(equation))


def _ordered(equation: JaxprEqn) -> list[Var]:
    return [one for one in equation.invars if not isinstance(one, Literal)]


def _multiplies(equation: JaxprEqn) -> bool:
    """Return whether there is a product in an equation."""
    if "dot" in equation.primitive.name:  # ragged ones too
        return True
    inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
    return any(_multiplies(one) for jaxpr in inner for one in getattr(jaxpr, "eqns", ()))


def _flat(whole: ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr with what it calls in its place."""
    reads = [jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype) for one in whole.jaxpr.invars]
    return jax.make_jaxpr(partial(_play, whole.jaxpr, whole.consts))(*reads)


def _play(jaxpr: Jaxpr, consts: Sequence[Any], *reads: Array) -> list[Array]:
    """Run a jaxpr, and what it calls as if it stood there."""
    there = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *reads], strict=True))

    def value(one: Any) -> Any:
        return one.val if isinstance(one, Literal) else there[one]

    for equation in jaxpr.eqns:
        read = [value(one) for one in equation.invars]
        if equation.primitive.name in _CALLS:
            inner = equation.params[_CALLS[equation.primitive.name]]
            with jax.named_scope(str(equation.source_info.name_stack)):
                made = _play(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *read)
        else:
            made = _alone(equation, value)
        there.update(zip(equation.outvars, made, strict=True))
    return [value(one) for one in jaxpr.outvars]


def _alone(equation: JaxprEqn, value: Callable[[Any], Any]) -> list[Array]:
    """Run one equation."""
    names = list(dict.fromkeys(_ordered(equation)))
    run = jaxpr_as_fun(_jaxpr((), names, equation.outvars, [equation]))
    made: list[Array] = run(*(value(one) for one in names))
    return made
