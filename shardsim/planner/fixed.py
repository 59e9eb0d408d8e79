"""Choices that a search holds: `mesh.model=4`, `remat=full`, as a plan file has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardsim.errors import PlanError, expect, nearest, shown
from shardsim.plan.layout import ROLES
from shardsim.plan.lengths import BY_SEQUENCE, Lengths, parse_lengths
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import (
    ACCUMULATION,
    ATTENTION,
    CONTEXT_KEYS,
    EXCHANGES,
    MATMUL_OVERLAP,
    PIPELINE_SCHEDULES,
    WHOLE,
    Routing,
    uneven,
)
from shardsim.plan.precision import DTYPE_BYTES, SCALES, Precision
from shardsim.plan.remat import Policy, parse_remat
from shardsim.plan.resolve import ROLE_OF

SCALED = "scales"
FORMATS_OF = tuple(DTYPE_BYTES)
FORMATS = tuple(name for name in Precision.__dataclass_fields__ if name not in ("bf16", "sparsity"))
FLAGS = ("forward_only", "offload_optimizer", "offload_parameters")
KEYS = (
    *("remat", "microbatches", "overlap.matmul", "attention", "optimizer", "context.keys"),
    *("accumulation", "pipeline_schedule", "pipeline_interleave"),
    *("lengths", *FLAGS),
    *(f"experts.{name}" for name in Routing.__dataclass_fields__),
    *(f"precision.{name}" for name in FORMATS),
)
MOST = 10**9
# Programs have rooms of fixed size for copies of tokens that others send, whatever the router does:
# twice the mean, and those of a device that gets more are dropped.
ROOM = 2.0
_WORDS: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "optimizer": tuple(OPTIMIZERS),
    "accumulation": ACCUMULATION,
    "pipeline_schedule": PIPELINE_SCHEDULES,
}


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What plans of a search have in common; None and what is left out is free."""

    sizes: Mapping[str, int] = field(default_factory=dict)  # by role
    remat: Policy | None = None
    microbatches: int | None = None
    matmul: int | None = None  # index in MATMUL_OVERLAP
    attention: str | None = None
    optimizer: str | None = None
    keys: str | None = None  # of CONTEXT_KEYS
    accumulation: str = "repeated"  # of ACCUMULATION
    pipeline_schedule: str = "1f1b"  # of PIPELINE_SCHEDULES
    pipeline_interleave: int = 1
    lengths: Lengths | None = None
    exchange: str | None = None  # of EXCHANGES
    imbalance: float | None = None
    padding: float | None = None  # where none is held, `ROOM`
    forward_only: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    precision: Mapping[str, str] = field(default_factory=dict)

    def precise(self, precision: Precision) -> Precision:
        """Return the formats with those that are held."""
        changes: dict[str, Any] = dict(self.precision)
        return replace(precision, **changes)


def fixed_of(choices: Mapping[str, Any], patch: int = 0) -> Fixed:
    """Return what keys of a plan file and their values hold; raise `PlanError` for other keys.

    `mesh.WORD` is the size of a role (data, fsdp, tensor, ...) or of the axis that the search calls
    so (model, stage, ...); 1 means that no axis has it. Images are cut into patches of `patch`.

    >>> fixed_of({"mesh.model": 4, "remat": "full"}).sizes
    {'tensor': 4}
    """
    expect(choices, Mapping, "fix: expected keys with their values")
    sizes: dict[str, int] = {}
    plain: dict[str, Any] = {}
    precision: dict[str, str] = {}
    for key, value in choices.items():
        root, _, rest = key.partition(".")
        if root == "mesh" and rest:
            if rest not in ROLE_OF:
                raise PlanError(f"fix: {key}: no role '{rest[:40]}'{nearest(rest, ROLE_OF)}")
            sizes[ROLE_OF[rest]] = _count(value, key)
        elif key not in KEYS:
            words = [*KEYS, *(f"mesh.{role}" for role in ROLES)]
            raise PlanError(f"fix: a search cannot hold '{key[:40]}'{nearest(key, words)}")
        elif key == "remat":
            plain["remat"] = parse_remat(value, "fix: remat", 0).only("a search")
        elif key in ("microbatches", "pipeline_interleave"):
            plain[key] = _count(value, key)
        elif key in FLAGS:
            if not isinstance(value, bool):
                raise PlanError(f"fix: {key}: must be true or false, not {shown(value)}")
            plain[key] = value
        elif key == "lengths":
            plain[key] = parse_lengths(value, "", patch)
        elif root == "precision":
            precision[rest] = _one_of(value, SCALES if rest == SCALED else FORMATS_OF, key)
        elif root == "overlap":
            plain["matmul"] = MATMUL_OVERLAP.index(_one_of(value, MATMUL_OVERLAP, key))
        elif root == "context":
            plain["keys"] = _one_of(value, CONTEXT_KEYS, key)
        elif key == "experts.exchange":
            plain[rest] = _one_of(value, EXCHANGES, key)
        elif root == "experts":
            plain[rest] = uneven(value, f"fix: {key}")
        else:
            plain[key] = _one_of(value, _WORDS[key], key)
    lengths = plain.get("lengths")
    if lengths is not None and lengths.held in BY_SEQUENCE:
        sizes.setdefault("context", 1)
    found = Fixed(sizes=sizes, precision=precision, **plain)
    if found.offload_parameters and found.accumulation in WHOLE:
        raise PlanError(
            f"fix: offload_parameters: accumulation {found.accumulation} keeps weights whole on "
            "the device; hold repeated or layered"
        )
    return found


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST:
        raise PlanError(f"fix: {key}: must be a positive whole number, not {shown(value)}")
    return value


def _one_of(value: Any, choices: tuple[str, ...], key: str) -> str:
    if value not in choices:
        raise PlanError(f"fix: {key}: {shown(value)} is not possible{nearest(value, choices)}")
    return str(value)
