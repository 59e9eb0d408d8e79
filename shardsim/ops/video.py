"""Layers that attend within a video's frames, or through time at each location.

Layers that attend within a frame need all locations of it on a device, those that attend through
time all frames of a location. Dynamic sequence parallelism (DSP, arXiv 2403.10266) splits the other
dimension for each: an all-to-all of the residual stream before a layer that attends through time,
and one after it, in place of one for each of queries, keys, values and result.

Tokens lie frame by frame; where they are split by location, location by location.

Shapes: x [batch, tokens, embed]; q [batch, tokens, heads, head_dim], k and v with kv_heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, linear
from shardsim.graph.build import TOKENS, Builder, stream
from shardsim.graph.place import BY_LOCATION
from shardsim.ops.attend import HEADS, KERNELS, KV, attention_ops
from shardsim.ops.attend_kernels import flash_attention, is_short, written_attention
from shardsim.ops.attend_mask import Mask
from shardsim.ops.lazy import checkpoint_name
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

SWITCHED = "switched tokens"  # the purpose of moving them
VIDEO = ("batch", "frame", "location", "embed")


def by_location(build: Builder, x: Array) -> Array:
    """Add what brings the residual stream to where tokens are split by location, if they are."""
    out = Array("x by location", VIDEO, stream=True, keep="", lies=BY_LOCATION, purpose=SWITCHED)
    moved = replace(x, purpose=SWITCHED).view(*VIDEO, seq="frame")
    build.add(replace(linear([moved], out), relay=True, call=SWITCHED))
    build.call("by_location", [x], out)
    return replace(out.view("batch", "seq", "embed", frame="seq", location="seq"), lies="")


def by_frame(build: Builder, x: Array) -> Array:
    """Add what brings it back."""
    out = stream("x by frame", keep="", purpose=SWITCHED)
    moved = replace(x, purpose=SWITCHED).view(*VIDEO, seq="location")
    there = replace(out, name="x by frame", dims=VIDEO, lies="by frame")
    build.add(replace(linear([moved], there), relay=True, call=SWITCHED))
    build.call("by_frame", [x], there)
    return there


def attend_along(build: Builder, q: Array, k: Array, v: Array, *, mask: Mask, kernel: str) -> Array:
    """Add attention to those tokens of a video that are in the same frame, or at the same location.

    Tokens are split by frame; through time by location, if the plan switches (`graph.place`).
    """
    space = mask.along == "space"
    split = "frame" if space else "location"
    of = ("location", "location seen") if space else ("frame", "seen frame")
    dims = ("batch", "frame", "location")
    seen = tuple(of[1] if d == of[0] else d for d in dims)
    own = q.view(*dims, *HEADS, seq=split)
    keys, values = (x.view(*seen, *KV, seq=split) for x in (k, v))
    lies = f"in {mask.along}"
    context = Array("context", (*dims, *HEADS), keep="context", purpose="second axis", lies=lies)
    attention_ops(build, own, keys, values, context, mask=mask, kernel=kernel, sinks=False, of=of)
    fused = kernel in KERNELS
    build.call("attend_along", [q, k, v], context, named=fused, fused=fused, mask=mask.to_data())
    return context.view(*TOKENS, *HEADS, frame="seq", location="seq")


@runs("by_location")
def run_by_location(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return tokens [batch, tokens, embed] split by location, where the plan says so."""
    return way.by_location(x)


@runs("by_frame")
def run_by_frame(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Undo `by_location`."""
    return way.by_frame(x)


@runs("attend_along")
def run_attend_along(way: Whole, params: Params, call: Any, q: Any, k: Any, v: Any) -> Any:
    """Return the weighted values [batch, tokens, heads, head_dim]: each frame, or location, is a
    sequence of its own."""
    q, k, v = (way.by_head(x) for x in (q, k, v))
    shape, mask = q.shape, call["mask"]
    along = mask["along"]
    q, k, v = (way.sequences(x, along) for x in (q, k, v))
    whole = way.has_sequences(along)
    if not whole:
        k, v = way.all_keys(k), way.all_keys(v)
    if not call["fused"]:
        out = written_attention(q, k, v, None)
    elif whole and is_short(k.shape[1]):
        out = checkpoint_name(written_attention(q, k, v, None), "context")
    elif whole:
        out = flash_attention(q, k, v, mask, None, way.plan["platform"])
    else:
        out = way.flash(q, k, v, mask, None)
    return way.tokens(out, along, shape)
