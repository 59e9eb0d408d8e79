"""A mixture of experts: how many there are, which layers have them, and how tokens reach them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction

from shardsim.errors import ModelError, nearest, shown

ROUTERS = ("softmax", "sigmoid")
_COUNTS = {"number": 2, "top_k": 1, "mlp": 1, "shared": 0, "shared_mlp": 0, "dense_layers": 0}
_COUNTS |= {"every": 1, "group": 0, "soft_slots": 0}
_FLAGS = ("beside", "apart", "router_bias", "scales", "shared_gate")
_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts in place of the MLP: each token goes to `top_k` of them.

    With a `capacity` factor each expert takes so many times its share of the tokens of a group and
    no more, and tokens are dispatched by products with masks (GShard, arXiv 2006.16668). Without
    one nothing is dropped: tokens are sorted by expert (MegaBlocks, arXiv 2211.15841).
    """

    number: int
    top_k: int
    mlp: int  # width of one expert's hidden layer
    shared: int = 0  # experts that every token goes to, besides
    shared_mlp: int = 0  # width of one of those; 0: as the others
    shared_gate: bool = False  # those are scaled by a gate of each token (Qwen 1.5)
    dense_layers: int = 0  # layers in front that have an MLP instead
    every: int = 1  # of so many layers in turn the last has experts, the others an MLP
    beside: bool = False  # an MLP beside the experts
    apart: bool = False  # experts, their router and that MLP each have norms of their own (Gemma 4)
    router: str = "softmax"  # of a token's logits over experts; or sigmoid of each
    router_bias: bool = False
    scales: bool = False  # a learned scale of what each expert makes (Gemma 4)
    capacity: float = 0.0  # 0: no token is dropped
    group: int = 0  # tokens among which capacity counts; 0: a sequence
    soft_slots: int = 0  # of an expert, each a mean of all tokens of a sequence (Soft MoE)

    def __post_init__(self) -> None:
        for key, least in _COUNTS.items():
            value = getattr(self, key)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= _LARGEST:
                raise ModelError(
                    f"experts.{key}: expected a whole number, {least} or more, found {shown(value)}"
                )
        for key in _FLAGS:
            if not isinstance(getattr(self, key), bool):
                raise ModelError(
                    f"experts.{key}: expected true or false, found {getattr(self, key)!r:.40}"
                )
        if self.router not in ROUTERS:
            raise ModelError(
                f"experts.router: unknown choice {self.router!r:.40}"
                f"{nearest(str(self.router), ROUTERS)}"
            )
        factor = self.capacity
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise ModelError(f"experts.capacity: expected a number, found {factor!r:.40}")
        if not math.isfinite(factor) or factor < 0:
            raise ModelError(
                f"experts.capacity: expected 0 (no token is dropped) or more, found {factor}"
            )
        if self.top_k > self.number:
            raise ModelError(
                f"experts.top_k: a token cannot go to {self.top_k} of {self.number} experts; the "
                f"nearest is {self.number}"
            )
        if self.shared_gate and not self.shared:
            raise ModelError("experts.shared_gate: there are no shared experts; leave it out")
        if self.apart and not self.beside:
            raise ModelError("experts.apart: from an MLP beside them; use beside: true")
        if self.soft_slots and (self.apart or self.scales):
            raise ModelError("experts.soft_slots: not with apart and scales; leave those out")
        if self.soft_slots and (self.capacity or self.router_bias or self.top_k != 1):
            raise ModelError(
                "experts.soft_slots: a slot is a mean of all tokens; leave out capacity and "
                "router_bias, and use top_k: 1"
            )
        if self.group and not self.capacity:
            raise ModelError("experts.group: only a capacity counts in groups; leave it out")

    @property
    def shared_width(self) -> int:
        """Width of all shared experts side by side."""
        return self.shared * (self.shared_mlp or self.mlp)

    @property
    def dropless(self) -> bool:
        """Whether each expert works on as many tokens as come."""
        return not self.capacity and not self.soft_slots

    def active(self, tokens: int) -> Fraction:
        """Return the share of experts' weights that works on a token, of a sequence of so many."""
        return Fraction(self.soft_slots or self.top_k, tokens if self.soft_slots else self.number)

    def has(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts."""
        return layer >= self.dense_layers and layer % self.every == self.every - 1

    def groups(self, tokens: int) -> int:
        """Return the groups of a sequence in which capacity counts."""
        return max(1, tokens // self.group) if self.group else 1

    def share(self, tokens: int) -> Fraction:
        """Return the tokens of a group that go to one expert, on average, or its slots."""
        if self.soft_slots:
            return Fraction(self.soft_slots)
        return Fraction(self.top_k * tokens, self.number * self.groups(tokens))

    def slots(self, tokens: int) -> Fraction:
        """Return the tokens of a group that one expert works on, empty places included."""
        share = self.share(tokens)
        if not self.capacity:
            return share
        return Fraction(math.ceil(share * Fraction(str(float(self.capacity)))))


KEYS = tuple(field.name for field in fields(Experts))
