"""Printing and parsing of bytes, times, rates and counts; SI seconds and bytes inside."""

from __future__ import annotations

import re
from decimal import Decimal
from math import isfinite

GIB = 2.0**30
MIB = 2.0**20

_BINARY = ((2.0**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (2.0**10, "KiB"))
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def show_bytes(count_bytes: float) -> str:
    """Return a byte count in binary units.

    >>> show_bytes(33017561088)
    '30.75 GiB'
    """
    for size, unit in _BINARY:
        if abs(count_bytes) >= size:
            return f"{count_bytes / size:.2f} {unit}"
    return f"{count_bytes:.0f} B"


def show_count(count: float, unit: str = "") -> str:
    """Return a count with a decimal prefix, four significant digits.

    >>> show_count(21743271936)
    '21.74 G'
    """
    for size, prefix in _DECIMAL:
        if abs(count) >= size:
            return f"{count / size:.4g} {prefix}{unit}"
    return f"{count:.4g} {unit}".rstrip()


def show_number(value: int) -> str:
    """Return a whole number as people read it: in full up to twelve digits.

    >>> show_number(65_536), show_number(-(10**99))
    ('65,536', '-1.00e+99')
    """
    return f"{value:,}" if abs(value) < 10**12 else f"{Decimal(value):.3g}"


def show_time(time_s: float) -> str:
    """Return a time with the unit that suits it.

    >>> show_time(0.01425)
    '14.25 ms'
    """
    if time_s == 0:
        return "0 s"
    for size, unit in _TIMES:
        if abs(time_s) >= size:
            return f"{time_s / size:.4g} {unit}"
    return f"{time_s:.3g} s"


def show_percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal.

    >>> show_percent(0.5493)
    '54.9 %'
    """
    return f"{100 * fraction:.1f} %"


# What a number may end with: a prefix, then a unit. `k` of whole counts (tokens, sequences) is
# 1,024, as in "a context of 8k"; of everything else 1,000. `Ki` is always 1,024.
_QUANTITY = re.compile(
    r"([-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?)\s*"
    r"(?:([kKMGTPE]i?|[mun](?=s))?(B/s|B|bit/s|bps|b/s|FLOP/s|FLOPS|flops|s|Hz)?)"
)
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_PREFIXES |= {"m": 1e-3, "u": 1e-6, "n": 1e-9}
_BITS = ("bit/s", "bps", "b/s")
# What a key counts, by how its name ends, and the units that it may be given in.
_MEASURES = (
    ("_bytes_per_s", ("B/s", *_BITS), "90GB/s"),
    ("_bytes", ("B",), "64GiB"),
    ("_s", ("s",), "5us"),
    ("_hz", ("Hz",), "1GHz"),
    ("flops", ("FLOP/s", "FLOPS", "flops"), "275TFLOP/s"),
)


def read_number(text: str, *, whole: bool = False, units: tuple[str, ...] = ()) -> float | None:
    """Return a number with a prefix and perhaps one of `units`, in SI; None where it is none.

    Of `whole` counts `k`, `M` and `G` are powers of 1,024.

    >>> read_number("90GB/s", units=("B/s",)), read_number("64GiB", units=("B",))
    (90000000000.0, 68719476736.0)
    >>> read_number("64k", whole=True), read_number("1e5", whole=True), read_number("300G")
    (65536.0, 100000.0, 300000000000.0)
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    digits, prefix, unit = match.group(1), match.group(2) or "", match.group(3) or ""
    if unit and unit not in units:
        return None
    binary = prefix.endswith("i") or (whole and not unit and prefix in ("k", "K", "M", "G", "T"))
    letter = prefix.rstrip("i").replace("K", "k")
    power = "kMGTPE".find(letter) + 1 if letter else 0
    factor = 1024.0**power if binary and power else _PREFIXES[letter]
    value = float(digits.replace("_", "")) * factor / (8.0 if unit in _BITS else 1.0)
    return value if isfinite(value) else None


def measure_of(key: str) -> tuple[tuple[str, ...], str]:
    """Return the units in which what `key` names may be given, and an example.

    >>> measure_of("chip.link_bytes_per_s")
    (('B/s', 'bit/s', 'bps', 'b/s'), '90GB/s')
    """
    name = key.removesuffix(".bf16").removesuffix(".int8").removesuffix(".fp8")
    for ending, units, example in _MEASURES:
        if name.endswith(ending):
            return units, example
    return (), ""
