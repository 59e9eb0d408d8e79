"""How a program computes attention: scores in HBM, JAX's kernel on TPU, cuDNN's on GPU.

Shapes as in `shardsim/ops/attend.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from shardsim.graph.arrays import Number
from shardsim.ops.attend_blocks import (
    NO_SEGMENT,
    blockwise_attention,
    place_of,
    seen_of,
)
from shardsim.ops.attend_mask import BLOCKS
from shardsim.ops.lazy import checkpoint_name, jax, jnp, lax

BLOCKS_OF_MASK = ("data_next", "mask_next", "block_mask")  # the kernel's: [heads, queries, keys]
BLOCKS_OF = (
    ("block_q", "block_kv"),
    ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"),
)
KERNEL_MULTIPLE = 128  # of the kernel's sequence and head_dim
SIZES = (2048, 1024, 512, 256, 128)  # of its blocks
CUDNN_MULTIPLE = 8  # of cuDNN's sequence


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
    blocks = sizes_of_blocks(mask, length, rows, alone=parts == 1)
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


def sizes_of_blocks(mask: Any, length: int, rows: int = 1, *, alone: bool) -> dict[str, Any]:
    """Return the sizes of the kernel's blocks of queries of such a length, in so many parts;
    `alone`: there are as many keys."""
    blocks: dict[str, Any] = {}
    largest = mask.get("blocks", BLOCKS)
    for names, most in zip(BLOCKS_OF, largest, strict=True):
        size = next(size for size in SIZES if size <= most and length // rows % size == 0)
        blocks |= dict.fromkeys(names, size)
    if alone and one_block(length, largest[1]):
        blocks = {name: size for name, size in blocks.items() if not name.endswith("_dq")}
        blocks["use_fused_bwd_kernel"] = True
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
