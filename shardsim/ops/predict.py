"""The pixels of each patch, predicted: the squared error of a diffusion model, or of a masked one.

A diffusion model predicts noise, and may predict its variance beside it (arXiv 2212.09748, section
3.1); all that it predicts is compared alike here. A masked one predicts the pixels of the patches
that its encoder did not see (arXiv 2111.06377, section 3).

Shapes: x [batch, tokens, embed]; pixels [batch, tokens, patch * patch * channels].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, einsum, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.embed import patchify
from shardsim.ops.lazy import jax, jnp
from shardsim.ops.masked import seen_at
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

PREDICTIONS = "predictions"  # the purpose of moving what is predicted, and what predicts it
# What is predicted and what is wanted are read; backward again, and the gradient is written.
ERRORS = Stream(passes=2.0, ops=3.0, gradient_passes=3.0, gradient_ops=2.0)


def patch_loss(build: Builder, final: Array, *, masked: bool, class_token: bool) -> None:
    """Add the prediction of all patches, and the loss: of what was `masked` alone, or of all."""
    head, bias = (
        weight("pixel_head", "embed", "pixels", purpose="ends"),
        vector("pixel_head_bias", "pixels"),
    )
    made = Array("predicted", (*TOKENS, "pixels"), stream=True, wide=True, purpose=PREDICTIONS)
    build.add(replace(einsum(final, head, made, bias), eager=True))
    loss = Array("errors", TOKENS, stream=True, keep="", wide=True, purpose=PREDICTIONS)
    build.add(pointwise([made], loss, stream=ERRORS))
    given = [Array("images", ("batch",)), Array("kept", ("batch",))]
    given = given if masked else [Array("wanted", ("batch",))]
    build.call("patch_loss", [final, *given], loss, class_token=class_token)


@runs("patch_loss")
def run_patch_loss(
    way: Whole, params: Params, call: Any, x: Any, wanted: Any, kept: Any = None
) -> Any:
    """Return the sum over examples of the mean squared error of predicted pixels."""
    first = int(call["class_token"])
    with jax.named_scope("predictions"):
        flat = way.flat()
        head = flat.head_matrix(params, "pixel_head")
        y = jnp.einsum("bse,ep->bsp", way.all_embed(x), head, preferred_element_type=jnp.float32)
        y = way.second_sum(y) + params["pixel_head_bias"].astype(jnp.float32)
    pixels = jnp.pad(patchify(wanted, way.model["patch"]), ((0, 0), (first, 0), (0, 0)))
    error = jnp.mean((y - way.own_tokens(pixels, 1)) ** 2, -1)
    tokens = way.plan["sequence"]
    counts = jnp.broadcast_to(jnp.arange(tokens) >= first, (len(error), tokens))
    if kept is not None:
        counts = counts & (seen_at(tokens, kept, call["class_token"]) < 0)
    share = counts / counts.sum(-1, keepdims=True)
    return jnp.sum(error * way.own_tokens(share, 1)) / way.token_copies
