"""What a row in the words of its source says and nothing reads: a note on each, never nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from shardsim.errors import FileError
from shardsim.machine import Chip, Machine
from shardsim.validate.figures import unread_figures
from shardsim.validate.job import says_a_slice
from shardsim.validate.words import UNSAID, number, shown, whole

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
