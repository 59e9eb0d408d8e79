"""An index of tokens: which of them each query sees (DeepSeek V3.2, arXiv 2512.02556, section 2.1).

As MaxText trains it: scores of all pairs are in HBM, for each head of the index; the largest of a
query are found by sorting its row, and attention under the mask of those computes all pairs. No
gradient passes back. It only has a place in a graph: the emitted program has none, and says so.

Shapes: queries [batch, tokens, index heads, index dim]; scores and mask [batch, tokens, keys].
"""

from __future__ import annotations

from dataclasses import replace

from shardsim.graph.arrays import Array, Counted, Op, Stream, einsum, linear, weight
from shardsim.graph.build import TOKENS, Builder
from shardsim.ops.attend import Mask
from shardsim.ops.norm import head_norm
from shardsim.ops.project import project_in

QUERIES = ("index_heads", "index_dim")
PAIRS = (*TOKENS, "index_keys")
# A row of scores and of its places is sorted: some 80 passes through on-chip memory for 4,096 keys,
# each with a comparison and two selections of both; two cumulative sums, and a mask, follow.
CHOOSE = Stream(passes=8.0, ops=80 * 5 + 20.0)


def token_index(build: Builder, x: Array, latent: Array, *, heads: int, causal: bool) -> Array:
    """Add the index of a layer's input `x` and its `latent` of queries; return the mask."""
    table = weight("index_query", "query_latent", *QUERIES)
    view = latent.view(**{latent.dims[-1]: "query_latent"})
    q = build.add(einsum(view, table, Array("index q", (*TOKENS, *QUERIES))))
    key = project_in(build, "index_key", x, "index k", ("index_dim",), keep="rest", bias=False)
    k = head_norm(build, "index_key_norm", key, kind="layernorm", bias=True)
    sums = Array("index weights", (*TOKENS, "index_heads"), wide=True)
    sums = build.add(
        replace(einsum(x, weight("index_weight", "embed", "index_heads"), sums), dtype="f32")
    )
    mask = Mask(causal=causal)
    pairs = Array("index pairs", (*PAIRS, "index_heads"), keep="")
    product = einsum(q, k.view(seq="index_keys"), pairs, unit="attention")
    build.add(replace(product, mask=mask))
    scores = Array("index scores", PAIRS, keep="", wide=True)
    # In units of float32: of each head a number in bf16 is read, and added.
    stream = Stream(passes=heads / 2 + 1.0, ops=3.0 * heads)
    counts = Counted("attention", 1, (*PAIRS, "index_heads"))
    build.add(Op((pairs, sums), scores, stream=stream, counts=counts, mask=mask))
    chosen = Array("index mask", PAIRS, keep="", trained=False)
    return build.add(linear([scores], chosen, stream=CHOOSE))
