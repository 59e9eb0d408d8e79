"""What a row measured, as tokens/s/chip, whatever its source printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import ModelError
from shardsim.machine import Chip, Machine
from shardsim.model import (
    Accounting,
    Model,
    accounting_named,
    forward_matmul_flops_per_token,
    model_flops_per_token,
)
from shardsim.validate.words import MEASURED, ROW, find, mapping, number

# When MaxText changed what it counts, and what it counted from then on.
_MAXTEXT = (
    ("2023-06-06", Accounting.PALM),
    ("2023-11-29", Accounting.PALM_CAUSAL),
    ("2024-05-09", Accounting.MAXTEXT_2024),
    ("2025-07-22", Accounting.MAXTEXT_2025),
)
_HALVED = re.compile(r"halved|half|/ ?2\b|causal mask|(?<!\d)6 ?\*? ?l ?\*? ?h")
_SIX = re.compile(r"\b6 ?\*? ?(n|p)(\b|_)|\b6 ?\* ?params")
_FULL = re.compile(r"12 ?\*? ?l|12lh|palm|full attention|attention in full")
_HARDWARE = re.compile(r"\bhfu\b|8 ?\*? ?n\b|96 ?\*? ?b|4 passes|four passes|hardware flop")


def accounting_of(row: Mapping[str, Any]) -> tuple[Accounting, bool]:
    """Return how a row's source counts FLOPs, and whether it counts recomputation too.

    The row's `accounting`, or the words of `mfu_formula`; MaxText's count by the date in them or
    in `source`. Without any words: as PaLM.
    """
    text = str(find(row, "mfu_formula", ROW) or "").lower()
    hardware = bool(_HARDWARE.search(text))
    said = row.get("accounting")
    if isinstance(said, str):
        try:
            return accounting_named(said), hardware
        except ModelError:
            text = f"{said.lower()} {text}"
    source = str(row.get("source", "")).lower()
    maxtext = "maxtext" in text or "tpu-recipes" in text
    if _HALVED.search(text) and not _FULL.search(text):
        explicit = maxtext and not _SIX.search(text)
        return (Accounting.MAXTEXT_2025 if explicit else Accounting.PALM_CAUSAL), hardware
    if _FULL.search(text):
        explicit = maxtext and "explicit" in text
        return (Accounting.MAXTEXT_2024 if explicit else Accounting.PALM), hardware
    if _SIX.search(text):
        return Accounting.SIX_N, hardware
    if "explicit" in text or "72 b" in text or "72b" in text or hardware:
        return Accounting.MAXTEXT_2024, hardware
    if maxtext or (not text and ("maxtext" in source or "tpu-recipes" in source)):
        dates = re.findall(r"20\d\d-\d\d-\d\d", text) or re.findall(r"20\d\d-\d\d-\d\d", source)
        if not dates:
            return Accounting.MAXTEXT_2024, hardware
        before = re.search(r"(until|before|to) " + dates[0], text) is not None
        known = [each for day, each in _MAXTEXT if (day < dates[0] if before else day <= dates[0])]
        return (known[-1] if known else Accounting.SIX_N), hardware
    return Accounting.PALM, hardware


def flops_per_token(row: Mapping[str, Any], model: Model, sequence: int) -> float:
    """Return the FLOPs per token by which the row's source turned throughput into FLOP/s."""
    accounting, hardware = accounting_of(row)
    flops = model_flops_per_token(model, sequence, accounting)
    if hardware:
        # A fourth pass over the layers, not over the logits (Megatron, arXiv 2104.04473, eq. 3).
        logits = 2.0 * model.vocab * model.embed
        flops += forward_matmul_flops_per_token(model, sequence) - logits
    return flops


def measured_rate(
    row: Mapping[str, Any],
    model: Model,
    sequence: int,
    peak: float,
    chip: Chip,
    machine: Machine | None,
    batch: int | None,
) -> tuple[float | None, str]:
    """Return tokens/s/chip and what it was derived from, "" if the row states it.

    `peak` is the FLOP/s of a chip of which the row's MFU is a share.
    """
    measured = mapping(row.get("measured"), "measured")
    rate = find(row, "tokens_per_s_per_chip", {"tokens_per_s_per_chip": ("tokens_s_chip",)})
    if rate is not None:
        return number(rate, "tokens_per_s_per_chip"), ""

    def of(key: str) -> float | None:
        value = find(measured, key, MEASURED)
        return None if value is None else number(value, f"measured.{key}")

    if (value := of("tokens_s_chip")) is not None:
        return value, ""
    if (value := of("tokens_s_device")) is not None:
        return value * chip.devices_per_chip, "tokens_s_device"
    if (value := of("sequences_s_chip")) is not None:
        return value * sequence, "sequences_s_chip"
    if machine is not None:
        if (value := of("tokens_s_total")) is not None:
            return value / machine.chips, "tokens_s_total"
        if (value := of("sequences_s_total")) is not None:
            return value * sequence / machine.chips, "sequences_s_total"
        step_s = of("step_s")
        if step_s is None and (step_ms := of("step_ms")) is not None:
            step_s = step_ms / 1e3
        if step_s is not None and batch is not None:
            return batch * sequence / step_s / machine.chips, "step_s"
    flops = flops_per_token(row, model, sequence)
    if (value := of("tflops_chip")) is not None:
        return value * 1e12 / flops, "tflops_chip"
    if (value := of("tflops_device")) is not None:
        return value * 1e12 * chip.devices_per_chip / flops, "tflops_device"
    if machine is not None:
        if (value := of("pflops_total")) is not None:
            return value * 1e15 / machine.chips / flops, "pflops_total"
        if (share := measured_mfu(row)) is not None:
            return share * peak / flops, "mfu_pct"
    return None, ""


def measured_mfu(row: Mapping[str, Any]) -> float | None:
    """Return the printed MFU as a fraction; one of at most 1 is a fraction already."""
    value = find(mapping(row.get("measured"), "measured"), "mfu_pct", MEASURED)
    if value is None:
        return None
    share = number(value, "measured.mfu_pct")
    return share / 100.0 if share > 1.0 else share
