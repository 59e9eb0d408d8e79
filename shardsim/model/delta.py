"""Linear attention: layers that keep a state of fixed size instead of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shardsim.errors import ModelError, shown

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Sizes of the gated delta rule (arXiv 2412.06464), which all layers have but every n-th.

    A state of `key_dim` x `value_dim` for each of `value_heads`; each of `key_heads` serves
    value_heads / key_heads of them in turn. Queries, keys and values pass a convolution over the
    last `taps` tokens. Tokens are worked on in chunks of `chunk`, a power of two.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    chunk: int = 64
    every: int = 4  # of so many layers in turn the last has softmax attention

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            least = 2 if field.name == "every" else 1
            if not whole or not least <= value <= _LARGEST:
                raise ModelError(
                    f"delta.{field.name}: expected a whole number, {least} or more, "
                    f"found {shown(value)}"
                )
        if self.value_heads % self.key_heads:
            more = -(-self.value_heads // self.key_heads) * self.key_heads
            raise ModelError(
                f"delta.value_heads: {self.value_heads} heads cannot share {self.key_heads} key "
                f"heads evenly; the nearest that can: {more}"
            )
        if self.chunk & (self.chunk - 1):
            raise ModelError(
                f"delta.chunk: must be a power of two, not {self.chunk}; the nearest is "
                f"{1 << self.chunk.bit_length() - 1}"
            )

    def has(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, keeps a state."""
        return layer % self.every != self.every - 1


KEYS = tuple(field.name for field in fields(Delta))
