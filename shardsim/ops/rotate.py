"""Rotary positions: queries or keys turned by where they stand (arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Stream, linear
from shardsim.graph.build import Builder, width_of
from shardsim.ops.lazy import jnp
from shardsim.ops.registry import runs
from shardsim.ops.whole import stored_gradient

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

ROTATE = Stream(passes=2.0, ops=8.0, gradient_passes=3.0, gradient_ops=8.0)


def rotate(build: Builder, x: Array) -> Array:
    """Add a rotation of each head by position."""
    out = build.add(linear([x], replace(x, name=f"{x.name} turned", keep="rest"), stream=ROTATE))
    build.call("rotate", [x], out, **width_of(x))
    return out


@runs("rotate")
def run_rotate(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Turn pairs (i, i + head_dim / 2) of heads by position * 10000^(-2i/d)."""
    x = stored_gradient(way.by_head(x, call))
    positions = way.query_tokens(jnp.arange(way.plan["sequence"]), 0)
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = [low * cosine - high * sine, high * cosine + low * sine]
    return jnp.concatenate(turned, -1).astype(x.dtype)
