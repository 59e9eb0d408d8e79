"""Soft experts: every slot of an expert is a mean of all tokens of a sequence, every token's result
one of all slots (Soft MoE, arXiv 2308.00951, section 2.1). Nothing is sorted, dropped or uneven.

Shapes: affinities [batch, tokens, experts, slots]; slots [experts, batch, slots, embed].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, einsum, pointwise, weight
from shardsim.graph.build import TOKENS, Builder
from shardsim.ops.exchange import ROUTED, reach, relay, slots
from shardsim.ops.experts import experts, mlps
from shardsim.ops.lazy import checkpoint_name, jax, jnp
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

PAIRS = (*TOKENS, "expert", "slot")
# Affinities in float32 are read for the maximum and for the sum, and a softmax is written; backward
# it and its gradient are read.
SOFTMAX = Stream(passes=2.5, ops=13.0, gradient_passes=2.0, gradient_ops=14.0)


def soft_experts(build: Builder, x: Array, out: Array, *, gated: bool, bias: bool) -> None:
    """Add experts on slots: a softmax over tokens makes them, one over slots brings them back."""
    tokens = reach(build, x, "tokens")
    matrix = weight("router", "embed", "choice", "slot").view(choice="expert")
    affinities = Array("affinities", PAIRS, wide=True, lies="masks", purpose=ROUTED)
    build.add(replace(einsum(tokens, matrix, affinities), dtype="f32"))
    shares = []
    for name in ("shares of tokens", "shares of slots"):
        share = Array(name, PAIRS, lies="masks", purpose=ROUTED)
        shares.append(build.add(pointwise([affinities], share, stream=SOFTMAX)))
    dims = ("expert", *slots(False), "embed")
    copies = Array("copies", dims, keep="", lies="copies", purpose=ROUTED)
    build.add(einsum(shares[0], tokens, copies))
    there = relay(build, copies, replace(copies, name="slots", keep="rest", lies="slots"))
    made = experts(build, there, gated=gated, bias=bias, sorted_by=False)
    returned = relay(build, made, replace(made, name="returned", keep="rest", lies="returned"))
    total = Array("sum of experts", (*TOKENS, "embed"), keep="", lies="sum", purpose=ROUTED)
    build.add(einsum(shares[1], returned, total))
    relay(build, total, out)


@runs("soft_experts")
def run_soft_experts(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return what all slots of all experts add to each token, [batch, tokens, embed]."""
    whole = way.over_tensor(x, embed=True)
    batch, _, width = whole.shape
    router = way.head_matrix(params, "router").reshape(width, call["number"], -1)
    affinities = jnp.einsum("bsk,kec->bsec", whole.astype(jnp.float32), router.astype(jnp.float32))
    dispatch = jax.nn.softmax(affinities, axis=1)
    combine = jax.nn.softmax(affinities, axis=(2, 3))
    dispatch, combine = (
        checkpoint_name(each.astype(x.dtype), "rest") for each in (dispatch, combine)
    )
    copies = jnp.einsum("bsec,bsd->ebcd", dispatch, whole)
    rows = way.exchange(copies.reshape(call["number"], -1, width))
    made = mlps(way, params, call, checkpoint_name(rows, "rest"), None)
    back = checkpoint_name(way.exchange_back(made), "rest")
    back = back.reshape(call["number"], batch, copies.shape[2], -1)
    return way.expert_sum(jnp.einsum("bsec,ebcd->bsd", combine, back))
