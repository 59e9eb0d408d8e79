"""Steps that do not run one microbatch after another through the whole model.

`scattered` holds weights whole over microbatches. Where layers lie on stages, or
each layer runs all microbatches before the next, embedding, layers and head are phases of their
own: the step goes through each with all microbatches, then back. The head computes its gradients
at once, so that logits of one microbatch are there at a time.

The weights of the embedding and the head are then gathered once a step, and their gradients, summed
in float32 over microbatches, scattered once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardsim.emit.runtime.collectives import member
from shardsim.emit.runtime.config import Data
from shardsim.emit.runtime.explicit import Explicit
from shardsim.emit.runtime.lending import (
    SUMS,
    Lending,
    in_sums,
    lend,
    opened,
    own_gradients,
    whole,
    with_sums,
    zeros,
)
from shardsim.emit.runtime.model import by_stack, layers, loss_sum, remat_policy, run
from shardsim.emit.runtime.turns import Turns
from shardsim.ops.whole import Array, Params


def scattered(
    way: Explicit, calls: Data, params: Params, parts: Params, units: int
) -> tuple[Array, Params]:
    """Return this device's share of the loss, and float32 gradients, with weights that stay whole
    over a step, and gradients that are scattered in every microbatch.

    `parts` are the batch as [microbatch, ...].
    """
    of_layers = {name for kind in calls["layers"] for name in kind["weights"]}
    held, inside = whole(way, params), Lending(way)
    ends = {name: value for name, value in held.items() if name not in of_layers}
    nothing = zeros({name: value for name, value in params.items() if name in of_layers})

    def loss(sums: Params, ends: Params, part: Params) -> Array:
        every = {**held, **ends, **{name + SUMS: value for name, value in sums.items()}}
        return loss_sum(inside, with_sums(calls, of_layers), every, part) / units

    def body(before: Any, part: Params) -> tuple[Any, None]:
        value, (mine, others) = jax.value_and_grad(loss, (0, 1))(nothing, ends, part)
        # Apart from the sum, into which the TPU compiler would move the scatters, and fails.
        gradients = lax.optimization_barrier({**mine, **own_gradients(way, in_sums(others))})
        return jax.tree.map(jnp.add, before, (value, gradients)), None

    return lax.scan(body, (jnp.zeros(()), zeros(params)), parts)[0]


def in_phases(
    way: Explicit, calls: Data, params: Params, parts: Params, units: int
) -> tuple[Array, Params]:
    """Return this device's share of the loss, and float32 gradients.

    `parts` are the batch as [microbatch, ...].
    """
    of_layers = {name for kind in calls["layers"] for name in kind["weights"]}
    stacks = {name: value for name, value in params.items() if name in of_layers}
    ends = whole(way, {n: value for n, value in params.items() if n not in of_layers})
    inside = opened(way)
    # In turns the last stage has the head, else the microbatches come back to the first for it.
    where = way.stages.size - 1 if way.plan["in_turns"] else 0
    here = jnp.where(member(way.stages) == where, 1.0, 0.0)

    def embed(ends: Params, part: Params) -> Array:
        return run(inside, ends, calls["before"], dict(part))["x"]

    def loss(ends: Params, x: Array, part: Params) -> Array:
        arrays = {**run(inside, ends, calls["before"], dict(part)), "x": x}
        value = run(inside, ends, calls["after"], arrays)[calls["after"][-1]["outs"][0]]
        return here * value / units

    def head(sums: Any, at: Any) -> tuple[Any, Array]:
        value, (gradients, back) = jax.value_and_grad(loss, (0, 1))(ends, *at)
        return jax.tree.map(jnp.add, sums, (value, in_sums(gradients))), back

    def unembed(sums: Params, at: Any) -> tuple[Params, None]:
        part, gradient = at
        _, pull = jax.vjp(partial(embed, part=part), ends)
        return jax.tree.map(jnp.add, sums, in_sums(pull(gradient)[0])), None

    def finished(gradients: Params, sums: Params, x: Array) -> Params:
        if way.plan["accumulation"] == "gathered":
            gradients = own_gradients(way, gradients)
        sums, _ = lax.scan(unembed, sums, (parts, x))
        return {**gradients, **own_gradients(way, sums)}

    _, x = lax.scan(lambda _, part: (None, embed(ends, part)), None, parts)
    middle, held = (staged, stacks) if way.stages.size > 1 else (layered, stacks)
    if way.plan["accumulation"] == "gathered":
        held = whole(way, stacks)
    if way.plan["in_turns"]:
        value, gradients, sums, x = Turns(way, calls, held, x[0]).run(ends, (x, parts), loss)
        return value, finished(gradients, sums, x)
    x, pull = jax.vjp(partial(middle, way, calls, held), zeros(held), x)
    (value, sums), x = lax.scan(head, (jnp.zeros(()), zeros(ends)), (x, parts))
    gradients, x = pull(x)
    return value, finished(gradients, sums, x)


def staged(way: Explicit, calls: Data, held: Params, sums: Params, queue: Array) -> Array:
    """Run all microbatches [microbatch, ...] through layers that lie on stages.

    A loop of ticks, alike on all stages: in each a stage runs the next microbatch through one of
    its chunks of layers and passes it on, the last stage to the first, where it waits for its next
    chunk, or for the head. Who has nothing to do yet, or no more, works on nothing. After a chunk
    of the first stage comes that of the second: with several chunks layers are dealt round, and
    all microbatches pass a chunk before the next.
    """
    plan = way.plan
    inside = opened(way) if plan["accumulation"] == "gathered" else way
    stages, chunks, many = way.stages.size, plan["chunks"], queue.shape[0]
    stage, ring = member(way.stages), [(k, (k + 1) % stages) for k in range(stages)]
    mine = lend(held, sums)
    cut = {name: v.reshape(chunks, -1, *v.shape[1:]) for name, v in mine.items()}

    away = sorted({name for group in plan["remat"] for name in group["offload"]})
    here = {"layer_input"}.union(*(group["save"] for group in plan["remat"])) - {*away}
    policy = remat_policy(plan, {"save": sorted(here), "offload": away})

    # Of a chunk's weights only the number stays for the way back.
    @partial(jax.checkpoint, policy=policy)
    def run_chunk(cut: Params, chunk: Array, x: Array) -> Array:
        weights = {n: v[0] if chunks == 1 else v[chunk] for n, v in cut.items()}
        # Tied to its tick, so that weights gathered for one need not stay for the next.
        weights, x = lax.optimization_barrier((weights, x))
        return layers(inside, calls, weights, x, {})

    def tick(carry: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], None]:
        queue, arrived = carry
        chunk = jnp.clip((now - stage) // many, 0, chunks - 1)
        x = run_chunk(cut, chunk, jnp.where(stage == 0, queue[now % many], arrived))
        with jax.named_scope("stage_boundary"):
            arrived = lax.ppermute(x, way.stages.axes, ring)
        place = (now - stages + 1) % many
        back = (stage == 0) & (now >= stages - 1)
        queue = queue.at[place].set(jnp.where(back, arrived, queue[place]))
        return (queue, arrived), None

    ticks = jnp.arange(many * chunks + stages - 1)
    return lax.scan(tick, (queue, jnp.zeros_like(queue[0])), ticks)[0][0]


def layered(way: Explicit, calls: Data, held: Params, sums: Params, x: Array) -> Array:
    """Run all microbatches [microbatch, ...] through each round of layers before the next.

    A round's weights are gathered once forward and once backward, and its gradients scattered
    once, when those of all microbatches are summed.
    """
    cuts = (by_stack(way.plan, calls, params) for params in (held, sums))
    for (stack, mine, groups), (_, own, _) in zip(*cuts, strict=True):
        x = layered_rounds(way, {**calls, "stacks": [stack]}, groups, mine, own, x)
    return x


def layered_rounds(
    way: Explicit, calls: Data, groups: Sequence[Data], held: Params, sums: Params, x: Array
) -> Array:
    """Run all microbatches through each round of one stack of layers before the next."""
    length, first = len(calls["stacks"][0]["round"]), 0
    for group in groups:
        alone = {**group, "layers": length}
        inside = opened(way, remat=[alone])
        names = [*group["save"], *group["offload"], "layer_input"]
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        rounds = group["layers"] // length
        last = first + rounds

        def one(inside: Explicit, x: Array, weights: Any) -> tuple[Array, None]:
            shards, sums = weights
            mine = whole(way, lend(shards, sums))
            wide = {name: value.astype(jnp.float32) for name, value in mine.items()}

            def each(_: None, part: Array) -> tuple[None, Array]:
                return None, layers(inside, calls, wide, part, {})

            return lax.scan(each, None, x)[1], None

        def cut(params: Params, first: int = first, last: int = last) -> Params:
            found = {}
            for name, value in params.items():
                by_round = value.reshape(
                    sum(g["layers"] for g in groups) // length, -1, *value.shape[1:]
                )
                found[name] = by_round[first:last]
            return found

        body = jax.checkpoint(partial(one, inside), policy=policy, prevent_cse=False)
        x = lax.scan(body, x, (cut(held), cut(sums)))[0]
        first = last
    return x
