"""Published runs as plans: reading a row of a runs file and filling in what it leaves open.

A row names dims, chip, chips, slices, topology, parallelism, batch, sequence and remat, in the
words of its source. What a source leaves out is filled by fixed rules, listed in `RULES`; a row
never carries a number of its own into the prediction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from shardsim.errors import FileError, PlanError, ShardsimError, nearest
from shardsim.machine import Machine, default_slice, load_chip, parse_machine
from shardsim.model import Model, load_model, model_names
from shardsim.plan.remat import Remat

RULES = (
    "attention: fused where the row names flash or splash attention, on v6e, tpu7x and GPUs, and "
    "for sequences over 2,048; elsewhere scores are written to HBM",
    "overlap on v2 to v4: only what the row's list of techniques names (there it was opt-in); "
    "a row without such a list, and every later chip: collective matmul and weight gathers "
    "overlap; reductions of gradients do not (the published option sets name all-gathers only)",
    "remat not stated: the least recomputation that fits in HBM, of none, dots and full",
    "parallelism not stated: the rest of the slice is fully sharded (or replicated where the row "
    "says data parallel)",
    "topology not stated: the vendor's default slice; mesh axes lie on it as JAX lays them",
)

# Words for the axes of parallelism, by the role that they have here.
PARALLELISM: Mapping[str, str] = {
    "dp": "data",
    "data": "data",
    "replica": "data",
    "fsdp": "fsdp",
    "fsdp_transpose": "fsdp",
    "zero3": "fsdp",
    "tp": "tensor",
    "tensor": "tensor",
    "model": "tensor",
    "mp": "tensor",
    "tensor_sequence": "tensor",
    "sp": "context",
    "cp": "context",
    "sequence": "context",
    "context": "context",
    "seq": "context",
    "pp": "pipeline",
    "pipeline": "pipeline",
    "stage": "pipeline",
    "dcn_dp": "dcn_data",
    "dcn_data": "dcn_data",
    "dcn_fsdp": "dcn_fsdp",
    "dcn_pp": "dcn_pipeline",
    "dcn_pipeline": "dcn_pipeline",
}

# MaxText's and others' names of tensors that a remat policy keeps.
REMAT_TENSORS: Mapping[str, tuple[str, ...]] = {
    "decoder_layer_input": ("layer_input",),
    "layer_input": ("layer_input",),
    "qkv": ("qkv",),
    "qkv_proj": ("qkv",),
    "q": ("qkv",),
    "k": ("qkv",),
    "v": ("qkv",),
    "query_proj": ("qkv",),
    "key_proj": ("qkv",),
    "value_proj": ("qkv",),
    "context": ("context",),
    "out_proj": ("attention_output",),
    "attention_out": ("attention_output",),
    "mlpwi": ("mlp_hidden",),
    "mlpwi_0": ("mlp_hidden",),
    "mlpwi_1": ("mlp_hidden",),
    "mlpwo": ("mlp_output",),
}
_DOTS = frozenset({"qkv", "attention_output", "mlp_hidden", "mlp_output"})
REMAT_POLICIES: Mapping[str, Remat] = {
    "none": Remat(save=frozenset({*_DOTS, "context", "rest"})),
    "full": Remat(),
    "minimal": Remat(save=_DOTS),
    "dots": Remat(save=_DOTS),
    "minimal_flash": Remat(save=_DOTS | {"context"}),
    "minimal_with_context": Remat(save=_DOTS | {"context"}),
    "selective": Remat(save=_DOTS | {"context"}),
    "save_dot_except_mlp": Remat(save=frozenset({"qkv", "attention_output"})),
    "save_dot_except_mlpwi": Remat(save=frozenset({"qkv", "attention_output", "mlp_output"})),
    "save_dot_with_context_except_mlp": Remat(
        save=frozenset({"qkv", "context", "attention_output"})
    ),
    "save_qkv_proj": Remat(save=frozenset({"qkv"})),
    "qkv_proj_offloaded": Remat(offload=frozenset({"qkv"})),
    "minimal_offloaded": Remat(offload=_DOTS),
    "save_out_proj": Remat(save=frozenset({"attention_output"})),
}


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
    remat: Remat | None
    attention: str
    overlap: Mapping[str, Any]
    optimizer: str
    replicated: bool  # what is left of the slice replicates parameters
    fused: bool
    measured: float | None  # tokens/s/chip
    measured_mfu: float | None
    measured_ratio: float | None  # speed-up of all slices over one
    accounting: str | None
    notes: tuple[str, ...] = ()


def read_run(row: Any, where: str) -> Run:
    """Read one row; raise `FileError` naming `where` and the key that is wrong."""
    if not isinstance(row, Mapping):
        raise FileError(f"{where}: expected a mapping of keys")
    where = f"{where} ({row.get('id', 'no id')})"
    try:
        return _read(row)
    except ShardsimError as error:
        raise FileError(f"{where}: {error}") from None


def _read(row: Mapping[str, Any]) -> Run:
    for key in ("chip", "dims"):
        if key not in row:
            raise FileError(f"missing key '{key}'")
    chip = load_chip(str(row["chip"]))
    tricks = row.get("tricks")
    words = " ".join(map(str, tricks)).lower() if isinstance(tricks, list) else None
    model = _model(row)
    sequence = _whole(row.get("seq", row.get("sequence")) or model.sequence, "seq")
    machine = _machine(row)
    measured = row.get("measured") or {}
    rate = row.get("tokens_per_s_per_chip", measured.get("tokens_s_chip"))
    mfu = measured.get("mfu_pct")
    scheme = " ".join(map(str, (row.get("parallelism") or {}).values())).lower()
    sizes, slice_sizes = _sizes(row.get("parallelism") or {}, machine)
    return Run(
        id=str(row.get("id", "run")),
        family=chip.name,
        model=model,
        sequence=sequence,
        machine=machine,
        batch=_batch(row, machine),
        sizes=None if "unknown" in scheme and "tensor" in scheme else sizes,
        slice_sizes=slice_sizes,
        remat=_remat(row.get("remat")),
        attention=_attention(chip.name, chip.kind, sequence, words),
        overlap=_overlap(chip.name, words),
        optimizer=_optimizer(row),
        replicated="data parallel only" in scheme,
        fused=model.parallel_block and "fused qkv" in (words or ""),
        measured=None if rate is None else _positive(rate, "tokens_per_s_per_chip"),
        measured_mfu=None if mfu is None else _positive(mfu, "measured.mfu_pct") / 100.0,
        measured_ratio=measured.get("speedup_2pods_vs_1"),
        accounting=row.get("accounting"),
    )


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise FileError(f"{key}: expected a whole number, found {value!r}")
    if value < 1:
        raise FileError(f"{key}: must be positive, not {value!r}")
    return int(value)


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e18:
        raise FileError(f"{key}: expected a positive number, found {value!r}")
    return float(value)


def _model(row: Mapping[str, Any]) -> Model:
    """Return the preset that the row names if its dims agree, else a model made of its dims."""
    dims = row["dims"]
    if not isinstance(dims, Mapping):
        raise FileError("dims: expected a mapping of keys")
    for key in ("experts", "num_experts", "moe"):
        if dims.get(key):
            raise FileError(f"dims.{key}: mixtures of experts are not modelled")
    name = str(row.get("model", "model"))
    if name in model_names():
        preset = load_model(name)
        same = (
            preset.layers == dims.get("layers", preset.layers)
            and preset.embed == dims.get("d_model", preset.embed)
            and preset.mlp == dims.get("d_ff", preset.mlp)
            and preset.heads == dims.get("heads", preset.heads)
        )
        if same:
            return preset
    for key in ("layers", "d_model", "heads"):
        if key not in dims:
            raise FileError(f"dims: missing key '{key}'")
    layers, width = _whole(dims["layers"], "dims.layers"), _whole(dims["d_model"], "dims.d_model")
    heads = _whole(dims["heads"], "dims.heads")
    vision = bool(dims.get("image") or dims.get("patch"))
    gated = bool(dims.get("glu"))
    bias = dims.get("bias", "none" if gated or dims.get("parallel_block") else "all")
    data: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._+-]", "-", name)[:80] or "model",
        "family": "vit" if vision else "decoder",
        "layers": layers,
        "embed": width,
        "mlp": _whole(dims.get("d_ff") or 4 * width, "dims.d_ff"),
        "heads": heads,
        "head_dim": _whole(dims.get("d_head") or width // heads, "dims.d_head"),
        "kv_heads": _whole(dims.get("kv_heads") or heads, "dims.kv_heads"),
        "sequence": _whole(row.get("seq") or dims.get("tokens") or 2048, "seq"),
        "gated_mlp": gated,
        "activation": "silu" if gated else "gelu",
        "parallel_block": bool(dims.get("parallel_block", False)),
        "qk_norm": bool(dims.get("qk_norm", False)),
        "tied_embeddings": bool(dims.get("tied", False)),
        "causal": not vision,
    }
    if bias not in ("none", None, False):
        parts = str(bias).lower()
        data["biases"] = {
            "qkv": "qkv" not in parts and "none" not in parts.split("mlp")[0],
            "attention_output": True,
            "mlp": True,
            "norm": "ln" not in parts,
        }
    if vision:
        data |= {
            "image": _whole(dims.get("image", 224), "dims.image"),
            "patch": _whole(dims.get("patch", 14), "dims.patch"),
        }
        data.pop("sequence")
    else:
        data |= {"vocab": _whole(dims.get("vocab") or 32768, "dims.vocab"), "positions": "rotary"}
        if gated:
            data["norm"] = "rmsnorm"
    return load_model(data)


def _machine(row: Mapping[str, Any]) -> Machine | None:
    """Return the slices of a row, or None if it does not say how many chips there were."""
    if not row.get("chips"):
        return None
    chip = load_chip(str(row["chip"]))
    chips = _whole(row["chips"], "chips")
    slices = _whole(row.get("slices") or 1, "slices")
    if chip.interconnect == "switch":
        return default_slice(chip, chips)
    if chips % slices:
        raise FileError(f"chips: {chips} do not divide into {slices} slices")
    shape = re.search(r"\b\d+x\d+(x\d+)?\b", str(row.get("topology", "")))
    if shape:
        lengths = [int(length) for length in shape.group().split("x")]
        if prod(lengths) == chips // slices and len(lengths) == chip.torus_dims:
            return parse_machine(f"{slices}*{chip.name}:{shape.group()}")
    one = default_slice(chip, chips // slices)
    return Machine(chip=chip, shape=one.shape, slices=slices)


def _sizes(
    parallelism: Mapping[str, Any], machine: Machine | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of roles inside a slice and over slices."""
    inside: dict[str, int] = {}
    outside: dict[str, int] = {}
    for key, value in parallelism.items():
        if isinstance(value, str) or value is None:
            continue
        if key not in PARALLELISM:
            if key in ("ep", "expert") and value != 1:
                raise FileError(f"parallelism.{key}: expert parallelism is not modelled")
            if key in ("microbatches", "interleave", "note", "ep", "expert", "vpp"):
                continue
            raise FileError(f"parallelism: unknown key '{key}'{nearest(key, PARALLELISM)}")
        role, size = PARALLELISM[key], _whole(value, f"parallelism.{key}")
        if role.startswith("dcn_"):
            outside[role[4:]] = outside.get(role[4:], 1) * size
        else:
            inside[role] = inside.get(role, 1) * size
    return inside, outside


def _batch(row: Mapping[str, Any], machine: Machine | None) -> int | None:
    if row.get("global_batch"):
        return _whole(row["global_batch"], "global_batch")
    if row.get("per_device_batch") and machine is not None:
        each = _positive(row["per_device_batch"], "per_device_batch")
        return max(1, round(each * machine.chips))
    return None


def _remat(text: Any) -> Remat | None:
    """Return the policy that a row's words describe; None if it does not say."""
    if text is None or str(text).lower().startswith("unknown"):
        return None
    words = str(text).lower().strip()
    first = re.split(r"[\s(,:]", words)[0]
    if first in REMAT_POLICIES:
        return REMAT_POLICIES[first]
    if first == "save" or "one activation" in words:
        return REMAT_POLICIES["full"]
    if first == "custom":
        kept: set[str] = set()
        for part in re.findall(r"[a-z_0-9]+", words.partition(":")[2]):
            kept |= set(REMAT_TENSORS.get(part, ()))
        if "offload" in words:
            return Remat(offload=frozenset(kept))
        return Remat(save=frozenset(kept - {"layer_input"}))
    raise FileError(f"remat: '{text}' is not known{nearest(first, REMAT_POLICIES)}")


def _attention(chip: str, kind: str, sequence: int, words: str | None) -> str:
    named = words is not None and ("flash" in words or "splash" in words)
    fused = named or chip in ("v6e", "tpu7x") or kind == "gpu" or sequence > 2048
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


def _optimizer(row: Mapping[str, Any]) -> str:
    words = f"{row.get('optimizer', '')} {row.get('precision', '')}".lower()
    if "adafactor" in words:
        return "adafactor-full" if "not factored" in words else "adafactor"
    if "mu in bf16" in words:
        return "adamw-bf16-mu"
    for name in ("momentum", "sgd"):
        if name in words:
            return name
    return "adamw"


def check_run(run: Run) -> None:
    """Raise `PlanError` if the row's sizes do not fit its slice at all."""
    if run.machine is None or run.sizes is None:
        return
    inside = prod(run.sizes.values())
    devices = run.machine.devices_per_slice
    if devices % inside and inside % run.machine.devices:
        raise PlanError(
            f"parallelism: sizes multiply to {inside}, which does not divide the {devices} "
            f"devices of a slice of {run.machine.name}"
        )
