"""Numbers on the command line: `64k`, `1e5`, `300G`, `14.2s`, `41%`, and prices by chip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from shardsim.units import read_number

BILLION = 1e9


class Whole(click.ParamType):
    """A whole number: 65536, 64k, 1e5."""

    name = "integer"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Read it; whoever uses it checks its range."""
        if isinstance(value, int):
            return value
        number = read_number(str(value), whole=True)
        if number is None or not number.is_integer():
            self.fail(
                f"{str(value)[:40]!r} is not a whole number, such as 65536 or 64k", param, ctx
            )
        return int(number)


class Amount(click.ParamType):
    """A positive number: 1e12, 300G, 1.5T; of tokens also 300B, billions."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Read it."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        billions = read_number(text.removesuffix("B")) if text.endswith("B") else None
        number = read_number(text) if billions is None else billions * BILLION
        if number is None or not number > 0:
            self.fail(f"{text[:40]!r} is no number above 0, such as 1e12 or 300B", param, ctx)
        return number


class Seconds(click.ParamType):
    """A time: 14.2, 14.2s, 850ms."""

    name = "seconds"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Read it."""
        number = value if isinstance(value, float) else read_number(str(value), units=("s",))
        if number is None or not number > 0:
            self.fail(f"{str(value)[:40]!r} is no time, such as 14.2 or 850ms", param, ctx)
        return float(number)


class Share(click.ParamType):
    """A fraction or a percentage: 0.41, 41%."""

    name = "fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Read it; a number above 2 that does not say % is refused."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        number = read_number(text.removesuffix("%"))
        if number is not None and text.endswith("%"):
            number /= 100.0
        if number is None or not 0 < number <= 2:
            self.fail(f"{text[:40]!r} is no fraction, such as 0.41 or 41%", param, ctx)
        return number


class Prices(click.ParamType):
    """What a chip costs for an hour: 4.2, or by chip, v5p=4.2,v5e=1.2; "" stands for any chip."""

    name = "prices"

    def convert(self, value: Any, param: Any, ctx: Any) -> Mapping[str, float]:
        """Read it; chips are called as `load_chip` calls them."""
        from shardsim.errors import HardwareError
        from shardsim.machine import load_chip

        if isinstance(value, Mapping):
            return value
        found: dict[str, float] = {}
        for part in str(value).split(","):
            chip, equals, text = part.rpartition("=")
            price = read_number(text)
            if price is None or not price > 0 or (not chip.strip() and equals):
                self.fail(f"{part[:40]!r} is no price, such as 4.2 or v5p=4.2", param, ctx)
            try:
                name = load_chip(chip.strip()).name if equals else ""
            except HardwareError as error:
                self.fail(str(error), param, ctx)
            if name in found:
                self.fail(f"{part[:40]!r}: a price of that was given already", param, ctx)
            found[name] = price
        return found


WHOLE, AMOUNT, SECONDS, SHARE, PRICES = Whole(), Amount(), Seconds(), Share(), Prices()
