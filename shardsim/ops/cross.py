"""Cross-attention: the tokens of one stack attend to those of another, its memory.

Memory is the result of the other stack's last norm. It is gathered over a tensor axis once, where
it is made; every layer projects it to keys and values of its own heads. So its gradient adds up
over layers, part by part, and is scattered once.

Shapes: memory [batch, memory, its width]; q [batch, tokens, heads, head_dim]; k and v [batch,
memory, kv_heads, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, einsum, linear, pointwise, weight
from shardsim.graph.build import TOKENS, Builder, vector
from shardsim.graph.place import CONTEXT, TENSOR
from shardsim.ops.activate import ACTIVATE
from shardsim.ops.attend import HEADS, KERNELS, KV, attention_ops
from shardsim.ops.attend_kernels import softmax_attention
from shardsim.ops.attend_mask import Mask
from shardsim.ops.lazy import checkpoint_name, jax, lax
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

MEMORY: Dims = ("batch", "memory")


@dataclass(frozen=True)
class Every(Mask):
    """All pairs of tokens of two stacks: no mask leaves half of them out."""

    causal: bool = False

    def counted(self, tokens: int, halved: bool) -> int:
        return tokens**2


@dataclass(frozen=True)
class OfText(Every):
    """The same of a text's few tokens, whose keys are gathered however those of a layer's own
    tokens come: turning queries by head, or a ring, would move all of the queries for them, or
    wait at every hop."""

    @property
    def local(self) -> bool:
        return True

    def to_data(self) -> dict[str, Any]:
        return {**super().to_data(), "text": True}


def hand_on(build: Builder, final: Array, name: str, *, whole: bool = False) -> Array:
    """Add what hands the tokens of a stack to others: gathered over a tensor axis, or, as a
    `whole`, over all axes that split tokens."""
    lies, owed = ("handed", (*TENSOR, *CONTEXT)) if whole else ("", TENSOR)
    out = Array(name, final.dims, keep="", purpose="memory", lies=lies, handed=True, owed=owed)
    build.add(replace(linear([final], out), relay=True, eager=True))
    build.call("hand_on", [final], out, whole=whole)
    return out


def memory(trained: bool) -> Array:
    """Return the tokens of another stack, as layers read them."""
    dims = (*MEMORY, "memory_embed")
    found = Array("memory", dims, keep="", handed=True, owed=TENSOR, purpose="memory")
    return replace(found, trained=trained)


def project_prompt(build: Builder) -> None:
    """Add the memory of a text whose features are given: two projections, the first activated
    (Wan, arXiv 2503.20314, section 4.2)."""
    prompt = Array("prompt", (*MEMORY, "prompt_embed"), trained=False)
    into = weight("prompt_in", "prompt_embed", "memory_hidden", purpose="ends")
    back = weight("prompt_out", "memory_hidden", "memory_embed", purpose="ends")
    hidden = Array("prompt hidden", (*MEMORY, "memory_hidden"), purpose="memory")
    build.add(einsum(prompt, into, hidden, vector("prompt_in_bias", "memory_hidden")))
    active = build.add(pointwise([hidden], replace(hidden, name="prompt active"), stream=ACTIVATE))
    made = memory(trained=True)
    build.add(einsum(active, back, made, vector("prompt_out_bias", "memory_embed")))
    build.call("project_prompt", [prompt], made)


def cross_keys(build: Builder, read: Array, *, bias: bool) -> tuple[Array, Array]:
    """Add the keys and values of a layer's cross-attention."""
    made, weights, biases = [], [], []
    for name in ("key", "value"):
        weights.append(weight(f"cross_{name}", "memory_embed", *KV))
        biases += [vector(f"cross_{name}_bias", *KV)] if bias else []
        out = Array(f"cross {name[0]}", (*MEMORY, *KV), keep="qkv", purpose="second axis")
        made.append(build.add(einsum(read, weights[-1], out, *biases[-1:])))
    names = [one.name for one in biases]
    build.call("project_memory", [read], *made, weights=weights, biases=names)
    return made[0], made[1]


def cross_attend(build: Builder, q: Array, k: Array, v: Array, *, kernel: str, text: bool) -> Array:
    """Add attention to all tokens of memory, which may be a `text`'s; `kernel` as of `attend`."""
    dims, lies = (*TOKENS, *HEADS), "" if text else "attended"
    context = Array("cross context", dims, keep="context", purpose="second axis", lies=lies)
    of = ("memory", "memory_keys")
    mask = OfText() if text else Every()
    attention_ops(build, q, k, v, context, mask=mask, kernel=kernel, sinks=False, of=of)
    fused, said = kernel in KERNELS, mask.to_data()
    build.call("cross_attend", [q, k, v], context, named=fused, fused=fused, mask=said)
    return context


@runs("hand_on")
def run_hand_on(way: Whole, params: Params, call: Any, x: Any) -> Any:
    """Return tokens [batch, tokens, embed] gathered over a tensor axis, or `whole`."""
    with jax.named_scope("memory"):
        return way.handed(x, call["whole"])


@runs("project_prompt")
def run_project_prompt(way: Whole, params: Params, call: Any, prompt: Any) -> Any:
    """Return memory [batch, memory, embed] of features [batch, memory, width] of a text."""
    with jax.named_scope("memory"):
        flat = way.flat()
        own = way.query_tokens(prompt, 1).astype(way.compute)
        (hidden,) = flat.project_in(own, params, ["prompt_in"])
        hidden = jax.nn.gelu(flat.with_bias(hidden, params, "prompt_in_bias"))
        made = flat.project_out([hidden], params, ["prompt_out"])
        return flat.add_vectors(params, made, ["prompt_out_bias"])


@runs("project_memory")
def run_project_memory(way: Whole, params: Params, call: Any, read: Any) -> Any:
    """Return keys and values of a memory that is not split over a tensor axis."""
    flat = way.flat()
    made = []
    for name, y in zip(
        call["weights"], flat.project_in(read, params, call["weights"]), strict=True
    ):
        bias = f"{name}_bias"
        made.append(flat.with_bias(y, params, bias) if bias in call["biases"] else y)
    return made


@runs("cross_attend")
def run_cross_attend(way: Whole, params: Params, call: Any, q: Any, k: Any, v: Any) -> Any:
    """Return the weighted values [batch, tokens, heads, head_dim], before their projection."""
    q, k, v = (way.by_head(x) for x in (q, k, v))
    k, v = (way.all_keys(x, text="text" in call["mask"]) for x in (k, v))
    if call["fused"]:
        return way.flash(q, k, v, call["mask"], None)
    v = lax.optimization_barrier(v)
    context = softmax_attention(q, k, v, None, lambda x: checkpoint_name(x, "rest"))
    return lax.optimization_barrier(context)
