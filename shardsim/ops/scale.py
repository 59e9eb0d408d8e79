"""Learned scales: of all heads of a token at once, of a branch's channels, of a token's branch.

Only their place in a graph: the emitted program has none of them, and says so.
"""

from __future__ import annotations

from dataclasses import replace

from shardsim.graph.arrays import Array, Stream, einsum, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, stream, vector
from shardsim.ops.norm import NORM

# In the addition that reads a branch; the scale's own gradient reads the branch again.
SCALE = Stream(ops=1.0, gradient_passes=2.0, gradient_ops=3.0)


def heads_norm(build: Builder, name: str, x: Array, *, kind: str, bias: bool) -> Array:
    """Add one norm over all heads of a token (OLMo 2, arXiv 2501.00656, section 2.1.3): where
    devices have some of the heads, its sums cross them."""
    count = ("moments",) if kind == "layernorm" else ()
    sums = Array(f"{x.name} sums", (*TOKENS, *count), wide=True, purpose="norm statistics")
    build.add(pointwise([x], sums))
    dims = tuple(d for d in x.dims if d not in TOKENS)
    vectors = [vector(f"{name}_{part}", *dims) for part in ("scale", "bias")[: 1 + bias]]
    out = replace(x, name=f"{x.name} normed", keep="rest")
    return build.add(pointwise([x, sums], out, *vectors, stream=NORM))


def layer_scale(build: Builder, branch: Array) -> Array:
    """Add a learned scale of each channel of a branch (arXiv 2103.17239, section 2)."""
    out = stream(f"{branch.name} scaled")
    return build.add(
        pointwise([branch], out, vector(f"{branch.name}_scale", "embed"), stream=SCALE)
    )


def token_gate(build: Builder, x: Array, branch: Array) -> Array:
    """Scale a branch by the sigmoid of a learned product of each token (Qwen 1.5's experts)."""
    gate = Array(f"{branch.name} gate", TOKENS, wide=True, purpose=branch.purpose)
    build.add(einsum(x, weight(f"{branch.name}_token_gate", "embed"), gate))
    return build.add(pointwise([branch, gate], stream(f"{branch.name} gated"), stream=SCALE))
