"""Low-rank adapters: what is trained where all else is frozen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from shardsim.errors import ModelError, nearest

ATTENTION = ("query", "key", "value", "attention_output")
MLP = ("mlp_in", "mlp_gate", "mlp_out")
CROSS = ("cross_query", "cross_attention_output")
SHARED = ("shared_in", "shared_gate", "shared_out")
EXPERTS = ("expert_in", "expert_gate", "expert_out")
PROJECTIONS = (*ATTENTION, *MLP, *CROSS, *SHARED, *EXPERTS)
_LARGEST = 10**6


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Beside each projection in `on` two narrow ones, to `rank` numbers a token and from there
    (arXiv 2106.09685, section 4.1). They alone are trained, in every layer."""

    rank: int
    on: tuple[str, ...] = (*ATTENTION, *MLP)

    def __post_init__(self) -> None:
        rank: Any = self.rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= _LARGEST:
            asked = f"a positive whole number up to {_LARGEST:,}"
            raise ModelError(f"lora.rank: expected {asked}, found {rank!r:.40}")
        on: Any = self.on
        if not isinstance(on, list | tuple) or not on:
            raise ModelError(f"lora.on: expected a list, as [query, value], found {on!r:.40}")
        for name in on:
            if name not in PROJECTIONS:
                raise ModelError(
                    f"lora.on: no projection {name!r:.40}{nearest(str(name), PROJECTIONS)}"
                )
        object.__setattr__(self, "on", tuple(on))


KEYS = tuple(field.name for field in fields(Lora))
