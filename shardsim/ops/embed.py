"""What makes the residual stream: tokens looked up in a table, or patches of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, einsum, linear, weight
from shardsim.graph.build import TOKENS, Builder, stream, vector
from shardsim.ops.lazy import jnp
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

LOOK_UP = Stream(passes=2.0, ops=1.0, gradient_passes=3.0, gradient_ops=1.0)


def embed_tokens(build: Builder, *, positions: str) -> Array:
    """Add the look-up of tokens: each member of a tensor axis makes its part of the rows.

    The table of the output head comes with it: where both are one, it is gathered once.
    """
    ids = Array("tokens", (*TOKENS, "vocab"), trained=False)
    table = weight("token_embedding", "vocab", "embed", kind="table", purpose="tables")
    out = stream("x", purpose="vocabulary")
    ins = [ids, table]
    if positions == "learned":
        ins.append(_positions())
    build.add(linear(ins, out, stream=LOOK_UP))
    head = Array("head", ("embed", "vocab"), keep="")
    build.call("embed_tokens", [ids], out, head, positions=positions)
    return out


def embed_patches(
    build: Builder,
    *,
    positions: str,
    class_token: bool,
    registers: bool = False,
    bias: bool = True,
    name: str = "x",
) -> Array:
    """Add the patch embedding, the positions, and tokens that are learned as they are; the result
    is called `name`."""
    pixels = Array("pixels", (*TOKENS, "patch"), trained=False)
    table = weight("patch_embedding", "patch", "embed", purpose="ends")
    biases = [vector("patch_embedding_bias", "embed")] if bias else []
    x = build.add(einsum(pixels, table, stream("patches"), *biases))
    vectors = [vector("cls_token", "embed")] if class_token else []
    vectors += [vector("register_tokens", "register", "embed")] if registers else []
    learned = [_positions()] if positions == "learned" else []
    out = build.add(linear([x, *learned], stream(name), *vectors))
    images = Array("images", ("batch",))
    build.call("embed_patches", [images], out, positions=positions, class_token=class_token)
    return out


def _positions() -> Array:
    return weight("position_embedding", "position", "embed", kind="table", purpose="ends")


@runs("embed_tokens")
def run_embed_tokens(way: Whole, params: Params, call: Any, tokens: Any) -> Any:
    """Return the residual stream before the first layer, and the table [embed, vocab] of the head.

    tokens [batch, tokens] of whole sequences.
    """
    table, head = way.tables(params)
    x = way.look_up(table, tokens)
    return [way.residual(add_positions(way, params, call, x)), head]


@runs("embed_patches")
def run_embed_patches(way: Whole, params: Params, call: Any, images: Any) -> Any:
    """Return the residual stream before the first layer: patches, projected."""
    pixels = patchify(images, way.model["patch"])
    if call["class_token"]:
        pixels = jnp.pad(pixels, ((0, 0), (1, 0), (0, 0)))
    pixels = way.own_tokens(pixels, 1).astype(way.compute)
    x = jnp.einsum("bsp,pe->bse", pixels, way.end_matrix(params, "patch_embedding"))
    x = way.add_vectors(params, x, ["patch_embedding_bias"])
    if call["class_token"]:
        first = way.own_tokens(jnp.arange(way.plan["sequence"]), 0) == 0
        x = jnp.where(first[:, None], way.vector(params, "cls_token").astype(x.dtype), x)
    return way.residual(add_positions(way, params, call, x))


def add_positions(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Add learned or fixed positions to the residual stream, where the model has them."""
    if call["positions"] == "learned":
        table = way.end_matrix(params, "position_embedding")[: way.plan["sequence"]]
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
    """Return images [batch, height, width, channels] as [batch, patches, pixels of a patch]."""
    b, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    cut = images.reshape(b, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, rows * columns, patch * patch * channels)
