"""The experts themselves: MLPs side by side, each on the tokens that chose it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, einsum, weight
from shardsim.graph.build import Builder, vector
from shardsim.ops.activate import activation
from shardsim.ops.exchange import ROUTED, combined, copies_in_order, masks, places_of, rooms
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax
from shardsim.ops.project import BACK, INTO
from shardsim.ops.registry import runs
from shardsim.ops.route import chosen

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

LANES = 128
WIDE_TILE = 1024  # columns of a tile of a grouped matmul, as MaxText has them


def row_tile(rows: Any) -> Any:
    """Return the rows of a tile of a grouped matmul, for so many `rows` an expert: about a quarter
    of them, from 128 to 512, as Tokamax's tuned tiles for TPU are (openxla/tokamax at 099096d3,
    ragged_dot/pallas_mosaic_tpu.py); megablox's own are of 512.

    A tile that two experts share is multiplied with the matrices of both (`make_group_metadata` of
    JAX's megablox), so that each expert costs a tile more than its rows.

    >>> [row_tile(rows) for rows in (512, 1024, 2560)]
    [128, 256, 512]
    """
    return LANES * (1 + (rows >= 8 * LANES) + 2 * (rows >= 16 * LANES))


def experts(
    build: Builder,
    slots: Array,
    *,
    gated: bool,
    bias: bool,
    sorted_by: bool,
    adapted: Collection[str] = (),
) -> Array:
    """Add all experts' MLPs, on arrays [experts, ..., embed].

    `sorted_by`: tokens are sorted by expert, as many as there are, so that products have rows in
    groups of any size. Beside products that are `adapted` each expert has narrow ones of its own,
    on the same rows (GroupedExpertsLoRA of NVIDIA-NeMo/Automodel, components/_peft/lora_moe.py).
    """
    rows: Dims = slots.dims[1:-1]
    names = ("expert_in", "expert_gate") if gated else ("expert_in",)
    parts = []

    def narrow(x: Array, into: Array, back: Array, out: Array, keep: str) -> None:
        low = Array(f"{out.name} low", ("expert", *rows, "rank"), keep=keep, lies="slots")
        low = build.add(replace(einsum(x, into, replace(low, purpose="adapters")), tile=sorted_by))
        build.add(replace(einsum(low, back, out), tile=sorted_by))

    for name in names:
        out = Array(f"{name} result", ("expert", *rows, "expert_mlp"), keep="mlp_hidden")
        out = replace(out, lies="slots", purpose=ROUTED)
        vectors = [vector(f"{name}_bias", "expert", "expert_mlp")] if bias else []
        if name in adapted:
            into = weight(f"{name}{INTO}", "expert", "embed", "rank")
            back = vector(f"{name}{BACK}", "expert", "rank", "expert_mlp")
            narrow(slots, into, back, out, "mlp_hidden")
        product = einsum(slots, weight(name, "expert", "embed", "expert_mlp"), out, *vectors)
        parts.append(build.add(replace(product, tile=sorted_by)))
    hidden = build.add(activation(parts, "expert hidden"))
    made = Array("made", slots.dims, keep="mlp_output", lies="made", purpose=ROUTED)
    vectors = [vector("expert_out_bias", "expert", "embed")] if bias else []
    if "expert_out" in adapted:
        into = vector(f"expert_out{INTO}", "expert", "expert_mlp", "rank")
        back = weight(f"expert_out{BACK}", "expert", "rank", "embed")
        narrow(hidden, into, back, made, "rest")
    product = einsum(hidden, weight("expert_out", "expert", "expert_mlp", "embed"), made, *vectors)
    return build.add(replace(product, tile=sorted_by))


@runs("experts")
def run_experts(way: Whole, params: Params, call: Any, x: Any, *asking: Any) -> Any:
    """Return what the experts of a token add to it, [batch, tokens, embed]; routers read
    `asking`, if that is given.

    Tokens are gathered to where experts choose from, and brought to them; what experts make is
    brought back, and summed by the chances.
    """
    whole = way.over_tensor(x, embed=True)
    if asking:
        asked = way.over_tensor(asking[0], embed=True)
        chances, choices = chosen(way, params, call, asking[0], asked)
    else:
        chances, choices = chosen(way, params, call, x, whole)
    x = way.over_experts(whole)
    chances, choices = (
        way.over_experts(way.over_tensor(each, embed=False)) for each in (chances, choices)
    )
    run = with_capacity if call["capacity"] else sorted_by_expert
    return way.expert_sum(run(way, params, call, x, chances, choices))


def with_capacity(way: Whole, params: Params, call: Any, x: Any, chances: Any, choices: Any) -> Any:
    """Dispatch by products with masks: tokens beyond an expert's places are dropped."""
    batch, tokens, width = x.shape
    groups = tokens // call["group"] if call["group"] else 1
    share = call["top"] * (tokens // groups) / call["number"]
    places = math.ceil(round(share * call["capacity"], 6))
    x, chances, choices = (
        each.reshape(batch * groups, tokens // groups, -1) for each in (x, chances, choices)
    )
    mask, shares = masks(chances, choices, call["number"], places)
    first, many = way.experts_here(call["number"])
    mask, shares = (
        checkpoint_name(lax.dynamic_slice_in_dim(each, first, many, 2), "rest")
        for each in (mask.astype(x.dtype), shares)
    )
    copies = jnp.einsum("gsec,gsd->egcd", mask, x)
    rows = way.exchange(copies.reshape(many, -1, width))
    made = mlps(way, params, call, checkpoint_name(rows, "rest"), None)
    made = checkpoint_name(way.exchange_back(made), "rest").reshape(*copies.shape[:3], -1)
    return jnp.einsum("gsec,egcd->gsd", shares, made).reshape(batch, tokens, -1)


def sorted_by_expert(
    way: Whole, params: Params, call: Any, x: Any, chances: Any, choices: Any
) -> Any:
    """Copy each token for its experts, sort the copies, and multiply group by group.

    Over an expert axis copies travel in rooms of equal size, one for each member.
    """
    number, top = call["number"], call["top"]
    batch, tokens, width = x.shape
    flat, chances = x.reshape(-1, width), chances.reshape(-1, top)
    mine = choices.reshape(-1, top).T.reshape(-1)  # first choices come first
    members = way.exchange_members
    if members == 1:
        first, many = way.experts_here(number)
        which = jnp.where((mine >= first) & (mine < first + many), mine - first, many)
        all_there = way.expert_members == 1
        order = jnp.argsort(which)
        places, room = jnp.argsort(order), rooms(mine.size, way.expert_members, way.plan["padding"])
        if not all_there:
            places = jnp.where((which < many) & (places < room), places, room)
        order = order[:room]
        rows = checkpoint_name(copies_in_order(flat, order, places, all_there), "rest")
        back = mlps(way, params, call, rows, which[order])
    else:
        many, all_there = number // members, False
        room = rooms(mine.size, members, way.plan["padding"])
        places = places_of(mine // many, members, room)
        order = (
            jnp.full(members * room, mine.size).at[places].set(jnp.arange(mine.size), mode="drop")
        )
        names = jnp.full(members * room, many).at[places].set(mine % many, mode="drop")
        sent = copies_in_order(flat, order, places, all_there).reshape(members, room, width)
        rows = way.exchange(sent).reshape(-1, width)
        names = checkpoint_name(way.exchange(names.reshape(members, room, 1)), "rest").reshape(-1)
        sort = jnp.argsort(names)
        there = jnp.argsort(sort)
        rows = checkpoint_name(copies_in_order(rows, sort, there, True), "rest")
        made = mlps(way, params, call, rows, names[sort])
        back = copies_in_order(made, there, sort, True).reshape(1, members * room, -1)
        back = checkpoint_name(way.exchange_back(back), "rest").reshape(members * room, -1)
    return combined(back, chances, order, places, all_there).reshape(batch, tokens, -1)


def mlps(way: Whole, params: Params, call: Any, rows: Any, which: Any) -> Any:
    """Return what experts make of rows: [experts, rows, embed], or [rows, embed] in order of
    `which` expert they are for. Where nothing is for any expert of this device it is 0."""
    grouped, platform = which is not None, way.plan["platform"]
    here = None  # which rows are for an expert of this device, if not all are
    if grouped and way.expert_members > 1:
        here = (which < call["number"] // way.expert_members)[:, None]
        rows = jnp.where(here, rows, 0) if platform == "tpu" else rows

    def product(x: Any, w: Any) -> Any:
        if not grouped:
            return jnp.einsum("erk,ekn->ern", x, w)
        sizes = jnp.bincount(which, length=w.shape[0] + 1)[:-1].astype(jnp.int32)
        return grouped_matmul(x, w, sizes, platform)

    def biased(y: Any, name: str) -> Any:
        if not call["bias"]:
            return y
        bias = params[f"{name}_bias"].astype(y.dtype)
        bias = way.expert_columns(bias, y.shape[-1])
        if not grouped:
            return y + bias[:, None]
        return y + jax.nn.one_hot(which, len(bias), dtype=y.dtype) @ bias  # no row is scattered

    def adapted(x: Any, name: str, y: Any) -> Any:
        if name not in call.get("adapted", ()):
            return y
        low = product(x, way.expert_matrix(params, f"{name}{INTO}"))
        if name == "expert_out":
            with jax.named_scope("adapters"):
                low = way.tensor_sum(low)
        low = checkpoint_name(low, "rest" if name == "expert_out" else "mlp_hidden")
        back = way.expert_matrix(params, f"{name}{BACK}")
        return y + product(low, way.expert_columns(back, y.shape[-1]))

    names = ("expert_in", "expert_gate") if call["gated"] else ("expert_in",)
    parts = []
    for name in names:
        y = adapted(rows, name, product(rows, way.expert_matrix(params, name)))
        parts.append(checkpoint_name(biased(y, name), "mlp_hidden"))
    hidden = getattr(jax.nn, call["activation"])(parts[0])
    hidden = checkpoint_name(hidden * parts[1] if call["gated"] else hidden, "rest")
    made = way.expert_scatter(product(hidden, way.expert_matrix(params, "expert_out")))
    made = biased(adapted(hidden, "expert_out", made), "expert_out")
    made = checkpoint_name(made, "mlp_output")
    return made if here is None else jnp.where(here, made, 0)


def grouped_matmul(x: Any, w: Any, sizes: Any, platform: str) -> Any:
    """Return each row of x [rows, k] times its expert's matrix of w [experts, k, n]: [rows, n].

    Rows are in the order of experts, `sizes` of each. What comes out for rows after the last of
    them, and as their gradient, means nothing.

    On TPU the kernel is JAX's megablox: of the compiler's own grouped product the gradient of the
    weights is a product of all rows with every expert.
    """
    if platform != "tpu":
        return lax.ragged_dot(x, w, sizes)
    from jax.experimental.pallas.ops.tpu import megablox

    rows, (many, inner, columns) = len(x), w.shape
    tile = min(row_tile(rows // many), rows + -rows % LANES)
    # The same tiles serve the gradients, where an adapter's narrow side is another dimension.
    tiling = tile, *(min(WIDE_TILE, d + -d % LANES) for d in (inner, columns))
    padded = jnp.pad(x, ((0, -rows % tile), (0, 0)))
    return megablox.gmm(padded, w, sizes, x.dtype, tiling)[:rows]
