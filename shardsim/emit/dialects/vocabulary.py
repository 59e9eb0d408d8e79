"""The words of a MaxText release: its logical axes, read from its own files or from a table.

`base.yml` gains and loses logical axes from release to release, and an axis that is not in the
rules is replicated without a word. So the axes are read from the installed release where one is
given; each comes with the mesh axes of its default rule, which say what it is for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsim.errors import FileError
from shardsim.files import read_yaml

RELEASE = "0.2.5"  # of the tables below

_PLACES = (
    "configs/base.yml",
    "maxtext/configs/base.yml",
    "src/maxtext/configs/base.yml",
    "MaxText/configs/base.yml",
    "src/MaxText/configs/base.yml",
)
_SLICE = re.compile(
    r'"(?P<name>[a-z0-9]{1,10}-\d{1,6})": *SystemCharacteristics\(\s*"tpu", *'
    r'"(?P<chip>[a-z0-9]{1,10}):(?P<shape>\d{1,4}(?:x\d{1,4}){1,2})"'
)

# Logical axes of MaxText 0.2.5 (src/maxtext/configs/base.yml) that training uses, of dense models
# and of experts, with the mesh axes of their default rules.
_BATCH = ("data", "fsdp", "expert")
TRAINING_AXES: Mapping[str, tuple[str, ...]] = {
    "activation_embed_and_logits_batch": _BATCH,
    "activation_embed_and_logits_batch_sequence": (*_BATCH, "context"),
    "activation_vocab": ("tensor",),
    "vocab": ("tensor",),
    "embed_vocab": ("fsdp", "context", "expert"),
    "activation_batch_attn": _BATCH,
    "activation_input_length_attn": ("tensor_sequence", "context"),
    "activation_heads": ("tensor",),
    "activation_kv_heads": ("tensor",),
    "activation_length_attn": ("context",),
    "activation_q_length": ("context",),
    "activation_kv_length": (),
    "activation_embed_attn": ("tensor",),
    "activation_kv": ("tensor",),
    "activation_kv_batch": _BATCH,
    "activation_kv_head_dim": ("tensor",),
    "heads": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "qkv": (),
    "kv": (),
    "kv_head_dim": (),
    "embed_attn": ("fsdp", "context", "expert"),
    "activation_batch_moe": _BATCH,
    "activation_length_moe": ("context",),
    "activation_norm_length_moe": ("tensor_sequence", "context"),
    "activation_embed_moe": ("tensor",),
    "activation_mlp_moe": ("tensor",),
    "activation_exp": ("expert",),
    "exp": ("expert",),
    "mlp_moe": ("tensor",),
    "mlp_no_fsdp": ("tensor",),
    "embed_moe": ("fsdp", "context"),
    "segment_ids_batch": _BATCH,
    "activation_mlp": ("tensor",),
    "activation_batch": _BATCH,
    "activation_length": ("context",),
    "activation_norm_length": ("tensor_sequence", "context"),
    "activation_embed": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp", "context", "expert"),
    "norm": ("tensor",),
    "layers": ("stage",),
}


@dataclass(frozen=True)
class Vocabulary:
    """Logical axes with the mesh axes of their default rules, and slices by name."""

    source: str
    axes: Mapping[str, tuple[str, ...]]
    slices: Mapping[str, str]  # v4-2048 -> v4:8x8x16; empty: not known


def table() -> Vocabulary:
    """Return the vocabulary of the release that the tables are of."""
    return Vocabulary(source=f"MaxText {RELEASE}", axes=TRAINING_AXES, slices={})


def installed(path: Path) -> Vocabulary:
    """Return the vocabulary of the MaxText at `path`: a checkout, a package, or an environment."""
    base = _base_yml(path)
    data = read_yaml(base)
    rules = data.get("logical_axis_rules") if isinstance(data, Mapping) else None
    if not isinstance(rules, list):
        raise FileError(f"{base}: no logical_axis_rules; is this MaxText's base.yml?")
    axes: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        if not isinstance(rule, list) or len(rule) != 2 or not isinstance(rule[0], str):
            raise FileError(f"{base}: logical_axis_rules: expected [name, axes], found {rule!r}")
        axes.setdefault(rule[0], _axes(rule[1]))
    return Vocabulary(
        source=f"the MaxText at {base.parent.parent}", axes=axes, slices=_slices(base.parent.parent)
    )


def _axes(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    return tuple(str(axis) for axis in given) if isinstance(given, list) else ()


def _base_yml(path: Path) -> Path:
    if os.path.isfile(path):
        return path
    candidates = [path / place for place in _PLACES]
    candidates += sorted(path.glob("lib/python3*/site-packages/maxtext/configs/base.yml"))
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise FileError(
        f"{path}: no MaxText there; give its checkout, its package's folder, the environment it "
        "is installed in, or its base.yml"
    )


def _slices(package: Path) -> dict[str, str]:
    """Return what each of the release's slice names stands for, as the compiler names it."""
    file = package / "utils" / "accelerator_to_spec_map.py"
    if not os.path.isfile(file):
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    chips = {"v5": "v5p"}  # what the compiler calls a v5p
    return {
        match["name"]: f"{chips.get(match['chip'], match['chip'])}:{match['shape']}"
        for match in _SLICE.finditer(text)
    }
