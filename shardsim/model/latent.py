"""Latent attention: queries, keys and values out of small arrays that all heads share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shardsim.errors import ModelError

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A token is projected down to a latent of width `key_value`, normed, and projected up to keys
    (`nope` a head) and values (`value` a head). A part of `rope` more, turned by position, is one
    for the keys of all heads. Queries, `nope + rope` a head, come from a latent of width `query`,
    or straight from the token where that is 0. Values are no wider than keys.
    """

    key_value: int
    rope: int
    nope: int
    value: int
    query: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "query")
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= _LARGEST:
                raise ModelError(
                    f"latent.{field.name}: expected a whole number, {least} or more, found "
                    f"{value!r:.40}"
                )
        if self.rope % 2:
            raise ModelError(
                f"latent.rope: rotary positions need an even number, found {self.rope}; the "
                f"nearest is {self.rope + 1}"
            )
        if self.value > self.head_dim:
            raise ModelError(
                f"latent.value: {self.value} is more than the {self.head_dim} of keys (nope + "
                f"rope), to which kernels pad values; the nearest is {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head of queries and keys."""
        return self.nope + self.rope


KEYS = tuple(field.name for field in fields(Latent))
