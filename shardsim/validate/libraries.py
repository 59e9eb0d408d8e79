"""What training libraries do where a row does not say: what layers keep, and attention kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardsim.machine import Chip

FULL: Mapping[str, Any] = {"save": [], "offload": []}


@dataclass(frozen=True, kw_only=True)
class Library:
    """A training library: the words of a row that name it, and what it does by itself."""

    words: str
    remat: Mapping[str, Any]  # of a layer whose attention is fused
    attention: str = ""  # the fused kernel that it always took; "": see `kernel_of`
    offloads: Mapping[str, Any] | None = None  # what "custom with offload" keeps, if nothing else


LIBRARIES = (
    # `build_remat_spec` keeps the projections of attention, and its result only where it is not
    # fused (apple/axlearn at 006dddc6, axlearn/common/attention.py).
    Library(
        words="axlearn",
        remat={"save": ["qkv", "attention_output"], "offload": []},
        attention="flash-2023",
    ),
    # `gradient_checkpointing` is true (stanford-crfm/levanter at 0096e24f, models/gpt2.py).
    Library(words="levanter", remat=FULL),
    # `scaled_dot_product_attention`, whose fused kernel is FlashAttention-2; activations are kept
    # unless a row says otherwise (pytorch/torchtitan at b5bcd76c).
    Library(
        words="torchtitan",
        remat={"save": ["qkv", "context", "attention_output", "mlp_hidden", "mlp_output", "rest"]},
        attention="flash-2023",
    ),
    # `recompute_granularity` is none (NVIDIA/Megatron-LM, megatron/training/arguments.py).
    Library(
        words="megatron|nemo",
        remat={"save": ["qkv", "context", "attention_output", "mlp_hidden", "mlp_output", "rest"]},
    ),
    # `remat_policy: full` (AI-Hypercomputer/maxtext at e591f30cb, configs/base.yml). Of 26 custom
    # policies in benchmarks/maxtext_trillium_model_configs.py 23 offload the layers' input, 21
    # queries, keys and values, 10 what comes after attention.
    Library(
        words="maxtext|tpu-recipes",
        remat=FULL,
        offloads={"save": [], "offload": ["layer_input", "qkv"]},
    ),
)


def library_of(source: str) -> Library | None:
    """Return the library that a row's source is about."""
    found = (one for one in LIBRARIES if re.search(one.words, source.lower()))
    return next(found, None)


def kernel_of(chip: Chip, sequence: int, words: str, library: Library | None) -> str:
    """Return the attention that a row ran, by what it says of kernels and where it ran.

    "flash" alone was the kernel of 2023 on chips of that time; later chips came with today's.
    Fused kernels are usual from v5e on, and for long sequences anywhere.
    """
    late = chip.name in ("v6e", "tpu7x") or chip.kind == "gpu"
    if library and library.attention:
        return library.attention
    if late or "splash" in words:
        return "flash"
    if "flash" in words:
        return "flash-2023"
    return "flash" if chip.name in ("v5e", "v5p") or sequence > 2048 else "unfused"
