"""What a row in the words of its source says that nothing reads: noted, or refused where it makes
another run of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from shardsim.errors import FileError
from shardsim.machine import Chip, Machine
from shardsim.model import Model
from shardsim.validate.dims import UNMODELLED_KEYS
from shardsim.validate.figures import unread_figures
from shardsim.validate.job import says_a_slice
from shardsim.validate.words import UNMODELLED_AXES, UNSAID, number, shown, whole

SOME_TOKENS = "attention to some of the tokens only"
# What is not modelled, by the words for it in what a row says of its split and its attention.
_SPLITS = (
    (r"hsdp(?!.*\bdp_shard)", "HSDP without the sizes of its two axes (dp_replicate, dp_shard)"),
    (r"zero[- ]bubble|dualpipe|\bzbv?\b", "a pipeline schedule other than 1F1B and interleaving"),
    (r"\b(sp|seq|sequence)([- _]parallel(ism)?)?[ =:x]*(?!1\b)\d+", "an axis over the sequence "
     "that is not said to gather keys and values (context does)"),
    (r"sliding|local[- ](window|attention)|window(ed)? attention|(linear|sparse) attention",
     SOME_TOKENS),
)  # fmt: skip
# What is not modelled of a whole run, by the words for it in anything a row says but its notes.
_OTHER_RUNS = (
    (r"\b(q?lora|peft)\b|\badapters?\b", "weights beside frozen ones (LoRA, adapters)"),
    (r"\bfrozen\b|\bfreez", "frozen weights"),
    (r"\b(dpo|rlhf|ppo|grpo)\b|distill|reference model", "a second model beside the trained one"),
    (r"\b(decode|decoding|inference|serving|prefill)\b", "anything but training"),
    (r"cross[- ]attention", "cross-attention"),
    (r"(forward|fwd)( pass)? only|bf16 (backward|bwd|gradients of)|backward in bf16",
     "8-bit products, or work, in the forward pass only"),
    (r"\bdrhs|\bwgrad in bf16|bf16 wgrad", "gradients of weights in more bits than other products"),
    (r"(int8|fp8|float8)[^,;]* (for|in) [^,;]* only", "8 bits in some of the products only"),
)  # fmt: skip
# Keys of a plan that a row in words may have as they are; others of its keys are words.
PLAN_KEYS = (
    "offload_optimizer",
    "offload_parameters",
    "vocab_tiles",
    "compiler_options",
    "accumulation",
    "execution",
    "fused_projections",
    "lengths",
    "overlap",
    "pipeline_interleave",
    "pipeline_schedule",
    "stage_layers",
    "context",
    "experts",
    "rules",
)
# Keys that say what a row is or how sure it is, and nothing of what ran.
_REMARKS = re.compile(
    r"(notes?|source|url|date|confidence|id|about|name|version|commit"
    r"|hardware|loss|host|hosts|nodes|family|kind|task|dataset|steps|hours|compiler_flags|peak)$"
    r"|.*(_derived|_confirmed|_assumed|_stated|_gib|_gb|_counts|_pct|_published|_notes?"
    r"|_per_chip|_printed|_jax|_libtpu|_version)$|train_.*|published.*|mfu.*|hfu.*|peak_.*"
)
LIBRARY_KEYS = ("library", "framework", "trainer", "codebase", "software")
_READ = {
    *("model", "dims", "chip", "chips", "slices", "topology", "parallelism", "global_batch"),
    *("per_device_batch", "seq", "precision", "optimizer", "remat", "tricks", "attention"),
    *("measured", "mfu_formula", "accounting", "microbatches", "microbatch"),
    *("gradient_accumulation_steps", "zero_stage"),
    *LIBRARY_KEYS,
}
# Techniques that are read somewhere, that every plan has, or that are no work.
_TRICKS = re.compile(
    r"async|overlap|collective|all[_-]?reduce|all[_-]?gather|reduce[_-]?scatter|fused|flash|splash"
    r"|attention|parallel (attn|layers)|norm|bias|glu|relu|gelu|silu|mqa|gqa|rope|embedding|scan"
    r"|synthetic|reused|vocab_tiling|offload|bf16|bfloat16|fp8|int8|quanti|dropless|drop(ping)?\b"
    r"|capacity|megablox|gmm|grouped matmul|routing|router|balanc|sort vjp|weight_sum|logit|window"
    r"|moe|gating|dispatch|expert|tiles|sa_block|ulysses|ring|striped|accumulation|optimizer"
    r"|compile\b|cuda graph|remat|checkpoint|packing|splitting|split_physical|hybrid_ring"
)
# Words that are read of other keys, or say what holds without them; and what holds of others.
_KNOWN: Mapping[str, tuple[str, str]] = {
    "precision": (
        r"\bbf16|bfloat16|f(p|loat)?32|f(p|loat)?8|int8|fp4|mixed|8[- ]?bit|state|moment|weight",
        "products are taken to be in bf16",
    ),
    "optimizer": (
        r"adam|adafactor|sgd|momentum|zero|fsdp|shard|bf16|\bmu\b|moment|state|offload|host",
        "taken as AdamW",
    ),
    "attention": (
        r"flash|splash|fused|dot|sdpa|auto|cudnn|xla|vanilla|standard|naive|softmax|eager|kernel"
        r"|pallas|causal|full|global|[mg]qa|mha|mla|ring|ulysses|context|gather|window|none|default"
        r"|latent|head|block|scores|striped|zig|balanc",
        "the usual kernel of the chip is taken",
    ),
    "mfu_formula": (
        r"halved|12 ?\*? ?l|palm|full attention|attention in full|\b6 ?\*? ?n|maxtext|megatron|mfu",
        "FLOPs are counted as PaLM does",
    ),
}
_EXPERTS = r"\bexperts?\b(?! parallel(ism)? 1\b)|\bep ?\d"
_OF_ATTENTION = ("kernel", "window", "skips_masked_blocks", "source", "note")
_COUNTS = ("seq", "chips", "slices", "microbatches", "microbatch", "gradient_accumulation_steps")


def tricks_of(said: Any) -> list[Any] | None:
    """Return a row's techniques as a list; of a mapping those that are on, with their values."""
    if isinstance(said, Mapping):
        on = {key: value for key, value in said.items() if value not in (False, None)}
        return [str(key) if value is True else f"{key}={value}" for key, value in on.items()]
    if isinstance(said, str):
        return [said]
    if said is not None and not isinstance(said, list):
        raise FileError(f"tricks: expected a list of techniques, found {shown(said)}")
    return said


def check_counts(row: Mapping[str, Any]) -> None:
    """Raise `FileError` for a count that is 0 or no number, which would pass for one not stated."""
    for key in _COUNTS:
        if key in row and not row[key] and row[key] != "":
            whole(row[key], key)
    if not isinstance(row.get("dims") or {}, Mapping) or row.get("dims") in (False, 0):
        raise FileError(f"dims: expected a mapping of keys, found {shown(row['dims'])}")


def notes_on(
    row: Mapping[str, Any], tricks: list[Any] | None, machine: Machine | None, chip: Chip
) -> list[str]:
    """Return what a row says in words that nothing reads, key by key."""
    notes = []
    if unknown := [one for one in tricks or () if not re.search(_TRICKS, str(one).lower())]:
        notes.append(f"tricks: not read: {'; '.join(map(str, unknown))[:200]}")
    attention = row.get("attention")
    if isinstance(attention, Mapping):
        if more := [str(key) for key in attention if key not in _OF_ATTENTION]:
            notes.append(f"attention: not read: {', '.join(more)[:200]}")
        attention = attention.get("kernel")
    figures = row.get("measured")
    counted = isinstance(figures, Mapping) and re.search("mfu|flops", f"{[*figures]}".lower())
    for key, (known, instead) in _KNOWN.items():
        said = attention if key == "attention" else row.get(key)
        words = str(said or "").lower()
        if key == "mfu_formula" and not counted:
            continue
        if words and not words.startswith(UNSAID) and not re.search(known, words):
            notes.append(f"{key}: {shown(said)} is not known; {instead}")
    if more := unread_figures(row.get("measured")):
        notes.append(f"measured: not read: {', '.join(more)[:200]}")
    if (topology := row.get("topology")) and not says_a_slice(str(topology), chip):
        notes.append(f"topology: not read: {shown(topology)}")
    if unread := [key for key in row if not _is_read(str(key))]:
        notes.append(f"not read: {', '.join(sorted(map(str, unread)))[:200]}")
    if row.get("compiler_flags"):
        notes.append("compiler_flags: not read; a plan's compiler_options are")
    nodes = row.get("nodes") or row.get("hosts")
    if machine is not None and chip.kind == "gpu" and nodes:
        chips = whole(nodes, "nodes") * prod(chip.max_slice)
        if chips != machine.chips:
            notes.append(f"nodes: {nodes} are {chips} chips, not {machine.chips}")
    return notes


def note_on_batch(row: Mapping[str, Any], batch: int, devices: int, steps: int) -> list[str]:
    """Return a note where sequences per device say another batch than the one that counts."""
    if row.get("global_batch") is None or row.get("per_device_batch") is None:
        return []
    said = number(row["per_device_batch"], "per_device_batch") * devices * steps
    if abs(said - batch) <= 0.01 * batch:
        return []
    return [f"per_device_batch: {said:,.0f} in all, but global_batch is {batch:,}, which counts"]


def refuse_splits(said: Mapping[str, str], model: Model) -> None:
    """Raise `FileError` where what a row says of its split and its attention is not modelled."""
    if model.experts is None and re.search(_EXPERTS, said["parallelism"]):
        raise FileError(f"parallelism: not modelled: {UNMODELLED_AXES['experts']}")
    for key, text in said.items():
        for pattern, what in _SPLITS:
            if re.search(pattern, text) and not (what == SOME_TOKENS and model.windows):
                raise FileError(f"{key}: not modelled: {what}")


def _is_read(key: str) -> bool:
    return key in _READ or key in PLAN_KEYS or _REMARKS.fullmatch(key.lower()) is not None


def refuse_other_runs(row: Mapping[str, Any]) -> None:
    """Raise `FileError` where a row says that something else ran than training of a whole model."""
    for key in ("tricks", "task", "model", "precision", "optimizer", "remat", "parallelism"):
        for pattern, what in _OTHER_RUNS:
            if re.search(pattern, str(row.get(key) or "").lower()[:2000]):
                raise FileError(f"{key}: not modelled: {what}")
    for key, value in row.items():
        name = str(key).lower()
        if key in _READ or value in (None, False, 0, "none") or _is_read(name):
            continue
        if re.search(UNMODELLED_KEYS, name):
            raise FileError(f"{key}: not modelled")
