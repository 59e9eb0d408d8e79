"""What a model is made of: the options of its block, from which everything else follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which linear maps and norms carry a bias."""

    qkv: bool = False
    attention_output: bool = False
    mlp: bool = False
    norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """A stack of equal Transformer blocks with what stands before and after it."""

    name: str
    family: str  # "vit" or "decoder"
    layers: int
    embed: int  # width of the residual stream
    mlp: int  # width of the MLP's hidden layer
    heads: int
    head_dim: int
    kv_heads: int  # heads: multi-head; 1: multi-query; between: grouped-query
    sequence: int  # tokens per sequence (image) when the plan does not say
    vocab: int = 0  # size of the token vocabulary; 0: none
    parallel_block: bool = False  # attention and MLP side by side, on one norm
    gated_mlp: bool = False
    activation: str = "gelu"  # gelu, relu, silu
    causal: bool = False
    tied_embeddings: bool = False
    qk_norm: bool = False
    norm: str = "layernorm"  # or rmsnorm (no bias, no mean)
    post_norms: bool = False  # a second norm after attention and after the MLP (Gemma 2)
    final_norm: bool = True
    positions: str = "learned"  # learned, rotary, fixed or none
    biases: Biases = Biases()
    patch: int = 0  # side of a square patch in pixels; 0: no patch embedding
    image: int = 0  # side of a square image in pixels
    channels: int = 3
    pooling: str = "none"  # none, mean, map (attention pooling with a probe), cls
    classes: int = 0  # outputs of the classification head; 0: none
    parameter_convention: str = "all"  # "all", or "block-matrices" as ViT-22B's 21.743 B counts
    note: str = ""
    source: str = ""
