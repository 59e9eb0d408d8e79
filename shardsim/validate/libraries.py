"""What training libraries do where a row does not say: what layers keep, kernels, pipelines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardsim.machine import Chip, Machine
from shardsim.model import Model
from shardsim.plan.plan import MeshAxis

COMBINED = "combined-1f1b"  # of `program.passes`
# Words for what is sent to experts beside another microbatch's work.
_BESIDE_OTHERS = r"(?<!no )(a2a|all-?to-?all|expert[- _]parallel[- _]comm\w*|1f1b)[- _]overlap"
TRAINER = "trainer"  # who runs published runs, where nothing else is known of their library
FULL: Mapping[str, Any] = {"save": [], "offload": []}
KEEPS_ALL: Mapping[str, Any] = {
    "save": ["qkv", "context", "attention_output", "mlp_hidden", "mlp_output", "rest"]
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """A training library: the words of a row that name it, and what it does by itself."""

    words: str
    remat: Mapping[str, Any]  # of a layer whose attention is fused
    implementation: str = TRAINER  # of `program.passes`
    attention: str = ""  # its fused kernel; "": see `kernel_of`
    fused_from: int = 0  # tokens of a sequence, where a row names no kernel
    remat_unfused: Mapping[str, Any] | None = None  # where that is something else
    precision: Mapping[str, Any] = field(default_factory=dict)  # keys of a plan file
    optimizer: str = "adamw"
    narrow_precision: Mapping[str, Any] = field(default_factory=dict)  # where products have 8 bits
    over_stages: Mapping[str, Any] = field(default_factory=dict)  # keys of a plan file
    context: Mapping[str, Any] = field(default_factory=dict)  # how a context axis attends
    microbatches_per_stage: int = 4
    microbatch: int = 0  # its sequences where a row does not say; 0: see `microbatches_per_stage`
    chunks: int = 0  # of a stage that is interleaved; 0: a row must say
    chips: Mapping[str, str] = field(default_factory=dict)  # what its published chips really are
    collective_matmul: bool = True  # else only where a row says so
    rings_beside_experts: bool = True  # else not where a model has experts
    whole_experts: bool = False  # an expert axis has the tensor axis inside
    by_block: bool = False  # computes whole layers again one by one, as few as must be
    # Models whose recipes run what is sent to experts beside another microbatch.
    beside_others: str = ""
    every_second_product: bool = False  # is what its "selective" computes again
    # Weights are whole over context and expert axes, state is split over data.
    state_over_data: bool = False
    offloads: Mapping[str, Any] | None = None  # what "custom with offload" keeps, if nothing else
    late_attention: str = "flash"  # its fused kernel on v6e and tpu7x
    rings_of_four: bool = False  # has a mesh of its own for an axis of four on a torus of 16 x 16

    def placed(self, mesh: tuple[MeshAxis, ...], machine: Machine) -> tuple[MeshAxis, ...]:
        """Return a mesh of one slice as the library places it."""
        if not self.rings_of_four or machine.shape != (16, 16):
            return mesh
        if sorted(axis.size for axis in mesh) != [4, 64]:
            return mesh
        sides = {4: 2, 64: 8}
        return tuple(
            replace(axis, torus=dict.fromkeys(("x", "y"), sides[axis.size])) for axis in mesh
        )


# `recompute_granularity` is none (NVIDIA/Megatron-LM, megatron/training/arguments.py); its
# distributed optimizer splits state over data, and keeps weights in float32 beside bf16 ones, which
# are cast once a step; benchmarks of it set `grad_reduce_in_fp32` to false, so that sums of
# gradients are in bf16 too, and microbatches of one sequence; an expert axis may take in that of
# tensors (arXiv 2504.14960). `tp_comm_overlap` is off: over a tensor axis what is forward waits.
# `recompute_method: block` computes some layers again and not the others.
MEGATRON = Library(
    words="megatron",
    remat=KEEPS_ALL,
    state_over_data=True,
    precision={"parameters": "bf16", "master": "f32"},
    microbatch=1,
    collective_matmul=False,
    by_block=True,
)
# Megatron as its recipes for H100 run it: of dense models `tp_comm_overlap` is on, of experts off,
# an expert lies whole on one GPU, so that an expert axis has that of tensors inside
# (`expert_tensor_parallel_size` 1), and `overlap_moe_expert_parallel_comm` is on for the largest
# Qwen3 (NVIDIA-NeMo/Megatron-Bridge at 067f987d, src/megatron/bridge/perf_recipes).
NEMO = replace(
    MEGATRON,
    words=r"megatron[-_ .]?bridge|\bnemo",
    collective_matmul=True,
    rings_beside_experts=False,
    whole_experts=True,
    beside_others=r"qwen3\W*235b",
)

LIBRARIES = (
    # `build_remat_spec` keeps the projections of attention, and its result only where it is not
    # fused (apple/axlearn at 006dddc6, axlearn/common/attention.py). Runs with 2,048 tokens are of
    # May 2024 or before (axlearn/experiments/text/gpt/fuji.py at 4dae7198), its configurations have
    # had fused attention since June (e0e93105), first the kernel of 2023, splash attention since
    # October, with one kernel of the gradient (a5f0b462; tpu_attention.py at 3f361084). Its runs on
    # v6e came in 2025.
    Library(
        words="axlearn",
        remat={"save": ["qkv", "attention_output"], "offload": []},
        remat_unfused={"save": ["qkv", "context", "attention_output"], "offload": []},
        attention="flash-2023",
        fused_from=2049,
    ),
    # `gradient_checkpointing` is true (stanford-crfm/levanter at 0096e24f, models/gpt2.py).
    # Marin trains with it.
    Library(words="levanter|marin", remat=FULL),
    # `scaled_dot_product_attention`, whose fused kernel is FlashAttention-2; activations are kept
    # unless a row says otherwise (products of 8 bits are never on the list of what its "selective"
    # keeps, `_save_list`); gradients travel in float32, the head multiplies in bf16. Over a context
    # axis keys and gradients go from member to member while nothing else runs. Over stages weights
    # stay gathered, microbatches are as many as stages, interleaved ones have two chunks. All its
    # published H100 have HBM2e and 500 W (pytorch/torchtitan at b5bcd76c).
    Library(
        words="torchtitan",
        remat=KEEPS_ALL,
        implementation="torchtitan",
        context={"keys": "ring", "overlap": False},
        attention="flash-2023",
        precision={"reduce": "f32"},
        narrow_precision={"bf16": ["head"]},
        over_stages={"accumulation": "gathered"},
        microbatches_per_stage=1,
        chunks=2,
        chips={"h100": "h100-500w"},
        collective_matmul=False,
        every_second_product=True,
    ),
    NEMO,
    MEGATRON,
    # Its `llama` and `llama-scan` compute whole layers again (AI-Hypercomputer/torchprime at
    # 1d2842b5, configs/model/remat); weights are made in bf16, the optimizer is Adafactor (at
    # 00d315c1, torch_xla_models/train.py).
    Library(
        words="torchprime",
        remat=FULL,
        precision={"parameters": "bf16"},
        optimizer="adafactor",
    ),
    # All its runs with a context axis: `remat_policy=custom context=device`.
    Library(words="maxtext#4687", remat={"save": ["context"]}),
    # `remat_policy: full` (AI-Hypercomputer/maxtext at e591f30cb, configs/base.yml). Of 26 custom
    # policies in benchmarks/maxtext_trillium_model_configs.py 23 offload the layers' input, 21
    # queries, keys and values, 10 what comes after attention. Its recipes for v6e and tpu7x set
    # `sa_block_*` to 1,024 or 2,048 forward and mostly 2,048 back, those of 2024 for v5p leave 512
    # (AI-Hypercomputer/tpu-recipes at c8cfe2f, training/trillium and training/ironwood).
    Library(
        words="maxtext|tpu-recipes",
        remat=FULL,
        offloads={"save": [], "offload": ["layer_input", "qkv"]},
        late_attention="flash-2048",
        rings_of_four=True,  # `hybrid_ring_64x4` (src/maxtext/utils/max_utils.py)
    ),
)


_UNFUSED = (
    r"\b(unfused|dot_product|(no|without|not) (flash|fused)|(vanilla|naive|eager) attention)\b"
)
# MaxText's `attention=flash` has been JAX's splash attention since January 2024 (d4d39937a); these
# recipes begin in September.
_SPLASH = "tpu-recipes"
_FUSED_GPU = "2206"  # FlashAttention is arXiv 2205.14135; it never ran on a V100


def paper_before(source: str, month: str) -> bool:
    """Return whether a source is a paper of before a month, by its number on arXiv.

    >>> paper_before("arXiv 2104.04473", "2205"), paper_before("arXiv 2205.05198", "2205")
    (True, False)
    """
    paper = re.search(r"arxiv[: ]*(\d{4})\.\d{4,5}", source.lower())
    return bool(paper and paper[1] < month)


def library_of(source: str, named: str = "") -> Library | None:
    """Return the library that a row names, or else that its source is about."""
    found = (
        one
        for text in (named, source)
        for one in LIBRARIES
        if text and re.search(one.words, text.lower())
    )
    return next(found, None)


def implementation_of(library: Library | None, chip: Chip, model: str = "", words: str = "") -> str:
    """Return what a library is known to do beyond a plan, of `program.passes`; `words` are a row's
    for its techniques."""
    if not library or chip.kind != "gpu":
        return TRAINER
    recipe = library.beside_others and re.search(library.beside_others, model.lower())
    return COMBINED if recipe or re.search(_BESIDE_OTHERS, words) else library.implementation


def kernel_of(
    chip: Chip, sequence: int, words: str, library: Library | None, source: str = ""
) -> str:
    """Return the attention that a row ran, by what it says of kernels and where it ran.

    "flash" alone was the kernel of 2023 on chips of that time; later chips came with today's.
    Fused kernels are usual from v5e on, and for long sequences anywhere; on GPUs since there is
    one, which a paper's number on arXiv tells.
    """
    if re.search(_UNFUSED, words):
        return "unfused"
    if chip.name == "v100" or (chip.kind == "gpu" and paper_before(source, _FUSED_GPU)):
        return "flash-2023" if "flash" in words else "unfused"
    late = chip.name in ("v6e", "tpu7x") or chip.kind == "gpu"
    if chip.kind == "tpu" and (own := re.search(r"\bflash-(2023|2048|two-kernels)\b", words)):
        return own[0]  # as a plan calls it
    if library and library.attention:
        fused = re.search("flash|splash", words) or sequence >= library.fused_from
        today = chip.kind == "tpu" and (late or "splash" in words)
        return (library.late_attention if today else library.attention) if fused else "unfused"
    if chip.name in ("v6e", "tpu7x") and library:
        return library.late_attention
    if late or "splash" in words or ("flash" in words and _SPLASH in source.lower()):
        return "flash"
    if "flash" in words:
        return "flash-2023"
    return "flash" if chip.name in ("v5e", "v5p") or sequence > 2048 else "unfused"


# What torchtitan's "selective" keeps of layers with products of 8 bits, which are not on its list.
ATTENTION_KEPT: Mapping[str, Any] = {"save": ["context"], "offload": []}


def every_second_product(model: Model) -> list[dict[str, Any]]:
    """Return what layers keep where the results of every second product are computed again, of
    queries, keys, values, output, gate, up and down in turn (PyTorch's selective checkpointing).

    A plan keeps the MLP's hidden layers whole or not at all, so one part of the layers keeps all
    products and another recomputes output and MLP: as many FLOPs and bytes in all.
    """
    keys = model.kv_heads * model.head_dim
    output, hidden = model.heads * model.head_dim, model.mlp
    again = keys + output + (hidden if model.gated_mlp else 0)
    share = again / (output + hidden * (2 if model.gated_mlp else 1))
    few = min(model.layers, round(share * model.layers))
    groups = [
        {"layers": model.layers - few, "save": [*_ATTENTION, "attention_output", "mlp_hidden"]},
        {"layers": few, "save": list(_ATTENTION)},
    ]
    return [group for group in groups if group["layers"]]


_ATTENTION = ("qkv", "context")
