"""What chips cost for an hour, in any currency, by the chip's name; "" stands for any other."""

from __future__ import annotations

from collections.abc import Mapping

from shardsim.errors import PlanError

Prices = Mapping[str, float]


def price_of(prices: Prices, chip: str) -> float:
    """Return what one chip-hour costs.

    >>> price_of({"v5p": 4.2, "": 1.0}, "v4")
    1.0

    Raises `PlanError` where neither the chip nor "" has a price.
    """
    if chip not in prices and "" not in prices:
        known = ", ".join(f"{name}={price:g}" for name, price in prices.items())
        raise PlanError(f"no price of a chip-hour of {chip} is given; write {known},{chip}=...")
    return prices[chip] if chip in prices else prices[""]
