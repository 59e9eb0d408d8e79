"""Sums of arrays of many shapes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from shardsim.plan.layout import Number


class Total:
    """A sum that adds small arrays among themselves before it broadcasts them to large ones."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[int, ...], Any] = {}
        self._value: Number | None = None  # since the last addition

    def add(self, value: Number) -> None:
        """Add a number or an array."""
        shape = np.shape(value)
        before = self._by_shape.get(shape)
        self._by_shape[shape] = value if before is None else before + value
        self._value = None

    @property
    def value(self) -> Number:
        """The sum of all that was added."""
        if self._value is None:
            total: Number = 0.0
            for shape in sorted(self._by_shape, key=lambda shape: (prod(shape), shape)):
                total = total + self._by_shape[shape]
            self._value = total
        return self._value
