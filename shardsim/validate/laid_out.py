"""How a row lies on its machine: mesh, rules, microbatches and context axis, as it says or as its
library has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd, prod
from typing import Any

from shardsim.errors import FileError
from shardsim.machine import Chip, Machine, default_slice
from shardsim.model import Model
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, SEQUENCE_SHARDED
from shardsim.plan.resolve import AXIS_NAMES, rules_data
from shardsim.validate.libraries import Library, paper_before
from shardsim.validate.rows import REST
from shardsim.validate.split_words import Said
from shardsim.validate.words import lower

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
# A tensor axis over which the residual stream is split by tokens, not by embed.
_BY_TOKENS = r"(?<!no )(?<!without )sequence[- _]parallel|tensor_sequence"
_WHOLE = r"\b(no|without) sequence[- _]parallel"  # over which it is split by nothing
_SPLIT_BY_TOKENS = "2205"  # since sequence parallelism on GPUs, arXiv 2205.05198
# Sizes that a source does not state: of a tensor axis; chips and images a step of a row without.
_TENSOR_SIZES, _CHIPS, _BATCHES = (1, 2, 4, 8, 16), (256, 512, 1024), (4096, 16384, 65536)


def mesh_of(
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


def anywhere(
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


def one_by_one(
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


def context_of(
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
    said = f"{split.text} {' '.join(split.sizes.keys)} {lower(row, 'tricks')}"
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


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` up to `most`; `most` itself where that is half or less
    of it, as then sequences do not come out even anyway."""
    found = next(one for one in range(min(number, most), 0, -1) if number % one == 0)
    return found if 2 * found > min(number, most) else min(number, most)
