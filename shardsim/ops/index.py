"""An index of tokens: which of them each query sees (DeepSeek V3.2, arXiv 2512.02556, section 2.1).

As MaxText trains it: scores of all pairs are in HBM, for each head of the index; the largest of a
query are found by sorting its row, and attention under the mask of those computes all pairs. What
the index reads is detached, and so is its mask: no gradient passes back, and without a loss of its
own its weights have none.

Shapes: queries [batch, tokens, index heads, index dim]; keys [batch, tokens, index dim]; scores and
mask [batch, tokens, keys].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Counted, Op, Stream, einsum, linear, pointwise
from shardsim.graph.arrays import weight as new_weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.attend_blocks import seen
from shardsim.ops.attend_mask import Mask
from shardsim.ops.lazy import jax, jnp, lax
from shardsim.ops.norm import EPSILON, NORM
from shardsim.ops.registry import runs
from shardsim.ops.rotate import ROTATE, run_rotate

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# Weights, none of which has a gradient, and their dimensions of heads and widths. Those of what is
# computed have other names: sequences that are seen whole need none of it.
NORM_WEIGHTS = ("index_key_norm_scale", "index_key_norm_bias")
WEIGHTS = ("index_query", "index_key", "index_weight", *NORM_WEIGHTS)
USED = {"index_heads": "scoring_heads", "index_dim": "scoring_dim"}
QUERIES = tuple(USED.values())
PAIRS = (*TOKENS, "index_keys")
# A row of scores is sorted: some 80 passes through on-chip memory for 4,096 keys, each with a
# comparison and two selections. A cumulative sum, of those that are as large as the last one
# chosen, and a mask follow.
CHOOSE = Stream(passes=8.0, ops=80 * 5 + 20.0)
HIDDEN = -0.7 * 3.4028235e38  # what is added to scores of tokens that are not chosen, as MaxText's


def token_index(
    build: Builder, x: Array, latent: Array, *, heads: int, head_dim: int, rotary: int, top: int
) -> Array:
    """Add the index of a layer's input `x` and its `latent` of queries; return the mask.

    The first `rotary` of a query's and a key's numbers turn by position; no query sees later keys.
    """
    key = _read(build, "index_key", x, "index k", "index_dim")
    sums = _read(build, "index_weight", x, "index weights", "index_heads")
    mask, turn = Mask(causal=True), Stream(passes=2.0, ops=ROTATE.ops * rotary / head_dim)
    table = new_weight("index_query", "query_latent", *USED)
    view = latent.view(**{latent.dims[-1]: "query_latent"})
    q = build.add(einsum(view, _used(table), Array("index q", (*TOKENS, *QUERIES), keep="")))
    q = build.add(linear([q], replace(q, name="index q turned"), stream=turn))
    k = _normed(build, key)
    k = build.add(linear([k], replace(k, name="index k turned"), stream=turn))
    pairs = Array("index pairs", (*PAIRS, "scoring_heads"), keep="")
    product = einsum(q, k.view(seq="index_keys"), pairs, unit="attention")
    build.add(replace(product, mask=mask))
    scores = Array("index scores", PAIRS, keep="", wide=True, purpose="index")
    # In units of float32: of each head a number in bf16 is read, and added.
    stream = Stream(passes=heads / 2 + 1.0, ops=3.0 * heads)
    counts = Counted("attention", 1, (*PAIRS, "scoring_heads"))
    build.add(Op((pairs, sums), scores, stream=stream, counts=counts, mask=mask))
    chosen = Array("index mask", PAIRS, keep="", trained=False)
    build.add(linear([scores], chosen, stream=CHOOSE))
    norm = [vector(name, "index_dim") for name in NORM_WEIGHTS]
    more: dict[str, Any] = {"top": top, "rotary": rotary, "mask": mask.to_data()}
    build.call("token_index", [latent, key, sums], chosen, weights=[table, *norm], **more)
    return chosen


def _used(array: Array) -> Array:
    """Return a weight as what is computed with it has its dimensions."""
    return array.view(**{d: USED[d] for d in array.dims if d in USED})


def _read(build: Builder, name: str, x: Array, out: str, d: str) -> Array:
    """Add a projection of the residual stream whose weight has no gradient."""
    matrix = new_weight(name, "embed", d)
    made = build.add(einsum(x, _used(matrix), Array(out, (*TOKENS, USED[d]))))
    build.call("project_in", [x], made, weights=[matrix], biases=[])
    return made


def _normed(build: Builder, key: Array) -> Array:
    """Add a layernorm of keys."""
    sums = Array("index k sums", (*TOKENS, "moments"), keep="", wide=True)
    build.add(pointwise([key], sums))
    learned = [_used(vector(name, "index_dim")) for name in NORM_WEIGHTS]
    out = replace(key, name="index k normed", keep="")
    return build.add(pointwise([key, sums], out, *learned, stream=replace(NORM, apart=None)))


@runs("token_index")
def run_token_index(way: Whole, params: Params, call: Any, latent: Any, key: Any, sums: Any) -> Any:
    """Return what scores of attention have added, [batch, queries, keys]: nothing of tokens that a
    query sees; None where it sees all that a mask leaves, as the sequence is no longer than that.

    How many of those as large as the last one chosen are chosen too: the first ones.
    """
    top, tokens = call["top"], way.plan["sequence"]
    if tokens <= top:
        return None
    latent, key, sums = (lax.stop_gradient(x) for x in (latent, key, sums))
    scores = index_scores(way, params, call, latent, key, sums)
    positions = way.query_tokens(jnp.arange(tokens), 0)
    pairs = seen(call["mask"], positions, way.key_tokens(key))
    scores = jnp.where(pairs, scores, -jnp.inf)
    last = lax.top_k(scores, top)[0][..., -1:]
    above, equal = scores > last, scores == last
    room = top - above.sum(-1, keepdims=True)
    chosen = pairs & (above | (equal & (jnp.cumsum(equal, -1) <= room)))
    return jnp.where(chosen, 0.0, HIDDEN).astype(latent.dtype)


def index_scores(way: Whole, params: Params, call: Any, latent: Any, key: Any, sums: Any) -> Any:
    """Return float32 scores [batch, queries, keys]: of each head what of its product is above zero,
    times a weight of the query. A factor of all of them would choose the same."""
    name, scale, bias = call["weights"]
    width = way.parameters[name]["shape"][-1]
    w = lax.stop_gradient(way.head_matrix(params, name)).reshape(latent.shape[-1], -1, width)
    q = turned_first(way, params, call, jnp.einsum("bsk,khd->bshd", latent, w))
    wide = key.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + EPSILON)
    scale, bias = (lax.stop_gradient(params[one]).astype(jnp.float32) for one in (scale, bias))
    k = turned_first(way, params, call, (wide * scale + bias).astype(key.dtype)[:, :, None])[
        :, :, 0
    ]
    pairs = lax.optimization_barrier(jnp.einsum("bqhd,bkd->bhqk", q, k))
    weights = jnp.moveaxis(sums, -1, 1)[..., None].astype(jnp.float32)
    scores = (jax.nn.relu(pairs).astype(jnp.float32) * weights).sum(1)
    with jax.named_scope("index"):
        return way.tensor_sum(scores)


def turned_first(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Turn the first part of each head by position."""
    turned, still = jnp.split(x, [call["rotary"]], -1)
    return jnp.concatenate([run_rotate(way, params, call, turned), still], -1)
