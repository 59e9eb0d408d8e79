"""What training takes and costs: days, chip-hours and money for a number of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shardsim.cost.predict import Prediction
from shardsim.errors import PlanError
from shardsim.planner.prices import Prices, price_of

SECONDS_PER_DAY = 86400.0
TRILLION = 1e12


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training on a number of tokens, without failures and pauses; prices in any currency."""

    tokens: float
    prices: Prices = field(default_factory=dict)  # of a chip-hour, by the chip's name

    def days(self, item: Prediction) -> float:
        """Return the days that it takes with a plan."""
        return self.tokens / item.plan.tokens * item.step_time_s / SECONDS_PER_DAY

    def chip_hours(self, item: Prediction) -> float:
        """Return the hours of all chips together."""
        return 24.0 * self.days(item) * item.plan.machine.chips

    def cost(self, item: Prediction) -> float | None:
        """Return what they cost; None without prices."""
        if not self.prices:
            return None
        return self.chip_hours(item) * price_of(self.prices, item.plan.machine.chip.name)

    def to_data(self, item: Prediction) -> dict[str, Any]:
        """Return it for one plan as plain data."""
        return {
            "tokens": self.tokens,
            "days": self.days(item),
            "chip_hours": self.chip_hours(item),
            "cost": self.cost(item),
        }


def training_of(
    tokens: float | None,
    images: float | None,
    sequence: int,
    prices: Prices | None,
    chips: Iterable[str] = (),
) -> Training | None:
    """Return the training that was asked for; None if nothing was.

    Images count `sequence` tokens each. With prices alone it is a trillion tokens. Raises
    `PlanError` where one of the `chips` has no price.
    """
    for chip in chips if prices else ():
        price_of(prices or {}, chip)
    if images is not None and tokens is not None:
        raise PlanError("--tokens and --images: two sizes of one training; give one")
    if images is not None:
        tokens = images * sequence
    if tokens is None and not prices:
        return None
    return Training(tokens=tokens or TRILLION, prices=prices or {})
