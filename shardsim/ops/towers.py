"""Two towers, of images and of texts, and losses that compare each embedding with all others.

A softmax over all pairs of a row, and of a column, gathers the embeddings of both towers (CLIP,
arXiv 2103.00020, figure 3). A sigmoid of each pair needs no sums over them: texts pass round the
devices, and each compares its images with those that are there (SigLIP, arXiv 2303.15343, section
3.3).

Shapes: embeddings [batch, feature].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, einsum, linear, pointwise, weight
from shardsim.graph.build import Builder, vector
from shardsim.ops.lazy import jax, jnp, lax
from shardsim.ops.pooling import add_pooled, pooled_vector
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

FEATURES = ("batch", "feature")
COMPARED = "contrast"  # the purpose of moving embeddings
BATCH = frozenset(("data", "fsdp", "expert"))  # axes that split embeddings
# Logits are read for the maximum and for the sum, backward again, and their gradient is written.
PAIRS = Stream(passes=2.0, ops=15.0, gradient_passes=2.0, gradient_ops=15.0)


def embedding(
    build: Builder, final: Array, name: str, *, pooling: str, projected: bool, bias: bool
) -> Array:
    """Add one vector of an image or a text: pooled, and `projected` or as wide as the tower."""
    out = Array(name, FEATURES, keep="", wide=True, purpose=COMPARED)
    out = replace(out, handed=name != "image features")
    x = add_pooled(build, final, pooling)
    if projected:
        matrix = weight("feature_projection", "embed", "feature", purpose="ends")
        biases = [vector("feature_projection_bias", "feature")] if bias else []
        made = replace(x, name="projected", dims=FEATURES, wide=True)
        build.add(replace(einsum(x, matrix, made, *biases), eager=True))
        build.add(linear([made], out))
    else:
        build.add(linear([x.view(embed="feature")], out))
    build.call("embedding", [final], out, pooling=pooling, projected=projected, bias=bias)
    return out


def contrastive_loss(build: Builder, images: Array, *, kind: str, trained: bool) -> None:
    """Add the comparison of images with the texts of a batch; `kind` is softmax or sigmoid."""
    texts = Array("text features", FEATURES, keep="", wide=True, purpose=COMPARED)
    # Texts that came round are kept; their gradients come round instead, as often as they would.
    owed = tuple(BATCH) if kind == "sigmoid" else ()
    texts = replace(texts, handed=True, owed=owed, trained=trained)
    scales = [vector("logit_scale")] + ([vector("logit_bias")] if kind == "sigmoid" else [])
    sides = [(images, texts)] + ([(texts, images)] if kind == "softmax" else [])
    losses = []
    for number, (own, other) in enumerate(sides):
        logits = Array(f"pair logits {number}", ("batch", "others"), wide=True, purpose=COMPARED)
        product = einsum(own, other.view(batch="others"), logits, *scales)
        passed = BATCH if kind == "sigmoid" else frozenset[str]()
        build.add(replace(product, passed=passed, vectors=tuple(scales)))
        loss = Array("pair loss", ("batch",), keep="", wide=True, purpose=COMPARED)
        build.add(pointwise([logits], loss, stream=PAIRS))
        losses.append(loss)
    ins = [images, texts]
    build.call(f"{kind}_loss", ins, losses[0], weights=scales)


@runs("embedding")
def run_embedding(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return embeddings [batch, feature]."""
    with jax.named_scope("pooling"):
        y = pooled_vector(way, params, call["pooling"], x)[:, 0]
        if not call["projected"]:
            return y
        flat = way.flat()
        w = flat.head_matrix(params, "feature_projection")
        y = jnp.einsum("be,ec->bc", y, w, preferred_element_type=jnp.float32)
        y = flat.second_sum(y)
        if call["bias"]:
            y = y + params["feature_projection_bias"].astype(jnp.float32)
        return y.astype(x.dtype)


def of_length_one(x: Any) -> Any:
    """Return embeddings of length 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-12)


@runs("softmax_loss")
def run_softmax_loss(way: Whole, params: Params, call: Any, images: Any, texts: Any) -> Any:
    """Return the summed cross-entropy of pairs, the mean of rows and columns."""
    images, texts = of_length_one(images), of_length_one(texts)
    scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
    right = way.first_row(len(images)) + jnp.arange(len(images))
    total = 0.0
    for own, other in ((images, texts), (texts, images)):
        with jax.named_scope("contrast"):
            every = way.all_rows(other)
        scores = jax.nn.log_softmax(scale * own @ every.T)
        total = total - jnp.sum(jnp.take_along_axis(scores, right[:, None], 1)) / 2
    return total / way.flat().copies


@runs("sigmoid_loss")
def run_sigmoid_loss(way: Whole, params: Params, call: Any, images: Any, texts: Any) -> Any:
    """Return the summed negative logarithms of the chances of pairs, and of those that are none."""
    images, texts = of_length_one(images), of_length_one(texts)
    scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
    bias = params["logit_bias"].astype(jnp.float32)
    first = jnp.arange(len(images))

    def loss(there: Any, pairs: Any) -> Any:
        return -jnp.sum(jax.nn.log_sigmoid(pairs * (scale * images @ there.T + bias)))

    def come(there: Any, _: Any) -> Any:
        with jax.named_scope("contrast"):
            there = way.next_rows(there)
        return there, loss(there, -1.0)

    total = loss(texts, jnp.where(first[:, None] == first, 1.0, -1.0))
    if way.row_members > 1:
        total = total + jnp.sum(lax.scan(come, texts, length=way.row_members - 1)[1])
    return total / way.flat().copies
