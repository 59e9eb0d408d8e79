"""What makes the residual stream: tokens looked up in a table, or patches of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, einsum, linear, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, stream, vector
from shardsim.graph.place import CONTEXT, EVERY, TENSOR
from shardsim.ops.lazy import jnp, lax
from shardsim.ops.norm import EPSILON, HEAD_NORM, NORM, centred, statistics
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

LOOK_UP = Stream(passes=2.0, ops=1.0, gradient_passes=3.0, gradient_ops=1.0)


def embed_tokens(build: Builder, *, positions: str, shared: bool = False) -> Array:
    """Add the look-up of tokens: each member of a tensor axis makes its part of the rows.

    The table of the output head comes with it: where both are one, it is gathered once. A `shared`
    one is handed to another stack, whole.
    """
    ids = Array("tokens", (*TOKENS, "vocab"), trained=False)
    table = weight("token_embedding", "vocab", "embed", kind="table", purpose="tables")
    out = stream("x", purpose="vocabulary")
    ins = [ids, table]
    if positions == "learned":
        ins.append(position_table())
    build.add(linear(ins, out, stream=LOOK_UP))
    head = Array("head", ("embed", "vocab"), keep="")
    if shared:
        build.call("embed_tokens", [ids], out, head, _shared(), positions=positions, shared=True)
    else:
        build.call("embed_tokens", [ids], out, head, positions=positions)
    return out


def embed_shared(build: Builder, *, positions: str) -> Array:
    """Add the look-up of tokens in the whole table of another stack."""
    ids = Array("tokens", (*TOKENS, "vocab"), trained=False)
    out = stream("x", purpose="vocabulary")
    learned = [position_table()] if positions == "learned" else []
    build.add(linear([ids, _shared(), *learned], out, stream=LOOK_UP))
    build.call("embed_shared", [ids, _shared()], out, positions=positions)
    return out


def _shared() -> Array:
    return Array("table", ("vocab", "embed"), keep="", handed=True, owed=EVERY)


def project_images(build: Builder, *, trained: bool) -> tuple[Array, Array]:
    """Add the tokens of images, projected; return them as they were handed and as they are."""
    read = Array("image tokens", ("batch", "image_seq", "image_embed"), keep="", lies="handed")
    owed = (*TENSOR, *CONTEXT)
    read = replace(read, handed=True, owed=owed, trained=trained, purpose="memory")
    table = weight("image_projection", "image_embed", "embed", purpose="ends")
    bias = vector("image_projection_bias", "embed")
    seen = read.view(image_seq="seq")
    return read, build.add(einsum(seen, table, stream("projected images"), bias))


def put_in_front(build: Builder, x: Array, *, trained: bool) -> Array:
    """Add the tokens of images, projected, in front of those of words, which leave room."""
    read, projected = project_images(build, trained=trained)
    out = build.add(linear([x, projected], stream("x", purpose="vocabulary")))
    build.call("put_in_front", [x, read], out)
    return out


def embed_patches(
    build: Builder,
    *,
    positions: str,
    class_token: bool,
    registers: bool = False,
    bias: bool = True,
    kept: bool = False,
    norms: tuple[str, bool] | None = None,
    name: str = "x",
) -> Array:
    """Add the patch embedding, of all patches or of those `kept`, the positions, and tokens that
    are learned as they are; the result is called `name`.

    `norms` are the kind of those in front of the embedding and behind it (Dual PatchNorm, arXiv
    2302.01327), and whether they have biases.
    """
    pixels = Array("pixels", (*TOKENS, "patch"), trained=False)
    parts = ("scale", "bias")[: 1 + bool(norms and norms[1])]
    if norms:
        inner = [vector(f"pixel_norm_{part}", "patch") for part in parts]
        normed = Array("pixels normed", pixels.dims)
        pixels = build.add(pointwise([pixels], normed, *inner, stream=HEAD_NORM))
    table = weight("patch_embedding", "patch", "embed", purpose="ends")
    biases = [vector("patch_embedding_bias", "embed")] if bias else []
    x = build.add(einsum(pixels, table, stream("patches"), *biases))
    if norms:
        outer = [weight(f"patch_norm_{part}", "norm", kind="vector") for part in parts]
        made = stream("patches normed")
        sums = statistics(build, x, made, kind=norms[0])
        x = build.add(pointwise([x, sums], made, *outer, stream=NORM))
    vectors = [vector("cls_token", "embed")] if class_token else []
    vectors += [vector("register_tokens", "register", "embed")] if registers else []
    learned = [position_table()] if positions == "learned" else []
    out = build.add(linear([x, *learned], stream(name), *vectors))
    given = [Array(name, ("batch",)) for name in ("images", "kept")[: 1 + kept]]
    more: dict[str, Any] = {} if bias else {"bias": False}
    more |= {"registers": True} if registers else {}
    more |= {"norms": norms[0]} if norms else {}
    build.call("embed_patches", given, out, positions=positions, class_token=class_token, **more)
    return out


def position_table() -> Array:
    """Return the table of learned positions."""
    return weight("position_embedding", "position", "embed", kind="table", purpose="ends")


@runs("embed_tokens")
def run_embed_tokens(way: Whole, params: Params, call: Any, tokens: Any) -> Any:
    """Return the residual stream before the first layer, and the table [embed, vocab] of the head.

    tokens [batch, tokens] of whole sequences.
    """
    table, head = way.tables(params)
    x = way.look_up(table, tokens)
    x = way.residual(add_positions(way, params, call, x))
    return [x, head, table] if call.get("shared") else [x, head]


@runs("embed_shared")
def run_embed_shared(way: Whole, params: Params, call: Any, tokens: Any, table: Any) -> Any:
    """Return the residual stream before the first layer, of the table of another stack."""
    return way.residual(add_positions(way, params, call, way.look_up(table, tokens)))


@runs("put_in_front")
def run_put_in_front(way: Whole, params: Params, call: Any, x: Any, images: Any) -> Any:
    """Return the residual stream with the tokens of images [batch, tokens, width] in front."""
    first = images.shape[1]
    there = way.own_tokens(jnp.arange(way.plan["sequence"]), 0) < first
    padded = jnp.pad(images, ((0, 0), (0, way.plan["sequence"] - first), (0, 0)))
    own = way.own_tokens(padded, 1)
    y = jnp.einsum("bsk,ke->bse", own, way.end_matrix(params, "image_projection"))
    y = way.add_vectors(params, y, ["image_projection_bias"])
    return way.residual(jnp.where(there[:, None], y, x))


@runs("embed_patches")
def run_embed_patches(way: Whole, params: Params, call: Any, images: Any, kept: Any = None) -> Any:
    """Return the residual stream before the first layer: patches, projected; registers are last."""
    pixels = patchify(images, way.model["patch"])
    patches = pixels.shape[1]
    if kept is not None:
        pixels = jnp.take_along_axis(pixels, kept[:, :, None], 1)
    if call["class_token"]:
        pixels = jnp.pad(pixels, ((0, 0), (1, 0), (0, 0)))
    without = pixels.shape[1]
    if call.get("registers"):
        pixels = jnp.pad(pixels, ((0, 0), (0, way.plan["sequence"] - without), (0, 0)))
    pixels = way.own_tokens(pixels, 1)
    if "norms" in call:
        pixels = normed_pixels(params, call["norms"], pixels)
    pixels = pixels.astype(way.compute)
    x = jnp.einsum("bsp,pe->bse", pixels, way.end_matrix(params, "patch_embedding"))
    if call.get("bias", True):
        x = way.add_vectors(params, x, ["patch_embedding_bias"])
    if "norms" in call:
        wide, square = centred(way, call["norms"], x)
        y = wide * lax.rsqrt(square + EPSILON) * way.vector(params, "patch_norm_scale")
        y = y.astype(x.dtype)
        x = way.add_vectors(params, y, [name for name in ["patch_norm_bias"] if name in params])
    if call["class_token"]:
        first = way.own_tokens(jnp.arange(way.plan["sequence"]), 0) == 0
        x = jnp.where(first[:, None], way.vector(params, "cls_token").astype(x.dtype), x)
    if call.get("registers"):
        place = way.own_tokens(jnp.arange(way.plan["sequence"]), 0) - without
        own = way.vector(params, "register_tokens")[jnp.maximum(place, 0)].astype(x.dtype)
        x = jnp.where(place[:, None] >= 0, own, x)
    if kept is None:
        return way.residual(add_positions(way, params, call, x))
    if call["class_token"]:
        kept = jnp.pad(kept + 1, ((0, 0), (1, 0)))
    if call["positions"] == "learned":
        table = way.end_matrix(params, "position_embedding")
    else:
        table = way.own_embed(sinusoids(patches + call["class_token"], way.model["embed"]))
    return way.residual(x + way.own_tokens(table[kept], 1).astype(x.dtype))


def normed_pixels(params: Params, kind: str, pixels: Any) -> Any:
    """Normalise the pixels of each patch [batch, patches, pixels], in float32."""
    wide = pixels.astype(jnp.float32)
    if kind == "layernorm":
        wide = wide - wide.mean(-1, keepdims=True)
    square = jnp.mean(wide * wide, -1, keepdims=True)
    y = wide * lax.rsqrt(square + EPSILON) * params["pixel_norm_scale"].astype(jnp.float32)
    return y + params["pixel_norm_bias"].astype(jnp.float32) if "pixel_norm_bias" in params else y


def add_positions(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Add learned or fixed positions to the residual stream, where the model has them."""
    if call["positions"] == "learned":
        table = way.end_matrix(params, "position_embedding")[: way.plan["sequence"]]
        if len(table) < way.plan["sequence"]:  # registers have none
            table = jnp.pad(table, ((0, way.plan["sequence"] - len(table)), (0, 0)))
        x = x + way.own_tokens(table, 0)
    elif call["positions"] == "fixed":
        waves = sinusoids(way.plan["sequence"], way.model["embed"])
        x = x + way.own_tokens(way.own_embed(waves), 0).astype(x.dtype)
    return x


def sinusoids(tokens: int, width: int) -> Any:
    """Return fixed positions [tokens, embed]: sines, then cosines (arXiv 1706.03762, 3.5)."""
    half = (width + 1) // 2
    angle = jnp.arange(tokens)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[:, :width]


def patchify(images: Any, patch: int) -> Any:
    """Return images [batch, height, width, channels] as [batch, patches, pixels of a patch]; those
    of a video [batch, frames, height, width, channels] one after another."""
    if images.ndim > 4:
        frames = patchify(images.reshape(-1, *images.shape[2:]), patch)
        return frames.reshape(len(images), -1, frames.shape[-1])
    b, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    cut = images.reshape(b, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, rows * columns, patch * patch * channels)
