"""Printing and parsing of bytes, times, rates and counts; SI seconds and bytes inside."""

from __future__ import annotations

GIB = 2.0**30
MIB = 2.0**20
GB = 1e9

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
