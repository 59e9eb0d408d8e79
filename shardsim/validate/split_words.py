"""What a row's `parallelism` says of its split: sizes by key, or a sentence ("fsdp 64, tp 4").

Every axis that is named has to have a size, or the row is refused: an axis that is left out would
make a row of another run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from shardsim.errors import FileError
from shardsim.machine import Chip
from shardsim.validate.libraries import Library
from shardsim.validate.words import (
    EXPERT_AXES,
    IN_WORDS,
    PARALLELISM,
    UNMODELLED_AXES,
    Split,
    shown,
    whole,
)

# Counts beside axes, by the words for them; `microbatch` is the sequences of one.
COUNTS = {
    **dict.fromkeys(
        ("microbatches", "num_microbatches", "num_pipeline_microbatches"), "microbatches"
    ),
    **dict.fromkeys(("ga", "grad_accum", "gradient_accumulation_steps"), "microbatches"),
    **dict.fromkeys(("microbatch", "mbs", "micro_batch", "micro_batch_size"), "microbatch"),
    **dict.fromkeys(("vpp", "vp", "virtual_pipeline", "virtual_stages"), "vpp"),
    "virtual_pipeline_model_parallel_size": "vpp",
    **dict.fromkeys(("gbs", "global_batch_size"), "batch"),
}
_LONGEST = 2000  # characters of a sentence that are read
_NAMES = {**PARALLELISM, **UNMODELLED_AXES}
_AXIS = "|".join(sorted(_NAMES, key=len, reverse=True))
_SIZED = re.compile(r"([a-z][a-z_0-9]*?)[\s\-_:=]*?(?:x|of)?[\s\-_:=(]*(\d{1,7})(?![\dx.])")
_TENSOR = re.compile(r"tensor|\btp\b|\b2-?d\b|model[- ](axis|parallel)|megatron|\bmodel\]")
# Words with a number that say no more than the row's other keys.
_HARMLESS = re.compile(
    r"v\d\w?|x|f|on|over|all|across|of|and|by|to|the|now|is|cores?|chips?|gpus?|devices?|.*slices?"
)
# Words that can only be axes, which must have a size where others have one.
_MUST = re.compile(
    r"(?<!no )(?<!without )(?<!async )\b(tensor|tp|context|cp|pipeline|pp)\b(?![- ]?strategy)"
)
# DeepSpeed's stages, and what PyTorch's FSDP calls them.
_ZERO = re.compile(r"\bzero[- _]*(?:stage[- _:=]*)?(\d+)\b|\bshard_grad_op\b")
_SHARDED = re.compile(r"(?<!no )(?<!without )\b(fsdp|full_shard|shard_grad_op)\b")
_ONLY_DATA = (
    r"data[- ]parallel only|pure data[- ]parallel|\bpure dp\b|\bdata only\b"
    r"|^\W*(data([- ]parallel(ism)?)?|d?dp)\W*$"
)
_LIST = r"[(\[{]\s*([^()\[\]{}]*?)\s*[)\]}]"
_KIND = r"(?:[- ]?(?:model[- ])?(?:parallel(?:ism)?|axis|stages?|shards?|sharding|dim(?:ension)?))"
_OF = r"(?:(?:of )?(?:size|degree)|of|over)"
# How sentences put an axis and its size, as "AXIS SIZE".
_PUT = (
    (r"\bvirtual_pipeline_model_parallel_size\b", "vpp"),
    (
        r"\b(virtual|interleaved)[- _](pipeline|pp|stages?)([- _](parallel\w*|stages?|size))*\b",
        "vpp",
    ),
    (r"\b(\d+) (vpp|virtual stages)\b(?![\s:=]*\d)", r"vpp \1"),
    (r"\bgradient[- ]accumulation( steps)?\b", "microbatches"),
    (r"\bmicro[- _]?batch[- _]?size\b", "microbatch"),
    (r"\b([a-z]+)_model_parallel_size\b", r"\1"),
    (r"\bmicro[- _](batch(es)?)\b", r"micro\1"),
    (r"fully[- ]sharded data[- ]parallel(ism)?", "fsdp"),
    (rf"\b(\d+)[- ]way (?:\w+[- ])??({_AXIS})\b{_KIND}*", r"\2 \1"),
    (r"\b(\d+) pipeline stages?", r"pipeline \1"),
    (rf"\b({_AXIS}){_KIND}*[\s:=]*{_OF}?[\s:=]*(\d+)\b(?!x)", r"\1 \2"),
    (
        rf"\b({_AXIS}) (\d+) ?\(?(?:over|across|on|via) (?:the )?(?:dcn|slices|pods)\b",
        r"dcn_\1 \2",
    ),
    (rf"\bdcn[: ]+({_AXIS})[\s:=]*(\d+)", r"dcn_\1 \2"),
)


@dataclass
class Said:
    """What a row says of its split."""

    text: str
    sizes: Split
    counts: dict[str, int] = field(default_factory=dict)  # microbatches, virtual stages ...
    replicated: bool = False  # data parallel only
    unknown_tensor: bool = False  # there is a tensor axis, of a size that is not stated
    # DeepSpeed's stage: state (1), gradients (2), weights (3) split over data.
    zero: int | None = None
    unread: list[str] = field(default_factory=list)  # words with a number, of no meaning here

    def rest(self, chip: Chip, library: Library | None) -> str | None:
        """Return the role of the devices that the sizes leave over; None: see `Split.mesh`."""
        inside = self.sizes.inside
        if self.sizes.rest or self.replicated:
            return self.sizes.rest or "data"
        if "fsdp" in inside:
            return None
        gpu = chip.kind == "gpu" and bool({"tensor", "pipeline"} & set(inside))
        gpu |= bool(library and library.state_over_data)
        return "data" if "data" in inside or gpu else "fsdp"

    def fold(self, devices: int, inside: bool = False) -> str:
        """Take the tensor axis out of an expert axis that has it inside, as is known of a library
        or as sizes that multiply to more than there are of GPUs say; return how, in words.

        Then an expert lies whole on one GPU; a plan has parts of it on all of the tensor axis.
        """
        sizes = self.sizes.inside
        over = prod(sizes.values()) / devices
        tensor, experts = sizes.get("tensor", 1), sizes.get("expert", 1)
        over = max(over, tensor) if inside else over
        if over <= 1 or tensor % over or experts % over:
            return ""
        sizes["expert"] = int(experts / over)
        return (
            f"parallelism: experts over {experts}, tensor parallelism inside: taken as "
            f"{sizes['expert']} and tensors of {tensor}"
        )


def split_of(said: Any, experts: bool, library: Library | None, stage: Any = None) -> Said:
    """Read a row's `parallelism`, and its `zero_stage` where that stands beside it.

    Raise `FileError` where it names an axis without a size, or a stage that there is not.
    """
    entries = said if isinstance(said, Mapping) else {}
    values = list(entries.values()) if entries else said if isinstance(said, list) else [said or ""]
    text = " ; ".join(map(str, values))[:_LONGEST].lower()
    found = Said(text, Split(experts=experts))
    for key, size in _flat(entries):
        if named := re.fullmatch(r"zero(?:_?stage)?_?(\d*)", key):
            found.zero = _stage(named[1] or size, f"parallelism.{key}")
            found.sizes.add("data", size if named[1] else 1)
        elif key in COUNTS:
            found.counts[COUNTS[key]] = whole(size, f"parallelism.{key}")
        elif (given := _size(key, size)) is not None:
            found.sizes.add(key, given)
    sizes = found.sizes
    if zero := _ZERO.search(text):
        found.zero = _stage(zero[1] or 2, "parallelism")
    if stage is not None:
        found.zero = _stage(stage, "zero_stage")
    if not (sizes.inside or sizes.outside or sizes.rest):
        _sentence(_ZERO.sub(" ", text), found)
    if (found.zero or 0) > 1 and "fsdp" not in sizes.inside | sizes.outside:
        _shard_data(sizes)
    elif found.zero in (0, 1):
        found.replicated = True
    stated = bool(sizes.inside or sizes.outside or sizes.rest)
    found.replicated |= re.search(_ONLY_DATA, text) is not None
    if "vpp" in found.counts and "pipeline" not in sizes.inside | sizes.outside:
        found.unread.append(f"virtual pipeline {found.counts['vpp']}, without stages")
    if "interleaved" in text and "vpp" not in found.counts:
        if not (library and library.chunks):
            raise FileError("parallelism: interleaved: missing the stages of a rank (vpp 4)")
        found.counts["vpp"] = library.chunks
    found.unknown_tensor = "tensor" not in sizes.inside and (
        ("unknown" in text and "tensor" in text)
        or (not stated and not found.replicated and _TENSOR.search(text) is not None)
    )
    return found


def _stage(said: Any, key: str) -> int:
    """Return a stage of DeepSpeed's; 0 splits nothing."""
    if str(said).strip() not in ("0", "1", "2", "3"):
        raise FileError(f"{key}: ZeRO has stages 0 to 3, not {shown(said)}")
    return int(said)


def _shard_data(sizes: Split) -> None:
    """Make an axis of data, or what sizes leave over, one that splits weights and gradients too."""
    for over in (sizes.inside, sizes.outside):
        if "data" in over:
            over["fsdp"] = over.pop("data")
    if "fsdp" not in sizes.inside:
        sizes.rest = "fsdp"


def _flat(entries: Mapping[Any, Any], over: str = "") -> Iterator[tuple[str, Any]]:
    """Yield axes and sizes, those of groups (`ici`, `dcn`, a mesh) too."""
    for name, value in entries.items():
        key = str(name)
        if isinstance(value, Mapping):
            yield from _flat(value, "dcn_" if key.startswith("dcn") else over)
        else:
            yield f"{over}{key}", value


def _size(key: str, said: Any) -> Any:
    """Return the size of an axis, or None of a key with a remark."""
    if re.fullmatch(r"-?[\d.]+", str(said)):
        return said
    name = re.sub(r"^(dcn|ici)_|((_model)?_parallel(ism)?)?(_size|_degree)?$", "", key)
    if name not in _NAMES or said is None:
        return None
    if isinstance(said, bool):  # a switch: only fully sharded is something without a size
        return "rest" if said and PARALLELISM.get(name) == "fsdp" else None
    if str(said).lower() in ("rest", "auto", "all", "remaining"):
        return "rest"
    if isinstance(said, str) and re.match(r"\s*\d", said):
        return whole(re.sub(r"[(,;\[].*", "", said), f"parallelism.{key}")
    raise FileError(f"parallelism.{key}: expected a size, found {shown(said)}")


def _sentence(text: str, found: Said) -> None:
    """Read the sizes of a sentence."""
    text = _zipped(text)
    many = "|".join(IN_WORDS)
    text = re.sub(rf"\b({many})(?=[- ]way\b| pipeline)", lambda m: str(IN_WORDS[m[1]]), text)
    for pattern, put in _PUT:
        text = re.sub(pattern, put, text)
    every = [(word.strip("_"), size) for word, size in _SIZED.findall(text)]
    named = dict(reversed(every))
    found.unread += re.findall(r"\b\d+[- ]way [a-z]+", text)
    found.unread += [f"{w} {n}" for w, n in every if n != named[w] and {w} & {*COUNTS, *_NAMES}]
    for name, size in named.items():
        axis = name.removeprefix("dcn_")
        if name in COUNTS:
            found.counts[COUNTS[name]] = whole(size, f"parallelism.{name}")
        elif axis in _NAMES:
            found.sizes.add(name, size)
        elif not _HARMLESS.fullmatch(name):
            found.unread.append(f"{name} {size}")
    if "fsdp" not in found.sizes.inside | found.sizes.outside and _SHARDED.search(text):
        found.sizes.rest = "fsdp"
    if not (found.sizes.inside or found.sizes.rest) or "unknown" in text:
        return
    roles = {_NAMES.get(word.removeprefix("dcn_")) for word in named}
    for word in _MUST.findall(text):
        if _NAMES[word] not in roles:
            raise FileError(f"parallelism: '{word}' without its size")


def _zipped(text: str) -> str:
    """Put lists of axes and of sizes, "(data, fsdp) = (2, 64)", as axes with sizes."""
    lists = [
        (one[0], re.split(r"[\s,]+|(?<=\d)x(?=\d)", one[1])) for one in re.finditer(_LIST, text)
    ]
    names = [words for _, words in lists if all(map(_is_axis, words))]
    for written, one in lists:
        if len(one) < 2 or not all(map(_is_size, one)):
            continue
        same = next((axes for axes in names if len(axes) == len(one)), None)
        if same is None:
            raise FileError(f"parallelism: {written} without the names of its axes")
        pairs = ", ".join(f"{axis} {size}" for axis, size in zip(same, one, strict=True))
        text = text.replace(written, pairs, 1)
    return text


def _is_size(word: str) -> bool:
    return re.fullmatch(r"-?\d+", word) is not None


def _is_axis(word: str) -> bool:
    plain = word.strip("'\"").removeprefix("dcn_")
    return plain in _NAMES or plain in EXPERT_AXES
