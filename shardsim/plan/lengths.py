"""Sequences of many lengths: how they are distributed, and how the rows of a step hold them.

A row is `sequence` tokens long, the longest that a sequence may be; longer ones are cut. `padded`
rows hold one sequence each. `packed_masked` and `packed` rows hold as many as first fit puts into
them; a mask keeps them apart, and a kernel computes whole rows, or skips what no sequence of its
own reaches into. `unpadded` sequences lie behind each other without rows (arXiv 2210.03052).

A distribution is `SAMPLE` sequences at even quantiles, in an order that a seed shuffles, so that
everything computed from it is the same every time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import exp, isfinite, log, log1p, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from shardsim.errors import PlanError, nearest
from shardsim.files import check_keys, read_text, read_yaml

DISTRIBUTIONS = ("constant", "uniform", "log_normal", "histogram")
HELD = ("padded", "packed_masked", "packed", "unpadded")
PACKED = ("packed_masked", "packed")
BY_SEQUENCE = ("packed", "unpadded")  # attention leaves out what no sequence reaches
SAMPLE = 4096  # sequences
SEED = 0
MOST_ENTRIES = 10_000  # of a histogram
LARGEST = 1e9  # of tokens, pixels and shares
# What each distribution is given by.
_GIVEN = {
    "constant": ("mean",),
    "uniform": ("least", "most"),
    "log_normal": ("mean", "deviation"),
    "histogram": ("histogram",),
}

Lines = tuple[tuple[int, float], ...]
Whole = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long sequences are, in tokens, and how rows hold them.

    `constant` sequences have `mean` tokens, `uniform` ones any number from `least` to `most`,
    `log_normal` ones this mean and standard `deviation`. A `histogram` lists tokens and how often a
    sequence has so many. A share of `dropped` tokens of each never enters the model (NaViT, arXiv
    2307.06304; MAE, arXiv 2111.06377).
    """

    distribution: str = "constant"
    mean: float = 0.0
    deviation: float = 0.0
    least: int = 0
    most: int = 0
    histogram: Lines = ()
    dropped: float = 0.0
    held: str = "padded"  # "as" in a plan file

    def __post_init__(self) -> None:
        for key, value, choices in (
            ("distribution", self.distribution, DISTRIBUTIONS),
            ("as", self.held, HELD),
        ):
            if value not in choices:
                raise PlanError(
                    f"lengths.{key}: {value!r:.40} is not possible{nearest(value, choices)}"
                )
        given = _GIVEN[self.distribution]
        for field in ("mean", "deviation", "least", "most", "histogram"):
            value = getattr(self, field)
            if field in given and not value:
                raise PlanError(f"lengths.{field}: {self.distribution} lengths need it")
            if field not in given and value:
                raise PlanError(
                    f"lengths.{field}: {self.distribution} lengths have {' and '.join(given)}"
                )
        for field in ("mean", "deviation", "least", "most"):
            value = getattr(self, field)
            if not _number(value) or not 0 <= value <= LARGEST:
                raise PlanError(f"lengths.{field}: expected tokens, not {value!r:.40}")
        if not _number(self.dropped) or not 0 <= self.dropped < 1:
            raise PlanError(f"lengths.dropped: a share from 0 to below 1, not {self.dropped!r:.40}")
        if self.most < self.least:
            raise PlanError(f"lengths.most: {self.most} is less than the least, {self.least}")

    @property
    def packed(self) -> bool:
        """Whether rows hold several sequences."""
        return self.held in PACKED

    @property
    def unpadded(self) -> bool:
        """Whether there are no rows."""
        return self.held == "unpadded"

    def to_data(self) -> dict[str, Any]:
        """Return what a plan file says of it."""
        data: dict[str, Any] = {"distribution": self.distribution}
        for key in (*_GIVEN[self.distribution], "dropped"):
            if value := getattr(self, key):
                data[key] = [list(line) for line in value] if key == "histogram" else value
        return data | {"as": self.held}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


@lru_cache(maxsize=64)
def sampled(lengths: Lengths, longest: int) -> Whole:
    """Return the tokens of `SAMPLE` sequences, none longer than `longest`, shuffled.

    >>> one = Lengths(distribution="uniform", least=100, most=300)
    >>> float(sampled(one, 1024).mean()), int(sampled(one, 250).max())
    (200.0, 250)
    """
    at = (np.arange(SAMPLE) + 0.5) / SAMPLE
    if lengths.distribution == "constant":
        found = np.full(SAMPLE, float(lengths.mean))
    elif lengths.distribution == "uniform":
        found = lengths.least + at * (lengths.most - lengths.least)
    elif lengths.distribution == "log_normal":
        variance = log1p((lengths.deviation / lengths.mean) ** 2)
        middle, normal = log(lengths.mean) - variance / 2.0, NormalDist()
        found = np.array([exp(middle + sqrt(variance) * normal.inv_cdf(p)) for p in at])
    else:
        tokens, shares = np.array(lengths.histogram, float).T
        order = np.argsort(tokens)
        ends = np.cumsum(shares[order]) / shares.sum()
        found = tokens[order][np.minimum(np.searchsorted(ends, at), len(order) - 1)]
    kept = np.rint(found * (1.0 - lengths.dropped)).astype(np.int64)
    kept = np.clip(kept, 1, longest)
    kept = np.random.default_rng(SEED).permutation(kept)
    kept.flags.writeable = False
    return kept


@lru_cache(maxsize=64)
def rows_of(lengths: Lengths, row: int) -> tuple[tuple[int, ...], ...]:
    """Return the sequences of each row of `row` tokens, as first fit packs them in their order.

    Padded rows hold one each.

    >>> four = Lengths(distribution="constant", mean=250, held="packed")
    >>> rows_of(four, 1024)[0], len(rows_of(four, 1024))
    ((250, 250, 250, 250), 1024)
    """
    tokens = sampled(lengths, row)
    if not lengths.packed:
        return tuple((int(one),) for one in tokens)
    rows: list[list[int]] = []
    left = np.zeros(len(tokens), np.int64)
    full = 0  # rows before it have no room for anything
    shortest = int(tokens.min())
    for one in tokens:
        fits = left[full : len(rows)] >= one
        first = full + int(fits.argmax()) if fits.any() else len(rows)
        if first == len(rows):
            rows.append([])
            left[first] = row
        rows[first].append(int(one))
        left[first] -= one
        while full < len(rows) and left[full] < shortest:
            full += 1
    return tuple(map(tuple, rows))


def row_tokens(lengths: Lengths | None, longest: int) -> int:
    """Return the tokens of a row, or where there are no rows, of a sequence on average."""
    if lengths is None or not lengths.unpadded:
        return longest
    return max(1, round(float(sampled(lengths, longest).mean())))


def real_tokens(lengths: Lengths, row: int) -> float:
    """Return the tokens that a row holds on average, or that a sequence without one has."""
    return float(sampled(lengths, row).sum()) / len(rows_of(lengths, row))


def sequences_of_row(lengths: Lengths, row: int) -> float:
    """Return the sequences that a row holds on average."""
    return SAMPLE / len(rows_of(lengths, row))


def fullest(values: Sequence[float] | np.ndarray[Any, Any], each: Any, members: Any) -> Any:
    """Return the work of the fullest member over the mean, expected over batches.

    Each of `members` has `each` of the `values`, drawn at random; both may be arrays. It is the
    mean of the largest of so many sums: exact for the distribution of a sum that is drawn with a
    seed, and beyond `MOST_DRAWN` summands the excess falls with the square root of their number.
    """
    drawn = tuple(map(float, values))
    pairs = np.stack(np.broadcast_arrays(np.maximum(np.ceil(each), 1), members), -1)
    known, where = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
    found = np.array([_fullest(drawn, int(count), int(many)) for count, many in known])
    shaped = found[where.reshape(pairs.shape[:-1])]
    return float(shaped) if shaped.ndim == 0 else shaped


MOST_DRAWN = 64
SUMS = 2**15


def _fullest(values: tuple[float, ...], each: int, members: int) -> float:
    if members == 1 or min(values) == max(values):
        return 1.0
    summands = min(each, MOST_DRAWN)
    below = (np.arange(SUMS + 1) / SUMS) ** members  # chance that all are below a quantile
    excess = float(_sums(values, summands) @ np.diff(below)) - 1.0
    return 1.0 + excess * sqrt(summands / each)


@lru_cache(maxsize=256)
def _sums(values: tuple[float, ...], summands: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return drawn sums of so many values over their mean, the smallest first."""
    drawn = np.random.default_rng(SEED).choice(np.array(values), (SUMS, summands)).sum(1)
    drawn = np.sort(drawn) / drawn.mean()
    return np.asarray(drawn, np.float64)


# Reading.


def parse_lengths(data: Any, where: str, patch: int = 0) -> Lengths | None:
    """Read `lengths` of a plan file; None where there are none.

    A histogram is a list of [tokens, share], or of images [height, width, share] in pixels that
    patches of `patch` cut, or the name of a YAML or CSV file of such rows beside the plan `where`.
    """
    if data is None:
        return None
    words = {field.name for field in fields(Lengths)} - {"held"} | {"as"}
    given = dict(
        check_keys(
            data, where="lengths", allowed=sorted(words), error=PlanError, words={"as": HELD}
        )
    )
    if "as" in given:
        given["held"] = given.pop("as")
    if "histogram" in given:
        given.setdefault("distribution", "histogram")
        given["histogram"] = _histogram(given["histogram"], where, patch)
    return Lengths(**given)


def _histogram(data: Any, where: str, patch: int) -> Lines:
    if isinstance(data, str):
        path = Path(where).parent / data
        if path.suffix == ".csv":
            rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row]
            data = [_numbers(row) for row in rows if _numbers(row)]
        else:
            data = read_yaml(path)
    if not isinstance(data, list) or not data or len(data) > MOST_ENTRIES:
        raise PlanError(
            "lengths.histogram: expected rows of [tokens, share] or [height, width, share], or a "
            "file of them"
        )
    lines = tuple(_line(row, patch) for row in data)
    if not any(share for _, share in lines):
        raise PlanError("lengths.histogram: every share is 0; give some line more")
    return lines


def _numbers(row: list[str]) -> list[float]:
    """Return the numbers of a row of text; none of a heading."""
    try:
        return [float(cell) for cell in row]
    except ValueError:
        return []


def _line(row: Any, patch: int) -> tuple[int, float]:
    good = isinstance(row, list) and len(row) in (2, 3) and all(map(_number, row))
    if not good or not all(0 <= value <= LARGEST for value in row) or min(row[:-1]) < 1:
        raise PlanError(
            "lengths.histogram: expected [tokens, share] or [height, width, share], not "
            f"{row!r:.40}"
        )
    *size, share = row
    if len(size) == 1:
        return int(size[0]), float(share)
    if not patch:
        raise PlanError("lengths.histogram: sizes of images need a model with patches")
    tokens = (int(size[0]) // patch) * (int(size[1]) // patch)
    if not tokens:
        raise PlanError(f"lengths.histogram: no patch of {patch} fits into {size}")
    return tokens, float(share)


def told(lengths: Lengths, row: int) -> Mapping[str, float]:
    """Return what a reader wants to know of a distribution, in tokens."""
    tokens = sampled(lengths, row)
    return {
        "mean": float(tokens.mean()),
        "longest": float(tokens.max()),
        "mean_square": float((tokens.astype(float) ** 2).mean()),
    }
