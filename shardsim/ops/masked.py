"""Masked patches: a decoder has a learned token wherever its encoder saw no patch.

MAE, arXiv 2111.06377, section 3: the encoder reads the patches that are kept; its tokens are
projected to the decoder's width and stand where their patches do, among tokens of a mask.

Shapes: tokens of the encoder [batch, kept, width]; kept [batch, kept], which patches those are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, linear
from shardsim.graph.build import Builder, stream, vector
from shardsim.ops.embed import add_positions, position_table, project_images
from shardsim.ops.lazy import jnp
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole


def fill_in(build: Builder, *, positions: str, class_token: bool, trained: bool) -> Array:
    """Add the residual stream of a decoder: an encoder's tokens, others masked, and positions."""
    read, seen = project_images(build, trained=trained)
    learned = [position_table()] if positions == "learned" else []
    out = build.add(linear([seen, *learned], stream("x"), vector("mask_token", "embed")))
    kept = Array("kept", ("batch",))
    build.call("fill_in", [read, kept], out, positions=positions, class_token=class_token)
    return out


@runs("fill_in")
def run_fill_in(way: Whole, params: Params, call: Any, images: Any, kept: Any) -> Any:
    """Return the residual stream before the first layer."""
    where = seen_at(way.plan["sequence"], kept, call["class_token"])
    there = way.own_tokens((where >= 0).T, 0).T
    spread = jnp.take_along_axis(images, jnp.maximum(where, 0)[:, :, None], 1)
    own = way.own_tokens(spread, 1)
    y = jnp.einsum("bsk,ke->bse", own, way.end_matrix(params, "image_projection"))
    y = way.add_vectors(params, y, ["image_projection_bias"])
    mask = way.vector(params, "mask_token").astype(y.dtype)
    return way.residual(add_positions(way, params, call, jnp.where(there[..., None], y, mask)))


def seen_at(tokens: int, kept: Any, class_token: bool) -> Any:
    """Return for each token [batch, tokens] which of the encoder's it is, -1 for none; a class
    token is the first of both."""
    first = int(class_token)
    alike = kept[:, None, :] + first == jnp.arange(tokens)[None, :, None]
    where = jnp.where(alike.any(-1), first + jnp.argmax(alike, -1), -1)
    return where.at[:, 0].set(0) if class_token else where
