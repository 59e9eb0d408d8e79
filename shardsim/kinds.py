"""Which kind of shardsim's files some data is, for whoever was given another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAN, MODEL, CONFIG = "a plan", "a model", "a Hugging Face config"
# What each kind has of keys, the surest sign first, and what to do with one.
_SIGNS: tuple[tuple[str, frozenset[str], str], ...] = (
    (PLAN, frozenset({"machine", "mesh"}), "predict, explain and compare take it whole"),
    ("a chip", frozenset({"peak_flops", "hbm_bytes"}), "shipped ones lie in hardware/"),
    ("a runs file", frozenset({"runs"}), "shardsim validate --runs takes it"),
    ("JSON of a search", frozenset({"plans", "searched"}), "its plans are under plans.plan"),
    ("JSON of explain", frozenset({"changes", "prediction"}), "it names no whole plan"),
    ("JSON of a prediction", frozenset({"step_time_s", "mfu"}), "it names no whole plan"),
    (CONFIG, frozenset({"model_type"}), "called .json, it is taken where a model is named"),
    ("a trainer's config", frozenset({"per_device_batch_size"}), "see shardsim import"),
    (MODEL, frozenset({"family", "layers"}), "it also needs --on, --batch and --mesh"),
    (MODEL, frozenset({"base"}), "it also needs --on, --batch and --mesh"),
)


def other_kind(data: Any, wanted: str) -> str:
    """Return what `data` is instead of what is `wanted`, with what to do; "" if that is not clear.

    >>> other_kind({"base": "vit-22b"}, PLAN)
    'it is a model, not a plan; it also needs --on, --batch and --mesh'
    """
    if not isinstance(data, Mapping):
        return ""
    for kind, keys, advice in _SIGNS:
        if keys <= data.keys():
            return "" if kind == wanted else f"it is {kind}, not {wanted}; {advice}"
    return ""
