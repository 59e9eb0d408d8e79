"""The router of experts: which of them a token goes to, and how much each of them counts."""

from __future__ import annotations

from dataclasses import replace

from shardsim.graph.arrays import Array, Op, Stream, einsum, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.exchange import ROUTED

# Logits are read in float32, made chances, and their gradient is written. The largest of them are
# found one after another, each by a comparison and a mask of all.
CHANCES = Stream(passes=1.0, ops=13.0, gradient_passes=2.0, gradient_ops=14.0)
OPS_OF_ONE = 2.0


def route(build: Builder, x: Array, *, top: int, kind: str, bias: bool) -> Array:
    """Add a router in float32 (arXiv 2101.03961, section 2.4): the chances of the `top` experts of
    a token, [batch, tokens, top]. `kind` is "softmax" or "sigmoid".
    """
    logits = Array("routing", (*TOKENS, "choice"), stream=True, wide=True, purpose=ROUTED)
    vectors = [vector("router_bias", "choice")] if bias else []
    matrix = weight("router", "embed", "choice")
    build.add(replace(einsum(x, matrix, logits, *vectors), dtype="f32"))
    chances = Array("chances", (*TOKENS, "top"), stream=True, purpose=ROUTED)
    stream = replace(CHANCES, ops=CHANCES.ops + OPS_OF_ONE * top)
    build.add(Op((logits,), chances, (logits,), stream=stream))
    build.call("route", [x], chances, weights=[matrix, *vectors], top=top, kind=kind)
    return chances
