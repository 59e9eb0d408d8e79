"""Orders in which rings visit their members, and how much an exchange puts on each link."""

from __future__ import annotations

import math

import numpy as np

from shardsim.simulate.topology import Floats, Ints


def exchange_crossings(n: int, ring: bool) -> Floats:
    """Return how many of the messages between all pairs cross the link that leaves each place of
    a ring or line of n, [up or down, place].

    >>> exchange_crossings(4, True)[0].tolist(), exchange_crossings(4, False)[0].tolist()
    ([2.0, 2.0, 2.0, 2.0], [3.0, 4.0, 3.0, 0.0])
    """
    crossing = np.zeros((2, n))
    for source in range(n):
        for target in range(n):
            ahead = (target - source) % n if ring else target - source
            ways = [(0, ahead, 1.0)] if ahead >= 0 else [(1, -ahead, 1.0)]
            if ring and 2 * ahead == n:
                ways = [(0, ahead, 0.5), (1, ahead, 0.5)]
            elif ring and 2 * ahead > n:
                ways = [(1, n - ahead, 1.0)]
            for way, steps, share in ways:
                for step in range(steps):
                    crossing[way, (source + (step if way == 0 else -step)) % n] += share
    return crossing


def twisted_crossings(
    shape: tuple[int, ...], twist: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[Floats, int]:
    """Return how much of what each chip holds crosses each of its links [axis, up or down] when
    all exchange with all over shortest routes, equal ones alike; and the longest route."""
    short, long = twist
    around = np.diag(shape)
    for axis in short:
        around[axis, list(long)] = shape[axis]
    turns = np.stack(np.meshgrid(*[range(-2, 3)] * len(shape), indexing="ij"), axis=-1)
    same = np.unique(turns.reshape(-1, len(shape)) @ around, axis=0)
    crossing = np.zeros((len(shape), 2))
    farthest = 0
    chips = math.prod(shape)
    for place in np.ndindex(*shape):
        ways = np.array(place) + same
        lengths = np.abs(ways).sum(axis=1)
        best = ways[lengths == lengths.min()]
        crossing[:, 0] += np.clip(best, 0, None).mean(axis=0) / chips
        crossing[:, 1] += np.clip(-best, 0, None).mean(axis=0) / chips
        farthest = max(farthest, int(lengths.min()))
    return crossing, farthest


def ring_order(factors: tuple[int, ...]) -> Ints:
    """Return the members of a group in the order in which a ring visits them.

    A single axis: as they lie. Several: a closed walk over the patch, in single steps if the
    patch has an even number of members; a snake otherwise. Slices are the outermost axis.

    >>> ring_order((1, 2, 3)).tolist()
    [0, 3, 4, 5, 2, 1]
    """
    inside = snake_cycle(tuple(factor for factor in factors[1:] if factor > 1))
    size = len(inside)
    return np.concatenate([inside + start * size for start in range(factors[0])])


def snake_path(lengths: tuple[int, ...]) -> Ints:
    """Return a walk over a grid in single steps, as row-major indices."""
    if not lengths:
        return np.zeros(1, dtype=np.int64)
    inner = snake_path(lengths[1:])
    rows = [inner if row % 2 == 0 else inner[::-1] for row in range(lengths[0])]
    return np.concatenate([row + number * len(inner) for number, row in enumerate(rows)])


def snake_cycle(lengths: tuple[int, ...]) -> Ints:
    """Return a walk over a grid that ends beside its start, if the grid has an even size."""
    if len(lengths) < 2:
        return np.arange(math.prod(lengths), dtype=np.int64)
    rows, inner = lengths[0], snake_path(lengths[1:])
    columns = len(inner)
    grid = np.arange(rows * columns).reshape(rows, columns)
    if columns % 2 == 0:
        walk = list(grid[0])
        for step, column in enumerate(range(columns - 1, -1, -1)):
            part = grid[1:, column]
            walk += list(part if step % 2 == 0 else part[::-1])
    elif rows % 2 == 0:
        walk = list(grid[:, 0])
        for step, row in enumerate(range(rows - 1, -1, -1)):
            part = grid[row, 1:]
            walk += list(part if step % 2 == 0 else part[::-1])
    else:
        return snake_path(lengths)
    places = np.array(walk, dtype=np.int64)
    return places // columns * columns + inner[places % columns]
