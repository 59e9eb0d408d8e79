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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from shardsim.graph.arrays import Apart, Array, Dims, Kernel, Matmul, Number, Op, Stream, einsum
from shardsim.graph.build import Builder, vector, width_of
from shardsim.ops.attend_blocks import (
    NO_SEGMENT,
    blockwise_attention,
    place_of,
    same_sequence,
    seen,
    seen_of,
)
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax
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


# A fused kernel skips the blocks of so many queries and keys that a mask leaves empty, forward and
# back; others are whole.
BLOCKS = (512, 512)
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


@dataclass(frozen=True)
class Mask:
    """Which query-key pairs count: all, or of each query the keys up to itself.

    Of those only the last `window` where it is not 0 (arXiv 2004.05150); or, `chunked`, those of
    the same chunk of so many tokens (Llama 4). Of a video's tokens those `along` "space", in the
    same frame, or "time", at the same location, where it is not "". Of all keys so many may be
    `chosen`: those count, and kernels compute all. These have `blocks` of so many queries and keys,
    forward and back.
    """

    causal: bool
    window: int = 0
    along: str = ""
    chosen: int = 0
    blocks: tuple[int, int] = BLOCKS
    chunked: bool = False

    def back(self) -> Mask:
        """Return the mask of the gradient's kernel."""
        return replace(self, blocks=self.blocks[::-1])

    @property
    def local(self) -> bool:
        """Whether every device has all keys that its queries see: a frame is never split."""
        return self.along == "space"

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        along = {"along": self.along} if self.along else {}
        blocks = {"blocks": self.blocks} if self.blocks != BLOCKS else {}
        chunked = {"chunked": True} if self.chunked else {}
        return {"causal": self.causal, "window": self.window, **along, **blocks, **chunked}

    def computed(self, tokens: int, last: Number | None = None) -> Number:
        """Return the share of the pairs that a fused kernel computes, in whole blocks: of all
        queries, or of the `last` so many, which see most."""
        if not self.causal or tokens <= self.blocks[0]:
            return 1.0
        last = tokens if last is None else last
        pairs = self._in_blocks(tokens) - self._in_blocks(tokens - last)
        return np.minimum(pairs / (tokens * last), 1.0)

    def _in_blocks(self, queries: Number) -> Number:
        """Return the pairs that a kernel computes for the first so many queries."""
        size = self.blocks[0]
        blocks, rest = queries // size, queries % size
        last = self._of_blocks(blocks + 1) - self._of_blocks(blocks)
        return (self._of_blocks(blocks) * size + last * rest) * size

    def _of_blocks(self, blocks: Number) -> Number:
        """Return the blocks of keys that a kernel computes for the first so many of queries: of
        each its own and those before, as far as a window goes, or back to where a chunk begins."""
        if self.chunked:
            rows = np.arange(int(np.max(blocks)))
            first = rows * self.blocks[0] // self.window * self.window // self.blocks[0]
            sums = np.concatenate([[0], np.cumsum(rows - first + 1)])
            return sums[np.asarray(blocks, dtype=int)]
        seen = 1 + -(-(self.window - 1) // self.blocks[0]) if self.window else np.inf
        full = np.minimum(blocks, seen)
        return full * (full + 1) / 2.0 + (blocks - full) * full

    def packed(self, tokens: int, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the share of the pairs of each row of `tokens` that a kernel computes which skips
        blocks of no common sequence; `rows` list the tokens of the sequences of each.

        >>> Mask(causal=False).packed(2048, [[1024, 1024], [512, 512, 1000]])
        [0.5, 0.375]
        """
        size = self.blocks[0]
        if tokens <= size:
            return [1.0] * len(rows)
        shares = []
        for row in rows:
            ends = np.cumsum(row)
            first, last = (ends - row) // size, (ends - 1) // size
            blocks = last - first + 1
            done = self._of_blocks(blocks) if self.causal else blocks**2
            both = np.sum(first[1:] == last[:-1])  # where two sequences meet inside a block
            shares.append(float(done.sum() - both) / (tokens / size) ** 2)
        return shares

    def alone(self, lengths: Sequence[int]) -> list[float]:
        """Return the pairs that a kernel computes of each sequence by itself."""
        return [float(self.computed(one)) * one**2 for one in lengths]

    def own(self, queries: Number, striped: Number) -> Number:
        """Return the share of the pairs of so many queries with the keys of the same tokens that a
        kernel computes: of tokens in a row, or `striped`, of two parts that lie apart."""
        if not self.causal:
            return 1.0
        alone, half = (self._in_blocks(q) / q**2 for q in (queries, queries / 2.0))
        # Two halves, each alone, and all of the later one's pairs with the earlier.
        apart = (2.0 * np.minimum(half, 1.0) + (not self.window)) / 4.0
        return np.where(striped, apart, np.minimum(alone, 1.0))

    def counted(self, tokens: int, halved: bool) -> int:
        """Return the pairs that model FLOPs count: all, or `halved` what a causal mask keeps.

        In full a window counts as so many keys of every query; `halved`, what lies in it: w of T
        tokens keep T w - w^2 / 2 pairs (MaxText, `calculate_mixed_attention_model_tflops`). Chunks
        count as sequences of their own.
        """
        if self.chunked:
            chunks, rest = divmod(tokens, self.window)
            return (chunks * self.window**2 + rest**2) // (1 + halved)
        window = min(self.window or self.chosen or tokens, tokens)
        return window * (2 * tokens - window) // 2 if halved else tokens * window


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


def written_attention(q: Any, k: Any, v: Any, pairs: Any, sinks: Any = None) -> Any:
    """Return attention whose scores are in HBM.

    Values and result are written once: fused into operands, of the second product and of the
    projection, they would be computed again for every tile.
    """
    v = lax.optimization_barrier(v)
    context = softmax_attention(q, k, v, pairs, lambda x: checkpoint_name(x, "rest"), sinks)
    return lax.optimization_barrier(context)


def softmax_attention(q: Any, k: Any, v: Any, mask: Any, name: Any, sinks: Any = None) -> Any:
    """Return softmax(q k^T / sqrt(head_dim)) v, computed in float32.

    q [batch, queries, heads, head_dim]; k and v [batch, keys, kv_heads, head_dim], each
    key-value head serving heads / kv_heads queries in turn; mask [queries, keys]. `name` marks
    the probabilities for the remat policy. `sinks` [heads] are logits that no value goes with.
    """
    batch, queries, heads, depth = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], depth)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * depth**-0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        probabilities = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.reshape(*grouped.shape[2:4], 1, 1)
        top = lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
        weights = jnp.exp(scores - top)
        probabilities = weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - top))
    probabilities = name(probabilities.astype(q.dtype))
    return jnp.einsum("bhgqk,bkhd->bqhgd", probabilities, v).reshape(q.shape)


BLOCKS_OF_MASK = ("data_next", "mask_next", "block_mask")  # the kernel's: [heads, queries, keys]
BLOCKS_OF = (
    ("block_q", "block_kv"),
    ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"),
)
KERNEL_MULTIPLE = 128  # of the kernel's sequence and head_dim
SIZES = (2048, 1024, 512, 256, 128)  # of its blocks
CUDNN_MULTIPLE = 8  # of cuDNN's sequence


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    positions: Any,
    platform: str,
    segments: Any = None,
    sinks: Any = None,
) -> Any:
    """Return softmax(q k^T / sqrt(head_dim)) v, [batch, queries, heads, head_dim].

    Of all tokens, `segments` [batch, tokens] are numbers of sequences that see only themselves;
    `sinks` [heads] are logits that the softmax counts and no value goes with.
    On TPU in the kernel; but queries that are no whole tiles by blocks of keys, few keys apart.
    """
    queries, keys = q.shape[1], k.shape[1]
    if platform == "tpu" and is_short(keys) and positions is None and segments is None:
        return checkpoint_name(written_attention(q, k, v, None, sinks), "context")
    tiles = queries // _rows_in_order(mask) % KERNEL_MULTIPLE == 0
    whole = queries == keys or (tiles and keys % queries == 0)
    if platform == "tpu" and whole:
        return kernel_attention(q, k, v, mask, positions, segments, sinks)
    if platform == "gpu" and queries == keys and q.dtype == jnp.bfloat16 and sinks is None:
        return cudnn_attention(q, k, v, mask)
    return blockwise_attention(q, k, v, mask, positions, segments, sinks)


def _rows_in_order(mask: Any) -> int:
    """Return in how many parts, each in order, the queries of a device are."""
    return 2 if mask.get("stripes") else 1


def is_short(keys: int) -> bool:
    """Return whether keys are so few that the kernel would pad them to twice as many or more."""
    return 2 * keys <= KERNEL_MULTIPLE


def one_block(tokens: Number, most: Number) -> Number:
    """Return whether the kernel takes all tokens at once, in a block of no more than `most`: then
    its gradient is one kernel too, and makes no sums of queries' gradients over blocks of keys."""
    length = np.ceil(tokens / KERNEL_MULTIPLE) * KERNEL_MULTIPLE
    return np.isin(length, SIZES) & np.less_equal(length, most)


def kernel_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    positions: Any,
    numbers: Any = None,
    sinks: Any = None,
    pairs: Any = None,
) -> Any:
    """Return attention by JAX's splash attention kernel; tokens and head_dim are padded for it.

    Queries are all of a sequence, or one of so many equal parts of it, or the two of a member of a
    striped order; `positions` says which. `pairs` [batch, queries, keys] are those that count in
    each sequence, for all heads alike; without them the mask says it.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as splash_masks,
    )

    tokens, heads, depth = q.shape[1:]
    parts, rows = k.shape[1] // tokens, _rows_in_order(mask)
    more = -tokens % KERNEL_MULTIPLE
    missing = ((0, 0), (0, more), (0, 0), (0, -depth % KERNEL_MULTIPLE))
    q = (q.astype(jnp.float32) * depth**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, missing).swapaxes(1, 2) for x in (q, k, v))
    length = tokens + more
    blocks = _kernel_blocks(mask, length // rows)
    if parts == 1 and one_block(tokens, mask.get("blocks", BLOCKS)[1]):
        blocks = {name: size for name, size in blocks.items() if not name.endswith("_dq")}
        blocks["use_fused_bwd_kernel"] = True
    form: Any = splash.CausalMask if mask["causal"] else splash.FullMask
    if mask.get("chunked"):
        form = partial(splash_masks.ChunkedCausalMask, chunk_size=mask["window"])
    elif mask["window"]:
        form = partial(splash.LocalMask, window_size=(mask["window"] - 1, 0), offset=0)
    if mask.get("stripes"):
        form = partial(_striped_mask, mask)
    cut = parts if mask["causal"] else 1  # without a mask all parts are alike
    make = partial(
        splash.make_splash_mha,
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=cut,
        residual_checkpoint_name="context",
    )
    if pairs is not None:  # what pads queries sees all, so that no row is empty
        pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, more)))
        pairs = jnp.pad(pairs, ((0, 0), (0, more), (0, 0)), constant_values=True)
        out = jax.vmap(partial(_attend_pairs, make))(pairs, q, k, v)
        return out.swapaxes(1, 2)[:, :tokens, :, :depth]
    kernel = make(
        splash.MultiHeadMask([form((cut * length, parts * length)) for _ in range(heads)])
    )
    if cut > 1:
        kernel = _part_of_kernel(kernel, cut, positions[0] // (tokens // rows))
    segments = None
    if more and not mask["causal"]:  # tokens see tokens, padding sees padding
        padding = (jnp.arange(length) >= tokens).astype(jnp.int32)
        segments = splash.SegmentIds(q=padding, kv=padding)
    each = None
    if numbers is not None:
        numbers = jnp.pad(numbers, ((0, 0), (0, more)), constant_values=NO_SEGMENT)
        segments, each = splash.SegmentIds(q=numbers, kv=numbers), 0
    run = kernel if sinks is None else partial(kernel, sinks=sinks)
    out = jax.vmap(run, in_axes=(0, 0, 0, each))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :tokens, :, :depth]


def _kernel_blocks(mask: Any, length: int) -> dict[str, Any]:
    """Return the sizes of the kernel's blocks for so many tokens in order."""
    blocks: dict[str, Any] = {}
    for names, most in zip(BLOCKS_OF, mask.get("blocks", BLOCKS), strict=True):
        size = next(size for size in SIZES if size <= most and length % size == 0)
        blocks |= dict.fromkeys(names, size)
    return blocks


def _attend_pairs(make: Any, pairs: Any, q: Any, k: Any, v: Any) -> Any:
    """Return attention by a splash attention kernel whose mask is `pairs`, of one sequence."""
    kernel = make(pairs[None])
    # JAX makes an array of this flag too, and then asks whether it is true.
    info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    kernel = type(kernel)(info, kernel.dq_mask_info, kernel.dkv_mask_info, **kernel.kwargs)
    return kernel(q, k, v)


def _striped_mask(mask: Any, shape: tuple[int, int]) -> Any:
    """Return the mask [queries, keys] of splash attention for tokens in stripes (`place_of`); the
    kernel computes it where a block is cut."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    kind = mask["window"], mask["stripes"], shape

    class Striped(masks._ComputableMask):
        def __init__(self) -> None:
            super().__init__(shape, lambda q, k: seen_of(mask, q, place_of(mask, k, shape[1])))
            self.q_sequence = place_of(mask, self.q_sequence, shape[0])
            self.kind = kind

        def __eq__(self, other: object) -> bool:
            return getattr(other, "kind", None) == kind

        def __hash__(self) -> int:
            return hash(kind)

    return Striped()


def _part_of_kernel(kernel: Any, parts: int, number: Any) -> Any:
    """Return a splash attention kernel for one part of the queries: with its rows of the mask."""

    def rows(x: Any, dim: int) -> Any:
        if x is None:
            return None
        length = x.shape[dim] // parts
        return lax.dynamic_slice_in_dim(x, number * length, length, dim)

    def part(info: Any) -> Any:
        if info is None:
            return None
        blocks = {name: rows(getattr(info, name), 1) for name in BLOCKS_OF_MASK}
        return info._replace(q_sequence=rows(info.q_sequence, 0), **blocks)

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*map(part, infos), **kernel.kwargs)


def cudnn_attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Return attention by cuDNN's kernel, which takes bf16 and even lengths; others are padded."""
    tokens = q.shape[1]
    more = -tokens % CUDNN_MULTIPLE
    lengths = None
    if more:
        missing = ((0, 0), (0, more), (0, 0), (0, 0))
        q, k, v = (jnp.pad(x, missing) for x in (q, k, v))
        lengths = jnp.full(q.shape[:1], tokens, jnp.int32)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=mask["causal"],
        local_window_size=(mask["window"] - 1, 0) if mask["window"] else None,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return checkpoint_name(out, "context")[:, :tokens]
