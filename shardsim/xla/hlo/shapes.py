"""Types of HLO values: arrays and tuples of them, with their layout in memory.

`bf16[512,768]{1,0:T(8,128)(2,1)S(1)}` is an array of 512 x 768, dimension 1 the fastest, in tiles
of 8 x 128, in memory space 1. On TPUs space 0 is HBM, 5 the host's memory, the others are on the
chip.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from shardsim.xla.hlo.errors import HloError, small_number

HBM, HOST = 0, 5

# Bits of an element, by the name that XLA gives its type.
ELEMENT_BITS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e5m2", "f8e4m3", "f8e4m3fn", "f8e8m0fnu"), 8),
    **dict.fromkeys(("f8e4m3b11fnuz", "f8e5m2fnuz", "f8e4m3fnuz", "f8e3m4"), 8),
    **dict.fromkeys(("s1", "u1"), 1),
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
    **dict.fromkeys(("token", "opaque"), 0),
}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LAYOUT = re.compile(r"([\d,]*)(?::((?:[A-Z]{1,2}\([^()]*\)|\([\d,:]+\))+))?")
_PROPERTY = re.compile(r"([A-Z]{0,2})\(([^()]*)\)")
_SPLIT = re.compile(r"\d+:\d+(?:,\d+)*")  # a dimension, and where it is cut


@dataclass(frozen=True)
class Shape:
    """An array (`elements` empty), or a tuple of shapes (`is_tuple`)."""

    dtype: str = ""
    dims: tuple[int, ...] = ()
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    memory_space: int = HBM
    is_tuple: bool = False
    elements: tuple[Shape, ...] = ()

    @cached_property
    def arrays(self) -> tuple[Shape, ...]:
        """The arrays of a tuple, however nested, in order; of an array itself."""
        if not self.is_tuple:
            return (self,)
        return tuple(array for element in self.elements for array in element.arrays)

    @cached_property
    def count(self) -> int:
        """Elements, of all arrays."""
        if self.is_tuple:
            return sum(element.count for element in self.elements)
        return math.prod(self.dims)

    @cached_property
    def bytes(self) -> float:
        """Bytes of the values, of all arrays, without padding."""
        if self.is_tuple:
            return sum(element.bytes for element in self.elements)
        return self.count * ELEMENT_BITS[self.dtype] / 8

    @cached_property
    def padded_bytes(self) -> float:
        """Bytes in memory, of all arrays: the minor dimensions fill whole tiles."""
        if self.is_tuple:
            return sum(element.padded_bytes for element in self.elements)
        if not self.tiles or not self.count:
            return self.bytes
        tile = self.tiles[0]
        sizes = [self.dims[dim] for dim in reversed(self.minor_to_major)]
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        for place, length in enumerate(reversed(tile)):
            sizes[-1 - place] = -(-sizes[-1 - place] // length) * length
        return math.prod(sizes) * ELEMENT_BITS[self.dtype] / 8

    @cached_property
    def hbm_bytes(self) -> float:
        """Padded bytes of those arrays that lie in HBM."""
        return sum(array.padded_bytes for array in self.arrays if array.memory_space == HBM)

    @cached_property
    def form(self) -> str:
        """Types and dimensions without layout, for comparing."""
        if self.is_tuple:
            return f"({', '.join(element.form for element in self.elements)})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape:
    """Return the shape that `text` writes; `/*index=5*/` remarks are skipped."""
    try:
        shape, end = _parse(text, 0)
    except RecursionError:
        raise HloError("a tuple nested too deeply") from None
    if end != len(text):
        raise HloError(f"not a shape: {text[:80]!r}")
    return shape


def shape_end(text: str, start: int) -> int:
    """Return where the shape that starts at `start` ends."""
    if not text.startswith("(", start):
        match = _ARRAY.match(text, start)
        if not match:
            raise HloError(f"not a shape: {text[start : start + 80]!r}")
        return match.end()
    return closing(text, start)


_PARENTHESES = re.compile(r"[()]")


def closing(text: str, start: int) -> int:
    """Return the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESES.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise HloError("unbalanced parentheses")


_SEPARATOR = re.compile(r", (?:/\*index=\d+\*/)?")


def _parse(text: str, start: int) -> tuple[Shape, int]:
    if not text.startswith("(", start):
        match = _ARRAY.match(text, start)
        if not match:
            raise HloError(f"not a shape: {text[start : start + 80]!r}")
        return _array(match[0]), match.end()
    elements: list[Shape] = []
    place = start + 1
    while not text.startswith(")", place):
        if elements:
            separator = _SEPARATOR.match(text, place)
            if not separator:
                raise HloError(f"not a shape: {text[place : place + 80]!r}")
            place = separator.end()
        element, place = _parse(text, place)
        elements.append(element)
    return Shape(is_tuple=True, elements=tuple(elements)), place + 1


@lru_cache(maxsize=65536)
def _array(text: str) -> Shape:
    match = _ARRAY.fullmatch(text)
    assert match
    dtype, sizes, layout = match.groups()
    if dtype not in ELEMENT_BITS:
        raise HloError(f"unknown element type '{dtype}'")
    dims = _numbers(sizes, text)
    order = tuple(reversed(range(len(dims))))
    tiles: list[tuple[int, ...]] = []
    space = HBM
    if layout is not None:
        parts = _LAYOUT.fullmatch(layout)
        if not parts:
            raise HloError(f"unknown layout {layout[:40]!r}")
        order = _numbers(parts[1], text)
        if parts[2]:
            tiles, space = _properties(parts[2])
    if sorted(order) != list(range(len(dims))):
        raise HloError(f"the layout of {text[:60]!r} does not order its dimensions")
    return Shape(
        dtype=dtype, dims=dims, minor_to_major=order, tiles=tuple(tiles), memory_space=space
    )


def _properties(text: str) -> tuple[list[tuple[int, ...]], int]:
    """Return tiles and memory space of what follows the colon of a layout."""
    tiles: list[tuple[int, ...]] = []
    space = HBM
    kind = ""
    for letters, inside in _PROPERTY.findall(text):
        kind = letters or kind
        if kind == "T":
            tile = _numbers(inside, text)
            if min(tile, default=0) < 1:
                raise HloError(f"unknown tiling {text[:40]!r}")
            tiles.append(tile)
        elif kind == "S" and letters:
            (space,) = _numbers(inside, text) or (HBM,)
        elif kind == "SC" and _SPLIT.fullmatch(inside):
            pass  # where the array is divided between memories; its bytes are the same
        elif kind not in ("E", "L") or not letters:  # bits of an element, padding of the tail
            raise HloError(f"unknown layout {text[:40]!r}")
    return tiles, space


def _numbers(text: str, shape: str) -> tuple[int, ...]:
    """Return `1,2,3` as numbers."""
    numbers = tuple(small_number(part, -1) for part in text.split(",")) if text else ()
    if min(numbers, default=0) < 0:
        raise HloError(f"not a shape: {shape[:80]!r}")
    return numbers
