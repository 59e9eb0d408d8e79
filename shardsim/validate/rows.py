"""Published runs as plans: reading a row of a runs file and filling in what it leaves open.

A row names dims, chip, chips, slices, topology, parallelism, batch, sequence and remat, in the
words of its source. What a source leaves out is filled by fixed rules, listed in `RULES`; a row
never carries a number of its own into the prediction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardsim.errors import FileError, ShardsimError
from shardsim.machine import Chip, Machine
from shardsim.model import Model
from shardsim.plan.remat import Remat
from shardsim.validate.dims import dims_of, model_of, sequence_of
from shardsim.validate.measured import accounting_of, measured_mfu, measured_rate
from shardsim.validate.parallelism import Parallelism, parallelism_of
from shardsim.validate.remat_words import remat_of
from shardsim.validate.slices import chip_of, machine_of
from shardsim.validate.words import ROW, find, mapping, number, shown, whole

RULES = (
    "attention: fused where the row names flash or splash attention, on v6e, tpu7x and GPUs, and "
    "for sequences over 2,048; elsewhere scores are written to HBM",
    "overlap on v2 to v4: only what the row's list of techniques names (there it was opt-in); "
    "a row without such a list, and every later chip: collective matmul and weight gathers "
    "overlap; reductions of gradients do not (the published option sets name all-gathers only)",
    "remat not stated or not understood: the least recomputation that fits in HBM, of none, dots "
    "and full",
    "parallelism not stated: the rest of the slice is fully sharded (replicated where the row says "
    "data parallel, gives only a data axis, sizes its fsdp axis, or splits a GPU job by tensor or "
    "pipeline); a tensor axis without a size: 1 to 16, and the median",
    "sizes that do not divide a slice but the whole job count the whole job; pipeline stages, then "
    "data, then the others go over the slices or GPU nodes; context axes split parameters too",
    "a pipeline's microbatches not stated: four per stage",
    "topology not stated: the vendor's default slice; mesh axes lie on it as JAX lays them; slices "
    "not stated: one, or as many full pods as the chips make",
    "batch not stated: per-device batch times devices (times accumulation steps), or tokens per "
    "batch over the sequence",
    "sequence not stated: the model's own; of an image its patches",
    "MLP gated or not, not stated: whichever comes nearer to the published parameter count, or as "
    "the family named does it; other dims not stated: mlp 4 x width, head width / heads, "
    "vocabulary 32,768, biases none in gated and parallel blocks and all elsewhere",
    "tokens/s/chip not stated: from tokens or sequences per second, from the step time, or from "
    "TFLOP/s or MFU by the source's own count of FLOPs (as PaLM counts where it names none)",
    "8-bit matmuls where the row's precision says fp8 or int8 and the chip has them; its MFU is "
    "then of the 8-bit peak",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of a runs file, in shardsim's terms. `None` means that the row does not say."""

    id: str
    family: str  # the chip's name
    model: Model
    sequence: int
    machine: Machine | None
    batch: int | None
    sizes: Mapping[str, int] | None  # role -> size inside a slice; None: unknown tensor size
    slice_sizes: Mapping[str, int]  # role -> size over slices
    rest: str | None  # the role that takes what the sizes leave over
    microbatches: int | None
    microbatch: int | None  # sequences of one microbatch on one data-parallel member
    interleave: int  # layer chunks per pipeline stage
    remat: Remat | None
    attention: str
    overlap: Mapping[str, Any]
    optimizer: str
    compute: str  # number format of matmuls
    replicated: bool  # what is left of the slice replicates parameters
    fused: bool
    measured: float | None  # tokens/s/chip
    measured_mfu: float | None
    measured_ratio: float | None  # speed-up of all slices over one
    accounting: str | None
    notes: tuple[str, ...] = ()
    op_costs: str = "physical"  # or "compiler": as `Plan.op_costs`


def read_run(row: Any, where: str) -> Run:
    """Read one row; raise `FileError` naming `where` and the key that is wrong."""
    if not isinstance(row, Mapping):
        raise FileError(f"{where}: expected a mapping of keys")
    where = f"{where} ({shown(row.get('id', 'no id'))})"
    try:
        return _read(row)
    except ShardsimError as error:
        raise FileError(f"{where}: {error}") from None


def _read(row: Mapping[str, Any]) -> Run:
    chip, word = chip_of(row)
    model = model_of(row)
    sequence = sequence_of(row, dims_of(row)) or model.sequence
    split = parallelism_of(find(row, "parallelism", ROW))
    notes = list(split.notes)
    machine, said = machine_of(row, chip, word, split.outside)
    notes += [said] if said else []
    words = _techniques(row)
    batch = _batch(row, machine, sequence)
    remat, said = remat_of(find(row, "remat", ROW))
    notes += [said] if said else []
    precision = f"{find(row, 'precision', ROW) or ''}".lower()
    compute = _compute(chip, precision)
    rate, source = measured_rate(row, model, sequence, chip.peak(compute), chip, machine, batch)
    if source:
        notes.append(f"measured tokens/s/chip derived from {source}")
    ratio = mapping(row.get("measured"), "measured").get("speedup_2pods_vs_1")
    optimizer = f"{find(row, 'optimizer', ROW) or ''} {precision}".lower()
    for key in ("microbatches", "microbatch"):
        if (value := find(row, key, ROW)) not in (None, 0):
            split.counts.setdefault(key, whole(value, key))
    flash = f"{words or ''} {row.get('attention', '')} {find(row, 'remat', ROW)}".lower()
    return Run(
        id=str(row.get("id", "run"))[:200],
        family=chip.name,
        model=model,
        sequence=sequence,
        machine=machine,
        batch=batch,
        sizes=None if split.unknown_tensor else split.inside,
        slice_sizes=split.outside,
        rest=_rest(split, chip),
        microbatches=split.counts.get("microbatches"),
        microbatch=split.counts.get("microbatch"),
        interleave=split.counts.get("interleave", 1),
        remat=remat,
        attention=_attention(chip, sequence, flash),
        overlap=_overlap(chip.name, words),
        optimizer=_optimizer(optimizer),
        compute=compute,
        replicated=split.replicated,
        fused=model.parallel_block and "fused qkv" in (words or ""),
        measured=rate,
        measured_mfu=measured_mfu(row),
        measured_ratio=None if ratio is None else number(ratio, "measured.speedup_2pods_vs_1"),
        accounting=accounting_of(row)[0].value,
        notes=tuple(notes),
    )


def _techniques(row: Mapping[str, Any]) -> str | None:
    """Return the row's list of techniques as one text; None if it has none."""
    tricks = find(row, "tricks", ROW)
    if isinstance(tricks, str):
        tricks = [tricks]
    return " ".join(map(str, tricks)).lower() if isinstance(tricks, list) else None


def _batch(row: Mapping[str, Any], machine: Machine | None, sequence: int) -> int | None:
    """Return sequences per step over all chips; per-device sizes may be fractions."""
    said = find(row, "global_batch", ROW)
    tokens = find(row, "batch_tokens", ROW)
    if isinstance(said, str) and "token" in said.lower():
        said, tokens = None, said
    if said not in (None, 0):
        return whole(said, "global_batch")
    if tokens not in (None, 0):
        count = number(tokens, "batch_tokens")
        if isinstance(tokens, str) and re.match(r"\s*[\d.]+\s*[mM]", tokens):
            count = count / 1e6 * 2**20  # 4M tokens are 2^22 where batches are powers of two
        return max(1, round(count / sequence))
    if machine is None:
        return None
    steps = whole(find(row, "microbatches", ROW) or 1, "microbatches")
    for key, count in (("per_device_batch", machine.devices), ("per_chip_batch", machine.chips)):
        if (each := find(row, key, ROW)) not in (None, 0):
            return max(1, round(number(each, key) * count * steps))
    return None


def _rest(split: Parallelism, chip: Chip) -> str | None:
    """Return the role of the devices that the row's sizes leave over; None: fsdp if one device
    of a chip each is left over, else data."""
    if split.rest:
        return split.rest
    if split.replicated:
        return "data"
    if "fsdp" in split.inside:
        return None
    if "data" in split.inside:
        return "data"
    own = {"tensor", "pipeline"} & set(split.inside)
    return "data" if chip.kind == "gpu" and own else "fsdp"


def _attention(chip: Chip, sequence: int, words: str) -> str:
    named = "flash" in words or "splash" in words
    fused = named or chip.name in ("v6e", "tpu7x") or chip.kind == "gpu" or sequence > 2048
    return "flash" if fused else "unfused"


def _overlap(chip: str, words: str | None) -> dict[str, Any]:
    if words is None or chip not in ("v2", "v3", "v4"):
        return {"matmul": "bidirectional", "weights": True, "gradients": False, "dcn": False}
    linear = "async parallel linear" in words or "collective matmul" in words
    reduce = "async reduce" in words or "async gradient" in words
    return {
        "matmul": "bidirectional" if linear else "off",
        "weights": "async" in words,
        "gradients": reduce,
        "dcn": False,
    }


def _optimizer(words: str) -> str:
    if "adafactor" in words:
        whole_moment = re.search(r"not factored|unfactored|without factor|no factor", words)
        return "adafactor-full" if whole_moment else "adafactor"
    if "mu in bf16" in words:
        return "adamw-bf16-mu"
    for name in ("momentum", "sgd"):
        if name in words:
            return name
    return "adamw"


def _compute(chip: Chip, words: str) -> str:
    """Return the number format of matmuls: 8-bit if the row says so and the chip has it."""
    for word, name in (("fp8", "fp8"), ("float8", "fp8"), ("int8", "int8")):
        if word in words and name in chip.peak_flops:
            return name
    return "bf16"
