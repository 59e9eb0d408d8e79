"""Heads of the layers that see the whole sequence, where those have others than layers with a
window."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shardsim.errors import ModelError, shown

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class GlobalHeads:
    """What differs in layers without a window (Gemma 4): heads of another width, of which fewer
    are key-value heads. Query heads are as many as elsewhere.

    With `values_are_keys` there is no projection of values: they are what that of keys makes.
    """

    kv_heads: int
    head_dim: int
    values_are_keys: bool = False

    def __post_init__(self) -> None:
        for key in ("kv_heads", "head_dim"):
            value = getattr(self, key)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= _LARGEST:
                raise ModelError(
                    f"global_heads.{key}: expected a positive whole number, found {shown(value)}"
                )
        if not isinstance(self.values_are_keys, bool):
            raise ModelError(
                "global_heads.values_are_keys: expected true or false, found "
                f"{self.values_are_keys!r:.40}"
            )


KEYS = tuple(field.name for field in fields(GlobalHeads))
