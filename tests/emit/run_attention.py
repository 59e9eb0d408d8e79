"""Runs attention and matrix gathers beside plain ones on host devices; prints JSON of errors.

Started by test_attention.py with eight host devices.
"""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType, Mesh, PartitionSpec

from shardsim.emit.runtime.collectives import gather_matrix, member, member_before, next_member
from shardsim.emit.runtime.config import Group
from shardsim.ops import attend_blocks, index
from shardsim.ops import attend_kernels as attention
from shardsim.ops.attend_kernels import softmax_attention
from shardsim.ops.attend_pieces import fits_pieces
from shardsim.ops.attend_round import Round, round_attention
from shardsim.ops.latent import attend_chosen
from shardsim.ops.whole import Whole

BATCH, HEADS = 2, 4
# (way, keys, queries, key-value heads, head_dim, causal, window, whether heads have sinks, of how
# many members the keys are in stripes)
ATTENTION: list[tuple[Any, ...]] = [
    ("blocks", 16, 16, 4, 8, False, 0),
    ("blocks", 50, 50, 2, 8, False, 0),
    ("blocks", 50, 50, 1, 8, True, 0),
    ("blocks", 64, 24, 4, 8, True, 0),
    ("blocks", 50, 50, 2, 8, True, 20),  # no whole blocks
    ("blocks", 64, 24, 4, 8, True, 2),
    ("kernel", 128, 128, 4, 128, False, 0),
    ("kernel", 130, 130, 2, 72, False, 0),
    ("kernel", 130, 130, 1, 72, True, 0),
    ("kernel", 384, 384, 4, 128, True, 130),  # blocks of keys that no query sees
    ("kernel", 130, 130, 2, 72, True, 7),
    ("blocks", 50, 50, 2, 8, True, 20, False, 0, True),  # in chunks
    ("kernel", 384, 384, 4, 128, True, 130, False, 0, True),
    ("kernel", 256, 128, 4, 128, False, 0),  # a part of the queries, as where the sequence is split
    ("kernel", 384, 128, 2, 128, True, 0),
    ("kernel", 384, 128, 2, 128, True, 130),
    ("kernel", 200, 100, 2, 128, True, 0),  # no whole tiles: by blocks of keys
    ("blocks", 24, 24, 2, 8, True, 7, True),  # with sinks
    ("kernel", 130, 130, 2, 72, True, 7, True),
    ("blocks", 60, 20, 2, 8, True, 0, False, 3),
    ("kernel", 512, 256, 2, 128, True, 0, False, 2),
    ("kernel", 768, 256, 2, 128, True, 130, False, 3),
]
# Keys pass round four members: (way, tokens of each, key-value heads, head_dim, causal, striped)
RINGS: list[tuple[Any, ...]] = [
    ("blocks", 24, 2, 8, True, True),
    ("kernel", 256, 2, 128, True, True),
    ("kernel", 128, 4, 72, True, False),
    ("kernel", 128, 1, 128, False, True),
]
MATRICES = [(shape, dim) for shape in ((48, 256), (256, 48), (24, 40)) for dim in (0, 1)]


def normal(seed: int, shape: tuple[int, ...]) -> Any:
    """Return an array of normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def error(found: Any, wanted: Any) -> float:
    """Return the largest relative error, in the Euclidean norm, of a tree of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    norm = np.linalg.norm
    return max(float(norm(np.ravel(a - b)) / norm(np.ravel(b))) for a, b in pairs)


def attend(
    way: str,
    keys: int,
    queries: int,
    kv: int,
    depth: int,
    causal: bool,
    window: int,
    sunk: bool = False,
    stripes: int = 0,
    chunked: bool = False,
) -> float:
    """Compare output and gradients of attention over the last `queries` of `keys` tokens, or in
    stripes over those of the member before the last."""
    shapes = (queries, HEADS), (keys, kv), (keys, kv), (queries, HEADS)
    q, k, v, d = (normal(i, (BATCH, *shape, depth)) for i, shape in enumerate(shapes))
    sinks = normal(9, (HEADS,)) if sunk else None
    here, places = np.arange(keys - queries, keys), np.arange(keys)
    if stripes:
        parts = places.reshape(2 * stripes, -1)
        pairs = [parts[[i, 2 * stripes - 1 - i]].ravel() for i in range(stripes)]
        here, places = pairs[-2], np.concatenate(pairs)
    positions = jnp.asarray(here) if causal else None
    mask = positions[:, None] >= places if causal else None
    if chunked:
        mask &= positions[:, None] // window == places // window
    elif window:
        mask &= positions[:, None] - places < window

    def ours(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        options = {"causal": causal, "window": window, "stripes": stripes}
        options |= {"chunked": chunked}
        platform = "tpu" if way == "kernel" else "cpu"
        return attention.flash_attention(q, k, v, options, positions, platform, None, sinks)

    def plain(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return softmax_attention(q, k, v, mask, lambda x: x, sinks)

    @jax.jit  # as one program: op by op takes ten times as long
    def both(*arrays: Any) -> Any:
        pairs = (jax.vjp(function, *arrays) for function in (ours, plain))
        return [(out, transpose(d)) for out, transpose in pairs]

    return error(*both(q, k, v, sinks))


def ring(way: str, here: int, kv: int, depth: int, causal: bool, striped: bool) -> float:
    """Compare output and gradients of attention to keys that pass round four members."""
    tokens, members = 4 * here, 4
    shapes = (tokens, HEADS), (tokens, kv), (tokens, kv), (tokens, HEADS)
    q, k, v, d = (normal(i, (BATCH, *shape, depth)) for i, shape in enumerate(shapes))
    parts = np.arange(tokens).reshape(2 * members, -1)
    pairs = [parts[[i, 2 * members - 1 - i]].ravel() for i in range(members)]
    order = np.concatenate(pairs) if striped else np.arange(tokens)
    options = {"causal": causal, "window": 0}
    mesh = Mesh(np.array(jax.devices()[:members]), ("context",), axis_types=(AxisType.Auto,))
    group = Group(("context",), members, tuple(range(members)))

    def places(hops: int) -> Any:
        return jnp.asarray(order).reshape(members, -1)[member_before(group, hops)]

    def on_one(q: Any, k: Any, v: Any) -> Any:
        rounds = Round(
            members=members,
            send=lambda x: next_member(x, group),
            places=places,
            later=lambda hops: member_before(group, hops) > member(group),
            striped=striped,
            overlap=True,
            kernel=fits_pieces(
                options, here, "tpu" if way == "kernel" else "cpu", striped and causal
            ),
        )
        return round_attention(q, k, v, options, rounds)

    spec = PartitionSpec(None, "context")
    ours = jax.shard_map(on_one, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    mask = order[:, None] >= order if causal else None

    def plain(q: Any, k: Any, v: Any) -> Any:
        return softmax_attention(q, k, v, mask, lambda x: x)

    @jax.jit
    def both(*arrays: Any) -> Any:
        pairs = (jax.vjp(function, *arrays) for function in (ours, plain))
        return [(out, transpose(d)) for out, transpose in pairs]

    return error(*both(q, k, v))


# (way, tokens, heads' width of keys and of values, of how many tokens each query sees)
CHOSEN = [("kernel", 256, 24, 24, 40), ("kernel", 130, 72, 48, 130), ("written", 50, 24, 16, 7)]


def attend_few(way: str, tokens: int, depth: int, values: int, top: int) -> float:
    """Compare output and gradients of attention to tokens that are chosen anew for each query."""
    shapes = depth, depth, values, values
    q, k, v, d = (normal(i, (BATCH, tokens, HEADS, one)) for i, one in enumerate(shapes))
    chosen = wanted_pairs(normal(8, (BATCH, tokens, tokens)), top)
    call = {"fused": way == "kernel", "mask": {"causal": True, "window": 0}}
    one = SimpleNamespace(plan={"platform": "tpu"})
    wide = ((0, 0), (0, 0), (0, 0), (0, depth - values))

    @jax.jit
    def both(pairs: Any, *arrays: Any) -> Any:
        def ours(q: Any, k: Any, v: Any) -> Any:
            return attend_chosen(one, call, q, k, v, jnp.where(pairs, 0.0, index.HIDDEN))

        def plain(q: Any, k: Any, v: Any) -> Any:
            mask = pairs[:, None, None]
            return softmax_attention(q, k, jnp.pad(v, wide), mask, lambda x: x)[..., :values]

        found = (jax.vjp(function, *arrays) for function in (ours, plain))
        return [(out, transpose(d)) for out, transpose in found]

    return error(*both(chosen, q, k, v))


def wanted_pairs(scores: Any, top: int) -> Any:
    """Return of each query the `top` keys with the largest scores that are no later, the first of
    equal ones."""
    pairs = np.zeros(scores.shape, bool)
    for batch, row in np.ndindex(scores.shape[:2]):
        order = np.argsort(-scores[batch, row, : row + 1], kind="stable")[:top]
        pairs[batch, row, order] = True
    return pairs


def choose(tokens: int, top: int) -> float:
    """Return the share of pairs on which an index and one written out differ; most scores are of
    no head above zero, so equal."""
    heads, width, rotary = 2, 8, 4
    latent, key = normal(0, (BATCH, tokens, 6)), normal(1, (BATCH, tokens, width))
    sums, w = normal(2, (BATCH, tokens, heads)), normal(3, (6, heads, width))
    scale, bias = 1 + 0.1 * normal(4, (width,)), normal(5, (width,))
    way = Whole({"sequence": tokens, "compute": "f32"}, {}, {}, {})
    way.parameters = {"index_query": {"shape": w.shape, "axes": ["query_latent", "a", "b"]}}
    params = {"index_query": w, "scale": scale, "bias": bias}
    call = {"top": top, "rotary": rotary, "mask": {"causal": True, "window": 0}}
    call |= {"weights": ["index_query", "scale", "bias"]}
    found = index.run_token_index(way, params, call, latent, key, sums)

    def turned(x: Any) -> Any:
        angle = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(rotary // 2) / (rotary // 2))
        one = np.exp(1j * angle)[:, None]
        turned = (x[..., : rotary // 2] + 1j * x[..., rotary // 2 : rotary]) * one
        return np.concatenate([turned.real, turned.imag, x[..., rotary:]], -1)

    spread = np.sqrt(key.var(-1, keepdims=True) + 1e-6)
    k = turned(((key - key.mean(-1, keepdims=True)) / spread * scale + bias)[:, :, None])[:, :, 0]
    q = turned(np.einsum("bsk,khd->bshd", latent, w))
    above = np.maximum(np.einsum("bqhd,bkd->bqkh", q, k), 0)
    wanted = wanted_pairs(np.einsum("bqkh,bqh->bqk", above, sums), top)
    return float(np.mean((found == 0) != wanted))


def gather(shape: tuple[int, int], dim: int) -> float:
    """Compare a gathered matrix with the whole one."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
    w = normal(0, shape)
    spec = PartitionSpec("fsdp") if dim == 0 else PartitionSpec(None, "fsdp")
    gathered = jax.jit(
        jax.shard_map(
            partial(gather_matrix, group=Group(("fsdp",), 8, tuple(range(8))), dim=dim),
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(w)
    return error(gathered, w)


if __name__ == "__main__":
    attend_blocks.KEYS_AT_ONCE = 16  # several blocks, the last one not full
    # The TPU's kernel, step by step on the CPU.
    make = splash_attention.make_splash_mha
    splash_attention.make_splash_mha = partial(make, interpret=True)
    results = {str(case): attend(*case) for case in ATTENTION}
    results |= {f"ring {case}": ring(*case) for case in RINGS}
    results |= {str(case): attend_few(*case) for case in CHOSEN}
    results |= {f"chosen {case}": choose(*case) for case in ((40, 6), (33, 1))}
    results |= {str(case): gather(*case) for case in MATRICES}
    print(json.dumps(results))
