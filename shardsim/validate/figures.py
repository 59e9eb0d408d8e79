"""What a row in the words of its source measured, and how the source counts FLOPs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import FileError
from shardsim.machine import Chip
from shardsim.model import Accounting, accounting_named
from shardsim.validate.words import number, shown

_MEASURED = {
    "tokens_s_chip": "tokens_per_s_per_chip",
    "tokens_s_gpu": "tokens_per_s_per_chip",
    "tokens_s_total": "tokens_per_s",
    "step_s": "step_time_s",
    "tflops_chip": "tflops_per_s_per_chip",
    "tflops_s_chip": "tflops_per_s_per_chip",
    "tflops_s_gpu": "tflops_per_s_per_chip",
    "mfu_pct": "mfu",
    "speedup_2pods_vs_1": "speedup_over_one_slice",
    "seconds_per_step": "step_time_s",
    **{key: key for key in ("tokens_per_s_per_chip", "tokens_per_s", "step_time_s", "mfu")},
}
# The same in images, examples or sequences.
_SAMPLES = {
    **dict.fromkeys(
        (f"{what}_s_{each}" for what in ("images", "examples", "samples", "sequences")
         for each in ("chip", "gpu")), "tokens_per_s_per_chip"),
    **dict.fromkeys(
        (f"{what}_s_total" for what in ("images", "examples", "samples", "sequences")),
        "tokens_per_s"),
}  # fmt: skip
_SAMPLES_A_CHIP = ("images_per_s_per_chip", "examples_per_s_per_chip", "samples_per_s_per_chip")
# When MaxText changed what it counts, and what it counted from then on.
_MAXTEXT = (
    ("2025-07-22", Accounting.MAXTEXT_2025),
    ("2024-05-09", Accounting.MAXTEXT_2024),
    ("2023-11-29", Accounting.PALM_CAUSAL),
    ("2023-06-06", Accounting.PALM),
    ("", Accounting.SIX_N),
)


_RATE = re.compile(r"(tokens?|tflops?)_(?:per_)?s(?:ec|econd)?_(?:per_)?(chip|gpu|device|core)")
_NO_SECONDS = re.compile(r"\d\s*(ms|milli\w*|us|µs|micro\w*|m|min\w*|h|hours?)\b")
_MILLISECONDS = ("step_ms", "step_time_ms", "ms_per_step")


def _rate(key: Any) -> re.Match[str] | None:
    name = re.sub(r"(?<=tflops)_(?=(per_)?(device|core)$)", "_s_", str(key).lower())
    return _RATE.fullmatch(name)


def _rates(said: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Return rates by the many ways to write their keys, of a chip."""
    found: dict[str, float] = {}
    for key, value in said.items():
        if value is not None and (match := _rate(key)):
            what = "tokens" if match[1].startswith("token") else "tflops"
            parts = {"device": chip.devices_per_chip, "core": chip.cores_per_chip}
            each = parts.get(match[2], 1)
            found[f"{what}_per_s_per_chip"] = each * number(value, f"measured.{key}")
        elif key in _MILLISECONDS and value is not None:
            found["step_time_s"] = number(value, f"measured.{key}") / 1e3
    return found


def _one_of_each(said: Mapping[str, Any]) -> None:
    """Raise `FileError` where two keys of a row say one figure, and not the same."""
    seconds: dict[str, float] = {}
    for key, value in said.items():
        if value is not None and key in _MILLISECONDS:
            seconds[str(key)] = number(value, f"measured.{key}") / 1e3
        elif value is not None and _MEASURED.get(str(key)) == "step_time_s":
            seconds[str(key)] = number(value, f"measured.{key}")
        elif value is not None and key == "steps_per_s":
            seconds[str(key)] = 1.0 / number(value, f"measured.{key}")
    if seconds and max(seconds.values()) > 1.02 * min(seconds.values()):
        words = " and ".join(f"{key} ({found:g} s)" for key, found in seconds.items())
        raise FileError(f"measured: {words} are one figure; leave one out")


def unread_figures(said: Any) -> list[str]:
    """Return the keys of what was measured that nothing reads, but for shares of peaks, which are
    often counted in several ways, and for how long a whole run was."""
    read = {*_MEASURED, *_SAMPLES, *_MILLISECONDS, "steps_per_s"}
    return [
        str(key)
        for key in (said if isinstance(said, Mapping) else ())
        if key not in read
        and not _rate(key)
        and not re.match(
            r"mfu|hfu|loss|note|source|hbm|mem|params|.*(days|hours|steps|_printed)$",
            str(key).lower(),
        )
    ]


def measured_of(row: Mapping[str, Any], sequence: int, chip: Chip) -> dict[str, float]:
    """Return what was measured; `sequence` is the tokens of one image, example or sequence."""
    said = row.get("measured") or {}
    if not isinstance(said, Mapping):
        raise FileError(f"measured: expected a mapping of keys, found {shown(said)}")
    _one_of_each(said)
    for word, value in said.items():
        if _MEASURED.get(word) == "step_time_s" and _NO_SECONDS.search(str(value).lower()):
            raise FileError(f"measured.{word}: {shown(value)} is not in seconds")
    found = _rates(said, chip) | {
        key: number(said[word], f"measured.{word}")
        for word, key in _MEASURED.items()
        if said.get(word) is not None
    }
    if found.get("mfu", 0.0) >= 1.0:
        found["mfu"] /= 100.0
    if found.get("mfu", 0.0) >= 1.0:
        word = next(word for word, key in _MEASURED.items() if key == "mfu" and word in said)
        raise FileError(f"measured.{word}: must be below 100 %, not {shown(said[word])}")
    for word, key in _SAMPLES.items():
        if key not in found and said.get(word) is not None:
            found[key] = sequence * number(said[word], f"measured.{word}")
    if "step_time_s" not in found and said.get("steps_per_s") is not None:
        found["step_time_s"] = 1.0 / number(said["steps_per_s"], "measured.steps_per_s")
    for word in _SAMPLES_A_CHIP:
        if row.get(word) and "tokens_per_s_per_chip" not in found:
            found["tokens_per_s_per_chip"] = sequence * number(row[word], word)
    if row.get("tokens_per_s_per_chip"):
        found["tokens_per_s_per_chip"] = number(
            row["tokens_per_s_per_chip"], "tokens_per_s_per_chip"
        )
    return found


def accounting_of(row: Mapping[str, Any]) -> Accounting:
    """Return how the row's source counts FLOPs, by its `accounting` or the words of `mfu_formula`.

    MaxText's count goes by the date in the words or in `source`; without any words: as PaLM.
    """
    if row.get("accounting") is not None:
        return accounting_named(str(row["accounting"]))
    text = str(row.get("mfu_formula") or "").lower()
    source = str(row.get("source") or "").lower()
    maxtext = "maxtext" in text
    if maxtext and "mixed" in text:
        return Accounting.MAXTEXT_MIXED
    if "halved" in text:
        return Accounting.MAXTEXT_2025 if maxtext and "6n" not in text else Accounting.PALM_CAUSAL
    if re.search(r"12 ?\*? ?l|palm|full attention|attention in full", text):
        return Accounting.MAXTEXT_2024 if "explicit" in text else Accounting.PALM
    if re.search(r"\b6 ?\*? ?n", text):
        return Accounting.SIX_N
    if maxtext or (not text and "maxtext" in source):
        dates = re.findall(r"20\d\d-\d\d-\d\d", text) or re.findall(r"20\d\d-\d\d-\d\d", source)
        if not dates:
            return Accounting.MAXTEXT_2024
        return next(counted for day, counted in _MAXTEXT if dates[0] >= day)
    return Accounting.PALM
