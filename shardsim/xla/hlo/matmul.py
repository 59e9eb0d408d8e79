"""Matmuls inside HLO: the TPU compiler writes them as convolutions.

A dimension of a matmul is a feature, a batch or a spatial dimension of the convolution. For each
spatial dimension the pairs of output and window positions that meet an element of the input (not
padding, not a hole of a dilation) are counted, as XLA's own cost analysis does; FLOPs are two for
each such pair and each pair of features.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shardsim.xla.hlo.errors import HloError, small_number
from shardsim.xla.hlo.module import Instruction
from shardsim.xla.hlo.shapes import Shape

_LABELS = re.compile(r"([0-9a-z]+)_([0-9a-z]+)->([0-9a-z]+)")
_WINDOW = re.compile(r"(\w+)=([\dx_\-]+)")

MOST_HITS = 10**8  # positions of a window that are looked at one by one


@dataclass(frozen=True)
class Matmul:
    """`batch` products of `[m, k]` by `[k, n]`; `k` may be a mean over the products.

    A kernel runs `products` of that shape (or its transposes) as one, and only `fraction` of each.
    """

    m: float
    k: float
    n: float
    batch: float
    products: int = 1
    fraction: float = 1.0

    @property
    def flops(self) -> float:
        """Multiply-adds, counted as two."""
        return 2.0 * self.m * self.k * self.n * self.batch * self.products * self.fraction


@dataclass(frozen=True)
class _Window:
    """One spatial dimension of a window."""

    size: int
    stride: int
    low: int
    high: int
    lhs_dilate: int
    rhs_dilate: int


def matmul_of(instruction: Instruction, lhs: Shape, rhs: Shape) -> Matmul:
    """Return the matmul of a `dot` or `convolution`; its shape must follow from the operands'."""
    if instruction.opcode == "dot":
        return _dot(instruction, lhs, rhs)
    return _convolution(instruction, lhs, rhs)


def _dot(instruction: Instruction, lhs: Shape, rhs: Shape) -> Matmul:
    names = ("lhs_batch_dims", "rhs_batch_dims", "lhs_contracting_dims", "rhs_contracting_dims")
    left_batch, right_batch, left_sum, right_sum = (instruction.numbers(name) for name in names)
    try:
        batch = [lhs.dims[dim] for dim in left_batch]
        summed = [lhs.dims[dim] for dim in left_sum]
        same = batch == [rhs.dims[dim] for dim in right_batch]
        same = same and summed == [rhs.dims[dim] for dim in right_sum]
    except IndexError:
        same = False
        batch = summed = []
    rows = [d for i, d in enumerate(lhs.dims) if i not in (*left_batch, *left_sum)]
    columns = [d for i, d in enumerate(rhs.dims) if i not in (*right_batch, *right_sum)]
    if not same or tuple(batch + rows + columns) != instruction.shape.dims:
        raise HloError(f"%{instruction.name}: a dot whose dimensions do not fit", instruction.line)
    return Matmul(
        m=math.prod(rows), k=math.prod(summed), n=math.prod(columns), batch=math.prod(batch)
    )


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> Matmul:
    labels = _LABELS.fullmatch(instruction.attribute("dim_labels"))
    if not labels:
        raise HloError(f"%{instruction.name}: dim_labels", instruction.line)
    out = instruction.shape
    spatial = len(out.dims) - 2
    windows = _windows(instruction, spatial)
    named = []
    for text, shape, letters in zip(
        labels.groups(), (lhs, rhs, out), ("bf", "io", "bf"), strict=True
    ):
        wanted = sorted([*map(str, range(spatial)), *letters])
        if sorted(text) != wanted or len(shape.dims) != len(text):
            raise HloError(f"%{instruction.name}: dim_labels={labels[0]}", instruction.line)
        named.append({letter: shape.dims[place] for place, letter in enumerate(text)})
    left, right, result = named
    batch_groups = _count(instruction, "batch_group_count")
    groups = _count(instruction, "feature_group_count")
    fits = (
        left["b"] == result["b"] * batch_groups
        and left["f"] == right["i"] * groups
        and right["o"] == result["f"]
        and right["o"] % (groups * batch_groups) == 0
    )
    m, k, n, batch = float(result["b"]), float(right["i"]), float(result["f"]), 1.0
    for number, window in enumerate(windows):
        size_in, size_out = left[str(number)], result[str(number)]
        fits = fits and right[str(number)] == window.size and size_out == _outputs(window, size_in)
        if not fits:
            break
        hits = _hits(window, size_in, size_out)
        if hits == size_in == size_out == window.size:  # one meeting each: a batch dimension
            batch *= hits
        elif window.size == 1 and hits == size_out:
            m *= size_out
        elif size_in == 1 and hits == size_out:
            n *= size_out
        else:  # summed over, for a single output; a true convolution otherwise
            m *= size_out
            k *= hits / size_out
    if not fits:
        raise HloError(
            f"%{instruction.name}: a convolution whose dimensions do not fit", instruction.line
        )
    return Matmul(m=m, k=k, n=n, batch=batch)


def _count(instruction: Instruction, name: str) -> int:
    text = instruction.attributes.get(name, "1")
    count = small_number(text, 0)
    if count < 1:
        raise HloError(f"%{instruction.name}: {name}={text[:40]}", instruction.line)
    return count


def _windows(instruction: Instruction, spatial: int) -> list[_Window]:
    text = instruction.attributes.get("window", "{}")
    found = dict(_WINDOW.findall(text))
    try:
        columns = {
            name: [int(x) for x in found[name].split("x")]
            for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
            if name in found
        }
        pads = (
            [tuple(map(int, x.split("_"))) for x in found["pad"].split("x")]
            if "pad" in found
            else [(0, 0)] * spatial
        )
        ones = [1] * spatial
        rows = zip(
            columns.get("size", ones if not spatial else []),
            columns.get("stride", ones),
            pads,
            columns.get("lhs_dilate", ones),
            columns.get("rhs_dilate", ones),
            strict=True,
        )
        windows = [
            _Window(size, stride, low, high, lhs, rhs)
            for size, stride, (low, high), lhs, rhs in rows
        ]
    except ValueError:
        raise HloError(f"%{instruction.name}: window={text[:60]}", instruction.line) from None
    small = any(min(w.size, w.stride, w.lhs_dilate, w.rhs_dilate) < 1 for w in windows)
    if len(windows) != spatial or small:
        raise HloError(f"%{instruction.name}: window={text[:60]}", instruction.line)
    return windows


def _outputs(window: _Window, size_in: int) -> int:
    """Return how many positions the window has on an input of `size_in`."""
    spread = (size_in - 1) * window.lhs_dilate + 1 + window.low + window.high
    reach = (window.size - 1) * window.rhs_dilate + 1
    return max((spread - reach) // window.stride + 1, 0)


@lru_cache(maxsize=4096)
def _hits(window: _Window, size_in: int, size_out: int) -> int:
    """Return how many pairs of output and window positions meet an element of the input."""
    if window.size == 1 and window.lhs_dilate == 1 and window.low <= 0 and window.high <= 0:
        return size_out
    if size_out * window.size > MOST_HITS:
        raise HloError(f"a window of {window.size} at {size_out} places")
    starts = np.arange(size_out) * window.stride - window.low
    at = starts[:, None] + np.arange(window.size) * window.rhs_dilate
    inside = (at >= 0) & (at % window.lhs_dilate == 0) & (at // window.lhs_dilate < size_in)
    return int(inside.sum())
