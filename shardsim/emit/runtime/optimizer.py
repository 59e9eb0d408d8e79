"""The optimizer, and updates of arrays of which a part lies in the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from shardsim.ops.whole import Array, Params

# Gradients that are zero up to rounding, such as those of a bias of keys, must not move weights,
# so Adam's epsilon is larger than optax's 1e-8.
ADAM_EPSILON = 1e-6
# What suits the synthetic data; a real run has a schedule. Adafactor's is relative to the weights.
LEARNING_RATES = {
    "adamw": 1e-3,
    "adamw-bf16-mu": 1e-3,
    "adafactor": 3e-2,
    "adafactor-full": 3e-2,
    "momentum": 1e-2,
    "sgd": 1e-1,
}


def in_float32(params: Params) -> Params:
    """Return parameters in the format in which the optimizer computes and keeps its state."""
    return {name: value.astype(jnp.float32) for name, value in params.items()}


def make_optimizer(name: str, learning_rate: float) -> Any:
    """Return the optimizer that the plan names; a learning rate of 0 takes its usual one."""
    learning_rate = learning_rate or LEARNING_RATES[name]
    if name == "adamw":
        return optax.adamw(learning_rate, eps=ADAM_EPSILON)
    if name == "adamw-bf16-mu":
        return optax.adamw(learning_rate, eps=ADAM_EPSILON, mu_dtype=jnp.bfloat16)
    if name == "adafactor":
        return optax.adafactor(learning_rate, momentum=0.9, dtype_momentum=jnp.bfloat16)
    if name == "adafactor-full":
        return optax.adafactor(learning_rate, factored=False)
    if name == "momentum":
        return optax.sgd(learning_rate, momentum=0.9)
    if name == "sgd":
        return optax.sgd(learning_rate)
    raise ValueError(f"unknown optimizer {name!r}")


def of(names: Iterable[str], tree: Any) -> Any:
    """Return a tree whose mappings are by the names of arrays, with some of them alone."""
    names = list(names)

    def pick(node: Any) -> Any:
        return {name: node[name] for name in names} if isinstance(node, dict) else node

    return jax.tree.map(pick, tree, is_leaf=lambda node: isinstance(node, dict))


def merged(trees: Sequence[Any]) -> Any:
    """Return the whole of trees that have different names."""

    def join(*nodes: Any) -> Any:
        if not isinstance(nodes[0], dict):
            return nodes[0]
        return {name: value for node in nodes for name, value in node.items()}

    return jax.tree.map(join, *trees, is_leaf=lambda node: isinstance(node, dict))


def stored(value: Array, place: Any) -> Array:
    """Return an array of the device in the memory of its place."""
    return jax.device_put(value, place) if place.memory_kind == "pinned_host" else value


def by_layer(
    update: Callable[..., tuple[Params, Any]],
    gradients: Params,
    stacks: tuple[Params, Any],
) -> Any:
    """Run `update` on each layer of `stacks` of parameters and state in turn, which stay in the
    memory in which they are.

    What of the state is no stack (a count of steps) is the same for all layers.
    """
    (length,) = {len(value) for value in gradients.values()}
    arrays, tree = jax.tree.flatten(stacks)

    def cut(array: Array, layer: Array) -> Array:
        return lax.dynamic_index_in_dim(array, layer, keepdims=False) if array.ndim else array

    def body(now: list[Array], layer: Array) -> tuple[list[Array], None]:
        # Of what is no stack each layer has what was there before.
        own = [cut(new if old.ndim else old, layer) for old, new in zip(arrays, now, strict=True)]
        mine, before = jax.tree.unflatten(tree, own)
        grads = {name: cut(value, layer) for name, value in gradients.items()}
        made = jax.tree.leaves(update(grads, before, mine))
        return [put(*each, layer) for each in zip(now, made, strict=True)], None

    found, _ = lax.scan(body, arrays, jnp.arange(length))
    return jax.tree.unflatten(tree, found)


def put(stack: Array, one: Array, layer: Array) -> Array:
    """Put a layer's array into its stack, in the memory in which that is."""
    if not stack.ndim:
        return one
    if jax.typeof(stack).memory_space == jax.memory.Space.Host:
        one = jax.device_put(one, jax.memory.Space.Host)
    return lax.dynamic_update_index_in_dim(stack, one, layer, 0)
