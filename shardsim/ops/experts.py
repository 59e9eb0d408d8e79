"""The experts themselves: MLPs side by side, each on the tokens that chose it."""

from __future__ import annotations

from dataclasses import replace

from shardsim.graph.arrays import Array, Dims, einsum, weight
from shardsim.graph.build import Builder, vector
from shardsim.ops.activate import activate
from shardsim.ops.exchange import ROUTED

# Rows of one tile of a grouped matmul (megablox's default). The last tile of an expert is half
# empty on average.
TILE = 512


def experts(
    build: Builder, slots: Array, *, gated: bool, activation: str, bias: bool, sorted_by: bool
) -> Array:
    """Add all experts' MLPs, on arrays [experts, ..., embed].

    `sorted_by`: tokens are sorted by expert, as many as there are, so that products have rows in
    groups of any size.
    """
    rows: Dims = slots.dims[1:-1]
    names = ("expert_in", "expert_gate") if gated else ("expert_in",)
    tile = TILE if sorted_by else 0
    parts = []
    for name in names:
        out = Array(f"{name} result", ("expert", *rows, "expert_mlp"), keep="mlp_hidden")
        out = replace(out, lies="slots", purpose=ROUTED)
        vectors = [vector(f"{name}_bias", "expert", "expert_mlp")] if bias else []
        product = einsum(slots, weight(name, "expert", "embed", "expert_mlp"), out, *vectors)
        parts.append(build.add(replace(product, tile=tile)))
    hidden = activate(build, parts, activation, "expert hidden")
    made = Array("made", slots.dims, keep="", lies="made", purpose=ROUTED)
    vectors = [vector("expert_out_bias", "expert", "embed")] if bias else []
    product = einsum(hidden, weight("expert_out", "expert", "expert_mlp", "embed"), made, *vectors)
    return build.add(replace(product, tile=tile))
