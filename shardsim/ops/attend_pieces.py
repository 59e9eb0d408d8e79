"""Attention of queries to some of their keys in JAX's splash attention kernel, as a ring runs it.

Forward the kernel says beside its result the logarithm of each row's sum, so that results of pieces
can be merged. Backward it makes probabilities from the logarithms of whole rows, so that what
pieces give adds up. Of a striped order queries are an early and a late half all along, each with
sums of its own.

Shapes: queries as in `attend_blocks._group`, keys and values as in `attend_round`; what the kernel
makes is [batch, heads, positions, head_dim].
"""

from __future__ import annotations

from functools import partial
from typing import Any

from shardsim.ops.attend_kernels import KERNEL_MULTIPLE, sizes_of_blocks
from shardsim.ops.lazy import jax, jnp

UNSEEN = 1e30  # the logarithm of a row's sum beside which every pair is nothing


def fits_pieces(mask: Any, tokens: int, platform: str, halved: bool) -> bool:
    """Return whether members of a ring, of so many tokens each, attend in the kernel: on TPU, to
    whole tiles, without a window."""
    part = tokens // (2 if halved else 1)
    return platform == "tpu" and not mask["window"] and part % KERNEL_MULTIPLE == 0


def add_piece(mask: Any, sums: Any, split: Any, here: Any, later: Any, halved: bool) -> Any:
    """Add what keys and values (`here`) give to the running (logarithm, norm, sums) of queries, or
    of both of their halves; the first are those of the queries' own tokens.

    `later`: whether they are of a member whose number is larger.
    """
    if not sums:
        logs, out = _piece_attended(mask, split, here, own=True)
        first = logs, jnp.ones_like(logs), out.astype(jnp.float32)
        return tuple(zip(*(jnp.split(x, 2, 2) for x in first), strict=True)) if halved else (first,)
    if not halved:
        made = _piece_attended(mask, split, here, own=False)
        return (_with_piece(sums[0], *made, jnp.logical_not(later) if mask["causal"] else True),)
    (early, late), (first, last) = sums, jnp.split(split, 2, 1)
    start, rest = _halves_of_keys(here)
    one = _piece_attended(mask, jnp.where(later, last, first), start, own=False)
    other = _piece_attended(mask, last, _chosen_half(later, rest, start), own=False)
    early = _with_piece(early, *one, jnp.logical_not(later))
    return early, _with_piece(_with_piece(late, *one, later), *other, True)


def merged_pieces(sums: Any, split: Any) -> tuple[Any, Any]:
    """Return the result of attention [batch, queries, heads, head_dim], in float32, and logarithms
    [batch, kv_heads, heads of each, queries]."""
    logs, norm, total = (jnp.concatenate(parts, 2) for parts in zip(*sums, strict=True))
    out = (total / norm[..., None]).swapaxes(1, 2)[..., : split.shape[-1]]
    shape = *split.shape[:1], *split.shape[2:4], split.shape[1]
    return out, (logs + jnp.log(norm)).reshape(shape)


def add_gradients(mask: Any, sums: Any, rows: Any, here: Any, later: Any, halved: bool) -> Any:
    """Return the float32 gradients of queries, or of both of their halves, with what `here` gives
    added, and the gradients of those keys and values.

    `rows` are queries and the gradient of their result, and as [batch, heads, queries] logarithms
    of whole rows and sums of result times gradient.
    """
    if not sums:
        dq, *made = _piece_gradients(mask, rows, here, own=True)
        return tuple(jnp.split(dq, 2, 2)) if halved else (dq,), made
    if not halved:
        *of_queries, logs, shares = rows
        if mask["causal"]:
            logs = jnp.where(later, UNSEEN, logs)
        dq, *made = _piece_gradients(mask, (*of_queries, logs, shares), here, own=False)
        return (sums[0] + dq,), made
    halves = (jnp.split(x, 2, dim) for x, dim in zip(rows, (1, 1, 2, 2), strict=True))
    early, late = zip(*halves, strict=True)
    start, rest = _halves_of_keys(here)
    one, *first = _piece_gradients(mask, _chosen_half(later, late, early), start, own=False)
    other, *last = _piece_gradients(mask, late, _chosen_half(later, rest, start), own=False)
    dq = sums[0] + jnp.where(later, 0, one), sums[1] + jnp.where(later, one, 0) + other
    pairs = (
        (x + jnp.where(later, 0, y), jnp.where(later, y, 0))
        for x, y in zip(first, last, strict=True)
    )
    return dq, [jnp.concatenate(pair, 1) for pair in pairs]


def rows_of_pieces(split: Any, d_out: Any, logs: Any, shares: Any) -> Any:
    """Return what `add_gradients` reads of queries."""
    return split, d_out, *(x.reshape(len(x), -1, x.shape[-1]) for x in (logs, shares))


def gradient_of_queries(sums: Any, split: Any) -> Any:
    """Return the gradient of queries [batch, queries, heads, head_dim] from its parts."""
    return jnp.concatenate(sums, 2).swapaxes(1, 2)[..., : split.shape[-1]]


def _with_piece(sums: Any, logs: Any, out: Any, seen: Any) -> Any:
    """Add the result of some keys alone, where they are seen."""
    top, norm, total = sums
    if seen is not True:
        logs = jnp.where(seen, logs, jnp.finfo(jnp.float32).min)
    new = jnp.maximum(top, logs)
    shrink, part = jnp.exp(top - new), jnp.exp(logs - new)
    return new, norm * shrink + part, total * shrink[..., None] + out * part[..., None]


def _halves_of_keys(here: Any) -> Any:
    """Return the early and the late half of keys and values."""
    return tuple(zip(*(jnp.split(x, 2, 1) for x in here), strict=True))


def _chosen_half(later: Any, one: Any, other: Any) -> Any:
    return jax.tree.map(partial(jnp.where, later), one, other)


def _piece_attended(mask: Any, split: Any, here: Any, own: bool) -> tuple[Any, Any]:
    """Return logarithms and results of queries, by the keys of the same tokens (`own`), or by keys
    that all see."""
    kernel = _piece_kernel(mask, split, here[0], own)
    out, (logs,) = jax.vmap(kernel)(
        _queries_in_tiles(split, split.shape[-1] ** -0.5), *map(_in_whole_tiles, here)
    )
    return logs, out


def _piece_gradients(mask: Any, rows: Any, here: Any, own: bool) -> Any:
    """Return what some keys give to the gradient of queries, and the gradients of those keys and
    their values."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    split, d_out, logs, shares = rows
    kernel, scale = _piece_kernel(mask, split, here[0], own), split.shape[-1] ** -0.5
    sizes, known = kernel.kwargs["block_sizes"], ("is_mqa", "mask_value", "mask_function")
    more = {name: kernel.kwargs[name] for name in (*known, "attn_logits_soft_cap", "interpret")}
    more |= {name: getattr(sizes, name) for name in ("q_layout", "k_layout", "v_layout")}

    def one(q: Any, k: Any, v: Any, logs: Any, d: Any, shares: Any) -> Any:
        given = q, k, v, None, None, logs, d, shares
        dq, dk, dv = splash._splash_attention_bwd_dkv(
            *given,
            bq=sizes.block_q_dkv,
            bkv=sizes.block_kv_dkv,
            bkv_compute=sizes.block_kv_dkv_compute,
            mask_info=kernel.dkv_mask_info,
            use_fused_bwd_kernel=sizes.use_fused_bwd_kernel,
            **more,
        )
        if dq is None:
            dq = splash._splash_attention_bwd_dq(
                *given,
                bq=sizes.block_q_dq,
                bkv=sizes.block_kv_dq,
                mask_info=kernel.dq_mask_info,
                **more,
            )
        return dq, dk, dv

    made = (
        _queries_in_tiles(split, scale),
        *map(_in_whole_tiles, here),
        logs,
        _queries_in_tiles(d_out),
        shares,
    )
    dq, dk, dv = jax.vmap(one)(*made)
    dk, dv = (x.swapaxes(1, 2)[..., : split.shape[-1]] for x in (dk, dv))
    return dq.astype(jnp.float32) * scale, dk, dv


def _piece_kernel(mask: Any, split: Any, keys: Any, own: bool) -> Any:
    """Return the kernel of queries and some keys."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, heads = (split.shape[1], keys.shape[1]), split.shape[2] * split.shape[3]
    form: Any = splash.CausalMask if own and mask["causal"] else splash.FullMask
    return splash.make_splash_mha(
        splash.MultiHeadMask([form(shape) for _ in range(heads)]),
        block_sizes=splash.BlockSizes(**sizes_of_blocks(mask, shape[0], alone=True)),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
    )


def _queries_in_tiles(split: Any, scale: float = 1.0) -> Any:
    """Return what is of queries as [batch, heads, queries, head_dim] in whole tiles."""
    x = (split.astype(jnp.float32) * scale).astype(split.dtype) if scale != 1.0 else split
    return _in_whole_tiles(x.reshape(*x.shape[:2], -1, x.shape[-1]))


def _in_whole_tiles(x: Any) -> Any:
    """Return what is of keys as [batch, heads, keys, head_dim] in whole tiles."""
    missing = ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % KERNEL_MULTIPLE))
    return jnp.pad(x, missing).swapaxes(1, 2)
