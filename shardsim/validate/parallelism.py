"""How a row's run was split: sizes by role, read from keys, lists or a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardsim.errors import FileError, nearest
from shardsim.validate.words import plain, shown, whole

# Words for the axes of parallelism, by the role that they have here.
PARALLELISM: Mapping[str, str] = {
    "dp": "data",
    "ddp": "data",
    "data": "data",
    "replica": "data",
    "replicate": "data",
    "dp_replicate": "data",
    "data_replicate": "data",
    "zero1": "data",
    "zero2": "data",
    "fsdp": "fsdp",
    "fsdp_transpose": "fsdp",
    "dp_shard": "fsdp",
    "data_shard": "fsdp",
    "shard": "fsdp",
    "zero": "fsdp",
    "zero3": "fsdp",
    "zero_3": "fsdp",
    "tp": "tensor",
    "tensor": "tensor",
    "tensor_model": "tensor",
    "tensor_transpose": "tensor",
    "tensor_sequence": "tensor",
    "model": "tensor",
    "mp": "tensor",
    "mdl": "tensor",
    "sp": "context",
    "cp": "context",
    "sequence": "context",
    "context": "context",
    "seq": "context",
    "ulysses": "context",
    "pp": "pipeline",
    "pipe": "pipeline",
    "pipeline": "pipeline",
    "pipeline_model": "pipeline",
    "stage": "pipeline",
    "stages": "pipeline",
}
_COUNTS = {
    "microbatches": "microbatches",
    "num_microbatches": "microbatches",
    "gradient_accumulation": "microbatches",
    "gradient_accumulation_steps": "microbatches",
    "microbatch": "microbatch",
    "micro_batch": "microbatch",
    "microbatch_size": "microbatch",
    "micro_batch_size": "microbatch",
    "mbs": "microbatch",
    "interleave": "interleave",
    "vpp": "interleave",
    "virtual_pipeline": "interleave",
    "virtual_stages": "interleave",
}
# Axes that are not modelled; a size of 1 means that they are not used.
_ABSENT = ("ep", "expert", "experts", "autoregressive", "track")
_REST = ("-1", "rest", "auto", "all", "remaining")
_SIZED = re.compile(r"([a-z][a-z_0-9]*?)[\s\-_:=]*?(?:x|of)?[\s\-_:=(]*(\d{1,7})(?![\dx.])")
_WAY = re.compile(r"(\d{1,7})[- ]?way[- ]([a-z_]+)")
_TENSOR = re.compile(r"tensor|\btp\b|\b2-?d\b|model[- ](axis|parallel)|megatron|\bmodel\]")


@dataclass
class Parallelism:
    """Sizes by role inside a slice and over slices, and what else the row says of the split."""

    inside: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # microbatches, microbatch, interleave
    rest: str | None = None  # the role that takes what is left, where the row says
    unknown_tensor: bool = False  # there is a tensor axis, of a size that is not stated
    replicated: bool = False  # data parallel only
    notes: list[str] = field(default_factory=list)


def parallelism_of(said: Any) -> Parallelism:
    """Read a row's `parallelism`: a mapping, a list, or a text such as "fsdp 64, tp 4"."""
    found = Parallelism()
    text = _text(said)
    entries = _entries(said)
    for key, value in entries:
        _add(found, key, value)
    if not entries or not (found.inside or found.outside or found.rest):
        _read_text(found, text)
    stated = found.inside or found.outside or found.rest
    found.replicated = "data parallel only" in text or "pure data parallel" in text
    found.unknown_tensor = "tensor" not in found.inside and (
        ("unknown" in text and "tensor" in text)
        or (not stated and not found.replicated and _TENSOR.search(text) is not None)
    )
    return found


def _text(said: Any) -> str:
    if isinstance(said, Mapping):
        return " ".join(str(value) for value in said.values())[:2000].lower()
    if isinstance(said, list):
        return ", ".join(map(str, said))[:2000].lower()
    return "" if said is None else str(said)[:2000].lower()


def _entries(said: Any) -> list[tuple[str, Any]]:
    """Return (key, value) of what is given key by key."""
    found: list[tuple[str, Any]] = []
    if isinstance(said, Mapping):
        for key, value in said.items():
            if isinstance(value, Mapping):  # {ici: {fsdp: 64}, dcn: {data: 2}}
                over = "dcn_" if plain(key).startswith("dcn") else ""
                found += [(over + plain(inner), size) for inner, size in value.items()]
            else:
                found.append((plain(key), value))
    for item in said if isinstance(said, list) else []:
        if isinstance(item, Mapping):
            found += _entries(item)
        elif isinstance(item, list) and len(item) == 2 and isinstance(item[0], str):
            found.append((plain(item[0]), item[1]))
    return found


def _name(key: str) -> tuple[str, bool]:
    """Return a key without what trainers add to it, and whether it is an axis over slices."""
    outside = key.startswith("dcn_")
    key = key.removeprefix("dcn_").removeprefix("ici_")
    for ending in ("_size", "_degree", "_dim", "_axis", "_world", "_ways"):
        key = key.removesuffix(ending)
    for ending in ("_parallelism", "_parallel"):
        key = key.removesuffix(ending)
    return key.replace("_model_parallel", "_model").replace("_parallel", ""), outside


def _add(found: Parallelism, key: str, value: Any) -> None:
    """Add one entry; words that are no size are remarks, and switches are no sizes."""
    name, outside = _name(key)
    if value is None or isinstance(value, (bool, list, Mapping)):
        return
    rest = str(value).strip().lower() in _REST
    if isinstance(value, str) and not rest and not re.fullmatch(r"\s*\d+\s*", value):
        return
    if name in _COUNTS:
        found.counts[_COUNTS[name]] = whole(value, f"parallelism.{key}")
    elif name in _ABSENT:
        if not rest and value not in (1, "1"):
            raise FileError(f"parallelism.{key}: {shown(value)}: this axis is not modelled")
    elif name not in PARALLELISM:
        if value not in (0, 1, "0", "1"):
            raise FileError(f"parallelism: unknown key '{key}'{nearest(key, PARALLELISM)}")
    elif rest:
        if not outside:
            found.rest = PARALLELISM[name]
    else:
        if value == 0:
            return
        sizes = found.outside if outside else found.inside
        role, size = PARALLELISM[name], whole(value, f"parallelism.{key}")
        sizes[role] = sizes.get(role, 1) * size


def _read_text(found: Parallelism, text: str) -> None:
    """Read `fsdp 64, tp=4`, `TP8 x DP16`, `16-way pipeline` out of a sentence."""
    pairs = [(word, size) for size, word in _WAY.findall(text)]
    pairs += _SIZED.findall(_WAY.sub(" ", text))
    for word, size in pairs:
        name, outside = _name(plain(word))
        sizes = found.outside if outside else found.inside
        if name in _COUNTS:
            found.counts.setdefault(_COUNTS[name], whole(int(size), "parallelism"))
        elif name in PARALLELISM and PARALLELISM[name] not in sizes and int(size) > 0:
            sizes[PARALLELISM[name]] = int(size)
    if not found.inside and re.search(r"\b(fsdp|zero-?3)\b", text):
        found.rest = "fsdp"
