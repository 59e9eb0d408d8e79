"""Every weight of a model: its shape, and a logical name for each of its dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardsim.model.spec import Model

AXES = (
    "embed",  # the residual stream
    "heads",  # query heads
    "kv_heads",  # key-value heads
    "head_dim",
    "mlp",  # the MLP's hidden layer
    "vocab",
    "patch",  # pixels of a patch: side * side * channels
    "position",
    "classes",
    "norm",  # width of a norm's scale or bias: as long as `embed`, rarely split
)
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

    @property
    def size_of_one(self) -> int:
        """Number of weights in one copy."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of weights in all copies."""
        return self.stack * self.size_of_one


class _Maker:
    """Makes tensors for one part of a model from the names of their axes."""

    def __init__(self, model: Model, part: str, stack: int, prefix: str = "") -> None:
        self.part = part
        self.stack = stack
        self.prefix = prefix
        self.lengths = {
            "embed": model.embed,
            "heads": model.heads,
            "kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "mlp": model.mlp,
            "vocab": model.vocab,
            "patch": model.patch * model.patch * model.channels,
            "position": model.image_tokens if model.patch else model.sequence,
            "classes": model.classes,
            "norm": model.embed,
        }

    def __call__(self, name: str, *axes: str, kind: str = "matrix") -> Tensor:
        return Tensor(
            name=self.prefix + name,
            axes=axes,
            shape=tuple(self.lengths[axis] for axis in axes),
            stack=self.stack,
            kind=kind,
            part=self.part,
        )

    def vector(self, name: str, *axes: str) -> Tensor:
        return self(name, *axes, kind="vector")

    def norm(self, name: str, *, bias: bool, axis: str = "norm") -> list[Tensor]:
        made = [self.vector(f"{name}_scale", axis)]
        return made + ([self.vector(f"{name}_bias", axis)] if bias else [])

    def attention(self, kv: str, *, qkv_bias: bool, output_bias: bool) -> list[Tensor]:
        made = [
            self("query", "embed", "heads", "head_dim"),
            self("key", "embed", kv, "head_dim"),
            self("value", "embed", kv, "head_dim"),
        ]
        if qkv_bias:
            made += [
                self.vector("query_bias", "heads", "head_dim"),
                self.vector("key_bias", kv, "head_dim"),
                self.vector("value_bias", kv, "head_dim"),
            ]
        made.append(self("attention_output", "heads", "head_dim", "embed"))
        if output_bias:
            made.append(self.vector("attention_output_bias", "embed"))
        return made

    def mlp(self, *, gated: bool, bias: bool) -> list[Tensor]:
        into = ("mlp_in", "mlp_gate") if gated else ("mlp_in",)
        made = [self(name, "embed", "mlp") for name in into]
        if bias:
            made += [self.vector(f"{name}_bias", "mlp") for name in into]
        made.append(self("mlp_out", "mlp", "embed"))
        if bias:
            made.append(self.vector("mlp_out_bias", "embed"))
        return made


def parameters(model: Model) -> tuple[Tensor, ...]:
    """Return every weight of `model`, part by part in the order of the forward pass.

    Example: a serial decoder block without biases has query, key, value, attention_output,
    mlp_in, mlp_out (and mlp_gate when gated), and the scales of two norms.
    """
    return (*_input(model), *_block(model), *_output(model))


def _input(model: Model) -> list[Tensor]:
    make = _Maker(model, "input", 1)
    made = []
    if model.vocab:
        made.append(make("token_embedding", "vocab", "embed", kind="table"))
    if model.patch:
        made.append(make("patch_embedding", "patch", "embed"))
        made.append(make.vector("patch_embedding_bias", "embed"))
    if model.pooling == "cls":
        made.append(make.vector("cls_token", "embed"))
    if model.positions == "learned":
        made.append(make("position_embedding", "position", "embed", kind="table"))
    return made


def _block(model: Model) -> list[Tensor]:
    make = _Maker(model, "block", model.layers)
    bias = model.biases
    first = "block_norm" if model.parallel_block else "attention_norm"
    made = make.norm(first, bias=bias.norm)
    made += make.attention("kv_heads", qkv_bias=bias.qkv, output_bias=bias.attention_output)
    if model.qk_norm:
        made += make.norm("query_norm", bias=bias.norm, axis="head_dim")
        made += make.norm("key_norm", bias=bias.norm, axis="head_dim")
    if model.post_norms:
        made += make.norm("post_attention_norm", bias=bias.norm)
    if not model.parallel_block:
        made += make.norm("mlp_norm", bias=bias.norm)
    made += make.mlp(gated=model.gated_mlp, bias=bias.mlp)
    if model.post_norms:
        made += make.norm("post_mlp_norm", bias=bias.norm)
    return made


def _output(model: Model) -> list[Tensor]:
    make = _Maker(model, "output", 1)
    made = make.norm("final_norm", bias=model.biases.norm) if model.final_norm else []
    if model.pooling == "map":
        made += _pooling_head(model)
    if model.classes:
        made.append(make("classifier", "embed", "classes"))
        made.append(make.vector("classifier_bias", "classes"))
    if model.vocab and not model.tied_embeddings:
        made.append(make("output_head", "embed", "vocab"))
    return made


def _pooling_head(model: Model) -> list[Tensor]:
    """Return the weights of multi-head attention pooling: a learned probe attends to the tokens.

    Its linear maps and its norm carry biases whatever the blocks do, each head has its own key
    and value, and its MLP is not gated.
    Source: big_vision, models/vit.py, class MAPHead.
    """
    make = _Maker(model, "output", 1, prefix="pooling_")
    made = [make.vector("probe", "embed")]
    made += make.attention("heads", qkv_bias=True, output_bias=True)
    made += make.norm("norm", bias=True)
    made += make.mlp(gated=False, bias=True)
    return made
