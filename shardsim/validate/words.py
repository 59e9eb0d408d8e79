"""Trainers' words: numbers, the axes of parallelism, and what remat policies keep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

from shardsim.errors import FileError, PlanError, nearest
from shardsim.machine import Machine
from shardsim.plan.layout import ROLES
from shardsim.plan.placement import place
from shardsim.plan.plan import MeshAxis
from shardsim.plan.remat import TENSORS as KEPT
from shardsim.plan.remat import Policy
from shardsim.plan.resolve import AXIS_NAMES

# Words for the axes of parallelism, by the role that they have here.
PARALLELISM: Mapping[str, str] = {
    **dict.fromkeys(("data", "dp", "ddp", "replica", "dp_replicate"), "data"),
    **dict.fromkeys(("fsdp", "fsdp_transpose", "dp_shard"), "fsdp"),
    **dict.fromkeys(("tensor", "tp", "model", "mp", "mdl", "tensor_model"), "tensor"),
    **dict.fromkeys(("tensor_transpose", "tensor_sequence"), "tensor"),
    **dict.fromkeys(("context", "cp"), "context"),
    **dict.fromkeys(("pipeline", "pp", "stage", "pipeline_model"), "pipeline"),
}
# Axes that are not modelled, with what they would do.
UNMODELLED_AXES: Mapping[str, str] = {
    **dict.fromkeys(("ulysses", "context_ulysses"), "Ulysses (all-to-all of heads)"),
    **dict.fromkeys(("ring", "ring_attention"), "ring attention"),
    **dict.fromkeys(("ep", "expert", "experts"), "experts on an axis of their own"),
    **dict.fromkeys(("sp", "sequence", "seq"), "an axis over the sequence that is not said to "
                    "gather keys and values ('context' does)"),
    **dict.fromkeys(("autoregressive", "track"), "this axis"),
}  # fmt: skip

EXPERT_AXES = ("ep", "expert", "experts")

# MaxText's and others' names of tensors that a remat policy keeps.
TENSORS: Mapping[str, str] = {
    **dict.fromkeys(("decoder_layer_input", "layer_input"), "layer_input"),
    **dict.fromkeys(("qkv", "qkv_proj", "q", "k", "v", "q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("query_proj", "key_proj", "value_proj"), "qkv"),
    "context": "context",
    **dict.fromkeys(("out_proj", "o_proj", "attention_out"), "attention_output"),
    **dict.fromkeys(("mlpwi", "mlpwi_0", "mlpwi_1"), "mlp_hidden"),
    "mlpwo": "mlp_output",
}
# Names that together are all of a tensor; one of them alone is only a part.
_PARTS = (
    *({"q", "k", "v"}, {"q_proj", "k_proj", "v_proj"}, {"query_proj", "key_proj", "value_proj"}),
    {"mlpwi_0", "mlpwi_1"},
)
_DOTS = frozenset({"qkv", "attention_output", "mlp_hidden", "mlp_output"})
_NONE = Policy(save=_DOTS | {"context", "rest"})
_MINIMAL = Policy(save=_DOTS)
_WITH_CONTEXT = Policy(save=_DOTS | {"context"})
REMAT_POLICIES: Mapping[str, Policy] = {
    **dict.fromkeys(("none", "everything_saveable"), _NONE),
    **dict.fromkeys(("full", "nothing_saveable"), Policy()),
    **dict.fromkeys(("minimal", "minimal_with_quantization", "dots"), _MINIMAL),
    "dots_with_no_batch_dims_saveable": _MINIMAL,
    "checkpoint_dots_with_no_batch_dims": _MINIMAL,
    # Products of whole sequences too, but what a fused kernel makes is none of theirs.
    **dict.fromkeys(("dots_saveable", "checkpoint_dots"), _MINIMAL),
    "minimal_flash": _WITH_CONTEXT,
    "minimal_with_context": _WITH_CONTEXT,
    "minimal_with_context_and_quantization": _WITH_CONTEXT,
    "selective": _WITH_CONTEXT,
    "save_dot_except_logits": _MINIMAL,  # those of attention
    "save_dot_except_mlp": Policy(save=frozenset({"qkv", "attention_output"})),
    "save_dot_except_mlpwi": Policy(save=frozenset({"qkv", "attention_output", "mlp_output"})),
    "save_dot_with_context_except_mlp": Policy(
        save=frozenset({"qkv", "context", "attention_output"})
    ),
    "save_qkv_proj": Policy(save=frozenset({"qkv"})),
    "save_out_proj": Policy(save=frozenset({"attention_output"})),
    "qkv_proj_offloaded": Policy(offload=frozenset({"qkv"})),
    **dict.fromkeys(("minimal_offloaded", "offload_dots_saveable"), Policy(offload=_DOTS)),
    "save_qkvo": Policy(save=frozenset({"qkv", "attention_output"})),
}

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
# Numbers as sentences have them, by their words.
IN_WORDS: Mapping[str, int] = {"sixteen": 16, **{word: n for n, word in enumerate(_NUMBERS, 1)}}
_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_NUMBER = re.compile(r"~?\s*(\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmbt](?![a-z]))?(\D*)")


# How sources say that they do not say.
UNSAID = ("unknown", "not stated", "not published")


def number(value: Any, key: str) -> float:
    """Return a positive finite number: 48, "48", "1,024", "21.7B", "54.9 %"; no others.

    >>> number("1,024 chips", "chips"), number("21.7B", "params")
    (1024.0, 21700000000.0)
    """
    found: float | None = None
    if isinstance(value, str) and len(value) <= 60:
        if match := _NUMBER.fullmatch(value.strip().lower()):
            found = float(re.sub(r"[,_]", "", match[1])) * _SCALES.get(match[2] or "", 1.0)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value)
    if found is None or not math.isfinite(found):
        raise FileError(f"{key}: expected a positive number, found {shown(value)}")
    if not 1e-12 < found < 1e18:
        raise FileError(f"{key}: must be positive and below 10^18, not {found:g}")
    return found


def whole(value: Any, key: str) -> int:
    """Return a positive whole number of at most 10^9."""
    found = number(value, key)
    if found != int(found):
        raise FileError(f"{key}: expected a whole number, found {shown(value)}")
    if found > 10**9:
        raise FileError(f"{key}: must be at most 10^9, not {found:g}")
    return int(found)


def shown(value: Any) -> str:
    """Return a value for a message, of bounded length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def remat_named(policy: str, tensors: Mapping[str, Any]) -> Policy | None:
    """Return a trainer's policy; "custom" keeps `tensors`, each on the "device" or offloaded.

    None for a name that is not known.
    """
    if policy != "custom":
        return REMAT_POLICIES.get(policy)
    places: dict[str, set[str]] = {"device": set(), "offload": set()}
    for name, where in tensors.items():
        places.get(str(where), set()).add(TENSORS[name])
    saved = places["device"] - places["offload"] - {"layer_input"}  # the scan carries it anyway
    return Policy(save=frozenset(saved), offload=frozenset(places["offload"]))


def remat_by_its_name(words: str) -> Policy | None:
    """Return the policy that `Policy.name` calls so, of tensors of a plan; None of other words.

    >>> remat_by_its_name("save statistics, offload context + qkv").name
    'save statistics, offload context + qkv'
    """
    kept: dict[str, frozenset[str]] = {}
    for part in words.split(", "):
        place, _, names = part.partition(" ")
        kept[place] = frozenset(name.strip() for name in names.split("+"))
        known = {*KEPT, "layer_input"} if place == "offload" else {*KEPT}
        if place not in ("save", "offload") or not kept[place] <= known:
            return None
    nothing: frozenset[str] = frozenset()
    return Policy(save=kept.get("save", nothing), offload=kept.get("offload", nothing))


def widened(names: Iterable[str]) -> list[str]:
    """Return those names of a custom policy for which a plan keeps more than they say.

    >>> widened(["q", "k", "v", "mlpwi_0", "context"])
    ['mlpwi_0']
    """
    given = set(names)
    return sorted(name for part in _PARTS if not part <= given for name in given & part)


@dataclass
class Split:
    """How a job was split: sizes by role inside a slice and over slices."""

    inside: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    experts: bool = False  # whether the model has any, which may lie on an axis of their own
    rest: str | None = None  # the role that takes what the sizes leave over, where it is said
    keys: list[str] = field(default_factory=list)  # of the trainer, that gave the sizes

    def add(self, key: str, size: Any, said: str = "") -> None:
        """Add one axis by its trainer's key, such as `ici_fsdp_parallelism`; -1 is the rest.

        `said` is the key in the file, where that is another word for the same.
        """
        over_slices, where = key.startswith("dcn_"), said or f"parallelism.{key}"
        name = re.sub(r"^(dcn|ici)_|((_model)?_parallel(ism)?)?(_size|_degree)?$", "", key)
        if size in (0, 1, "0", "1"):
            return
        of_experts = self.experts and name in EXPERT_AXES
        if name in UNMODELLED_AXES and not of_experts:
            raise FileError(f"{where}: not modelled: {UNMODELLED_AXES[name]}")
        if name not in PARALLELISM and not of_experts:
            raise FileError(f"parallelism: unknown key '{key}'{nearest(key, PARALLELISM)}")
        role = "expert" if of_experts else PARALLELISM[name]
        if size in (-1, "-1", "rest", "auto"):
            self.rest = self.rest if over_slices else role
            return
        sizes = self.outside if over_slices else self.inside
        self.keys.append(where)
        sizes[role] = sizes.get(role, 1) * whole(size, where)

    def _keys(self, over_slices: bool) -> str:
        named = [key for key in self.keys if ("dcn_" in key) is over_slices]
        return ", ".join(named) or "parallelism"

    def mesh(self, machine: Machine, rest: str | None) -> tuple[MeshAxis, ...]:
        """Return the mesh on `machine`; `rest` is the role of what the sizes leave over.

        With `rest` None it is fsdp if one device of a chip each is left over, else data. Sizes
        count one slice, or the whole job where they divide only that (as they always do on GPU
        nodes, of which no one counts the parallelism inside).
        """
        sizes, outside = dict(self.inside), {r: n for r, n in self.outside.items() if n > 1}
        devices, product = machine.devices_per_slice, prod(sizes.values())
        whole_job = machine.chip.interconnect == "switch" or devices % product != 0
        if whole_job and not outside and machine.slices > 1 and machine.devices % product == 0:
            _fill(sizes, machine, machine.devices // product, rest)
            left = machine.slices
            for role in ROLES:
                if (part := gcd(left, sizes.get(role, 1))) > 1:
                    outside[role] = part
                    sizes[role] //= part
                    left //= part
        elif machine.chip.interconnect == "switch" and machine.devices % product:
            raise PlanError(
                f"{self._keys(False)}: sizes multiply to {product}, which does not divide the "
                f"{machine.devices} devices of {machine.name}"
            )
        elif devices % product:
            raise PlanError(
                f"{self._keys(False)}: sizes multiply to {product}, which does not divide the "
                f"{devices} devices of a slice of {machine.name}"
            )
        elif machine.slices % prod(outside.values()):
            raise PlanError(
                f"{self._keys(True)}: sizes over slices multiply to {prod(outside.values())}, but "
                f"{machine.name} has {machine.slices}"
            )
        else:
            _fill(sizes, machine, devices // product, rest)
            left = machine.slices // prod(outside.values())
            outside["data"] = outside.get("data", 1) * left
        roles = [role for role in ROLES if sizes.get(role, 1) * outside.get(role, 1) > 1]
        one = Machine(chip=machine.chip, shape=machine.shape, twisted=machine.twisted)
        axes = place({AXIS_NAMES[role]: sizes.get(role, 1) for role in roles}, one)
        found = tuple(
            MeshAxis(
                name=axis.name,
                size=axis.size * outside.get(role, 1),
                torus=({"dcn": outside[role]} if outside.get(role, 1) > 1 else {})
                | dict(axis.torus),
            )
            for role, axis in zip(roles, axes, strict=True)
        )
        return found or (MeshAxis(name="data", size=1, torus={}),)


def _fill(sizes: dict[str, int], machine: Machine, left: int, rest: str | None) -> None:
    if rest is None:
        rest = "fsdp" if left == machine.chip.devices_per_chip else "data"
    sizes[rest] = sizes.get(rest, 1) * left


def lower(row: Mapping[str, Any], key: str) -> str:
    """Return what a row says under a key, in small letters."""
    return str(row.get(key) or "").lower()
