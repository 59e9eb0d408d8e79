"""Rows in the words of their sources, as the rows of `shardsim.validate.rows`.

Collections of published figures state what their sources printed: counts of chips, dims, and
sentences on sharding, remat and techniques. What such a row leaves out is filled by the rules of
docs/runs.md; what it says that is not modelled is refused.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Mapping
from dataclasses import replace
from math import gcd, prod
from typing import Any

from shardsim.cost.predict import hbm_of
from shardsim.errors import FileError, ShardsimError
from shardsim.machine import Chip, Machine, default_slice, load_chip
from shardsim.model import Model
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, SEQUENCE_SHARDED
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.plan.resolve import AXIS_NAMES, rules_data
from shardsim.validate.dims import model_of, sequence_of, with_printed_slots
from shardsim.validate.figures import accounting_of, measured_of
from shardsim.validate.formats import optimizer_of, precision_of
from shardsim.validate.job import batch_of, machine_of
from shardsim.validate.libraries import (
    ATTENTION_KEPT,
    FULL,
    TRAINER,
    Library,
    every_second_product,
    implementation_of,
    kernel_of,
    library_of,
    paper_before,
)
from shardsim.validate.remat_words import remat_of
from shardsim.validate.rows import REST, Run, read_run
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
from shardsim.validate.words import UNSAID, shown, whole

FILLED = "a row in the words of its source: what it leaves open is filled as docs/runs.md says"
# What marks a row of prose: keys that rows of `shardsim.validate.rows` do not have.
_KEYS = ("chip", "chips", "dims", "parallelism", "global_batch", "seq", "tricks")
NO_BATCH = "global_batch: missing, and no per_device_batch either"
# How a context axis attends, by the words for it; without such an axis nothing is known of it.
_ATTENDS = (
    (r"ulysses|all[- ]to[- ]all", "ulysses", "Ulysses (all-to-all of heads)"),
    (r"\bring\b(?![- ]all)|ring[-_]?attention|striped|zig-?zag", "ring", "ring attention"),
)
# Words for tokens that are dealt so that all have as much to do; experts' loads are another matter.
# The last is MaxText's key, which deals them so unless it is told otherwise.
_DEALT = (
    r"(?<!no )(?<!not )(?<!without )(striped|zig-?zag"
    r"|load[- ]balanc\w*\b(?![- ](loss|expert|rout))|context[ _]parallel[ _]strategy)"
)
# Words of a split without sizes.
_SPLIT_WORDS = (
    r"data|fsdp|zero|shard|tensor|model|mesh|megatron|pipeline|replic|\b[tdpce]p\b|ddp|spmd|gspmd"
    r"|unknown|not (stated|published)"
)
# A tensor axis over which the residual stream is split by tokens, not by embed.
_BY_TOKENS = r"(?<!no )(?<!without )sequence[- _]parallel|tensor_sequence"
_WHOLE = r"\b(no|without) sequence[- _]parallel"  # over which it is split by nothing
_SPLIT_BY_TOKENS = "2205"  # since sequence parallelism on GPUs, arXiv 2205.05198
# Collective matmul, as libraries of GPUs call it.
_RINGS = (
    r"(?<!no )(?<!without )"
    r"(async[- _]?(tp|tensor)|(tp|tensor)[- _](comm\w*[- _])?overlap|user[- _]?buffers)"
)
# Sizes that a source does not state: of a tensor axis; chips and images a step of a row without.
_TENSOR_SIZES, _CHIPS, _BATCHES = (1, 2, 4, 8, 16), (256, 512, 1024), (4096, 16384, 65536)
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
        if library and data.get("remat") == library.remat and _unsaid(row) and not _fits(run):
            run = _that_fits(run, data, library, where, notes)
    except ShardsimError as error:
        raise FileError(f"{where} ({run.id[:60]!r}): {error}") from None
    if not run.measured and (said := row.get("measured")):
        notes.append(f"measured: no rate is read of {', '.join(map(str, said))[:120]}")
    words = f"{_lower(row, 'tricks')} {_lower(row, 'parallelism')}"
    made = implementation_of(library, run.plans[0].machine.chip, str(row.get("model") or ""), words)
    return replace(run, notes=tuple(notes), implementation=made)


def _that_fits(
    run: Run, data: Mapping[str, Any], library: Library, where: str, notes: list[str]
) -> Run:
    """Return a run whose remat is not stated and whose library's own does not fit, as it may have
    run: with what the library offloads, or with the least recomputation that fits.

    A library that computes layers again one by one has as few of them as must be. Over stages, of
    which each has other ones, and where its recipes compute small parts of layers instead, it is
    taken to keep what it does by itself.
    """
    if library.by_block:
        return _by_block(run, data, library, where, notes)
    if library.offloads:
        other = read_run({**data, "remat": library.offloads}, where)
        how = (
            "whole layers again do not fit: what layers start from and queries, keys and values "
            "wait in the host's memory"
        )
    else:
        other = read_run({key: value for key, value in data.items() if key != "remat"}, where)
        how = "what its library keeps does not fit: the least recomputation that fits"
    if not _fits(other):
        return run
    notes.append(f"remat: not stated, and {how}")
    return other


def _by_block(
    run: Run, data: Mapping[str, Any], library: Library, where: str, notes: list[str]
) -> Run:
    """Return a run that computes as few whole layers again as must be."""
    plan = run.plans[0]
    if any(axis.name == AXIS_NAMES["pipeline"] for axis in plan.mesh):
        notes.append("remat: not stated; what its library keeps does not fit as predicted")
        return run

    def again(few: int) -> Run:
        groups = [{"layers": few, **FULL}, {"layers": plan.model.layers - few, **library.remat}]
        kept = FULL if few == plan.model.layers else groups
        return read_run({**data, "remat": kept}, where)

    if not _fits(again(plan.model.layers)):
        return run
    choices = range(plan.model.round_layers, plan.model.layers, plan.model.round_layers)
    place = bisect(choices, False, key=lambda few: _fits(again(few)))
    few = choices[place] if place < len(choices) else plan.model.layers
    notes.append(f"remat: not stated; {few} whole layers again, as few as let it fit")
    return again(few)


def _fits(run: Run) -> bool:
    return any(hbm_of(plan, TRAINER).fits for plan in run.plans)


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
    context = _context(said, split, model, str(row.get("notes") or ""), library)
    if whole_square and model.causal:
        model = replace(model, causal=False)  # the kernel computes every block
    machine = machine_of(row, chip, prod(split.sizes.outside.values()), notes)
    notes += notes_on(row, tricks, machine, chip)
    notes += _notes_on_split(row, split)
    _count(row, split, words or "")
    if model.experts is not None and model.experts.soft_slots:
        machine = _one_by_one(split, machine, chip, model.experts.number, notes)
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
            chip, precision, f"{precision} ; {words or ''} ; {_lower(row, 'optimizer')}", library
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
        return data | _anywhere(row, split, chip, batch, library) | own
    if batch is None:
        raise FileError(NO_BATCH)
    inside = bool(library and library.whole_experts)
    if chip.kind == "gpu" and (folded := split.fold(machine.devices, inside)):
        notes.append(folded)
    placed = _mesh(split, machine, batch, model, library, row)
    return data | {"machine": machine.name, "batch": batch} | placed | own


def _checked(row: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """Return a row under usual keys, which states a chip and, of so many, a batch."""
    row = _with_usual_keys(row)
    check_counts(row)
    if row.get("chip") is None:
        raise FileError("missing key 'chip'")
    stated = any(row.get(key) is not None for key in ("global_batch", "per_device_batch"))
    batch_words = r"\b(gbs|global_batch_size)\b"
    if row.get("chips") and not stated and not re.search(batch_words, _lower(row, "parallelism")):
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


def _anywhere(
    row: Mapping[str, Any], split: Said, chip: Chip, batch: int | None, library: Library | None
) -> dict[str, Any]:
    """Return machines, batches and the mesh of a row that does not state its chips."""
    slices = [default_slice(chip, count).name for count in _CHIPS]
    rest = split.rest(chip, library) or "data"
    return {
        "machine": slices,
        "batch": batch or list(_BATCHES),
        "mesh": {AXIS_NAMES[rest]: REST},
        **_rules(split, {AXIS_NAMES[rest]}, chip, library, row),
    }


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


def _one_by_one(
    split: Said, machine: Machine | None, chip: Chip, experts: int, notes: list[str]
) -> Machine:
    """Return the slice of a row with soft experts, and split them where the row does not say how:
    there are as many as devices, or as divide them, and all else is replicated, as in the code of
    the paper (`params_axis_resources` in the configs of google-research/vmoe)."""
    if machine is None:
        machine = default_slice(chip, max(1, experts // chip.devices_per_chip))
        notes.append("chips: not stated; one device for each expert")
    if not (split.sizes.inside or split.sizes.outside or split.sizes.rest):
        split.sizes.add("expert", gcd(experts, machine.devices_per_slice))
        split.sizes.rest, split.replicated = "data", True
    return machine


def _context(
    said: Mapping[str, str], split: Said, model: Model, notes: str, library: Library | None
) -> dict[str, Any]:
    """Return how a context axis attends, as a row or its library says.

    Raises `FileError` where a row says how and has none.
    """
    for pattern, keys, what in _ATTENDS:
        for key, text in said.items():
            if not re.search(pattern, text):
                continue
            if "context" in split.sizes.inside:
                every = f"{' '.join(said.values())} {notes}".lower()
                found: dict[str, Any] = {"keys": keys}
                if keys == "ring":
                    found["order"] = "striped" if re.search(_DEALT, every) else "contiguous"
                if keys == "ring" and re.search(r"without overlap|not overlap", every):
                    found["overlap"] = False
                return {"context": found}
            if keys == "ring" or model.experts is None:  # experts' tokens are exchanged too
                raise FileError(f"{key}: not modelled: {what} without a context axis")
    usual = library.context if library else {}
    return {"context": usual} if usual and "context" in split.sizes.inside else {}


def _chip_name(row: Mapping[str, Any], library: Library | None) -> str:
    """Return the chip of a row; its notes may say that it is another of the same name, and so may
    what is known of its library's runs."""
    name, notes = str(row["chip"])[:200], str(row.get("notes") or "").lower()
    slower = "hbm2e" in notes or "500 w limit" in notes
    if name.lower() == "h100" and slower:
        return "h100-500w"
    return library.chips.get(name.lower(), name) if library else name


def _mesh(
    split: Said,
    machine: Machine,
    batch: int,
    model: Model,
    library: Library | None,
    row: Mapping[str, Any],
) -> dict[str, Any]:
    """Return mesh, rules and pipeline of a row whose slices are known."""
    if split.unknown_tensor:
        sizes = [
            size
            for size in _TENSOR_SIZES
            if model.heads % size == 0 and machine.devices_per_slice % size == 0
        ]
        return {"mesh": {"fsdp": REST, "model": sizes}}
    mesh = split.sizes.mesh(machine, split.rest(machine.chip, library))
    mesh = library.placed(mesh, machine) if library and machine.slices == 1 else mesh
    found = {axis.name: axis.size for axis in mesh}
    groups = prod(found.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    if batch == 1 < groups:
        raise FileError(f"parallelism: how {groups} devices share one sequence is not said")
    data: dict[str, Any] = {
        "mesh": {axis.name: {"size": axis.size, "torus": dict(axis.torus)} for axis in mesh},
        **_rules(split, set(found), machine.chip, library, row),
    }
    stages = found.get("stage", 1)
    if "microbatches" in split.counts:
        data["microbatches"] = split.counts["microbatches"]
    elif each := split.counts.get("microbatch", library.microbatch if library else 0):
        data["microbatches"] = max(1, round(batch / (groups * each)))
    elif stages > 1:
        most = stages * (library.microbatches_per_stage if library else 4)
        data["microbatches"] = _divisor(max(1, batch // groups), most)
    if library and stages > 1:
        data |= library.over_stages
    if split.zero == 2:
        if stages > 1:
            raise FileError("parallelism: not modelled: ZeRO-2 over pipeline stages")
        data["accumulation"] = "scattered"
    return data | {"pipeline_interleave": split.counts.get("vpp", 1)}


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` up to `most`; `most` itself where that is half or less
    of it, as then sequences do not come out even anyway."""
    found = next(one for one in range(min(number, most), 0, -1) if number % one == 0)
    return found if 2 * found > min(number, most) else min(number, most)


def _rules(
    split: Said, names: set[str], chip: Chip, library: Library | None, row: Mapping[str, Any]
) -> dict[str, Any]:
    """Return rules where they are not the usual ones: of data parallelism only, of Megatron's
    expert axis, over which all but the experts is replicated (arXiv 2504.14960, section 3), and of
    a tensor axis of GPUs, over which the residual stream is split by tokens (arXiv 2205.05198; by
    nothing in papers before). Optimizer state is split over data unless the row says that nothing
    is (ZeRO stage 0)."""
    gpu = chip.kind == "gpu"
    apart = split.replicated or bool(library and library.state_over_data)
    said = f"{split.text} {' '.join(split.sizes.keys)} {_lower(row, 'tricks')}"
    residual = EMBED_SHARDED
    if re.search(_WHOLE, said):
        residual = REPLICATED
    elif re.search(_BY_TOKENS, said):
        residual = SEQUENCE_SHARDED
    elif gpu:
        early = paper_before(str(row.get("source") or ""), _SPLIT_BY_TOKENS)
        residual = REPLICATED if early else SEQUENCE_SHARDED
    unusual = residual != EMBED_SHARDED and "model" in names
    if not (apart or unusual or (gpu and "expert" in names)):
        return {}
    rules = rules_data(
        names,
        residual=residual,
        optimizer_over_data=apart and split.zero != 0,
        context_shards_parameters=not apart,
        expert_shards_parameters=False,
    )
    return {"rules": rules}


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


def _lower(row: Mapping[str, Any], key: str) -> str:
    return str(row.get(key) or "").lower()
