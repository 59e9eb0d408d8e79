"""Names of slices: the compiler's (`v4:8x8x16`) and the vendors' (`v4-2048`, `v5litepod-256`).

Vendors count TensorCores for v2 to v5p (and MaxText for tpu7x), chips for v5e and v6e: `v4-2048`
is 1,024 chips, `v5e-256` is 256. `explain` says so, and a name that leaves it open is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from shardsim.errors import HardwareError
from shardsim.machine.catalog import find_name, load_chip, show
from shardsim.machine.chip import Chip
from shardsim.machine.shapes import Shape, can_twist, is_possible, nearest_shapes, shapes_of
from shardsim.machine.slices import Machine

_COUNT = r"(?:(?P<slices>\d{1,6})\*)?"
_SHAPE = r":(?P<shape>\d{1,6}(x\d{1,6})*)(?P<twist>_twisted)?"
_COMPILER = re.compile(_COUNT + r"(?P<chip>[^:*]+)" + _SHAPE, re.ASCII)
_VENDOR = re.compile(_COUNT + r"(?P<chip>[^:*]+)-(?P<number>\d{1,6})", re.ASCII)
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
    raise HardwareError(f"no {chip.name} {noun} has {chips:,} chips; {_instead(chip, chips)}")


def scaled(machine: Machine, factor: float) -> Machine | None:
    """Return more or fewer slices of the same kind, or one larger or smaller; None: no such.

    >>> [other.name for other in (scaled(parse_machine("v4:8x8x16"), 2.0),) if other]
    ['v4:8x16x16']
    """
    if machine.slices > 1:
        slices = round(machine.slices * factor)
        return replace(machine, slices=slices) if slices else None
    try:
        return default_slice(machine.chip, round(machine.chips * factor))
    except HardwareError:
        return None


def _read(text: str, own_chip: Chip | None) -> tuple[Machine, str | None]:
    """Return the machine and the explanation of its name, which is None if there is none."""
    plain = "".join(str(text).split()).lower().replace("\N{MULTIPLICATION SIGN}", "x")
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
        some = [shapes_of(chip, 2**power)[:1] for power in range(20)]
        names = _join([_name(chip, shape) for found in some for shape in found][-4:])
        raise HardwareError(f"{show(text)} is a chip, not a slice of it; for example {names}")
    raise HardwareError(f"{show(text)} names no slice; {_HELP}")


def _chip(name: str, own_chip: Chip | None) -> Chip:
    if own_chip is not None and name == own_chip.name.lower():
        return own_chip
    return load_chip(name)


def _slices(digits: str | None, text: str) -> int:
    if digits is not None and int(digits) == 0:
        raise HardwareError(f"{show(text)}: the number of slices must be at least 1")
    return int(digits) if digits else 1


def _from_shape(chip: Chip, shape: Shape, slices: int, twisted: bool) -> Machine:
    """Return the machine of the given shape if there can be one."""
    name = _name(chip, shape)
    switch = chip.interconnect == "switch"
    if len(shape) == 1 and not switch:
        raise HardwareError(f"{name} does not say how the chips lie; {_bare_count(chip, shape[0])}")
    if not is_possible(chip, shape):
        raise HardwareError(f"there is no slice {name}; {_instead_of_shape(chip, shape)}")
    if twisted and not can_twist(chip, shape):
        some = [other for other in shapes_of(chip) if can_twist(chip, other)]
        some.sort(key=lambda other: abs(math.log(math.prod(other) / math.prod(shape))))
        names = _join([f"{_name(chip, other)}_twisted" for other in some[:3]])
        rule = f"only k x k x 2k and k x 2k x 2k can; nearest: {names}"
        rule = rule if some else f"no slice of {chip.name} can"
        raise HardwareError(f"{name} cannot be twisted; {rule}")
    return Machine(chip=chip, shape=shape, slices=slices, twisted=twisted)


def _from_number(chip: Chip, number: int, slices: int, text: str) -> tuple[Machine, str]:
    """Return the machine of a vendor's name such as v4-2048, and what that name says."""
    counts = "TensorCores" if chip.names_count == "cores" else "chips"
    each = chip.cores_per_chip if chip.names_count == "cores" else 1
    chips = number // each
    try:
        if number % each:
            raise HardwareError(f"a chip has {each} of them; {_instead(chip, chips)}")
        machine = default_slice(chip, chips)
    except HardwareError as error:
        size = f": {chips:,} chips" if each > 1 and chips and number % each == 0 else ""
        raise HardwareError(f"{show(text)} counts {counts}{size}; {error}") from None
    if slices > 1 and machine.slices > 1:
        raise HardwareError(
            f"{show(text)}: {chips:,} chips are {machine.slices} nodes already; for several times"
            f" that write {slices * machine.slices}*{_name(chip, machine.shape)}"
        )
    machine = Machine(chip=chip, shape=machine.shape, slices=max(slices, machine.slices))
    per = f"{chips:,} chip{'s' if chips > 1 else ''}{' a slice' if slices > 1 else ''}"
    return machine, f"{text} counts {counts}: {per}, {machine.name}"


def _bare_count(chip: Chip, chips: int) -> str:
    """Return what `chip:chips`, a number without a shape, may have meant."""
    shapes = shapes_of(chip, chips)
    if not shapes:
        return f"no slice has {chips:,} chips; {_instead(chip, chips)}"
    clear = f"{chips:,} chips are {_name(chip, shapes[0])}"
    if chip.names_count != "cores":
        return f"{clear} ({chip.name}-{chips})"
    clear += f" ({chip.name}-{chips * chip.cores_per_chip})"
    halved, rest = divmod(chips, chip.cores_per_chip)
    other = [] if rest else shapes_of(chip, halved)
    if not other:
        return clear
    return (
        f"{clear}; {chip.name}-{chips} counts TensorCores and is {halved:,} chips, "
        f"{_name(chip, other[0])}"
    )


def _instead(chip: Chip, chips: int) -> str:
    """Return the possible numbers of chips nearest to `chips`, each with its default slice."""
    if chip.interconnect == "switch":
        return f"nearest: {_join(_nodes(chip, chips))}"
    sizes = sorted({math.prod(shape) for shape in shapes_of(chip)})
    near = [size for size in sizes if size <= chips][-1:]
    near += [size for size in sizes if size > chips][:1]
    names = [f"{_name(chip, shapes_of(chip, size)[0])} ({_chips(size)})" for size in near]
    return f"nearest: {_join(names + _several(chip, chips))}"


def _instead_of_shape(chip: Chip, shape: Shape) -> str:
    """Return the possible slices nearest to an impossible one, and the rule where it helps."""
    chips = math.prod(shape)
    if chip.interconnect == "switch":
        if len(shape) > 1:
            return f"GPUs have no torus; nearest: {_join(_nodes(chip, chips))}"
        return f"a node has up to {chip.max_slice[0]}; nearest: {_join(_nodes(chip, chips))}"
    rule = ""
    if len(shape) != chip.torus_dims:
        rule = f"{chip.name} slices have {chip.torus_dims} axes; "
    elif chips > math.prod(chip.max_slice):
        pod = "x".join(map(str, chip.max_slice))
        rule = f"the largest is {pod}, {_chips(math.prod(chip.max_slice))}; "
    elif chip.wrap == "cube4":
        rule = "from 4x4x4 up every axis is a multiple of 4; "
    names = [_name(chip, other) for other in nearest_shapes(chip, shape)]
    return f"{rule}nearest: {_join(names + _several(chip, chips))}"


def _nodes(chip: Chip, chips: int) -> list[str]:
    """Return names of GPUs nearest to a number of them."""
    node = chip.max_slice[0]
    if chips <= node:
        sizes = [shape[0] for shape in shapes_of(chip)]
        below = [size for size in sizes if size <= chips][-1:]
        above = [size for size in sizes if size > chips][:1]
        return [f"{chip.name}:{size}" for size in below + above]
    whole, rest = divmod(chips, node)
    counts = [whole] if rest == 0 else [whole, whole + 1]
    return [f"{count if count > 1 else ''}*{chip.name}:{node}".lstrip("*") for count in counts]


def _several(chip: Chip, chips: int) -> list[str]:
    """Return the name of several full pods if they are just `chips` chips."""
    pod = math.prod(chip.max_slice)
    if chip.interconnect == "switch" or chips <= pod or chips % pod or chips // pod >= 10**6:
        return []
    return [f"{chips // pod}*{_name(chip, chip.max_slice)}"]


def _name(chip: Chip, shape: Shape) -> str:
    return f"{chip.name}:{'x'.join(map(str, shape))}"


def _chips(count: int) -> str:
    return f"{count:,} chip{'s' if count > 1 else ''}"


def _join(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
