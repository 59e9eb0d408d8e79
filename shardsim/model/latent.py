"""Latent attention: queries, keys and values made of compressed vectors (DeepSeek-V2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shardsim.errors import ModelError
from shardsim.files import check_keys

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Widths of multi-head latent attention (arXiv 2405.04434, section 2.1).

    Keys and values of all heads come from one vector of `keys` numbers a token, queries from one of
    `queries` (0: from the residual stream). `rotary` of a head's width turn by position; those of
    the keys are one vector for all heads. A head's values are `values` wide.
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
                    f"found {value!r:.40}"
                )
        if self.rotary % 2:
            raise ModelError(f"latent.rotary: must be even, not {self.rotary}")


def latent_of(given: Any, where: str) -> Latent | None:
    """Return what a model's `latent` says: nothing, or a mapping of `Latent`'s fields."""
    if given is None or isinstance(given, Latent):
        return given
    names = [field.name for field in fields(Latent)]
    data: Mapping[str, Any] = check_keys(
        given,
        where=f"{where}: latent",
        allowed=names,
        required=names[:3],
        error=ModelError,
    )
    try:
        return Latent(**data)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
