"""The compiler-partitioned way: `jax.jit` with a sharding constraint on every activation.

Arrays are global. A constraint holds for the gradient too: the transpose of a sharding
constraint is the same constraint on the cotangent. Which collectives follow is the compiler's
choice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from shardsim.emit.runtime.config import Data
from shardsim.ops.attend_kernels import flash_attention
from shardsim.ops.whole import Array, Params, Whole


def to_spec(dims: list[list[str]]) -> PartitionSpec:
    """Return the PartitionSpec of a spec in plain data: mesh axes for each dimension."""
    return PartitionSpec(*(tuple(axes) if axes else None for axes in dims))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(w: Array, whole: Any, shard: Any) -> Array:
    """Constrain a weight to `whole` before use, and its gradient to `shard`."""
    return lax.with_sharding_constraint(w, whole)


gathered.defvjp(
    lambda w, whole, shard: (gathered(w, whole, shard), None),
    lambda whole, shard, _, gradient: (lax.with_sharding_constraint(gradient, shard),),
)


class Partitioned(Whole):
    """The operations of the model on global arrays, with constraints."""

    def __init__(
        self, plan: Data, model: Data, parameters: Data, activations: Data, mesh: Any
    ) -> None:
        super().__init__(plan, model, parameters, activations)
        self.mesh = mesh
        self.is_flat = False

    def flat(self) -> Partitioned:
        other = Partitioned(self.plan, self.model, self.parameters, self.activations, self.mesh)
        other.is_flat = True
        return other

    def keep(self, x: Array, kind: str) -> Array:
        """Constrain an activation as the plan says for its kind."""
        spec = to_spec(self.activations[f"flat_{kind}" if self.is_flat else kind])
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def weight(self, params: Params, name: str) -> Array:
        entry = self.parameters[name]
        skip = 1 if entry["part"] == "block" else 0
        shard = entry["spec"][skip:]
        gone = self.plan["gather"]
        whole = [[axis for axis in axes if axis not in gone] for axes in shard]
        places = [NamedSharding(self.mesh, to_spec(spec)) for spec in (whole, shard)]
        return gathered(params[name].astype(self.compute), *places)

    def project_in(self, x: Array, params: Params, names: list[str]) -> list[Array]:
        # Left as it lies, the compiler may fuse the gathering with the matmuls.
        x = self.keep(x, "input" if self.plan["matmul"] == "off" else "residual")
        ys = super().project_in(x, params, names)
        kinds = ["keys" if "kv_heads" in self.parameters[n]["axes"] else "wide" for n in names]
        return [self.keep(y, kind) for y, kind in zip(ys, kinds, strict=True)]

    def project_out(self, hs: list[Array], params: Params, names: list[str]) -> Array:
        hs = [self.keep(h, "wide") for h in hs]
        return self.keep(super().project_out(hs, params, names), "residual")

    def residual(self, x: Array) -> Array:
        return self.keep(x, "residual")

    def all_keys(self, x: Array, text: bool = False) -> Array:
        return self.keep(x, "all_keys")

    def flash(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Any,
        positions: Array | None,
        sinks: Array | None = None,
    ) -> Array:
        """Run attention by hand: the compiler cannot partition its kernel."""
        batch, context, heads = self.activations["wide"]
        keys = self.activations["all_keys"]
        if keys[2] != heads:  # each device then needs a key-value head for each of its queries
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
            keys = [batch, [], heads, []]
        specs = [[batch, context, heads, []], keys, keys, *([[context]] * (positions is not None))]

        def local(q: Array, k: Array, v: Array, positions: Array | None = None) -> Array:
            return flash_attention(q, k, v, mask, positions, self.plan["platform"])

        attend = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=tuple(to_spec(spec) for spec in specs),
            out_specs=to_spec(specs[0]),
            check_vma=False,
        )
        return attend(q, k, v, *([] if positions is None else [positions]))

    def look_up(self, table: Array, tokens: Array) -> Array:
        return self.keep(super().look_up(table, tokens), "residual")

    def logits(self, x: Array, head: Array) -> Array:
        return self.keep(super().logits(self.keep(x, "input"), head), "logits")

    def pool(self, x: Array, share: Array) -> Array:
        pooled = super().pool(x, share)
        return self.flat().keep(pooled.astype(jnp.float32), "residual")
