"""Steps that do not run one microbatch after another through the whole model.

`scattered` holds weights whole over microbatches. Where layers lie on stages, or
each layer runs all microbatches before the next, embedding, layers and head are phases of their
own: the step goes through each with all microbatches, then back. The head computes its gradients
at once, so that logits of one microbatch are there at a time.

The weights of the embedding and the head are then gathered once a step, and their gradients, summed
in float32 over microbatches, scattered once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardsim.emit.runtime.apart import Apart
from shardsim.emit.runtime.collectives import member
from shardsim.emit.runtime.config import Data
from shardsim.emit.runtime.explicit import Explicit
from shardsim.emit.runtime.lending import (
    SUMS,
    Lending,
    lend,
    opened,
    own_gradients,
    whole,
    with_sums,
    zeros,
)
from shardsim.emit.runtime.model import by_stack, layers, loss_sum, remat_policy, run
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
        value, gradients, sums, x = in_turns(way, calls, held, ends, (x, parts), loss)
        return value, finished(gradients, sums, x)
    x, pull = jax.vjp(partial(middle, way, calls, held), zeros(held), x)
    (value, sums), x = lax.scan(head, (jnp.zeros(()), zeros(ends)), (x, parts))
    gradients, x = pull(x)
    return value, finished(gradients, sums, x)


def in_sums(gradients: Params) -> Params:
    """Return gradients in the format in which they are summed."""
    return {name: value.astype(jnp.float32) for name, value in gradients.items()}


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


def in_turns(
    way: Explicit,
    calls: Data,
    held: Params,
    ends: Params,
    batch: tuple[Array, Params],
    loss: Callable[[Params, Array, Params], Array],
) -> tuple[Array, Params, Params, Array]:
    """Run all microbatches through layers that lie on stages, one forward, one back in a tick.

    Stage s of P runs microbatch m forward in tick m + s and back in tick m + 2 (P - 1) - s, the
    last stage in one tick, with the head between. So there are P - 1 ticks forward alone, as many
    of both as there are microbatches, and P - 1 back alone; in each a stage that has nothing to do
    works on nothing. What layers keep for the way back lies in 2 P - 1 places.

    Where gradients of weights are apart, those of microbatch m are made in tick m + 2 (P - 1) on
    all stages, so that none is made of nothing; what they multiply waits in P places.

    Return the loss, the float32 gradients of layers and ends, and those of what the layers start
    from.
    """
    inside = opened(way) if way.plan["accumulation"] == "gathered" else way
    queue, parts = batch
    stages, many = way.stages.size, queue.shape[0]
    places, last = 2 * stages - 1, stages - 1
    stage = member(way.stages)
    ring = [(k, (k + 1) % stages) for k in range(stages)]
    how: list[Any] = []  # of what is kept: its tree, and the names of the weights in it

    def keep(mine: Params, x: Array) -> tuple[Array, list[Array]]:
        """Return what the layers make of x, and what of it the way back reads but weights."""

        def run_layers(sums: Params, x: Array) -> Array:
            return layers(inside, calls, lend(mine, sums), x, {})

        y, pull = jax.vjp(run_layers, zeros(mine), x)
        weights = {id(value): name for name, value in mine.items()}
        leaves, tree = jax.tree.flatten(pull)
        names = [weights.get(id(leaf)) for leaf in leaves]
        how[:] = [tree, names]
        return y, [leaf for leaf, name in zip(leaves, names, strict=True) if name is None]

    def kept_of(microbatch: Array, room: Sequence[Array], mine: Params) -> list[Array]:
        """Return all that the way back of a microbatch reads."""
        at = microbatch % places
        kept = iter([lax.dynamic_index_in_dim(one, at, keepdims=False) for one in room])
        return [next(kept) if name is None else mine[name] for name in how[1]]

    def pulled(kept: Sequence[Array], gradient: Array) -> Any:
        return jax.tree.unflatten(how[0], kept)(gradient)

    def space(several: int, of: Sequence[Array]) -> list[Array]:
        return [jnp.zeros((several, *one.shape), one.dtype) for one in of]

    _, kept = jax.eval_shape(keep, held, queue[0])
    room, wait, apart = space(places, kept), [], None
    if way.plan["weights_apart"]:
        shapes = jax.eval_shape(kept_of, jnp.zeros((), int), room, held)
        apart = Apart(pulled, shapes, queue[0])
        wait = space(stages, apart.waiting)

    def forward(carry: Any, now: Array) -> tuple[Any, Array]:
        queue, arrived, room = carry
        # Tied to its tick, so that weights gathered for one need not stay for the next.
        mine, arrived = lax.optimization_barrier((held, arrived))
        x = jnp.where(stage == 0, queue[jnp.clip(now, 0, many - 1)], arrived)
        y, kept = keep(mine, x)
        place = (now - stage) % places
        room = [
            lax.dynamic_update_index_in_dim(all_, one, place, 0)
            for all_, one in zip(room, kept, strict=True)
        ]
        with jax.named_scope("stage_boundary"):
            arrived = lax.ppermute(y, way.stages.axes, ring)
        return (queue, arrived, room), y

    def back(carry: Any, room: list[Array], gradient: Array, now: Array) -> Any:
        queue, made, sums, wait = carry
        with jax.named_scope("stage_boundary"):
            arrived = lax.ppermute(made, way.stages.axes, [(to, come) for come, to in ring])
        mine, gradient = lax.optimization_barrier(
            (held, jnp.where(stage == last, gradient, arrived))
        )
        microbatch = now - 2 * last + stage
        kept = kept_of(microbatch, room, mine)
        if apart:
            own, x, wait = apart.at_once(kept, gradient, wait, microbatch % stages)
        else:
            own, x = pulled(kept, gradient)
        busy = (microbatch >= 0) & (microbatch < many)
        added = {
            name: jnp.where(busy, sums[name] + value, sums[name]) for name, value in own.items()
        }
        place = jnp.clip(now - 2 * last, 0, many - 1)
        queue = queue.at[place].set(jnp.where((stage == 0) & busy, x, queue[place]))
        return queue, x, {**sums, **added}, wait

    def weights(carry: Any, room: list[Array], now: Array) -> Any:
        queue, made, sums, wait = carry
        if apart:
            microbatch = now - 2 * last
            own = apart.later(kept_of(microbatch, room, held), wait, microbatch % stages)
            sums = {**sums, **{name: sums[name] + value for name, value in own.items()}}
        return queue, made, sums, wait

    def both(carry: Any, now: Array, full: bool) -> tuple[Any, None]:
        queue, arrived, room, made, sums, wait, of_ends, value = carry
        (queue, arrived, room), y = forward((queue, arrived, room), now)
        part = {name: all_[now - last] for name, all_ in parts.items()}
        more, (gradients, gradient) = jax.value_and_grad(loss, (0, 1))(ends, y, part)
        of_ends = jax.tree.map(jnp.add, of_ends, in_sums(gradients))
        backwards = back((queue, made, sums, wait), room, gradient, now)
        queue, made, sums, wait = weights(backwards, room, now) if full else backwards
        return (queue, arrived, room, made, sums, wait, of_ends, value + more), None

    def only_back(carry: Any, now: Array, room: list[Array]) -> tuple[Any, None]:
        return weights(back(carry, room, nothing, now), room, now), None

    nothing = jnp.zeros_like(queue[0])
    (queue, arrived, room), _ = lax.scan(
        lambda carry, now: (forward(carry, now)[0], None), (queue, nothing, room), jnp.arange(last)
    )
    carry = queue, arrived, room, nothing, zeros(held), wait, zeros(ends), jnp.zeros(())
    ticks = last + jnp.arange(many)
    if apart:
        carry, _ = lax.scan(partial(both, full=False), carry, ticks[:last])
        ticks = ticks[last:]
    carry, _ = lax.scan(partial(both, full=True), carry, ticks)
    queue, _, room, made, sums, wait, of_ends, value = carry
    (queue, _, sums, _), _ = lax.scan(
        partial(only_back, room=room), (queue, made, sums, wait), last + many + jnp.arange(last)
    )
    return value, sums, of_ends, jnp.where(stage == 0, queue, 0)


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
