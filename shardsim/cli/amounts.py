"""Numbers on the command line: `64k`, `1e5`, `300G`, `14.2s`, `41%`, and prices by chip.

Each function is the `type` of options: it reads a text, or raises `click.BadParameter`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

from shardsim.errors import HardwareError, PlanError
from shardsim.units import read_number, show_number

BILLION = 1e9
MOST_SHARE = 2.0  # of a peak; above it a percentage was meant


def whole(value: str | int) -> int:
    """Read a whole number: 65536, 64k (65,536), 1e5. Whoever uses it checks its range."""
    text = str(value).strip()
    if re.fullmatch("[-+]?[0-9]{1,100}", text):
        return int(text)
    number = read_number(text, whole=True)
    if number is None or not number.is_integer():
        raise click.BadParameter(f"{text[:40]!r} is not a whole number, such as 65536 or 64k")
    return int(number)


def check_wholes(given: Mapping[str, int | None]) -> None:
    """Refuse numbers, by the options that they were given as, beyond what a plan file may hold."""
    from shardsim.plan.io import LARGEST

    for key, value in given.items():
        if value is not None and not 1 <= value <= LARGEST:
            raise PlanError(
                f"{key}: must be a whole number from 1 to {LARGEST:,}, not {show_number(value)}"
            )


def amount(value: str | float) -> float:
    """Read a number above 0: 1e12, 300G, 1.5T; of tokens also 300B, billions."""
    text = str(value).strip()
    number = read_number(text)
    if number is None and text.endswith("B") and (number := read_number(text[:-1])) is not None:
        number *= BILLION
    if number is None or not number > 0:
        raise click.BadParameter(f"{text[:40]!r} is no positive number, such as 1e12 or 300B")
    return number


def seconds(value: str | float) -> float:
    """Read a time: 14.2, 14.2s, 850ms."""
    number = read_number(str(value), units=("s",))
    if number is None or not number > 0:
        raise click.BadParameter(f"{str(value)[:40]!r} is no time, such as 14.2 or 850ms")
    return number


def share(value: str | float) -> float:
    """Read a fraction or a percentage: 0.41, 41%."""
    text = str(value).strip()
    number = read_number(text.removesuffix("%"))
    if number is not None and text.endswith("%"):
        number /= 100.0
    if number is None or not 0 < number <= MOST_SHARE:
        raise click.BadParameter(f"{text[:40]!r} is no fraction, such as 0.41 or 41%")
    return number


def prices(value: str | Mapping[str, float]) -> Mapping[str, float]:
    """Read what a chip costs for an hour: 4.2, or by chip, v5p=4.2,v5e=1.2; "" is any other."""
    from shardsim.machine import load_chip

    if not isinstance(value, str):
        return value
    found: dict[str, float] = {}
    for part in value.split(","):
        chip, equals, text = part.rpartition("=")
        price = read_number(text)
        if price is None or not price > 0 or (equals and not chip.strip()):
            raise click.BadParameter(f"{part[:40]!r} is no positive price, such as 4.2 or v5p=4.2")
        try:
            name = load_chip(chip.strip()).name if equals else ""
        except HardwareError as error:
            raise click.BadParameter(str(error)) from None
        if name in found:
            raise click.BadParameter(f"{part[:40]!r}: a price of that was given already")
        found[name] = price
    return found
