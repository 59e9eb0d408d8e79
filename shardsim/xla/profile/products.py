"""Measured products among planned ones, by their sizes on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Protocol

MOST_PARTS = 4  # products that a compiler makes one of


class Product(Protocol):
    """`batch` products of `[m, k]` by `[k, n]`: work of a plan, or a matmul of a program."""

    @property
    def m(self) -> Any: ...
    @property
    def k(self) -> Any: ...
    @property
    def n(self) -> Any: ...
    @property
    def batch(self) -> Any: ...


@dataclass(frozen=True, order=True)
class Sizes:
    """Three sizes in their order, of so many products; those of a product and its gradients.

    >>> str(Sizes((64, 128, 256), 2))
    '2 of 64 x 128 x 256'
    """

    dims: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        text = " x ".join(map(str, self.dims))
        return f"{self.batch} of {text}" if self.batch > 1 else text


def _sizes(m: Any, k: Any, n: Any, batch: Any) -> Sizes:
    dims = sorted(round(float(size)) for size in (m, k, n))
    return Sizes(tuple(dims), round(float(batch)))


def sizes_of(product: Product) -> Sizes:
    """Return the sizes of a product."""
    return _sizes(product.m, product.k, product.n, product.batch)


class Products:
    """The planned products in groups, each of which is told apart from the others."""

    def __init__(self, planned: Iterable[Sizes]) -> None:
        self._groups = {sizes: sizes for sizes in planned}

    def group(self, sizes: Sizes) -> Sizes:
        """Return the sizes that stand for the group of planned ones."""
        while self._groups[sizes] != sizes:
            sizes = self._groups[sizes]
        return sizes

    def alone(self, product: Product) -> Sizes | None:
        """Return the planned sizes of a measured product, or None.

        A long contraction may be split: so many products of a part of it each, summed after.
        """
        return next((sizes for sizes in _forms(product) if sizes in self._groups), None)

    def join(self, product: Product) -> None:
        """Put planned products that one measured product does at once into one group.

        Their results, operands or contractions lie side by side in it: two sizes are theirs, the
        third is the sum of their thirds. The fewest parts are taken.
        """
        if self.alone(product) is not None:
            return
        for sizes in _forms(product):
            for place, whole in enumerate(sizes.dims):
                rest = sizes.dims[:place] + sizes.dims[place + 1 :]
                thirds = {
                    third: other
                    for other in self._groups
                    if other.batch == sizes.batch and (third := _third(other, rest)) is not None
                }
                for many in range(2, MOST_PARTS + 1):
                    for parts in combinations_with_replacement(sorted(thirds), many):
                        if sum(parts) == whole:
                            self._unite([thirds[part] for part in parts])
                            self._groups[sizes_of(product)] = self.group(thirds[parts[0]])
                            return

    def _unite(self, several: list[Sizes]) -> None:
        first = self.group(several[0])
        for other in several[1:]:
            self._groups[self.group(other)] = first


def _forms(product: Product) -> Iterator[Sizes]:
    yield sizes_of(product)
    if float(product.batch) > 1:
        yield _sizes(product.m, product.k * product.batch, product.n, 1)


def _third(sizes: Sizes, rest: tuple[int, ...]) -> int | None:
    """Return the third size of a product that has two others."""
    left = list(sizes.dims)
    for size in rest:
        if size not in left:
            return None
        left.remove(size)
    return left[0]
