"""The gated delta rule: attention whose past is a state of fixed size (arXiv 2412.06464).

Of each head, token by token: h <- e^g h; h <- h + beta k (v - k h); the result is q h. Here tokens
are worked on in chunks (arXiv 2406.06484, section 3): inside one as attention under a causal mask,
with what earlier tokens of it have written taken out by the inverse of a triangular matrix; from
chunk to chunk a scan passes the state on.

Shapes: q and k [batch, tokens, key_heads, key_dim]; v and the result [batch, tokens, value_heads,
value_dim]; beta and decay g [batch, tokens, value_heads], both float32. Products with the state, or
that inverse, are in float32, as in MaxText; model FLOPs count the rule token by token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Counted, Dims, Op, Stream, einsum, pointwise
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.ops.lazy import jax, jnp, lax
from shardsim.ops.norm import EPSILON, HEAD_NORM
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

KEYS: Dims = ("delta_keys", "delta_key")
VALUES: Dims = ("delta_heads", "delta_value")
CHUNKS: Dims = ("batch", "delta_chunk")
PAIRS: Dims = (*CHUNKS, "delta_heads", "delta_token", "delta_seen")

# A convolution reads its row and writes it; backward it reads both once more, for its own gradient
# and that of its taps. Two operations a tap, and a silu.
CONV = Stream(passes=2.0, ops=20.0, gradient_passes=5.0, gradient_ops=40.0)
GATES = Stream(passes=3.0, ops=24.0, gradient_passes=4.0, gradient_ops=24.0)
SCALED = Stream(passes=2.0, ops=2.0, gradient_passes=4.0, gradient_ops=4.0)
# Scores in float32 are read, masked, weighted by their decay and written.
DECAYED = Stream(passes=2.0, ops=12.0, gradient_passes=4.0, gradient_ops=14.0)
# The inverse: each of six doublings of its blocks reads and writes it; its gradient is a product.
INVERSE = Stream(passes=12.0, ops=12.0, gradient_passes=2.0, gradient_ops=2.0)
# What a scan reads and writes beside its products: the state that comes and the one that goes.
STATE = Stream(passes=2.0, ops=3.0, gradient_passes=3.0, gradient_ops=6.0)
DIFFERENCE = Stream(passes=1.0, ops=1.0, gradient_passes=1.0, gradient_ops=1.0)
GATED_NORM = Stream(passes=3.0, ops=20.0, gradient_passes=6.0, gradient_ops=30.0)


def short_conv(build: Builder, name: str, x: Array) -> Array:
    """Add a convolution of each channel over the last tokens, and a silu."""
    taps = vector(f"{name}_conv", "delta_tap", *x.dims[len(TOKENS) :])
    out = replace(x, name=f"{x.name} convolved", keep="rest")
    counts = Counted("matmul", 1, (*x.dims, "delta_tap"))
    build.add(replace(pointwise([x], out, taps, stream=CONV), counts=counts))
    build.call("short_conv", [x], out, weights=[taps])
    return out


def delta_rule(
    build: Builder, q: Array, k: Array, v: Array, b: Array, a: Array, *, chunk: int
) -> Array:
    """Add the rule; `b` and `a` make how much each token writes, and how much it leaves."""
    vectors = [vector(name, "delta_heads") for name in ("delta_log_decay", "delta_decay_bias")]
    beta, decay = (
        Array(name, (*TOKENS, "delta_heads"), keep="", wide=True)
        for name in ("delta beta", "delta decay")
    )
    build.add(pointwise([b], beta, stream=GATES))
    build.add(pointwise([a], decay, *vectors, stream=GATES))
    context = _rule(build, _by_value_head(build, q), _by_value_head(build, k), v, beta, decay)
    build.call("delta_rule", [q, k, v, b, a], context, weights=vectors, chunk=chunk)
    return context.view(*TOKENS, *VALUES, delta_chunk="seq")


def _by_value_head(build: Builder, x: Array) -> Array:
    """Add a norm of each head of queries or keys, for every head of values that it serves."""
    out = Array(f"{x.name} normed", (*TOKENS, "delta_heads", "delta_key"), keep="")
    stream = replace(HEAD_NORM, by_head=False)
    return build.add(pointwise([x.view(delta_keys="delta_heads")], out, stream=stream))


def _rule(build: Builder, q: Array, k: Array, v: Array, beta: Array, decay: Array) -> Array:
    def cut(x: Array, token: str = "delta_token") -> Array:
        return x.view(*CHUNKS, token, *x.dims[len(TOKENS) :], seq="delta_chunk")

    def product(a: Array, b: Array, name: str, dims: Dims, **more: Any) -> Array:
        """Add a product that stays in a chunk; what it makes is no tensor of a remat policy."""
        made = Array(name, dims, keep="", wide=True)
        return build.add(replace(einsum(a, b, made), counted=False, **more))

    def scores(name: str, a: Array, also: list[Array]) -> Array:
        raw = product(cut(a), cut(k, "delta_seen"), f"delta {name}", PAIRS)
        out = replace(raw, name=f"delta {name} decayed")
        return build.add(pointwise([raw, *map(cut, also)], out, stream=DECAYED))

    def scaled(x: Array, by: list[Array]) -> Array:
        out = replace(x, name=f"{x.name} written", keep="")
        return cut(build.add(pointwise([x, *by], out, stream=SCALED)), "delta_also")

    wide: dict[str, Any] = {"dtype": "f32"}
    heads = (*CHUNKS, "delta_token", "delta_heads")
    lower = scores("keys", k, [beta, decay])
    again = lower.view(*PAIRS[:3], "delta_seen", "delta_also")
    inverse = product(
        lower, again, "delta inverse", (*PAIRS[:4], "delta_also"), stream=INVERSE, **wide
    )
    u = product(inverse, scaled(v, [beta]), "delta u", (*heads, "delta_value"), **wide)
    w = product(inverse, scaled(k, [beta, decay]), "delta w", (*heads, "delta_key"), **wide)
    inside = scores("queries", q, [decay])
    dims = (*CHUNKS, "delta_heads", "delta_key", "delta_value")
    state = product(cut(k), u, "delta state", dims, stream=STATE, **wide)
    new = product(w, state, "delta new", (*heads, "delta_value"), stream=DIFFERENCE, **wide)
    context = Array("delta context", (*CHUNKS, "delta_token", *VALUES), keep="rest")
    seen = new.view(delta_token="delta_seen")
    for one, other in ((cut(q), state), (inside, seen)):
        build.add(replace(einsum(one, other, context), counted=False, **wide))
    counts = Counted("attention", 4, (*TOKENS, *VALUES, "delta_key"))
    build.made[-1] = replace(build.made[-1], counts=counts)
    return context


def gated_norm(build: Builder, x: Array, gate: Array) -> Array:
    """Add a norm of each head, times the silu of a gate."""
    scale = vector("delta_norm_scale", "delta_value")
    out = replace(gate, name="delta result", keep="rest")
    build.add(Op((x, gate), out, (x, gate), (scale,), stream=GATED_NORM))
    build.call("gated_norm", [x, gate], out, weights=[scale])
    return out


def by_head(x: Any, width: int) -> Any:
    """Return [batch, tokens, heads, width], whether or not heads are apart."""
    return x.reshape(*x.shape[:2], -1, width)


@runs("short_conv")
def run_short_conv(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return silu of the sum of the last tokens [batch, tokens, heads, width], each by its tap."""
    taps = params[call["weights"][0]].astype(jnp.float32)
    x = by_head(x, taps.shape[-1])
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (len(taps) - 1, 0), (0, 0), (0, 0)))
    made = sum(padded[:, i : i + x.shape[1]] * tap for i, tap in enumerate(taps))
    return jax.nn.silu(made).astype(x.dtype)


@runs("delta_rule")
def run_delta_rule(
    way: Whole, params: Params, call: Any, q: Any, k: Any, v: Any, b: Any, a: Any
) -> Any:
    """Return the result of the rule [batch, tokens, value_heads, value_dim]."""
    log, bias = (params[name].astype(jnp.float32) for name in call["weights"])
    beta = jax.nn.sigmoid(b.astype(jnp.float32))
    decay = -jnp.exp(log) * jax.nn.softplus(a.astype(jnp.float32) + bias)
    many = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(unit(x), many, 2) for x in (q, k))
    return chunked_rule(q, k, v, beta, decay, call["chunk"])


def unit(x: Any) -> Any:
    """Return vectors of length one."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + EPSILON)).astype(x.dtype)


def chunked_rule(q: Any, k: Any, v: Any, beta: Any, decay: Any, size: int) -> Any:
    """Return the gated delta rule [batch, tokens, heads, value_dim], in chunks of `size` tokens.

    All have the same heads; the tokens are whole chunks.
    """

    def chunks(x: Any) -> Any:
        """Return [chunk, batch, heads, tokens of it, ...]."""
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    def product(equation: str, *factors: Any) -> Any:
        wide = (x.astype(jnp.float32) for x in factors)
        return jnp.einsum(equation, *wide, precision=lax.Precision.HIGHEST)

    def scores(a: Any, b: Any, least: int) -> Any:
        """Return products of tokens with those `least` or more before them, less what decays."""
        made = jnp.einsum("nbhid,nbhjd->nbhij", a, b, preferred_element_type=jnp.float32)
        there = jnp.tril(jnp.ones((size, size), bool), -least)
        between = jnp.where(there, total[..., :, None] - total[..., None, :], -jnp.inf)
        return made * jnp.exp(between)

    shape, kind = v.shape, q.dtype
    q = q * q.shape[-1] ** -0.5
    q, k, v, beta, decay = map(chunks, (q, k, v, beta, decay))
    total = jnp.cumsum(decay, -1)
    inverse = unit_lower_inverse(beta[..., None] * scores(k, k, 1))
    u = product("nbhij,nbhjd->nbhid", inverse, v * beta[..., None])
    w = product("nbhij,nbhjd->nbhid", inverse, k * (beta * jnp.exp(total))[..., None])
    inside = scores(q, k, 0)

    def step(state: Any, chunk: Any) -> tuple[Any, Any]:
        q, k, u, w, inside, total = chunk
        new = u - product("bhid,bhde->bhie", w, state)
        out = product("bhid,bhde->bhie", q * jnp.exp(total)[..., None], state)
        out = out + product("bhij,bhje->bhie", inside, new)
        last = total[..., -1:]
        state = state * jnp.exp(last)[..., None]
        state = state + product("bhid,bhie->bhde", k * jnp.exp(last - total)[..., None], new)
        return state, out

    state = jnp.zeros((*k.shape[1:3], k.shape[-1], v.shape[-1]), jnp.float32)
    out = lax.scan(step, state, (q, k, u, w, inside, total))[1]
    return jnp.moveaxis(jnp.moveaxis(out, 0, 1), 2, 3).reshape(shape).astype(kind)


def unit_lower_inverse(lower: Any) -> Any:
    """Return the inverse of 1 + lower, which is zero on and above its diagonal.

    Blocks on the diagonal double: of [[a, 0], [b, c]] the inverse has -c' b a' below a' and c'.
    """
    inverse = jax.custom_vjp(_inverse_by_blocks)
    inverse.defvjp(lambda x: (_inverse_by_blocks(x),) * 2, _inverse_gradient)
    return inverse(lower)


def _inverse_by_blocks(lower: Any) -> Any:
    size = lower.shape[-1]
    made = jnp.ones((*lower.shape[:-2], size, 1, 1), lower.dtype)
    width = 1
    while width < size:
        many = size // (2 * width)
        cut = lower.reshape(*lower.shape[:-2], many, 2 * width, many, 2 * width)
        blocks = jnp.moveaxis(jnp.diagonal(cut, 0, -4, -2), -1, -3)[..., width:, :width]
        one, other = made[..., ::2, :, :], made[..., 1::2, :, :]
        below = -jnp.matmul(
            jnp.matmul(other, blocks, precision=lax.Precision.HIGHEST),
            one,
            precision=lax.Precision.HIGHEST,
        )
        upper = jnp.concatenate([one, jnp.zeros_like(below)], -1)
        made = jnp.concatenate([upper, jnp.concatenate([below, other], -1)], -2)
        width *= 2
    return made[..., 0, :, :]


def _inverse_gradient(inverse: Any, gradient: Any) -> tuple[Any]:
    turned = jnp.swapaxes(inverse, -1, -2)
    half = jnp.matmul(turned, gradient, precision=lax.Precision.HIGHEST)
    return (-jnp.tril(jnp.matmul(half, turned, precision=lax.Precision.HIGHEST), -1),)


@runs("gated_norm")
def run_gated_norm(way: Whole, params: Params, call: Any, x: Any, gate: Any) -> Any:
    """Normalise each head [batch, tokens, heads, width] by its mean square, times silu(gate)."""
    scale = params[call["weights"][0]].astype(jnp.float32)
    wide = x.astype(jnp.float32)
    y = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPSILON) * scale
    return (y * jax.nn.silu(by_head(gate, len(scale)).astype(jnp.float32))).astype(x.dtype)
