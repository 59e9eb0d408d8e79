"""Rows in the words of their sources, as the rows of `shardsim.validate.rows`.

Collections of published figures state what their sources printed: counts of chips, dims, and
sentences on sharding, remat and techniques. What such a row leaves out is filled by the rules of
docs/runs.md; what it says that is not modelled is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from shardsim.errors import FileError, ShardsimError
from shardsim.machine import Chip, Machine, load_chip
from shardsim.model import Model
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.validate.dims import model_of, sequence_of, with_printed_slots
from shardsim.validate.figures import accounting_of, measured_of
from shardsim.validate.formats import optimizer_of, precision_of
from shardsim.validate.job import batch_of, machine_of
from shardsim.validate.laid_out import anywhere, context_of, mesh_of, one_by_one
from shardsim.validate.libraries import (
    ATTENTION_KEPT,
    Library,
    every_second_product,
    implementation_of,
    kernel_of,
    library_of,
)
from shardsim.validate.remat_fits import fits, that_fits
from shardsim.validate.remat_words import remat_of
from shardsim.validate.rows import Run, read_run
from shardsim.validate.split_words import Said, split_of
from shardsim.validate.unread import (
    LIBRARY_KEYS,
    PLAN_KEYS,
    check_counts,
    note_on_batch,
    notes_on,
    refuse_other_runs,
    refuse_splits,
    tricks_of,
)
from shardsim.validate.words import UNSAID, lower, shown, whole

FILLED = "a row in the words of its source: what it leaves open is filled as docs/runs.md says"
# What marks a row of prose: keys that rows of `shardsim.validate.rows` do not have.
_KEYS = ("chip", "chips", "dims", "parallelism", "global_batch", "seq", "tricks")
NO_BATCH = "global_batch: missing, and no per_device_batch either"
# Words of a split without sizes.
_SPLIT_WORDS = (
    r"data|fsdp|zero|shard|tensor|model|mesh|megatron|pipeline|replic|\b[tdpce]p\b|ddp|spmd|gspmd"
    r"|unknown|not (stated|published)"
)
# Collective matmul, as libraries of GPUs call it.
_RINGS = (
    r"(?<!no )(?<!without )"
    r"(async[- _]?(tp|tensor)|(tp|tensor)[- _](comm\w*[- _])?overlap|user[- _]?buffers)"
)
_ROW_COUNTS = {
    "microbatches": "microbatches",
    "gradient_accumulation_steps": "microbatches",
    "microbatch": "microbatch",
}
# What other collections call the keys that are read.
_ALIASES = {
    **dict.fromkeys(("seq_len", "seq_length", "sequence_length", "max_target_length"), "seq"),
    **dict.fromkeys(("global_batch_size", "batch_size", "gbs"), "global_batch"),
    **dict.fromkeys(("per_device_batch_size", "local_batch_size"), "per_device_batch"),
    **dict.fromkeys(("num_microbatches", "num_pipeline_microbatches"), "microbatches"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("micro_batch_size", "microbatch_size", "mbs"), "microbatch"),
    **dict.fromkeys(("num_chips", "gpus", "num_gpus"), "chips"),
    **dict.fromkeys(("num_slices", "pods"), "slices"),
    **dict.fromkeys(("num_vocab_tiling", "vocab_tiling"), "vocab_tiles"),
    **dict.fromkeys(("remat_policy", "activation_checkpointing", "recompute"), "remat"),
    "num_nodes": "nodes",
    "xla_flags": "compiler_flags",
}
_OF_TOKENS = ("global_batch_tokens", "batch_tokens", "tokens_per_step")


def _with_usual_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its keys as they are read; raise `FileError` where two say one thing."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = _ALIASES.get(str(key), key)
        if value is not None and name in found:
            raise FileError(f"'{key}' and '{name}' are one")
        if value is not None:
            found[name] = value
    for key in _OF_TOKENS:
        if key in found and "global_batch" not in found:
            whole(found[key], key)
            found["global_batch"] = f"{found.pop(key)} tokens"
    return found


def is_prose(row: Any) -> bool:
    """Return whether a row of a runs file is in the words of its source."""
    strict = isinstance(row, Mapping) and ("machine" in row or "mesh" in row)
    return isinstance(row, Mapping) and not strict and any(key in row for key in _KEYS)


def from_prose(row: Mapping[str, Any], where: str) -> Run:
    """Read one row; raise `FileError` naming `where` and the key that is wrong."""
    notes: list[str] = []
    try:
        data = strict_row(row, notes)
    except ShardsimError as error:
        raise FileError(f"{where} ({str(row.get('id') or 'no id')[:60]!r}): {error}") from None
    run = read_run(data, where)
    library, row = _library(row), _with_usual_keys(row)
    try:
        if library and data.get("remat") == library.remat and _unsaid(row) and not fits(run):
            run = that_fits(run, data, library, where, notes)
    except ShardsimError as error:
        raise FileError(f"{where} ({run.id[:60]!r}): {error}") from None
    if not run.measured and (said := row.get("measured")):
        notes.append(f"measured: no rate is read of {', '.join(map(str, said))[:120]}")
    words = f"{lower(row, 'tricks')} {lower(row, 'parallelism')}"
    made = implementation_of(library, run.plans[0].machine.chip, str(row.get("model") or ""), words)
    return replace(run, notes=tuple(notes), implementation=made)


def _unsaid(row: Mapping[str, Any]) -> bool:
    return str(row.get("remat") or "unknown").lower().startswith(UNSAID)


def _library(row: Mapping[str, Any]) -> Library | None:
    """Return the library that a row names with a key of its own, or by its source."""
    named = " ".join(str(row[key]) for key in LIBRARY_KEYS if row.get(key))
    return library_of(str(row.get("source")), named)


def strict_row(row: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the row as `read_run` takes it; remarks go to `notes`."""
    row = _checked(row, notes)
    library = _library(row)
    chip = load_chip(_chip_name(row, library))
    model = with_printed_slots(model_of(row, notes), row, notes)
    sequence = sequence_of(row) or model.sequence
    kernel, whole_square = _kernel(row.get("attention"))
    tricks = tricks_of(row.get("tricks"))
    words = " ; ".join(map(str, tricks)).lower() if tricks is not None else None
    split = split_of(
        row.get("parallelism"), model.experts is not None, library, row.get("zero_stage")
    )
    said = {"parallelism": split.text, "attention": kernel, "tricks": words or ""}
    refuse_splits(said, model)
    refuse_other_runs(row)
    context = context_of(said, split, model, str(row.get("notes") or ""), library)
    if whole_square and model.causal:
        model = replace(model, causal=False)  # the kernel computes every block
    machine = machine_of(row, chip, prod(split.sizes.outside.values()), notes)
    notes += notes_on(row, tricks, machine, chip)
    notes += _notes_on_split(row, split)
    _count(row, split, words or "")
    if model.experts is not None and model.experts.soft_slots:
        machine = one_by_one(split, machine, chip, model.experts.number, notes)
    batch = _batch(row, split, machine, sequence, notes)
    precision = str(row.get("precision") or "").lower()
    attention = f"{words or ''} {kernel} {row.get('remat')}".lower()
    data = {
        "id": str(row.get("id") or "run")[:200],
        "model": model.to_mapping(),
        "sequence": sequence,
        "attention": kernel_of(chip, sequence, attention, library, str(row.get("source"))),
        "overlap": _overlap(chip, words, f"{split.text} {precision}", library, model),
        "precision": precision_of(
            chip, precision, f"{precision} ; {words or ''} ; {lower(row, 'optimizer')}", library
        ),
        "optimizer": optimizer_of(f"{row.get('optimizer') or ''} {precision}".lower(), library),
        "fused_projections": model.parallel_block and "fused qkv" in (words or ""),
        "measured": measured_of(row, sequence, chip),
        "accounting": accounting_of(row).value,
        "source": str(row.get("source") or "not stated"),
        "filled": {"id": FILLED},
        **context,
        **_switches(words or "", notes),
    }
    own = {key: row[key] for key in PLAN_KEYS if row.get(key) is not None}
    data |= own
    remat = _remat(row, library, data, split, model, notes)
    if remat is not None:
        data["remat"] = remat
    if machine is None:
        return data | anywhere(row, split, chip, batch, library) | own
    if batch is None:
        raise FileError(NO_BATCH)
    inside = bool(library and library.whole_experts)
    if chip.kind == "gpu" and (folded := split.fold(machine.devices, inside)):
        notes.append(folded)
    placed = mesh_of(split, machine, batch, model, library, row)
    return data | {"machine": machine.name, "batch": batch} | placed | own


def _checked(row: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """Return a row under usual keys, which states a chip and, of so many, a batch."""
    row = _with_usual_keys(row)
    check_counts(row)
    if row.get("chip") is None:
        raise FileError("missing key 'chip'")
    stated = any(row.get(key) is not None for key in ("global_batch", "per_device_batch"))
    batch_words = r"\b(gbs|global_batch_size)\b"
    if row.get("chips") and not stated and not re.search(batch_words, lower(row, "parallelism")):
        raise FileError(NO_BATCH)
    for key in LIBRARY_KEYS[:-1]:  # software may be a version of anything
        if row.get(key) and library_of("", str(row[key])) is None:
            notes.append(f"{key}: {shown(row[key])} is not known: nothing is taken from it")
    return row


def _count(row: Mapping[str, Any], split: Said, words: str) -> None:
    """Add to what a split counts what the row counts elsewhere."""
    if steps := re.search(r"\bgradient[- _]accumulation(?: steps)?[ =:]*(\d{1,4})\b", words):
        split.counts.setdefault("microbatches", int(steps[1]))
    for key, name in _ROW_COUNTS.items():
        if row.get(key):
            split.counts[name] = whole(row[key], key)


def _batch(
    row: Mapping[str, Any], split: Said, machine: Machine | None, sequence: int, notes: list[str]
) -> int | None:
    """Return the sequences of a step, if they are said."""
    if (said := split.counts.get("batch")) and row.get("global_batch") is None:
        row = {**row, "global_batch": said}
    steps_each = split.counts.get("microbatches", 1)
    batch = batch_of(row, machine, steps_each, sequence)
    if batch and machine:
        notes += note_on_batch(row, batch, machine.devices, steps_each)
    if said and batch != said:
        notes.append(f"parallelism: its batch, {said}, is not that of global_batch")
    return batch


def _kernel(given: Any) -> tuple[str, bool]:
    """Return a row's words for its kernel, and whether that computes what a mask leaves out."""
    given = given if isinstance(given, Mapping) else {"kernel": given}
    if given.get("window"):
        raise FileError("attention.window: give it as dims.window")
    return str(given.get("kernel") or "").lower(), given.get("skips_masked_blocks") is False


def _notes_on_split(row: Mapping[str, Any], split: Said) -> list[str]:
    """Return what of a row's split is not read."""
    sizes = split.sizes
    if split.unread:
        return [f"parallelism: not read: {', '.join(split.unread)[:200]}"]
    said = sizes.inside or sizes.outside or sizes.rest or re.search(_SPLIT_WORDS, split.text)
    if said or not row.get("parallelism"):
        return []
    return [f"parallelism: {shown(row['parallelism'])} names no axis; the usual is taken"]


def _remat(
    row: Mapping[str, Any],
    library: Library | None,
    data: Mapping[str, Any],
    split: Said,
    model: Model,
    notes: list[str],
) -> Any:
    """Return what layers keep, as the row says or as its library does by itself; None: unknown.
    `data` says what attention and number formats are."""
    said = str(row.get("remat") or "").lower()
    remat = remat_of(row.get("remat"), library, notes)
    if library is None:
        return remat
    if library.every_second_product and "pipeline" not in split.sizes.inside:
        if re.match(r"selective\W*(op\b|$)", said):
            narrow = DTYPE_BYTES[data["precision"]["compute"]] == 1
            remat = ATTENTION_KEPT if narrow else every_second_product(model)
    if remat is None and "custom" not in said:
        remat = (library.remat_unfused if data["attention"] == "unfused" else None) or library.remat
    return remat


def _chip_name(row: Mapping[str, Any], library: Library | None) -> str:
    """Return the chip of a row; its notes may say that it is another of the same name, and so may
    what is known of its library's runs."""
    name, notes = str(row["chip"])[:200], str(row.get("notes") or "").lower()
    slower = "hbm2e" in notes or "500 w limit" in notes
    if name.lower() == "h100" and slower:
        return "h100-500w"
    return library.chips.get(name.lower(), name) if library else name


def _overlap(
    chip: Chip, words: str | None, said: str, library: Library | None, model: Model
) -> dict[str, Any]:
    """Return what waits behind what. On GPUs reductions have a stream of their own (PyTorch's FSDP,
    Megatron's `overlap_grad_reduce`)."""
    gpu = chip.kind == "gpu"
    rings = library.collective_matmul if library else not gpu
    if library and model.experts is not None:
        rings = rings and library.rings_beside_experts
    rings = rings or re.search(_RINGS, f"{words or ''} {said}") is not None
    if words is None or chip.name not in ("v2", "v3", "v4"):
        return {"matmul": "bidirectional" if rings else "off", "weights": True, "gradients": gpu}
    linear = "async parallel linear" in words or "collective matmul" in words
    reduce = "async reduce" in words or "async gradient" in words
    return {
        "matmul": "bidirectional" if linear else "off",
        "weights": "async" in words,
        "gradients": reduce,
    }


def _switches(words: str, notes: list[str]) -> dict[str, Any]:
    """Return the keys of a plan that a row's tricks name as MaxText's config does."""
    data: dict[str, Any] = {}
    for what in ("optimizer", "parameter"):
        if re.search(rf"{what}_memory_host_offload(?![ =:]*(?:false|off|0)\b)", words):
            data[f"offload_{what}" + "s" * (what == "parameter")] = True
    if tiles := re.search(r"num_vocab_tiling[ =:]*(\d{1,4})\b", words):
        data["vocab_tiles"] = int(tiles[1])
    elif "num_vocab_tiling" in words:
        notes.append("tricks: num_vocab_tiling without a whole number below 10,000; left out")
    return data
