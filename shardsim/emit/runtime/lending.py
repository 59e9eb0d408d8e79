"""Weights that are whole for longer than a layer, or lie with the host, and their gradients.

Such weights lend themselves: what is computed with them has its gradient with respect to float32
sums instead, which may be shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from shardsim.emit.runtime.collectives import gather_weight, scatter_gradient
from shardsim.emit.runtime.config import Data, Group, make_group
from shardsim.emit.runtime.explicit import Explicit
from shardsim.ops.whole import Array, Params


def opened(way: Explicit, **changes: Any) -> Explicit:
    """Return the way to work with weights that are whole already."""
    plan = {**way.plan, "gather": [], "experts_gather": [], **changes}
    return Explicit(plan, way.model, way.parameters, way.activations)


def in_sums(gradients: Params) -> Params:
    """Return gradients in the format in which they are summed."""
    return {name: value.astype(jnp.float32) for name, value in gradients.items()}


def shards_of(way: Explicit, name: str, ndim: int) -> tuple[Group, int]:
    """Return over whom a weight is gathered, and along which dimension of `ndim`.

    Without its stack of layers a weight has a dimension less.
    """
    entry = way.parameters[name]
    axes = way.plan["experts_gather" if "expert" in entry["axes"] else "gather"]
    spec = entry["spec"][len(entry["spec"]) - ndim :]
    for dim, names in enumerate(spec):
        if over := [axis for axis in names if axis in axes]:
            return make_group(way.plan, over), dim
    return make_group(way.plan, []), 0


def over_shards(
    way: Explicit, arrays: Params, move: Callable[[Array, Group, int], Array]
) -> Params:
    """Return arrays of weights by name, those that are split moved over the group that splits them
    and the dimension in which it does."""
    found = {}
    for name, value in arrays.items():
        group, dim = shards_of(way, name, value.ndim)
        at_end = "tables" if "vocab" in way.parameters[name]["axes"] else "end_weights"
        block = way.parameters[name]["part"] == "block"
        with jax.named_scope("gather_weights" if block else at_end):
            found[name] = move(value, group, dim) if group.size > 1 else value
    return found


def whole(way: Explicit, params: Params) -> Params:
    """Return weights gathered, in the compute format; vectors as they are."""
    return over_shards(
        way,
        params,
        lambda value, group, dim: gather_weight(value, group, dim, way.compute, way.reduce),
    )


def own_gradients(way: Explicit, gradients: Params) -> Params:
    """Return the shards of float32 gradients of whole weights, summed over those who gather."""
    return over_shards(
        way,
        gradients,
        lambda value, group, dim: scatter_gradient(value, group, dim, way.reduce).astype(
            jnp.float32
        ),
    )


@jax.custom_vjp
def lent(value: Array, sums: Array) -> Array:
    """Return `value`, whose gradient is that of the float32 `sums`."""
    return value


lent.defvjp(
    lambda value, sums: (value, None),
    lambda _, gradient: (None, gradient.astype(jnp.float32)),
)


def zeros(params: Params) -> Params:
    """Return float32 zeros like arrays."""
    return {name: jnp.zeros(value.shape, jnp.float32) for name, value in params.items()}


def lend(params: Params, sums: Params) -> Params:
    """Return weights whose gradients are those of `sums`."""
    return {name: lent(on_device(value), sums[name]) for name, value in params.items()}


def on_device(value: Array) -> Array:
    """Return an array in the device's memory, fetched where it is in the host's."""
    there = jax.typeof(value).memory_space == jax.memory.Space.Host
    return jax.device_put(value, jax.memory.Space.Device) if there else value


def whole_first(way: Explicit, params: Params, accumulate: Callable[..., Any]) -> Any:
    """Return loss and gradients of `accumulate` with weights that stay whole over a step."""
    loss, gradients = accumulate(opened(way), whole(way, params))
    return loss, own_gradients(way, gradients)


SUMS = " sums"  # what a layer's calls do not name, beside each weight that they do


def with_sums(calls: Data, names: Iterable[str]) -> Data:
    """Return calls of layers that take, beside those of their weights that are named, sums."""
    names = set(names)
    kinds = [
        {**kind, "weights": kind["weights"] + [n + SUMS for n in kind["weights"] if n in names]}
        for kind in calls["layers"]
    ]
    return {**calls, "layers": kinds}


class Fetching(Explicit):
    """Weights in the host's memory, which a layer fetches, forward and again back; its gradients
    are those of sums on the device."""

    def of_layer(self, weights: Params) -> Params:
        here = {name: on_device(value) for name, value in weights.items()}
        sums = {name: here[name + SUMS] for name in here if name + SUMS in here}
        return {**here, **lend({name: here[name] for name in sums}, sums)}


class Lending(Explicit):
    """Weights that are whole, of which a layer scatters the gradients as it makes them."""

    def __init__(self, way: Explicit) -> None:
        plan = {**way.plan, "gather": [], "experts_gather": []}
        super().__init__(plan, way.model, way.parameters, way.activations)
        self.way = way

    def flat(self) -> Explicit:
        return opened(self.way).flat()

    def of_layer(self, weights: Params) -> Params:
        found = {}
        for name in [name for name in weights if name + SUMS in weights]:
            group, dim = shards_of(self.way, name, weights[name].ndim)
            found[name] = lent_by(weights[name], weights[name + SUMS], group, dim, self.reduce)
        return found


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lent_by(value: Array, sums: Array, group: Group, dim: int, reduce: Any) -> Array:
    """Return a whole weight, whose gradient is summed over the group, scattered, and that of the
    shards `sums`."""
    return value


def _scatter_lent(group: Group, dim: int, reduce: Any, _: None, gradient: Array) -> Any:
    with jax.named_scope("gather_weights"):
        if group.size > 1:
            gradient = scatter_gradient(gradient, group, dim, reduce)
    return None, gradient.astype(jnp.float32)


lent_by.defvjp(lambda value, sums, group, dim, reduce: (value, None), _scatter_lent)
