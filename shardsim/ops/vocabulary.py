"""Logits over a vocabulary and their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Apart, Array, Stream, einsum, linear, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.lazy import jax, jnp, lax
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

LOSS_STATISTICS = "loss statistics"  # the purpose of summing over logits
# The maximum of logits is found in the end of their product, and their gradient made where products
# read it: the loss reads float32 logits once, for the sum of exponentials. Apart it reads them
# twice, and backward again, and writes their gradient in the compute format: 14 bytes an element.
LOSS = Stream(passes=1.0, ops=2.0, apart=Apart(passes=2.0, gradient_passes=1.5))
LOSS_APART_OPS = 15.0  # of each of the two


def token_loss(
    build: Builder, final: Array, *, tied: bool, bias: bool = False, images: int = 0
) -> None:
    """Add logits, with a `bias` of each word or without, and loss: the maximum of each row, the
    sum of its exponentials beside the target's logit. Tokens of `images` in front have no target.
    """
    name = "token_embedding" if tied else "output_head"
    dims = ("vocab", "embed") if tied else ("embed", "vocab")
    table = weight(name, *dims, kind="table" if tied else "matrix", purpose="tables")
    logits = Array("logits", (*TOKENS, "vocab"), wide=True, purpose="vocabulary")
    vectors = [vector(f"{name}_bias", "vocab")] if bias else []
    build.add(einsum(final, table, logits, *vectors))
    build.add(linear([logits], Array("maximum", TOKENS, wide=True, purpose=LOSS_STATISTICS)))
    loss = Array("loss", (*TOKENS, "two"), keep="", wide=True, purpose=LOSS_STATISTICS)
    build.add(pointwise([logits], loss, stream=LOSS))
    head, targets = Array("head", ("embed", "vocab")), Array("targets", TOKENS)
    named: dict[str, Any] = {"bias": f"{name}_bias"} if bias else {}
    named |= {"images": images} if images else {}
    build.call("token_loss", [final, head, targets], loss, **named)


@runs("token_loss")
def run_token_loss(way: Whole, params: Params, call: Any, x: Any, head: Any, targets: Any) -> Any:
    """Return the summed cross-entropy of the next tokens; the vocabulary may be split."""
    logits = way.logits(x, head)
    if "bias" in call:
        logits = logits + params[call["bias"]].astype(jnp.float32)
    columns = jnp.arange(logits.shape[-1]) + way.vocab_start(logits.shape[-1])
    logits = jnp.where(columns < way.model["vocab"], logits, -1e30)  # padding
    with jax.named_scope("loss_statistics"):
        top = way.vocab_max(lax.stop_gradient(logits).max(-1))
        is_target = columns == way.query_tokens(targets, 1)[..., None]
        right = jnp.sum(jnp.where(is_target, logits - top[..., None], 0), -1)
        sums = way.vocab_sum(jnp.stack([jnp.exp(logits - top[..., None]).sum(-1), right]))
    losses = jnp.log(sums[0]) - sums[1]
    if way.counts is not None:
        losses = losses * way.query_tokens(way.counts, 1)
    if "images" in call:
        here = way.query_tokens(jnp.arange(way.plan["sequence"]), 0)
        losses = jnp.where(here >= call["images"], losses, 0)
    return jnp.sum(losses) / way.copies
