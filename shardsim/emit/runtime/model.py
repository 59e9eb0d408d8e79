"""The model: its calls one after another, layers under scans.

Each call runs an op by name, on arrays by name. Everything that sharding touches is asked of `way`
(`Whole`, `Explicit` or `Partitioned`), so a model reads the same for one device and for a pod.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from shardsim.emit.runtime.config import Data
from shardsim.ops.registry import RUNS
from shardsim.ops.whole import Array, Params, Whole


def loss_sum(
    way: Whole, calls: Data, params: Params, batch: Params, parts: Sequence[Data] = ()
) -> Array:
    """Return this device's share of the sum of losses over a microbatch.

    The shares of all devices add up to the whole: where several compute the same loss, each
    counts for its part, so that gradients are sums over devices whatever the sharding. The stacks
    that the model reads are `parts`, in order: each may read what those before have made.
    """
    way.segments, way.counts = batch.get("segments"), batch.get("counts")
    arrays, before = dict(batch), list(calls["before"])
    while before and all(name in arrays for name in before[0]["ins"]):
        run(way, params, [before.pop(0)], arrays)
    for part in parts:
        name = f"{part['name']}/"
        mine = {key.removeprefix(name): params[key] for key in params if key.startswith(name)}
        own = {key.removeprefix(name): batch[key] for key in batch if key.startswith(name)}
        there, steps = way.part(part), part["calls"]
        read = {name for call in steps["before"] for name in call["ins"]}
        found = {name: arrays[name] for name in read & arrays.keys() - own.keys()} | own
        found = run(there, mine, steps["before"], found)
        arrays[steps["after"][-1]["outs"][0]] = stack(there, steps, mine, found)
    return stack(way, calls, params, run(way, params, before, arrays))


def stack(way: Whole, calls: Data, params: Params, arrays: Params) -> Array:
    """Run the layers of a stack and what stands after them; return the last result."""
    shared = {name: arrays[name] for name in calls.get("shared", ())}
    arrays["x"] = layers(way, calls, params, arrays["x"], shared)
    return run(way, params, calls["after"], arrays)[calls["after"][-1]["outs"][0]]


def run(way: Whole, params: Params, calls: Sequence[Data], arrays: Params) -> Params:
    """Run calls in order; return all arrays by name, each named for the remat policy."""
    for call in calls:
        made = RUNS[call["run"]](way, params, call, *(arrays[name] for name in call["ins"]))
        made = made if isinstance(made, list) else [made]
        for name, keep, value in zip(call["outs"], call["keeps"], made, strict=True):
            arrays[name] = named(way, value, keep) if keep else value
    return arrays


def named(way: Whole, value: Array, keep: str) -> Array:
    """Name an array for the remat policy.

    What has heads and goes to the host's memory lies there as attention's kernel reads it, heads
    before tokens: in another order each of its readers would lay it out anew when it comes back.
    """
    away = any(keep in group["offload"] for group in way.plan["remat"])
    if away and keep in ("qkv", "context") and value.ndim == 4 and way.plan["platform"] != "gpu":
        return jnp.swapaxes(checkpoint_name(jnp.swapaxes(value, 1, 2), keep), 1, 2)
    return checkpoint_name(value, keep)


def layers(way: Whole, calls: Data, params: Params, x: Array, shared: Params) -> Array:
    """Run the layers in rounds, all rounds of a group of layers under one scan.

    All of them read what is `shared`, whose gradient adds up over them.

    Each layer keeps for its backward pass what the plan says for its group. A weight that several
    layers of a round have lies in their order, round after round.
    """
    kinds = [calls["layers"][kind] for stack in calls["stacks"] for kind in stack["round"]]
    names = dict.fromkeys(name for kind in kinds for name in kind["weights"])
    every = {name: way.in_layer_order(params[name]) for name in names}
    for stack, mine, groups in by_stack(way.plan, calls, every):
        x = rounds(way, calls["layers"], stack["round"], mine, groups, x, shared)
    return x


def by_stack(
    plan: Data, calls: Data, params: Params
) -> Iterator[tuple[Data, Params, Sequence[Data]]]:
    """Yield each stack of layers, its part of the weights and its groups of layers.

    Stacks that have a weight of one name share an array, each after those before it.
    """
    kinds, stacks, taken = calls["layers"], calls["stacks"], dict.fromkeys(params, 0)
    if len(stacks) == 1:
        yield stacks[0], params, plan["remat"]
        return
    for stack in stacks:
        mine = {}
        for name, value in params.items():
            if each := sum(name in kinds[kind]["weights"] for kind in stack["round"]):
                first = taken[name]
                taken[name] += each * stack["rounds"]
                mine[name] = value[first : taken[name]]
        layers = stack["rounds"] * len(stack["round"])
        yield stack, mine, [{**group, "layers": layers} for group in plan["remat"]]


def rounds(
    way: Whole,
    kinds: Sequence[Data],
    order: Sequence[int],
    stacked: Params,
    groups: Sequence[Data],
    x: Array,
    shared: Params,
) -> Array:
    """Run the rounds of one stack of layers, the kinds of each in `order`."""
    users = {
        name: [place for place, kind in enumerate(order) if name in kinds[kind]["weights"]]
        for name in stacked
    }

    def layer(place: int, x: Array, weights: Params) -> Array:
        arrays = {"x": way.residual(checkpoint_name(x, "layer_input")), **shared}
        kind = kinds[order[place]]
        if len(order) > 1:  # its own, cut out anew in the backward pass: else it would be kept
            weights = {name: value[users[name].index(place)] for name, value in weights.items()}
        mine = kind["calls"]
        return run(way, way.of_layer(weights), mine, arrays)[mine[-1]["outs"][0]]

    def one_round(policy: Any, alone: bool, x: Array, weights: Params) -> tuple[Array, None]:
        for place, kind in enumerate(order):
            mine = {name: weights[name] for name in kinds[kind]["weights"]}
            step = jax.checkpoint(partial(layer, place), policy=policy, prevent_cse=alone)
            x = step(checkpoint_name(x, "layer_input"), mine)
        return x, None

    if len(order) > 1:
        stacked = {
            name: value.reshape(-1, len(users[name]), *value.shape[1:])
            for name, value in stacked.items()
        }
    first = 0
    for group in groups:
        last = first + group["layers"] // len(order)
        mine = stacked
        if len(groups) > 1:
            mine = {name: value[first:last] for name, value in stacked.items()}
        # One round is no loop to a compiler, which would find what is to run again there already.
        policy, alone = remat_policy(way.plan, group), last - first == 1
        x = lax.scan(partial(one_round, policy, alone), x, mine)[0]
        first = last
    return x


def remat_policy(plan: Data, group: Data) -> Any:
    """Return the checkpoint policy: keep the tensors that the plan names for a group of layers,
    compute the rest again.

    Gathered weights and inputs carry no name, so the backward pass always gathers them again.
    Where there is no host memory to offload to (CPU), those tensors are kept.
    """
    policies = jax.checkpoint_policies
    save, offload = group["save"], group["offload"]
    if plan["platform"] == "gpu" and "context" in save:
        return policies.save_from_both_policies(
            cudnn_results, policies.save_only_these_names(*save)
        )
    if offload and plan["platform"] != "cpu":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=save,
            names_which_can_be_offloaded=offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = [name for name in offload if name != "layer_input"]
    return policies.save_only_these_names(*save, *kept)


def cudnn_results(primitive: Any, *_: Any, **params: Any) -> bool:
    """Keep the result of cuDNN's attention and its logarithms, which cannot be named inside it."""
    return bool(primitive.name.startswith("dot_product_attention_fwd"))
