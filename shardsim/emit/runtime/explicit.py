"""The explicit way: inside `jax.shard_map`, with every collective written out.

Arrays are what one device holds. Roles of the mesh axes: `tensor` splits heads, mlp and vocab;
`tensor2` splits embed of weights and activations (2-D tensor parallelism, arXiv 2211.05102,
section 3.2.2); `context` splits the sequence, in attention too, where keys are gathered or pass
round a ring, or heads there ("ulysses"); `gather` splits embed of weights that are gathered before
use. The residual stream lies over `tensor` by sequence, by embed, or whole on every member.

Gradients: the loss is the sum of all devices' shares, and every collective's gradient is its
transpose (all-gather and reduce-scatter are each other's, a sum is its own).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardsim.emit.runtime.collectives import (
    SLICED,
    gather,
    gather_linear,
    gather_weight,
    in_order,
    member,
    member_before,
    next_member,
    own,
    own_stripes,
    scatter,
    scatter_linear,
    shared_total,
    total,
    turn,
)
from shardsim.emit.runtime.config import Data, make_group
from shardsim.ops.attend_blocks import place_of
from shardsim.ops.attend_pieces import fits_pieces
from shardsim.ops.attend_round import Round, round_attention
from shardsim.ops.whole import (
    Array,
    Params,
    Whole,
    dtype,
    joined,
    logits_linear,
)


class Explicit(Whole):
    """The operations of the model on one device of many."""

    def __init__(self, plan: Data, model: Data, parameters: Data, activations: Data) -> None:
        super().__init__(plan, model, parameters, activations)
        roles = plan["roles"]
        self.tensor = make_group(plan, roles["tensor"])
        self.tensor2 = make_group(plan, roles["tensor2"])
        self.context = make_group(plan, roles["context"])
        self.shards = make_group(plan, plan["gather"])
        self.stages = make_group(plan, roles["pipeline"])
        self.split = plan["residual"]  # "sequence", "embed" or "replicated"
        self.ring = plan["matmul"] != "off" and self.split != "replicated" and self.tensor.size > 1
        self.both = plan["matmul"] == "bidirectional"
        # With a second axis rows hold more than they spare (ViT-22B on v5p: 36.4 GiB, not 29.7).
        by_rows = self.split == "sequence" and self.tensor2.size == 1
        self.pieces = "rows" if by_rows else self.split
        # Whether the projections take wide arrays with heads and head_dim as one dimension.
        self.joins = self.ring or plan["fused"] or self.tensor2.size > 1
        self.reduce = dtype(plan["reduce"])
        nothing = make_group(plan, [])
        self.on_embed = self.tensor if self.split == "embed" else nothing
        self.on_tokens = self.tensor if self.split == "sequence" else nothing
        expert, ring = make_group(plan, roles["expert"]), plan["exchange"] == "ring"
        self.experts_ring, self.exchanged = (expert, nothing) if ring else (nothing, expert)
        self.exchange_members, self.expert_members = self.exchanged.size, expert.size
        self.experts_shards = make_group(plan, plan["experts_gather"])
        self.keys = plan["keys"] if self.context.size > 1 else "gathered"
        self.switches = plan["keys"] == "dsp"
        striped = plan["order"] == "striped" and self.context.size > 1
        self.order = {"stripes": self.context.size} if striped else {}
        self.rows = make_group(plan, roles["data"] + roles["fsdp"] + roles["expert"])
        self.row_members = self.rows.size
        self.copies = self.tensor.size * self.tensor2.size
        self.token_copies = self.copies // self.on_tokens.size
        if not model["vocab"]:
            self.copies *= self.context.size

    def flat(self) -> Explicit:
        plan = {**self.plan, "residual": "replicated"}
        return Explicit(plan, self.model, self.parameters, self.activations)

    # Parameters.

    def in_layer_order(self, stack: Array) -> Array:
        return stack

    def whole_weight(self, w: Array, name: str, dim: int) -> Array:
        """Gather the weight `name`, or what this device needs of it, along its embed `dim`."""
        entry = self.parameters[name]
        at_end = "tables" if "vocab" in entry["axes"] else "end_weights"
        with jax.named_scope("gather_weights" if entry["part"] == "block" else at_end):
            return gather_weight(w, self.shards, dim, self.compute, self.reduce)

    def own_heads(self, value: Array, name: str) -> Array:
        """Cut out the key-value head that this device's queries use, where heads are not split."""
        axes = self.parameters[name]["axes"]
        kv_heads = self.model["kv_heads"]
        if "kv_heads" not in axes or kv_heads % self.tensor.size == 0:
            return value
        head = member(self.tensor) * kv_heads // self.tensor.size
        return lax.dynamic_slice_in_dim(value, head, 1, axes.index("kv_heads"))

    def second_part(self, y: Array, name: str, dim: int, summed: bool) -> Array:
        """Return this device's heads, or part of mlp, over the second tensor axis.

        `summed`: y is already the same on all members; otherwise it is summed over them.
        """
        if self.tensor2.size == 1:
            return y
        heads = y.shape[dim] // self.model["head_dim"]
        if "kv_heads" not in self.parameters[name]["axes"] or heads % self.tensor2.size == 0:
            return own(y, self.tensor2, dim) if summed else scatter(y, self.tensor2, dim)
        # Fewer key-value heads than members: each member takes the one that its queries use.
        y = y if summed else total(y, self.tensor2)
        head = member(self.tensor2) * heads // self.tensor2.size
        width = self.model["head_dim"]
        return lax.dynamic_slice_in_dim(y, head * width, width, dim)

    def wide_vector(self, params: Params, name: str) -> Array:
        value = self.own_heads(params[name], name).reshape(-1).astype(self.compute)
        return self.second_part(value, name, 0, summed=True)

    def end_matrix(self, params: Params, name: str) -> Array:
        return own(self.whole_weight(params[name], name, 1), self.on_embed, 1)

    def head_matrix(self, params: Params, name: str) -> Array:
        return self.whole_weight(params[name], name, 0)

    # The two projections of a block's branch.

    def project_in(self, x: Array, params: Params, names: list[str]) -> list[Array]:
        still = [name for name in names if "detached" in self.parameters[name]]  # the last ones
        params = {**params, **{name: lax.stop_gradient(params[name]) for name in still}}
        shards = [self.own_heads(params[name], name) for name in names]
        if self.joins:
            shards = [self.flatten(w, name) for w, name in zip(shards, names, strict=True)]
        ends = [sum(w.shape[1] for w in shards[: i + 1]) for i in range(len(shards) - 1)]
        if self.plan["fused"]:
            shards = [jnp.concatenate(shards, 1)]
        weights = tuple(self.whole_weight(w, names[0], 0) for w in shards)
        ys = self.linear_in(x, weights, x.dtype, len(weights) - len(still))
        if self.plan["fused"]:
            ys = tuple(jnp.split(ys[0], ends, 2))
        with jax.named_scope("second_axis"):
            return [
                self.second_part(y, name, 2, summed=False)
                for y, name in zip(ys, names, strict=True)
            ]

    def linear_in(
        self, x: Array, weights: tuple[Array, ...], kind: Any, trained: int
    ) -> tuple[Array, ...]:
        """Gather x over the tensor axis and multiply it by each weight; the first `trained` of the
        products have gradients."""
        with jax.named_scope("tensor_input"):
            if self.ring:
                ring = self.tensor, self.pieces, self.both
                return gather_linear(x, weights, *ring, kind, trained)
            if self.split != "replicated":
                x = gather(x, self.tensor, SLICED[self.split])
            return tuple(self.product(x, w, kind) for w in weights)

    def project_out(self, hs: list[Array], params: Params, names: list[str]) -> Array:
        hs = [joined(h) for h in hs] if self.joins else hs
        with jax.named_scope("second_axis"):
            hs = [gather(h, self.tensor2, 2) for h in hs]
        shards = [self.flatten(params[name], name) for name in names]
        if self.plan["fused"] and len(hs) > 1:
            hs, shards = [jnp.concatenate(hs, 2)], [jnp.concatenate(shards, 0)]
        weights = tuple(self.whole_weight(w, names[0], 1) for w in shards)
        with jax.named_scope("tensor_output"):
            if self.ring:
                return scatter_linear(tuple(hs), weights, self.tensor, self.pieces, self.both)
            y = sum(self.product_out(h, w) for h, w in zip(hs, weights, strict=True))
            if self.split == "replicated":
                return total(y, self.tensor)
            return scatter(y, self.tensor, SLICED[self.split])

    # Where things are.

    def own_tokens(self, x: Array, dim: int) -> Array:
        return own(self.query_tokens(x, dim), self.on_tokens, dim)

    def query_tokens(self, x: Array, dim: int) -> Array:
        if self.order:
            return own_stripes(x, self.context, dim)
        return own(x, self.context, dim)

    def own_embed(self, x: Array) -> Array:
        last = x.ndim - 1
        return own(own(x, self.tensor2, last), self.on_embed, last)

    def all_keys(self, x: Array, text: bool = False) -> Array:
        with jax.named_scope("keys"):
            if self.keys in ("ring", "ulysses") and not text:
                return x
            return gather(x, self.context, 1)

    def key_tokens(self, keys: Array) -> Array:
        return place_of(self.order, super().key_tokens(keys), keys.shape[1])

    def flash(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Any,
        positions: Array | None,
        sinks: Array | None = None,
    ) -> Array:
        if self.keys == "ring" and "text" not in mask:
            return self.pass_round(q, k, v, mask)
        if self.keys == "ulysses" and "text" not in mask:
            return self.turn_to_heads(q, k, v, mask, positions)
        if positions is not None:
            mask = {**mask, **self.order}
        return super().flash(q, k, v, mask, positions, sinks)

    def pass_round(self, q: Array, k: Array, v: Array, mask: Any) -> Array:
        """Attend to keys and values that pass round the context axis."""
        group, here = self.context, q.shape[1]

        def places(hops: int) -> Array:
            at = member_before(group, hops) * here + jnp.arange(here)
            return place_of(self.order, at, here * group.size)

        def send(x: Array) -> Array:
            with jax.named_scope("keys"):
                return next_member(x, group)

        halved = bool(self.order) and mask["causal"]
        ring = Round(
            members=group.size,
            send=send,
            places=places,
            later=lambda hops: member_before(group, hops) > member(group),
            striped=bool(self.order),
            overlap=self.plan["keys_overlap"],
            kernel=fits_pieces(mask, here, self.plan["platform"], halved),
        )
        return round_attention(q, k, v, mask, ring)

    def turn_to_heads(
        self, q: Array, k: Array, v: Array, mask: Any, positions: Array | None
    ) -> Array:
        """Attend to all tokens with some of the heads; key-value heads of several members are sent
        to each."""
        size = self.context.size
        with jax.named_scope("keys"):
            if k.shape[2] % size:
                k, v = (jnp.repeat(x, size // x.shape[2], 2) for x in (k, v))
            q, k, v = (turn(x, self.context, 2, 1) for x in (q, k, v))
        at = None if positions is None else jnp.arange(self.plan["sequence"])
        out = super().flash(q, k, v, mask, at)
        with jax.named_scope("keys"):
            return turn(out, self.context, 1, 2)

    def by_location(self, x: Array) -> Array:
        if not self.switches:
            return x
        locations = self.plan["sequence"] // self.model["frames"]
        x = x.reshape(len(x), -1, locations, x.shape[-1])
        with jax.named_scope("switch"):
            x = turn(x, self.context + self.on_tokens, 2, 1).swapaxes(1, 2)
        return x.reshape(len(x), -1, x.shape[-1])

    def by_frame(self, x: Array) -> Array:
        if not self.switches:
            return x
        x = x.reshape(len(x), -1, self.model["frames"], x.shape[-1])
        with jax.named_scope("switch"):
            x = turn(x, self.context + self.on_tokens, 2, 1).swapaxes(1, 2)
        return x.reshape(len(x), -1, x.shape[-1])

    def has_sequences(self, along: str) -> bool:
        return along == "space" or self.switches or self.context.size == 1

    def lie_in_turn(self, along: str) -> bool:
        return along == "space" or self.switches

    def own_queries(self, x: Array) -> Array:
        return own(x, self.tensor2, x.ndim - 1)

    def handed(self, x: Array, whole: bool) -> Array:
        if not whole:
            return gather(gather(x, self.on_tokens, 1), self.on_embed, 2)
        x = gather(x, self.context + self.on_tokens, 1)
        x = gather(x, self.tensor2 + self.on_embed, 2)
        return in_order(x, self.context) if self.order else x

    def all_embed(self, x: Array) -> Array:
        return gather(x, self.on_embed, 2)

    def all_columns(self, x: Array) -> Array:
        return gather(x, self.tensor, x.ndim - 1)

    # Sums over what is split.

    def embed_sum(self, x: Array) -> Array:
        return total(x, self.tensor2 + self.on_embed)

    def tensor_sum(self, x: Array) -> Array:
        return total(x, self.tensor)

    def residual_tokens(self, x: Array) -> Array:
        return own(x, self.on_tokens, 1)

    def second_sum(self, x: Array) -> Array:
        return total(x, self.tensor2)

    def context_sum(self, x: Array) -> Array:
        return total(x, self.context)

    def context_max(self, x: Array) -> Array:
        return lax.pmax(x, self.context.axes) if self.context.size > 1 else x

    def vocab_sum(self, x: Array) -> Array:
        return shared_total(x, self.tensor)

    def vocab_max(self, x: Array) -> Array:
        return lax.pmax(x, self.tensor.axes) if self.tensor.size > 1 else x

    def vocab_start(self, columns: int) -> Array:
        return member(self.tensor) * columns

    # Embeddings of a batch.

    def first_row(self, rows: int) -> Array:
        return member(self.rows) * rows

    def all_rows(self, x: Array) -> Array:
        return gather(x, self.rows, 0)

    def next_rows(self, x: Array) -> Array:
        return next_member(x, self.rows)

    # Experts.

    def routing(self, x: Array, whole: Array, params: Params) -> Array:
        w = self.whole_weight(params["router"], "router", 0).astype(jnp.float32)
        x = whole if self.split == "embed" else x
        return jnp.einsum("bsk,kn->bsn", x.astype(jnp.float32), w)

    def over_tensor(self, x: Array, embed: bool) -> Array:
        with jax.named_scope("experts"):
            x = gather(x, self.on_tokens, 1)
            return gather(x, self.on_embed, 2) if embed else x

    def over_experts(self, x: Array) -> Array:
        with jax.named_scope("experts"):
            return gather(x, self.experts_ring, 0)

    def experts_here(self, number: int) -> tuple[Array, int]:
        many = number // self.experts_ring.size
        return member(self.experts_ring) * many, many

    def exchange(self, x: Array) -> Array:
        with jax.named_scope("experts"):
            return turn(x, self.exchanged, 0, 1)

    def exchange_back(self, x: Array) -> Array:
        with jax.named_scope("experts"):
            return turn(x, self.exchanged, 1, 0)

    def expert_matrix(self, params: Params, name: str) -> Array:
        axes = self.parameters[name]["axes"]
        if "embed" not in axes:  # of an adapter, which none shards
            return super().expert_matrix(params, name)
        dim = 0 if self.plan["by_expert"] else axes.index("embed")
        with jax.named_scope("gather_weights"):
            shards = self.experts_shards
            return gather_weight(params[name], shards, dim, self.compute, self.reduce)

    def expert_columns(self, value: Array, width: int) -> Array:
        return value if value.shape[-1] == width else own(value, self.tensor, value.ndim - 1)

    def expert_scatter(self, y: Array) -> Array:
        with jax.named_scope("experts"):
            return scatter(y, self.tensor, y.ndim - 1)

    def expert_sum(self, y: Array) -> Array:
        with jax.named_scope("experts"):
            y = scatter(y, self.experts_ring, 0)
            if self.split == "sequence":
                return turn(y, self.tensor, 1, 2)
            return y if self.split == "embed" else gather(y, self.tensor, 2)

    # The ends.

    def tables(self, params: Params) -> tuple[Array, Array]:
        table = self.whole_weight(params["token_embedding"], "token_embedding", 1)
        if self.model["tied_embeddings"]:
            return table, table.T
        return table, self.whole_weight(params["output_head"], "output_head", 0)

    def look_up(self, table: Array, tokens: Array) -> Array:
        rows = self.query_tokens(tokens, 1) - self.vocab_start(table.shape[0])
        found = (rows >= 0) & (rows < table.shape[0])
        x = jnp.where(found[..., None], table[jnp.clip(rows, 0, table.shape[0] - 1)], 0)
        with jax.named_scope("look_up"):
            if self.split == "replicated":
                return total(x, self.tensor)
            return scatter(x, self.tensor, SLICED[self.split])

    def logits(self, x: Array, head: Array) -> Array:
        with jax.named_scope("head"):
            if self.plan["platform"] == "gpu" and not self.ring:
                if self.split != "replicated":
                    x = gather(x, self.tensor, SLICED[self.split])
                logits = logits_linear(x, head, "gpu")
            else:
                logits = self.linear_in(x, (head,), jnp.float32, 1)[0]
            return shared_total(logits, self.tensor2)

    def pool(self, x: Array, share: Array) -> Array:
        pooled = total(super().pool(x, share), self.context + self.on_tokens)
        return gather(pooled, self.on_embed, 2)
