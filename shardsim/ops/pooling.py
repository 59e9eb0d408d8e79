"""One vector of an image: pooled by mean, class token or attention; then classes or features."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import (
    Array,
    Dims,
    Kernel,
    Matmul,
    Op,
    einsum,
    linear,
    pointwise,
    weight,
)
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.lazy import jax, jnp, lax
from shardsim.ops.norm import norm, run_norm
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

ROWS: Dims = ("batch",)
HEADS: Dims = ("heads", "head_dim")


def image_loss(build: Builder, final: Array, *, pooling: str, classes: bool) -> None:
    """Add pooling, classifier or features, and the loss."""
    one = add_pooled(build, final, pooling)
    if classes:
        table = weight("classifier", "embed", "classes", purpose="ends")
        loss = Array("class logits", (*ROWS, "classes"), keep="", wide=True, purpose="pooling")
        bias = vector("classifier_bias", "classes")
        build.add(replace(einsum(one, table, loss, bias), eager=True))
    else:  # the loss is the squared error of the features
        loss = Array("errors", ROWS, keep="", wide=True, purpose="pooling")
        build.add(pointwise([one], loss))
    wanted = Array("labels" if classes else "features", ROWS)
    build.call("image_loss", [final, wanted], loss, pooling=pooling, classes=classes)


def add_pooled(build: Builder, final: Array, pooling: str) -> Array:
    """Add pooling: one vector [batch, embed] of all tokens, or of one of them."""
    return _by_attention(build, final) if pooling == "map" else _mean(build, final)


def _row(name: str) -> Array:
    """Return one vector an image."""
    return Array(name, (*ROWS, "embed"), purpose="pooling")


def _mean(build: Builder, final: Array) -> Array:
    """Add the mean over tokens, or the class token: float32 sums."""
    pieces = Array("pooled pieces", (*ROWS, "embed"), stream=True, wide=True, purpose="pooling")
    build.add(replace(linear([final], pieces), eager=True))
    return build.add(replace(linear([pieces], replace(_row("pooled"), wide=True)), eager=True))


def _project(build: Builder, name: str, source: Array, dims: Dims, out: Array) -> Array:
    """Add a projection of the pooling head, with its bias."""
    into = "embed" in out.dims
    full = (*dims, "embed") if into else ("embed", *dims)
    bias = vector(f"{name}_bias", *(("embed",) if into else dims))
    return build.add(einsum(source, weight(name, *full, purpose="ends"), out, bias))


def _by_attention(build: Builder, final: Array) -> Array:
    """Add attention of a learned probe to the tokens, then an MLP; every head has its own key and
    value. Source: big_vision, models/vit.py, class MAPHead."""

    def inner(name: str, lead: Dims, dims: Dims) -> Array:
        return Array(name, (*lead, *dims), purpose="pooling")

    row = build.add(Op((), _row("probe rows"), vectors=(vector("pooling_probe", "embed"),)))
    q = _project(build, "pooling_query", row, HEADS, inner("pooling q", ROWS, HEADS))
    build.made[-1] = replace(build.made[-1], call="pooling_query")
    k = _project(build, "pooling_key", final, HEADS, inner("pooling k", TOKENS, HEADS))
    v = _project(build, "pooling_value", final, HEADS, inner("pooling v", TOKENS, HEADS))
    context = inner("pooling context", ROWS, HEADS)
    shape = Matmul(rows=(), inner=("head_dim",), columns=("seq",), batch=("batch", "heads"))
    kernel = Kernel(shape=shape, products=2, gradient_products=4, ops=0.0, gradient_ops=0.0)
    # A softmax over split keys: its maximum, then its values and their weights.
    largest = Array("pooling maximum", ("batch", "heads"), wide=True, purpose="pooling")
    build.add(Op((q, k), largest, unit="attention"))
    shares = replace(inner("pooling weights", ROWS, ("heads",)), wide=True)
    build.add(Op((q, k), shares, (q, k), eager=True))
    sums = replace(context, name="pooling sums", wide=True)
    build.add(Op((q, k, v), sums, (q, k, v), unit="attention", kernel=kernel, eager=True))
    build.add(linear([sums, shares], context))
    pooled = _project(build, "pooling_attention_output", context, HEADS, _row("pooled"))
    inside = Builder()  # what runs it is part of this op's own function
    normed = norm(
        inside, "pooling_norm", pooled, _row("pooled normed"), kind="layernorm", bias=True
    )
    build.made += inside.made
    up = _project(build, "pooling_mlp_in", normed, ("mlp",), inner("pooling up", ROWS, ("mlp",)))
    hidden = build.add(pointwise([up], replace(up, name="pooling hidden")))
    down = _project(build, "pooling_mlp_out", hidden, ("mlp",), _row("pooling down"))
    return build.add(linear([pooled, down], _row("features")))


@runs("image_loss")
def run_image_loss(way: Whole, params: Params, call: Any, x: Any, wanted: Any) -> Any:
    """Return the summed cross-entropy of the classes, or squared error of pooled features."""
    with jax.named_scope("pooling"):
        pooled = pooled_vector(way, params, call["pooling"], x)
        flat = way.flat()
        if not call["classes"]:
            error = flat.embed_sum(
                jnp.sum((pooled[:, 0].astype(jnp.float32) - flat.own_embed(wanted)) ** 2, -1)
            )
            return jnp.sum(error) / way.model["embed"] / flat.copies
        weights = flat.head_matrix(params, "classifier")
        logits = jnp.einsum("be,ec->bc", pooled[:, 0], weights, preferred_element_type=jnp.float32)
        logits = flat.second_sum(logits) + params["classifier_bias"].astype(jnp.float32)
    scores = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.take_along_axis(scores, wanted[:, None], 1)) / flat.copies


def pooled_vector(way: Whole, params: Params, pooling: str, x: Any) -> Any:
    """Return one vector of an image or a text, [batch, 1, embed]."""
    if pooling == "map":
        return map_head(way, params, x)
    tokens = way.plan["sequence"]
    share = jnp.ones(tokens) / tokens
    if pooling in ("cls", "last"):
        share = jnp.arange(tokens) == (0 if pooling == "cls" else tokens - 1)
    return way.pool(x, way.own_tokens(share.astype(jnp.float32), 0)).astype(x.dtype)


def map_head(way: Whole, params: Params, x: Any) -> Any:
    """Pool by attention: one learned query per head attends to all tokens; then an MLP.

    As big_vision's MAPHead (models/vit.py): x [batch, tokens, embed] to [batch, 1, embed].
    """
    depth, flat = way.model["head_dim"], way.flat()
    probe = flat.vector(params, "pooling_probe").astype(x.dtype)
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, *probe.shape))
    (q,) = flat.project_in(probe, params, ["pooling_query"])
    k, v = way.project_in(x, params, ["pooling_key", "pooling_value"])
    q, k, v = (
        way.by_head(way.with_bias(y, params, f"pooling_{name}_bias"))
        for y, name in zip((q, k, v), ["query", "key", "value"], strict=True)
    )
    scores = jnp.einsum("bhd,bkhd->bhk", q[:, 0], k, preferred_element_type=jnp.float32)
    scores = scores * depth**-0.5
    weights = jnp.exp(scores - way.context_max(lax.stop_gradient(scores).max(-1))[..., None])
    values = way.context_sum(jnp.einsum("bhk,bkhd->bhd", weights, v.astype(jnp.float32)))
    context = values / way.context_sum(weights.sum(-1))[..., None]
    context = context.astype(x.dtype).reshape(x.shape[0], 1, -1)
    y = flat.project_out([context], params, ["pooling_attention_output"])
    y = flat.add_vectors(params, y, ["pooling_attention_output_bias"])
    vectors = ["pooling_norm_scale", "pooling_norm_bias"]
    h = run_norm(flat, params, {"kind": "layernorm", "weights": vectors, "stored": False}, y)
    (h,) = flat.project_in(h, params, ["pooling_mlp_in"])
    h = jax.nn.gelu(flat.with_bias(h, params, "pooling_mlp_in_bias"))
    z = flat.project_out([h], params, ["pooling_mlp_out"])
    return y + flat.add_vectors(params, z, ["pooling_mlp_out_bias"])
