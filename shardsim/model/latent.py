"""Latent attention: queries, keys and values out of small arrays that all heads share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shardsim.errors import ModelError, shown

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values of all heads come from one latent of `keys` numbers a token, queries from one of
    `queries` (0: from the residual stream). `rotary` of a head's width turn by position; those of
    the keys are one array for all heads. A head's values are `values` wide, no wider than its keys.
    """

    keys: int
    rotary: int
    values: int
    queries: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "queries")
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= _LARGEST:
                raise ModelError(
                    f"latent.{field.name}: expected a whole number, {least} or more, "
                    f"found {shown(value)}"
                )
        if self.rotary % 2:
            raise ModelError(
                f"latent.rotary: must be even, not {self.rotary}; the nearest is {self.rotary + 1}"
            )


KEYS = tuple(field.name for field in fields(Latent))
