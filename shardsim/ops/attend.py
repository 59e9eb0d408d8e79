"""Softmax attention: its scores in HBM, or in a fused kernel that never holds all of them.

On TPU the kernel is JAX's splash attention, elsewhere a loop over blocks of keys. Both keep for
their backward pass the output and one logarithm a query, named "context" for the remat policy, and
compute the probabilities again from them (arXiv 2205.14135; 2307.08691, section 3.1). So memory
grows with the sequence, not with its square.

Shapes: q [batch, queries, heads, head_dim]; k and v [batch, keys, kv_heads, head_dim], each
key-value head serving heads / kv_heads queries in turn; positions [queries] of the queries among
the keys, where a query must not see later keys, or None where it sees all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Apart, Array, Dims, Kernel, Matmul, Op, Stream, einsum
from shardsim.graph.build import Builder, vector, width_of
from shardsim.ops.attend_blocks import same_sequence, seen
from shardsim.ops.attend_kernels import written_attention
from shardsim.ops.attend_mask import BLOCKS, Mask
from shardsim.ops.lazy import jnp
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

HEADS: Dims = ("kv", "group", "head_dim")
KV: Dims = ("kv", "head_dim")
# The same of layers without a window, where those have others.
GLOBAL_HEADS: Dims = ("global_kv", "global_group", "global_head_dim")
GLOBAL_KV: Dims = ("global_kv", "global_head_dim")

# Softmax: mask, maximum, difference, exponential (about eight multiply-adds), sum, cast. Its
# gradient: the exponential again, a product and a difference. With the scores in HBM it reads them
# for the maximum and again for the exponential and its sum, and writes the probabilities; backward
# reads probabilities and their gradient twice and writes once.
SOFTMAX = Stream(passes=3.0, ops=13.0, gradient_passes=5.0, gradient_ops=14.0)
# Apart from matmuls, scores of float32 (two passes of bf16) are written and read three times, for
# maximum, sum and probabilities; the gradient reads them too and has a float32 result that two
# products read. A mask is an array of its own, read with another of float32, and keeps the gradient
# from being one kernel: it is made twice, and its sum reads it.
APART = Apart(passes=8.0, gradient_passes=7.0)
APART_MASKED = Apart(passes=10.5, gradient_passes=14.0)


FUSED_GRADIENT = 5  # products of the gradient in one kernel


@dataclass(frozen=True)
class Fused:
    """A fused kernel: how many times the operations of a plain softmax it takes, whether they run
    beside its products or in turn with them, its blocks, and whether gradients of keys and values
    and of queries are two kernels, each of which makes the scores again and their gradient."""

    operations: float
    beside: bool
    blocks: tuple[int, int] = BLOCKS
    two: bool = False


# "flash" is today's kernel (splash attention). "flash-2023" is the first one
# (`pallas.ops.tpu.flash_attention`, blocks of 512): fitted to MaxText's runs of that year on v5e,
# whose matmuls reach the same share of the peak, attention being 8 % of the products or 4 %, with 6
# times the operations, and no more than a large matmul on its own (0.933) with 5. "flash-2048" is
# today's with the blocks that MaxText's recipes for v6e and tpu7x ask for, "flash-two-kernels" what
# it does where nobody asks for a fused gradient (`use_fused_bwd_kernel`).
KERNELS = {
    "flash": Fused(operations=1.0, beside=True),
    "flash-2048": Fused(operations=1.0, beside=True, blocks=(1024, 2048)),
    "flash-two-kernels": Fused(operations=1.0, beside=True, two=True),
    "flash-2023": Fused(operations=5.0, beside=False),
}


SINKS = vector("sinks", "kv", "group")


def attend(
    build: Builder, q: Array, k: Array, v: Array, *, mask: Mask, kernel: str, sinks: bool = False
) -> Array:
    """Add attention of queries to keys and values of the whole sequence.

    `kernel` is one of `KERNELS`, or "unfused". `sinks`: each head has a learned logit that its
    softmax counts and no value goes with.
    """
    context = Array("context", q.dims, keep="context", purpose="second axis", lies="attended")
    attention_ops(build, q, k, v, context, mask=mask, kernel=kernel, sinks=sinks)
    fused = kernel in KERNELS
    more = {"mask": mask.to_data(), **width_of(q)}
    learned = [SINKS] if sinks else []
    build.call("attend", [q, k, v], context, weights=learned, named=fused, fused=fused, **more)
    return context


def attention_ops(
    build: Builder,
    q: Array,
    k: Array,
    v: Array,
    context: Array,
    *,
    mask: Mask,
    kernel: str,
    sinks: bool,
    widths: Dims = (),
    of: tuple[str, str] = ("seq", "keys"),
    bias: Array | None = None,
) -> None:
    """Add the ops of `attend`, which make `context`; for `widths` see `Kernel`.

    `of` is the dimension of keys that are attended to, and its name where all of them are there. A
    `bias` of scores is added to them in HBM, or read by the kernel.
    """
    if of[1] not in k.dims:
        k, v = (x.view(**dict([of])) for x in (k, v))
    logits = (SINKS,) if sinks else ()
    if kernel in KERNELS:
        rows = of[0] if of[0] in q.dims else "seq"
        one = _kernel(q, k, v, context, mask, KERNELS[kernel], widths, (rows, of[1]))
        if bias:
            one = replace(one, ins=(*one.ins, bias), needs=(*one.needs, bias))
        build.add(replace(one, vectors=logits))
    else:
        pairs = (*q.dims[:-3], of[1], *q.dims[-3:-1])
        lies = context.lies if mask.along else ""
        product = einsum(q, k, Array("scores", pairs, lies=lies), unit="attention")
        scores = build.add(replace(product, mask=mask))
        chances = Array("probabilities", pairs, lies=lies)
        softmax = replace(SOFTMAX, apart=APART_MASKED if mask.causal else APART)
        read = (scores, bias) if bias else (scores,)
        build.add(Op(read, chances, (chances,), logits, unit="attention", stream=softmax))
        build.add(replace(einsum(chances, v, context, unit="attention"), mask=mask))


def _kernel(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    mask: Mask,
    fused: Fused,
    widths: Dims,
    of: tuple[str, str],
) -> Op:
    """Return a fused attention kernel, `of` queries and keys along these dimensions."""
    batch = tuple(d for d in q.dims[:-1] if d != of[0])
    kernel = Kernel(
        shape=Matmul(rows=of[:1], inner=q.dims[-1:], columns=of[1:], batch=batch),
        products=2,
        gradient_products=FUSED_GRADIENT + 2 * fused.two,  # the scores again, and dV, dP, dQ, dK
        ops=SOFTMAX.ops * fused.operations,
        gradient_ops=SOFTMAX.gradient_ops * fused.operations * (1 + fused.two),
        mask=mask,
        beside=fused.beside,
        widths=widths,
    )
    return Op((q, k, v), out, (q, k, v, out), unit="attention", kernel=kernel)


@runs("attend")
def run_attend(way: Whole, params: Params, call: Any, q: Any, k: Any, v: Any) -> Any:
    """Return the weighted values [batch, tokens, heads, head_dim], before their projection."""
    q, k, v = (way.by_head(x, call) for x in (q, k, v))
    k, v = way.all_keys(k), way.all_keys(v)
    positions, sinks = None, None
    mask = call["mask"]
    if call["weights"]:
        sinks = params[call["weights"][0]].astype(jnp.float32)
    if mask["causal"]:
        positions = way.query_tokens(jnp.arange(way.plan["sequence"]), 0)
    if call["fused"]:
        return way.flash(q, k, v, mask, positions, sinks)
    pairs = None if positions is None else seen(mask, positions, way.key_tokens(k))
    if way.segments is not None:
        alike = same_sequence(way.segments, way.segments)
        pairs = alike if pairs is None else alike & pairs
    return written_attention(q, k, v, pairs, sinks)
