"""An index of tokens: few of them, chosen for each query, are attended to."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shardsim.errors import ModelError, shown

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class Index:
    """Sizes of the index of DeepSeek V3.2 (arXiv 2512.02556, section 2.1).

    Products of `heads` small queries with one key of `head_dim` a token, weighted for each query,
    choose the `top` tokens that it sees; sequences no longer than that are seen whole.
    """

    heads: int
    head_dim: int
    top: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= _LARGEST:
                raise ModelError(
                    f"index.{field.name}: expected a positive whole number, found {shown(value)}"
                )


KEYS = tuple(field.name for field in fields(Index))
