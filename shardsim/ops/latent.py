"""Latent attention: queries, keys and values out of latents that all heads share.

A token is projected down to latents, which every member of a tensor axis has whole; of what heads
make of them it has those of its own (DeepSeek-V2, arXiv 2405.04434, section 2.1). A part of each
head is turned by position; that of keys is one array for all heads.

Shapes: latents [batch, tokens, width]; queries and keys [batch, tokens, heads, head_dim], values
and result [batch, tokens, heads, value_dim]. Fused kernels have heads of one width: values are
padded with zeros to that of the keys, and the result is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, Stream, einsum, linear, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.attend import KERNELS, attention_ops
from shardsim.ops.attend_blocks import same_sequence, seen
from shardsim.ops.attend_kernels import kernel_attention
from shardsim.ops.attend_mask import Mask
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax
from shardsim.ops.norm import EPSILON, NORM
from shardsim.ops.registry import runs
from shardsim.ops.rotate import ROTATE, run_rotate

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

WIDE: Dims = ("kv", "group", "head_dim")
RESULT: Dims = ("kv", "group", "value_dim")
# Read and written; so is the gradient.
COPY = Stream(passes=2.0, gradient_passes=2.0)


def latent_norm(build: Builder, name: str, x: Array) -> Array:
    """Add an RMS norm of a latent, which no device has a part of."""
    scale = vector(f"{name}_scale", x.dims[-1])
    out = build.add(
        pointwise([x], replace(x, name=f"{x.name} normed", keep="rest"), scale, stream=NORM)
    )
    build.call("latent_norm", [x], out, weights=[scale])
    return out


def latent_up(
    build: Builder, x: Array, latent: str, made: Mapping[str, tuple[str, Dims]]
) -> list[Array]:
    """Add projections of a latent, each to an array by heads: `made` has by weight the name and
    the dimensions of what it makes. `latent` is the dimension that weights are stored by."""
    view = x.view(**{x.dims[-1]: latent})
    outs, weights = [], []
    for name, (out, dims) in made.items():
        weights.append(weight(name, latent, *dims))
        whole = Array(out, (*TOKENS, *dims), keep="qkv", purpose="second axis")
        outs.append(build.add(einsum(view, weights[-1], whole)))
    build.call("latent_up", [x], *outs, weights=weights)
    return outs


def rotate_part(build: Builder, q: Array, *, rotary: int, head_dim: int) -> Array:
    """Add a rotation of the last `rotary` of each head of queries."""
    share = rotary / head_dim
    stream = replace(ROTATE, ops=ROTATE.ops * share, gradient_ops=ROTATE.gradient_ops * share)
    out = replace(q, name=f"{q.name} turned", keep="rest")
    build.add(linear([q], out, stream=stream))
    build.call("rotate_part", [q], out, rotary=rotary)
    return out


def latent_keys(build: Builder, keys: Array, shared: Array) -> Array:
    """Add the keys: of each head its own part, then the `shared` one, turned by position."""
    turned = build.add(
        linear([shared], replace(shared, name=f"{shared.name} turned", keep=""), stream=ROTATE)
    )
    out = replace(keys, name="keys", dims=(*keys.dims[:-1], "head_dim"), keep="rest")
    build.add(linear([keys, turned], out, stream=COPY))
    build.call("latent_keys", [keys, shared], out)
    return out


def attend_latents(
    build: Builder,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    kernel: str,
    sinks: bool,
    chosen: Array | None = None,
) -> Array:
    """Add attention of heads whose values are narrower than their keys; queries may see `chosen`
    tokens only."""
    context = Array("context", (*TOKENS, *RESULT), keep="context", purpose="second axis")
    fused = kernel in KERNELS
    if fused:
        keys = v.view(seq="keys")
        wide = replace(v, name="values wide", dims=(*keys.dims[:-1], "head_dim"), keep="")
        build.add(linear([keys], wide, stream=COPY))
        result = replace(context, name="context wide", dims=(*TOKENS, *WIDE))
        widths = ("head_dim", "value_dim")
        options: dict[str, Any] = {"mask": mask, "kernel": kernel, "sinks": sinks, "bias": chosen}
        attention_ops(build, q, k, wide, result, widths=widths, **options)
        context = build.add(linear([result], replace(context, keep=""), stream=COPY))
    else:
        attention_ops(build, q, k, v, context, mask=mask, kernel=kernel, sinks=sinks, bias=chosen)
    read = [q, k, v, chosen] if chosen else [q, k, v]
    build.call("attend_latents", read, context, named=fused, fused=fused, mask=mask.to_data())
    return context


@runs("latent_norm")
def run_latent_norm(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Normalise a latent [batch, tokens, width] by its mean square, in float32."""
    wide = x.astype(jnp.float32)
    scale = params[call["weights"][0]].astype(jnp.float32)
    y = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPSILON) * scale
    return lax.optimization_barrier(y.astype(x.dtype))


@runs("latent_up")
def run_latent_up(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return what heads make of a latent, [batch, tokens, heads, width] for each weight."""
    made = []
    for name in call["weights"]:
        width = way.parameters[name]["shape"][-1]
        w = way.head_matrix(params, name).reshape(x.shape[-1], -1, width)
        made.append(jnp.einsum("bsk,khd->bshd", x, w))
    return made


@runs("rotate_part")
def run_rotate_part(way: Whole, params: Params, call: Any, q: Any) -> Any:
    """Turn the last part of each head by position."""
    q = way.by_head(q)
    still, turned = jnp.split(q, [q.shape[-1] - call["rotary"]], -1)
    return jnp.concatenate([still, run_rotate(way, params, call, turned)], -1)


@runs("latent_keys")
def run_latent_keys(way: Whole, params: Params, call: Any, keys: Any, shared: Any) -> Any:
    """Return keys [batch, tokens, heads, head_dim]: `shared` [batch, tokens, rotary], turned by
    position, stands behind the keys of each head."""
    turned = run_rotate(way, params, call, shared[:, :, None])
    every = jnp.broadcast_to(turned, (*keys.shape[:3], turned.shape[-1]))
    return jnp.concatenate([keys, every], -1)


@runs("attend_latents")
def run_attend_latents(
    way: Whole, params: Params, call: Any, q: Any, k: Any, v: Any, chosen: Any = None
) -> Any:
    """Return the weighted values [batch, tokens, heads, value_dim], before their projection.

    What is `chosen` is added to scores: [batch, queries, keys].
    """
    if chosen is not None:
        return attend_chosen(way, call, q, k, v, chosen)
    k, v = way.all_keys(k), way.all_keys(v)
    mask, positions = call["mask"], None
    if mask["causal"]:
        positions = way.query_tokens(jnp.arange(way.plan["sequence"]), 0)
    if call["fused"]:
        more = q.shape[-1] - v.shape[-1]
        wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, more)))
        return way.flash(q, k, wide, mask, positions)[..., : v.shape[-1]]
    pairs = None if positions is None else seen(mask, positions, way.key_tokens(k))
    if way.segments is not None:
        alike = same_sequence(way.segments, way.segments)[:, 0]
        pairs = alike if pairs is None else alike & pairs
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if pairs is not None:
        scores = jnp.where(pairs, scores, jnp.finfo(jnp.float32).min)
    chances = checkpoint_name(jax.nn.softmax(scores, axis=-1).astype(q.dtype), "rest")
    v = lax.optimization_barrier(v)
    return lax.optimization_barrier(jnp.einsum("bhqk,bkhd->bqhd", chances, v))


def attend_chosen(way: Whole, call: Any, q: Any, k: Any, v: Any, chosen: Any) -> Any:
    """Return attention to the tokens that are `chosen`: in the kernel on TPUs, whose mask each
    sequence has of its own, else with all scores in HBM."""
    if not call["fused"]:
        return written(q, k, v, chosen, lambda x: checkpoint_name(x, "rest"))
    if way.plan["platform"] != "tpu":
        return checkpoint_name(written(q, k, v, chosen, lambda x: x), "context")
    more = q.shape[-1] - v.shape[-1]
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, more)))
    pairs = lax.stop_gradient(chosen) == 0
    return kernel_attention(q, k, wide, call["mask"], None, pairs=pairs)[..., : v.shape[-1]]


def written(q: Any, k: Any, v: Any, bias: Any, name: Any) -> Any:
    """Return attention whose scores are in HBM, with a `bias` of them [batch, queries, keys];
    `name` marks the probabilities for the remat policy."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5 + lax.stop_gradient(bias)[:, None].astype(jnp.float32)
    chances = name(jax.nn.softmax(scores, axis=-1).astype(q.dtype))
    v = lax.optimization_barrier(v)
    return lax.optimization_barrier(jnp.einsum("bhqk,bkhd->bqhd", chances, v))
