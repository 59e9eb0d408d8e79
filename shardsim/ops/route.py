"""The router of experts: which of them a token goes to, and how much each of them counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Op, Stream, einsum, linear, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.exchange import ROUTED, for_experts
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# Logits are read in float32, made chances, and their gradient is written. The largest of them are
# found one after another, each by a comparison and a mask of all.
CHANCES = Stream(passes=1.0, ops=13.0, gradient_passes=2.0, gradient_ops=14.0)
OPS_OF_ONE = 2.0


def route(
    build: Builder, x: Array, *, top: int, kind: str, bias: bool, scales: bool = False
) -> tuple[Array, Array]:
    """Add a router in float32 (arXiv 2101.03961, section 2.4): the chances of the `top` experts of
    a token, and which they are, both [batch, tokens, top]. `kind` is "softmax" or "sigmoid"; with
    `scales` a chance is multiplied by a learned number of its expert.
    """
    logits = Array("routing", (*TOKENS, "choice"), stream=True, wide=True, purpose=ROUTED)
    vectors = [vector("router_bias", "choice")] if bias else []
    matrix = weight("router", "embed", "choice")
    product = einsum(for_experts(x), matrix, logits, *vectors)
    build.add(replace(product, dtype="f32", call=ROUTED))
    chances = Array("chances", (*TOKENS, "top"), stream=True, purpose=ROUTED)
    stream = replace(CHANCES, ops=CHANCES.ops + OPS_OF_ONE * top)
    learned = (vector("router_scale", "choice"),) if scales else ()
    build.add(Op((logits,), chances, (logits,), learned, stream=stream))
    choices = replace(chances, name="choices", wide=True, trained=False)
    build.add(linear([logits], choices))
    return chances, choices


def chosen(way: Whole, params: Params, call: Any, x: Any, whole: Any) -> tuple[Any, Any]:
    """Return chances, in the format of x, and numbers of the experts that a token goes to.

    `whole` is x gathered over a tensor axis. A softmax is over those experts alone, so that it adds
    up to one (Mixtral, arXiv 2401.04088).
    """
    logits = checkpoint_name(way.routing(x, whole, params), "rest")
    if call["router_bias"]:
        logits = logits + params["router_bias"].astype(jnp.float32)
    largest, choices = lax.top_k(logits, call["top"])
    soft = call["router"] == "softmax"
    chances = jax.nn.softmax(largest, -1) if soft else jax.nn.sigmoid(largest)
    if call.get("scales"):
        chances = chances * params["router_scale"].astype(jnp.float32)[choices]
    return chances.astype(x.dtype), choices
