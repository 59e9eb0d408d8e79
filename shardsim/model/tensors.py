"""Every weight of a model: its shape, and a logical name for each of its dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, weights_of
from shardsim.graph.place import GROUPS, has_groups, logical_axis
from shardsim.model.blocks import graph_of
from shardsim.ops.conditions import CONDITIONS, FREQUENCIES
from shardsim.ops.conditions import PARTS as PARTS_OF_CONDITION

if TYPE_CHECKING:
    from shardsim.model.spec import Model

Number = Any  # int, Fraction, float or an array of them

AXES = (
    "embed",  # the residual stream
    "heads",  # query heads
    "kv_heads",  # key-value heads
    "head_dim",
    "query_rank",  # latents of queries, and of keys and values
    "key_value_rank",
    "rotary",  # the part of a head that is turned by position, that which is not, and its values'
    "nope",
    "value_dim",
    "mlp",  # the MLP's hidden layer
    "vocab",
    "expert",
    "choice",  # experts, of a router's logits
    "patch",  # pixels of a patch: side * side * channels
    "position",
    "register",
    "bucket",  # of relative positions
    "classes",
    "label",  # classes that an example is conditioned on
    "frequency",  # waves of its time
    "modulation",  # shift, scale and gate of two branches; "two": shift and scale of one norm
    "two",
    "pixels",  # of a patch, as they are predicted
    "rank",  # of an adapter
    "image_embed",  # the residual stream of images, where their tokens are projected
    "feature",  # of a tower's embedding
    "delta",  # heads of linear attention: of keys, or of values
    "index_dim",
    "delta_key",
    "delta_value",
    "delta_tap",  # tokens of its convolution
    "one",  # of a single number
    "norm",  # width of a norm's scale or bias: as long as `embed`, rarely split
)
_OF_CHUNK = ("delta_token", "delta_seen", "delta_also")
KINDS = ("matrix", "vector", "table")
PARTS = ("input", "block", "output")


@dataclass(frozen=True)
class Tensor:
    """One weight, or `stack` equal ones.

    `axes` names each dimension of `shape`; the stack is not among them. A "matrix" multiplies
    tokens, a "table" is looked up or added by row, a "vector" is a bias, a scale or a probe.
    `part` is where it stands: before the blocks, in each block, or after them.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    stack: int
    kind: str
    part: str = "block"
    trained: bool = True  # whether it has a gradient

    def of_part(self, name: str) -> Tensor:
        """Return it as a weight of a part of a model: its name begins with the part's."""
        return replace(self, name=f"{name}/{self.name}") if name else self

    @property
    def fetched(self) -> bool:
        """Whether it may lie in the host's memory, and each layer fetches its own: a matrix."""
        return self.part == "block" and self.kind == "matrix"

    @property
    def size_of_one(self) -> int:
        """Number of weights in one copy."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of weights in all copies."""
        return self.stack * self.size_of_one


def of_tokens(model: Model, tokens: Number) -> Mapping[str, Number]:
    """Return the lengths of dimensions that tokens make: keys of an index, chunks of linear
    attention, and of a video whose layers attend along them frames and locations; frames are as
    many in a sequence of any length."""
    if (index := model.index) is not None:  # sequences that are seen whole need none
        needed = tokens > index.top
        used = {"scoring_heads": index.heads, "scoring_dim": index.head_dim, "index_keys": tokens}
        return {name: length * needed for name, length in used.items()}
    if model.delta:
        chunk = model.delta.chunk
        return {"delta_chunk": tokens / chunk} | dict.fromkeys(_OF_CHUNK, chunk)
    if not model.attends:
        return {}
    locations = tokens / model.frames
    return {
        **dict.fromkeys(("frame", "seen frame"), model.frames),
        **dict.fromkeys(("location", "location seen"), locations),
    }


def lengths(model: Model) -> Mapping[str, int]:
    """Return the length of every dimension of a model's graph but those of a batch."""
    experts, latent = model.experts, model.latent
    chosen: dict[str, int] = {}
    if latent is not None:
        chosen = {
            **{f"query_{part}": latent.queries for part in ("rank", "latent")},
            **{f"key_value_{part}": latent.keys for part in ("rank", "latent")},
            "rotary": latent.rotary,
            "nope": model.head_dim - latent.rotary,
            "value_dim": latent.values,
        }
    if (delta := model.delta) is not None:
        chosen |= {
            "delta_keys": delta.key_heads,
            "delta_heads": delta.value_heads,
            "delta_key": delta.key_dim,
            "delta_value": delta.value_dim,
            "delta_tap": delta.taps,
        }
    if (index := model.index) is not None:
        chosen |= {"index_heads": index.heads, "index_dim": index.head_dim}
    if experts is not None:
        chosen |= {
            "expert": experts.number,
            "choice": experts.number,
            "top": experts.top_k,
            **({"slot": experts.soft_slots} if experts.soft_slots else {}),
            "expert_mlp": experts.mlp,
            "shared_mlp": experts.shared_width,
        }
    if model.memory_tokens:
        chosen |= dict.fromkeys(("memory", "memory_keys"), model.memory_tokens)
        chosen["memory_embed"] = model.encoder.embed if model.encoder else model.embed
        chosen |= {"prompt_embed": model.prompt_embed, "memory_hidden": model.embed}
    if model.images is not None:
        chosen |= {"image_seq": model.images.sequence, "image_embed": model.images.embed}
    if (heads := model.global_heads) is not None:
        chosen |= {
            "global_kv": heads.kv_heads,
            "global_group": model.heads // heads.kv_heads,
            "global_head_dim": heads.head_dim,
        }
    return {
        **chosen,
        "one": 1,
        "embed": model.embed,
        "norm": model.embed,
        **dict.fromkeys(("branch_embed", "branch_norm", "branch_mlp"), model.branch),
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "kv": model.kv_heads,
        "group": model.heads // model.kv_heads,
        "head_dim": model.head_dim,
        "mlp": model.mlp,
        "vocab": model.vocab,
        "delta": model.delta.key_heads if model.delta else 0,
        "patch": model.patch**2 * model.channels,
        "position": model.image_positions if model.patch else model.sequence,
        "register": model.registers,
        "classes": model.classes,
        "moments": 2,
        "two": 2,
        "modulation": PARTS_OF_CONDITION,
        "frequency": FREQUENCIES,
        "condition": model.embed,
        "label": model.labels,
        "pixels": model.patch**2 * model.predicts,
        "bucket": model.buckets,
        "feature": model.feature_width,
        "rank": model.lora.rank if model.lora else 0,
    }


@lru_cache(maxsize=256)
def parameters(model: Model) -> tuple[Tensor, ...]:
    """Return every weight of `model`, part by part in the order of the forward pass.

    Example: a serial decoder block without biases has the scale of a norm, query, key, value,
    attention_output, another norm's scale, mlp_in (and mlp_gate when gated) and mlp_out.
    """
    graph = graph_of(model)
    made = _tensors(model, weights_of(graph.before.ops), "input", 1)
    layers: dict[str, Tensor] = {}
    for layer, many in graph.layers:  # layers of several kinds share stacks of equal weights
        for tensor in _tensors(model, weights_of(layer.part.ops), "block", many):
            same = layers.get(tensor.name)
            layers[tensor.name] = replace(tensor, stack=same.stack + many) if same else tensor
    made += layers.values()
    known = {tensor.name for tensor in made}
    after = [weight for weight in weights_of(graph.after.ops) if weight.name not in known]
    return tuple(made + _tensors(model, after, "output", 1))


def _tensors(model: Model, weights: Iterable[Array], part: str, stack: int) -> list[Tensor]:
    sizes = lengths(model)
    made = []
    for weight in weights:
        axes = axes_of(weight.dims)
        grouped = has_groups(weight.dims)
        shape = tuple(
            sizes["heads" if grouped and d in GROUPS else d]
            for d in weight.dims
            if d not in GROUPS.values()
        )
        kind, trained = weight.weight, weight.trained
        made.append(Tensor(weight.name, axes, shape, stack, kind, part, trained))
    return made


@lru_cache(maxsize=256)
def of_examples(model: Model) -> frozenset[str]:
    """Return the names of weights that work on the condition of an example, not on tokens."""
    if model.modulation == "none":
        return frozenset()
    graph = graph_of(model)
    ops = (*graph.ends, *(op for layer, _ in graph.layers for op in layer.part.ops))
    return frozenset(
        weight.name for weight in weights_of([op for op in ops if op.out.purpose == CONDITIONS])
    )


def axes_of(dims: Dims) -> tuple[str, ...]:
    """Return the logical axes of an array: heads are one axis, not key-value heads and groups.

    >>> axes_of(("embed", "kv", "group", "head_dim")), axes_of(("kv", "head_dim"))
    (('embed', 'heads', 'head_dim'), ('kv_heads', 'head_dim'))
    """
    grouped = has_groups(dims)
    return tuple(logical_axis(d, grouped) for d in dims if d not in GROUPS.values())
