"""Rows' words for number formats and optimizers."""

from __future__ import annotations

import re
from typing import Any

from shardsim.errors import FileError
from shardsim.machine import Chip
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.precision import NARROW
from shardsim.validate.libraries import Library

_OF_GRADIENTS = r"(grad_dtype|grads|gradients)"
_BF16 = r"(bf16|bfloat16)"
_WEIGHTS = r"(weights|parameters|params)"
_NARROW_WEIGHTS = (
    rf"\b{_BF16}[- ]{_WEIGHTS}\b|\b{_BF16} \({_WEIGHTS}\b|\b{_WEIGHTS} (are )?in {_BF16}"
    rf"|\bweight_dtype[ =:]*{_BF16}|\bpure {_BF16}"
)
_NARROW_STATE = (
    rf"\b{_BF16} (both )?(moments|(optimizer )?states?)\b"
    rf"|\b(moments|states?|mu and nu) (are )?(in )?{_BF16}"
)
_QUANTISED = (
    r"\bquantization[ =:'\"]*(int8|fp8)\w*|\b(int8|fp8|float8)( training| matmuls?| \(?aqt)"
)


def optimizer_of(words: str, library: Library | None) -> str:
    """Return the optimizer of a row by its words, its library's where it names none."""
    if narrow := re.search(r"\b8[- ]?bit\b|\bint8 (adam|state|moments?)|adam[w_ ]*8", words):
        raise FileError(f"optimizer: state of 8 bits ({narrow.group()}) is not modelled")
    if "adafactor" in words:
        whole_moment = re.search(r"not factored|unfactored|without factor|no factor", words)
        return "adafactor-full" if whole_moment else "adafactor"
    if re.search(
        rf"\bmu(_dtype)?,? ({_OF_GRADIENTS},? )?(in )?bf16|first moment (in )?bf16", words
    ):
        return "adamw-bf16-mu"
    for name in ("momentum", "sgd", "adam"):
        if name in words:
            return {"adam": "adamw"}.get(name, name)
    if other := re.search(r"soap\b|shampoo|\blion\b|muon|lamb|lars|sophia", words):
        raise FileError(
            f"optimizer: {other.group()} is not modelled; choose from: {', '.join(OPTIMIZERS)}"
        )
    return library.optimizer if library else "adamw"


def precision_of(chip: Chip, precision: str, words: str, library: Library | None) -> dict[str, Any]:
    """Return formats: of products, and of weights and gradients that a row says are bf16."""
    narrow = re.search(_QUANTISED, words)
    found: dict[str, Any] = {"compute": _compute(chip, narrow[0] if narrow else precision)}
    if library:
        found |= library.precision
        found |= library.narrow_precision if found["compute"] in NARROW else {}
    if re.search(_NARROW_WEIGHTS, words):
        found |= {"parameters": "bf16", "state": "bf16"}  # moments are as the weights are
    if re.search(_NARROW_STATE, words):
        found["state"] = "bf16"
    if re.search(rf"\b{_OF_GRADIENTS} (in )?bf16|\bbf16 (grads|gradients)\b", words):
        found["gradients"] = "bf16"
    return found


def _compute(chip: Chip, words: str) -> str:
    """Return the number format of matmuls."""
    for word, name in (("fp8", "fp8"), ("float8", "fp8"), ("int8", "int8"), ("fp4", "fp4")):
        if word in words:
            if name not in chip.peak_flops:
                raise FileError(f"precision: {name}: the {chip.name} multiplies no {name}")
            return name
    return "f32" if re.match(r"(fp32|f32|float32)\b", words) and "bf16" not in words else "bf16"
