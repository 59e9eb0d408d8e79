"""What a model is made of: the options of its block, from which everything else follows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from shardsim.errors import ModelError, instead, is_bool, nearest, shown
from shardsim.model.blocks import graph_of
from shardsim.model.checks import (
    check_attends,
    check_block,
    check_branch,
    check_delta,
    check_experts,
    check_global_heads,
    check_latent,
    check_lora,
    check_modulation,
    check_tokens,
    check_vit,
)
from shardsim.model.delta import Delta
from shardsim.model.experts import Experts
from shardsim.model.global_heads import GlobalHeads
from shardsim.model.index import Index
from shardsim.model.latent import Latent
from shardsim.model.lora import Lora
from shardsim.model.parts import Part, check_parts, parts_of
from shardsim.model.tensors import Tensor, of_examples
from shardsim.model.tensors import parameters as _parameters
from shardsim.units import show_count

FAMILIES = ("vit", "decoder", "encoder")
ACTIVATIONS = ("gelu", "relu", "silu")
NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rotary", "fixed", "relative", "none")
QK_NORMS = ("head", "heads")
POOLINGS = ("none", "mean", "map", "cls", "last")
CONTRASTS = ("softmax", "sigmoid")
CONVENTIONS = ("all", "block-matrices")
MODULATIONS = ("none", "layer", "model")
GIVES = ("loss", "memory", "tokens", "features")

MOST_LAYERS = 10**5  # each is looked at on its own; far above any model's
LARGEST = 10**9  # far above any dimension of a model; keeps every product within a float
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")

_CHOICES = {
    "family": FAMILIES,
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "positions": POSITIONS,
    "qk_norm_over": QK_NORMS,
    "qk_norm_kind": ("", *NORMS),
    "pooling": POOLINGS,
    "parameter_convention": CONVENTIONS,
    "gives": GIVES,
    "contrast": CONTRASTS,
    "modulation": MODULATIONS,
}
_POSITIVE = (
    *("layers", "embed", "mlp", "heads", "head_dim", "kv_heads", "sequence", "channels"),
    *("buckets", "frames"),
)
_NOT_NEGATIVE = (
    *("vocab", "patch", "image", "classes", "registers", "features"),
    *("width", "predicts", "labels", "prompt", "prompt_embed", "kept", "branch"),
)
_FLAGS = (
    *("parallel_block", "gated_mlp", "causal", "tied_embeddings", "head_bias", "qk_norm"),
    *("parallel_norms", "pre_norms", "post_norms", "mlp_post_norm", "layer_scale"),
    *("residual_scale", "value_norm", "final_norm", "patch_bias", "input_norm", "sinks"),
    *("output_gate", "sub_norms", "patch_norms", "shared_embeddings", "features_bias", "frozen"),
)


def _check_count(where: str, key: str, value: Any, *, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= LARGEST:
        wanted = "a positive whole number" if least else "a whole number, 0 or more"
        told = "more" if whole and value > LARGEST else shown(value)
        hint = instead(value, lambda meant: type(meant) is int and least <= meant <= LARGEST)
        raise ModelError(f"{where}: {key}: expected {wanted} (at most 10^9), found {told}{hint}")


def _check_flag(where: str, key: str, value: Any) -> None:
    if not isinstance(value, bool):
        hint = instead(value, is_bool)
        raise ModelError(f"{where}: {key}: expected true or false, found {shown(value)}{hint}")


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which linear maps and norms carry a bias."""

    qkv: bool = False
    attention_output: bool = False
    mlp: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_flag("model: biases", field.name, getattr(self, field.name))


@dataclass(frozen=True, kw_only=True, repr=False)
class Model:
    """A stack of equal Transformer blocks with what stands before and after it.

    What it reads of other stacks are models of their own (`Model.parts`). Every field is checked
    when the model is made; a `ModelError` names the field that is wrong.
    """

    name: str
    family: str  # "vit", "decoder", or "encoder": of tokens, for others to read
    layers: int
    embed: int  # width of the residual stream
    mlp: int  # width of the MLP's hidden layer
    heads: int
    head_dim: int
    kv_heads: int  # heads: multi-head; 1: multi-query; between: grouped-query
    sequence: int  # tokens per sequence (image) when the plan does not say
    vocab: int = 0  # size of the token vocabulary; 0: none
    parallel_block: bool = False  # attention and MLP side by side, on one norm
    parallel_norms: bool = False  # there, each on a norm of its own (GPT-NeoX)
    gated_mlp: bool = False
    activation: str = "gelu"  # gelu, relu, silu
    causal: bool = False
    tied_embeddings: bool = False
    head_bias: bool = False  # of each word, in the output head (Phi 2)
    qk_norm: bool = False
    qk_norm_over: str = "head"  # each head, or all "heads" of a token at once (OLMo 2)
    qk_norm_kind: str = ""  # its kind, where it is not `norm` (Wan)
    branch: int = 0  # width of what attention gives and experts read, projected back; 0: embed
    value_norm: bool = False  # each head of values over its own mean square, unscaled (Gemma 4)
    norm: str = "layernorm"  # or rmsnorm (no bias, no mean)
    pre_norms: bool = True  # a norm in front of attention and of the MLP
    post_norms: bool = False  # a second norm after attention and after the MLP (Gemma 2)
    mlp_post_norm: bool = False  # of those two the one after the MLP alone (MaxText's Envy)
    # Norms stand behind each addition, of so many times the stream plus the branch (DeepNet; 1: the
    # first Transformer), instead of in front of branches. 0: they do not.
    deepnorm: float = 0.0
    # A norm more in front of each branch's output projection: of all heads, of the MLP's hidden
    # layer (sub-LN, Magneto).
    sub_norms: bool = False
    layer_scale: bool = False  # a learned scale of each channel of what a branch adds (DINOv2)
    residual_scale: bool = False  # a learned number of each layer, times the stream (Gemma 4)
    final_norm: bool = True
    positions: str = "learned"  # learned, rotary, fixed, relative (a bias of scores, T5) or none
    buckets: int = 32  # of relative positions
    # Tokens that a query sees, itself and those before it, in each layer of a round; 0: all.
    windows: tuple[int, ...] = ()
    chunked: bool = False  # windows do not slide: a query sees those of its own chunk (Llama 4)
    # Of a video's tokens those that a query sees in each layer of a round: all, those of its frame
    # (space), or those at its location (time); (): all.
    attends: tuple[str, ...] = ()
    global_heads: GlobalHeads | None = None  # of layers without a window (Gemma 4)
    biases: Biases = Biases()
    sinks: bool = False  # a learned logit of each head that no value goes with (gpt-oss)
    output_gate: bool = False  # what attention gives, times a sigmoid of the input (Qwen3-Next)
    delta: Delta | None = None  # linear attention in all layers but every n-th (Qwen3-Next)
    latent: Latent | None = None  # queries, keys and values out of latents (DeepSeek)
    index: Index | None = None  # which tokens a query of latents sees (DeepSeek V3.2)
    experts: Experts | None = None  # in place of the MLP
    lora: Lora | None = None  # adapters, which alone are trained
    patch: int = 0  # side of a square patch in pixels; 0: no patch embedding
    image: int = 0  # side of a square image in pixels, or height of another
    width: int = 0  # of an image in pixels; 0: as its height
    frames: int = 1  # of a video, each in patches
    channels: int = 3
    patch_bias: bool = True  # of the patch embedding
    patch_norms: bool = False  # norms of a patch's pixels and of its embedding (Dual PatchNorm)
    input_norm: bool = False  # a norm in front of the layers of a vit (CLIP)
    registers: int = 0  # learned tokens beside an image's patches, without positions (DINOv2)
    pooling: str = "none"  # none, mean, map (attention pooling with a probe), cls, last
    classes: int = 0  # outputs of the classification head; 0: none
    kept: int = 0  # patches that it reads, where it masks the others (an encoder of MAE); 0: all
    predicts: int = 0  # channels of each pixel, which are its loss (DiT, MAE); 0: none
    modulation: str = (
        "none"  # of norms and branches by a time: each "layer"'s own, or the "model"'s
    )
    labels: int = 0  # classes that a time goes with, one of which may be none (DiT)
    prompt: int = 0  # tokens of a text, given as features, that every layer attends to (Wan)
    prompt_embed: int = 0  # width of those features
    encoder: Model | None = None  # whose tokens every layer attends to, besides its own
    images: Model | None = None  # whose tokens stand in front of its own
    text: Model | None = None  # a tower of texts, whose embeddings images' are compared with
    contrast: str = "softmax"  # of all pairs of a batch, or sigmoid of each
    features: int = 0  # width of a tower's embedding, projected; 0: its own
    features_bias: bool = False
    shared_embeddings: bool = False  # of an encoder: its tokens are in its reader's table
    frozen: bool = False  # of what another model reads: not trained
    gives: str = "loss"  # or what it is to the model that reads it
    parameter_convention: str = "all"  # "all", or "block-matrices" as ViT-22B's 21.743 B counts
    note: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        where = f"model {self.name!r}" if isinstance(self.name, str) else "model"
        _check_words(self, where)
        for key in _POSITIVE:
            _check_count(where, key, getattr(self, key), least=1)
        if self.layers > MOST_LAYERS:
            raise ModelError(f"{where}: layers: at most {MOST_LAYERS:,}, found {self.layers:,}")
        for key in _NOT_NEGATIVE:
            _check_count(where, key, getattr(self, key), least=0)
        for key in _FLAGS:
            _check_flag(where, key, getattr(self, key))
        object.__setattr__(self, "windows", _checked_windows(self, where))
        object.__setattr__(self, "attends", check_attends(self, where))
        if not isinstance(self.biases, Biases):
            raise ModelError(f"{where}: biases: expected Biases, found {self.biases!r}")
        check_block(self, where)
        check_latent(self, where)
        check_delta(self, where)
        check_branch(self, where)
        check_global_heads(self, where)
        check_experts(self, where)
        check_lora(self, where)
        check_modulation(self, where)
        if self.family == "vit":
            check_vit(self, where)
        else:
            check_tokens(self, where)
        check_parts(self, where)

    def __repr__(self) -> str:
        kind = f"{self.family}, {self.layers} layers, embed {self.embed:,}"
        return f"Model({self.name!r}: {kind}, {show_count(self.parameters_all)} parameters)"

    @property
    def attention_width(self) -> int:
        """Width of the merged query heads, heads * head_dim (not always `embed`)."""
        return self.heads * self.head_dim

    @property
    def feature_width(self) -> int:
        """Width of a tower's embedding."""
        return self.features or self.embed

    @property
    def patches(self) -> int:
        """Patches per image or video, (image / patch)^2 if it is square; 0 without images."""
        if not self.patch:
            return 0
        return self.frames * (self.image // self.patch) * ((self.width or self.image) // self.patch)

    @property
    def image_tokens(self) -> int:
        """Tokens per image: the patches that are kept, the class token if there is one, and
        registers."""
        masked = self.patches - self.kept if self.kept else 0
        return self.image_positions - masked + self.registers

    @property
    def memory_tokens(self) -> int:
        """Tokens, besides its own, that every layer attends to."""
        return self.encoder.sequence if self.encoder else self.prompt

    @property
    def image_positions(self) -> int:
        """Tokens per image that have a position: the patches, and the class token."""
        return self.patches + (1 if self.pooling == "cls" else 0)

    @cached_property
    def round_layers(self) -> int:
        """Layers after which the kinds of layers begin anew: a pipeline stage has whole rounds."""
        return max(stack.round_layers for stack in graph_of(self).stacks)

    @cached_property
    def stacks(self) -> tuple[tuple[int, int], ...]:
        """Stacks of layers, each of rounds that are alike: rounds, and layers of a round."""
        return tuple((stack.rounds, stack.round_layers) for stack in graph_of(self).stacks)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The stacks that a step runs, in order: those that others read, then this model's own."""
        return parts_of(self)

    @cached_property
    def main(self) -> Model:
        """The stack with the most weights in its layers, of those that are trained: of a masked
        autoencoder the encoder, of a captioner that of images."""

        def many(part: Part) -> tuple[bool, int]:
            tensors = part.model.own_tensors
            return not part.model.frozen, sum(one.size for one in tensors if one.part == "block")

        return max(reversed(self.parts), key=many).model

    @cached_property
    def own_tensors(self) -> tuple[Tensor, ...]:
        """Every weight of this stack and its ends, in the order of the forward pass."""
        return _parameters(self)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every weight of the model, part by part in the order of the forward pass."""
        if len(self.parts) == 1:
            return self.own_tensors
        return tuple(
            tensor.of_part(part.name) for part in self.parts for tensor in part.model.own_tensors
        )

    @cached_property
    def trained_tensors(self) -> tuple[Tensor, ...]:
        """Every weight that has a gradient."""
        return tuple(tensor for tensor in self.tensors if tensor.trained)

    @cached_property
    def parameters_all(self) -> int:
        """Number of weights, every tensor counted."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def parameters(self) -> int:
        """Number of weights as the model's authors count them: the N of its published MFU.

        "all" counts every tensor. "block-matrices" counts the matrices of the blocks only:
        ViT-22B's published 21.743 B is 48 * (4 * 6144^2 + 2 * 6144 * 24576) = 21,743,271,936.
        """
        if self.parameter_convention == "block-matrices":
            return self.block_matrices
        return self.parameters_all

    @cached_property
    def active_parameters(self) -> int:
        """Number of weights that work on one token, counted as `parameters`: of all experts only
        those that it goes to, and none that work on an example's condition. Of several stacks each
        works on its own tokens."""
        return sum(part.model.own_active_parameters for part in self.parts)

    @cached_property
    def own_active_parameters(self) -> int:
        """The same of this stack and its ends."""
        return self._active(self.own_tensors)

    @cached_property
    def own_trained_parameters(self) -> int:
        """Those of them that have gradients."""
        return self._active(tensor for tensor in self.own_tensors if tensor.trained)

    def _active(self, tensors: Iterable[Tensor]) -> int:
        whole = self.parameter_convention == "all"
        counted = [
            tensor
            for tensor in tensors
            if whole or (tensor.part == "block" and tensor.kind == "matrix")
        ]
        once = of_examples(self)
        total = sum(tensor.size for tensor in counted if tensor.name not in once)
        if self.experts is None:
            return total
        of_experts = sum(tensor.size for tensor in counted if "expert" in tensor.axes)
        return total - of_experts + int(of_experts * self.experts.active(self.sequence))

    @cached_property
    def block_matrices(self) -> int:
        """Weights of the blocks that multiply every token: QKV, attention output and MLP."""
        return sum(
            tensor.size
            for tensor in self.tensors
            if tensor.part == "block" and tensor.kind == "matrix"
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the model as plain data that `load_model` reads back; defaults are left out."""
        data: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is not MISSING and value == field.default:
                continue
            if isinstance(value, Biases):
                value = {item.name: getattr(value, item.name) for item in fields(value)}
            elif isinstance(value, Delta | Experts | GlobalHeads | Index | Latent | Lora):
                value = {
                    item.name: _plain(getattr(value, item.name))
                    for item in fields(value)
                    if getattr(value, item.name) != item.default
                }
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Model):
                value = value.to_mapping()
            data[field.name] = value
        return data


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_words(model: Model, where: str) -> None:
    if not isinstance(model.name, str) or not _NAME.fullmatch(model.name):
        raise ModelError(
            f"model: name: expected letters, digits and . _ + - (at most 80), found {model.name!r}"
        )
    for key, choices in _CHOICES.items():
        value = getattr(model, key)
        if value not in choices:
            raise ModelError(
                f"{where}: {key}: unknown choice {shown(value)}{nearest(value, choices)}"
            )
    for key in ("note", "source"):
        if not isinstance(getattr(model, key), str):
            raise ModelError(f"{where}: {key}: expected text, found {getattr(model, key)!r}")


def _checked_windows(model: Model, where: str) -> tuple[int, ...]:
    """Return the windows of a round as whole numbers, or raise `ModelError`."""
    windows: Any = model.windows
    if not isinstance(windows, list | tuple):
        raise ModelError(f"{where}: windows: expected a list, as [4096, 0], found {windows!r}")
    for window in windows:
        _check_count(where, "windows", window, least=0)
    if any(windows) and not model.causal:
        raise ModelError(f"{where}: windows: need causal attention; use causal: true, or []")
    if model.chunked and not any(windows):
        raise ModelError(f"{where}: chunked: needs windows, the tokens of a chunk; use false")
    if windows and model.layers % len(windows):
        close = max(1, round(model.layers / len(windows))) * len(windows)
        raise ModelError(
            f"{where}: windows: {model.layers} layers are not whole rounds of {len(windows)};"
            f" the nearest number of layers is {close}"
        )
    return tuple(windows)
