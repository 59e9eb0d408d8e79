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
    kind, advice = _sign(data)
    return f"it is {kind}, not {wanted}; {advice}" if kind not in ("", wanted) else ""


def kind_of(data: Any) -> str:
    """Return which kind of file some data is; "" if that is not clear."""
    return _sign(data)[0]


def _sign(data: Any) -> tuple[str, str]:
    """Return the kind, and what to do with one."""
    keys = data.keys() if isinstance(data, Mapping) else frozenset()
    found = ((kind, advice) for kind, signs, advice in _SIGNS if signs <= keys)
    return next(found, ("", ""))
