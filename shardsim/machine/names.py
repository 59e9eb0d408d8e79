"""Names of slices: the compiler's (`v4:8x8x16`) and the vendors' (`v4-2048`, `v5litepod-256`).

Vendors count TensorCores for v2 to v5p (and MaxText for tpu7x), chips for v5e and v6e: `v4-2048`
is 1,024 chips, `v5e-256` is 256. `explain` says so, and a name that leaves it open is refused.
"""

from __future__ import annotations

import math
import re

from shardsim.errors import HardwareError
from shardsim.machine.catalog import find_name, load_chip, show
from shardsim.machine.chip import Chip
from shardsim.machine.shapes import Shape, can_twist, is_possible, nearest_shapes, shapes_of
from shardsim.machine.slices import Machine

_COUNT = r"(?:(?P<slices>\d{1,5})\*)?"
_COMPILER = re.compile(_COUNT + r"(?P<chip>[^:*]+):(?P<shape>\d{1,6}(x\d{1,6})*)(?P<twist>_twisted)?")
_VENDOR = re.compile(_COUNT + r"(?P<chip>[^:*]+)-(?P<number>\d{1,7})")
_HELP = "a slice is written v4:8x8x16, 2*v5p:8x8x8 (two slices), v5e-256 or 16*h100:8 (16 nodes)"


def parse_machine(text: str, own_chip: Chip | None = None) -> Machine:
    """Return the machine that `text` names; `HardwareError` with the nearest possible ones if none.

    `own_chip` is a chip from the user's own file, which may be named like one that is known.

    >>> parse_machine("v4-2048").name
    'v4:8x8x16'
    >>> parse_machine("2*v5litepod-256").chips
    512
    """
    return _read(text, own_chip)[0]


def explain(text: str, own_chip: Chip | None = None) -> str | None:
    """Return how a vendor's name was understood, or None for a name that leaves nothing open.

    >>> explain("v4-2048")
    'v4-2048 counts TensorCores: 1,024 chips, v4:8x8x16'
    """
    return _read(text, own_chip)[1]


def possible_slices(chip: Chip | str, chips: int | None = None) -> list[str]:
    """Return the names of single slices (for GPUs: nodes), of `chips` chips if given.

    By number of chips, then the most cubic first. Axes are ascending; other orders are accepted.
    A number of GPUs beyond one node gives the name of that many nodes.

    >>> possible_slices("v5e", 128)
    ['v5e:8x16']
    """
    chip = load_chip(chip) if isinstance(chip, str) else chip
    if chip.interconnect == "switch" and chips is not None and chips > chip.max_slice[0]:
        whole = chips % chip.max_slice[0] == 0
        return [default_slice(chip, chips).name] if whole else []
    return [_name(chip, shape) for shape in shapes_of(chip, chips)]


def default_slice(chip: Chip | str, chips: int) -> Machine:
    """Return the slice that the vendor gives for a number of chips; of GPUs as many full nodes.

    >>> default_slice("v4", 1024).name, default_slice("h100", 64).name
    ('v4:8x8x16', '8*h100:8')
    """
    chip = load_chip(chip) if isinstance(chip, str) else chip
    shapes = shapes_of(chip, chips)
    if shapes:
        return Machine(chip=chip, shape=shapes[0])
    node = math.prod(chip.max_slice)
    if chip.interconnect == "switch" and chips > node and chips % node == 0:
        return Machine(chip=chip, shape=chip.max_slice, slices=chips // node)
    noun = "node" if chip.interconnect == "switch" else "slice"
    raise HardwareError(
        f"no {chip.name} {noun} has {chips:,} chips; {_instead(chip, chips, noun == 'slice')}"
    )


def _read(text: str, own_chip: Chip | None) -> tuple[Machine, str | None]:
    """Return the machine and the explanation of its name, which is None if there is none."""
    plain = "".join(str(text).split()).lower().replace("×", "x")
    if len(plain) > 200:
        raise HardwareError(f"{show(text)} names no slice; {_HELP}")
    match = _COMPILER.fullmatch(plain)
    if match:
        chip = _chip(match["chip"], own_chip)
        shape = tuple(int(length) for length in match["shape"].split("x"))
        slices = _slices(match["slices"], plain)
        return _from_shape(chip, shape, slices, match["twist"] is not None), None
    # `find_name` first, because an alias may end in a number too.
    match = None if find_name(plain) else _VENDOR.fullmatch(plain)
    if match:
        chip = _chip(match["chip"], own_chip)
        return _from_number(chip, int(match["number"]), _slices(match["slices"], plain), plain)
    known = find_name(plain)
    if known or (own_chip is not None and plain == own_chip.name.lower()):
        chip = load_chip(known) if known else _chip(plain, own_chip)
        some = ", ".join(_name(chip, shape) for shape in shapes_of(chip)[-4:])
        raise HardwareError(f"{show(text)} is a chip, not a slice of it; for example {some}")
    raise HardwareError(f"{show(text)} names no slice; {_HELP}")


def _chip(name: str, own_chip: Chip | None) -> Chip:
    if own_chip is not None and name == own_chip.name.lower():
        return own_chip
    return load_chip(name)


def _slices(digits: str | None, text: str) -> int:
    if digits is not None and int(digits) == 0:
        raise HardwareError(f"{show(text)}: the number of slices must be at least 1")
    return int(digits) if digits else 1


def _from_shape(chip: Chip, shape: Shape, slices: int, twisted: bool) -> tuple_machine:
    ...
