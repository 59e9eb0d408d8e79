"""Layers that lie on stages, one microbatch forward and one back in a tick.

Stage s of P runs microbatch m forward in tick m + s and back in tick m + 2 (P - 1) - s, the last
stage in one tick, with the head between. So there are P - 1 ticks forward alone, as many of both as
there are microbatches, and P - 1 back alone; in each a stage that has nothing to do works on
nothing. What layers keep for the way back lies in 2 P - 1 places.

Where gradients of weights are apart, those of microbatch m are made in tick m + 2 (P - 1) on all
stages, so that none is made of nothing; what they multiply waits in P places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shardsim.emit.runtime.apart import Apart
from shardsim.emit.runtime.collectives import member
from shardsim.emit.runtime.config import Data
from shardsim.emit.runtime.explicit import Explicit
from shardsim.emit.runtime.lending import in_sums, lend, opened, zeros
from shardsim.emit.runtime.model import layers
from shardsim.ops.whole import Array, Params


class Tick(NamedTuple):
    """What a tick leaves to the next."""

    queue: Array  # [microbatch, ...]: what layers read, then the gradient of it
    arrived: Array  # what the stage before has made
    made: Array  # the gradient for the stage before
    room: list[Array]  # [place, ...]: what layers keep of a microbatch
    wait: list[Array]  # [place, ...]: what gradients of weights that are apart multiply
    sums: Params  # gradients of layers
    of_ends: Params  # gradients of ends
    loss: Array


class Turns:
    """The ticks of a stage, whose layers have the weights `held`."""

    def __init__(self, way: Explicit, calls: Data, held: Params, first: Array) -> None:
        """Take a microbatch, to know shapes."""
        self.inside = opened(way) if way.plan["accumulation"] == "gathered" else way
        self.axes, self.stages = way.stages.axes, way.stages.size
        self.stage, self.last = member(way.stages), way.stages.size - 1
        self.places = 2 * self.stages - 1
        self.calls, self.held, self.first = calls, held, first
        # Of what is kept: its tree, and the names of the weights in it.
        self.tree: Any = None
        self.names: list[str | None] = []
        self.kept = jax.eval_shape(self._keep, held, first)[1]
        self.apart: Apart | None = None
        if way.plan["weights_apart"]:
            room = _space(self.places, self.kept)
            shapes = jax.eval_shape(self._kept_of, jnp.zeros((), int), room, held)
            self.apart = Apart(self._pulled, shapes, first)

    def run(
        self,
        ends: Params,
        batch: tuple[Array, Params],
        loss: Callable[[Params, Array, Params], Any],
    ) -> tuple[Array, Params, Params, Array]:
        """Return the loss, the float32 gradients of layers and ends, and those of what the layers
        start from."""
        queue, parts = batch
        many, nothing = queue.shape[0], jnp.zeros_like(self.first)
        carry = Tick(
            queue=queue,
            arrived=nothing,
            made=nothing,
            room=_space(self.places, self.kept),
            wait=_space(self.stages, self.apart.waiting) if self.apart else [],
            sums=zeros(self.held),
            of_ends=zeros(ends),
            loss=jnp.zeros(()),
        )

        def forward(carry: Tick, now: Array) -> tuple[Tick, None]:
            return self._forward(carry, now, many)[0], None

        def both(carry: Tick, now: Array, full: bool) -> tuple[Tick, None]:
            carry, y = self._forward(carry, now, many)
            part = {name: every[now - self.last] for name, every in parts.items()}
            more, (gradients, gradient) = jax.value_and_grad(loss, (0, 1))(ends, y, part)
            of_ends = jax.tree.map(jnp.add, carry.of_ends, in_sums(gradients))
            carry = carry._replace(of_ends=of_ends, loss=carry.loss + more)
            carry = self._back(carry, gradient, now, many)
            return self._weights(carry, now) if full else carry, None

        def back(carry: Tick, now: Array) -> tuple[Tick, None]:
            return self._weights(self._back(carry, nothing, now, many), now), None

        carry, _ = lax.scan(forward, carry, jnp.arange(self.last))
        ticks = self.last + jnp.arange(many)
        if self.apart:
            carry, _ = lax.scan(partial(both, full=False), carry, ticks[: self.last])
            ticks = ticks[self.last :]
        carry, _ = lax.scan(partial(both, full=True), carry, ticks)
        carry, _ = lax.scan(back, carry, self.last + many + jnp.arange(self.last))
        return carry.loss, carry.sums, carry.of_ends, jnp.where(self.stage == 0, carry.queue, 0)

    def _forward(self, carry: Tick, now: Array, many: int) -> tuple[Tick, Array]:
        """Run a microbatch forward, and hand it on; return also what the layers made."""
        # Tied to its tick, so that weights gathered for one need not stay for the next.
        mine, arrived = lax.optimization_barrier((self.held, carry.arrived))
        queued = carry.queue[jnp.clip(now, 0, many - 1)]
        y, kept = self._keep(mine, jnp.where(self.stage == 0, queued, arrived))
        place = (now - self.stage) % self.places
        room = [
            lax.dynamic_update_index_in_dim(every, one, place, 0)
            for every, one in zip(carry.room, kept, strict=True)
        ]
        return carry._replace(arrived=self._handed(y, 1), room=room), y

    def _back(self, carry: Tick, gradient: Array, now: Array, many: int) -> Tick:
        """Run a microbatch back; its `gradient` is the last stage's."""
        arrived = self._handed(carry.made, -1)
        gradient = jnp.where(self.stage == self.last, gradient, arrived)
        mine, gradient = lax.optimization_barrier((self.held, gradient))
        microbatch = now - 2 * self.last + self.stage
        kept, wait = self._kept_of(microbatch, carry.room, mine), carry.wait
        if self.apart:
            own, x, wait = self.apart.at_once(kept, gradient, wait, microbatch % self.stages)
        else:
            own, x = self._pulled(kept, gradient)
        busy = (microbatch >= 0) & (microbatch < many)
        added = {
            name: jnp.where(busy, carry.sums[name] + value, carry.sums[name])
            for name, value in own.items()
        }
        place = jnp.clip(now - 2 * self.last, 0, many - 1)
        done = jnp.where((self.stage == 0) & busy, x, carry.queue[place])
        queue, sums = carry.queue.at[place].set(done), {**carry.sums, **added}
        return carry._replace(queue=queue, made=x, sums=sums, wait=wait)

    def _weights(self, carry: Tick, now: Array) -> Tick:
        """Make the gradients of weights that are apart."""
        if self.apart is None:
            return carry
        microbatch = now - 2 * self.last
        kept = self._kept_of(microbatch, carry.room, self.held)
        own = self.apart.later(kept, carry.wait, microbatch % self.stages)
        sums = {name: carry.sums[name] + value for name, value in own.items()}
        return carry._replace(sums={**carry.sums, **sums})

    def _handed(self, x: Array, step: int) -> Array:
        """Return what another stage hands on, to the next or (step -1) to the one before."""
        stages = range(self.stages)
        with jax.named_scope("stage_boundary"):
            return lax.ppermute(x, self.axes, [(k, (k + step) % self.stages) for k in stages])

    def _keep(self, mine: Params, x: Array) -> tuple[Array, list[Array]]:
        """Return what the layers make of x, and what of it the way back reads but weights."""

        def run_layers(sums: Params, x: Array) -> Array:
            return layers(self.inside, self.calls, lend(mine, sums), x, {})

        y, pull = jax.vjp(run_layers, zeros(mine), x)
        weights = {id(value): name for name, value in mine.items()}
        leaves, self.tree = jax.tree.flatten(pull)
        self.names = [weights.get(id(leaf)) for leaf in leaves]
        return y, [leaf for leaf, name in zip(leaves, self.names, strict=True) if name is None]

    def _kept_of(self, microbatch: Array, room: Sequence[Array], mine: Params) -> list[Array]:
        """Return all that the way back of a microbatch reads."""
        at = microbatch % self.places
        kept = iter([lax.dynamic_index_in_dim(one, at, keepdims=False) for one in room])
        return [next(kept) if name is None else mine[name] for name in self.names]

    def _pulled(self, kept: Sequence[Array], gradient: Array) -> Any:
        return jax.tree.unflatten(self.tree, kept)(gradient)


def _space(several: int, of: Sequence[Any]) -> list[Array]:
    return [jnp.zeros((several, *one.shape), one.dtype) for one in of]
