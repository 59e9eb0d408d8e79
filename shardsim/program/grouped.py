"""Products of groups of rows, each group with a matrix of its own: one kernel, tile by tile.

JAX's megablox and Tokamax run a grid of steps one after the other. While one multiplies, what the
next reads is fetched: a tile of rows, and where another group begins its matrix, which is larger
than what HBM brings in one step. A tile that two groups share is multiplied with the matrices of
both. So an expert costs a tile of rows and a wait for its matrix more than its rows.
"""

from __future__ import annotations

import numpy as np

from shardsim.ops.experts import WIDE_TILE, row_tile
from shardsim.plan.layout import Number
from shardsim.plan.tiles import LANES
from shardsim.program.rules import Where, changed, in_two, width
from shardsim.program.schedule import Block, Grid, Task
from shardsim.program.tasks import Compute
from shardsim.records import replace

# A kernel has its inputs twice and its result three times in so much of on-chip memory, as Tokamax
# reckons (`_fit_within_tpu_vmem` in openxla/tokamax at 783ea95, ragged_dot/pallas_mosaic_tpu.py).
INPUTS, RESULTS, ROOM = 2.0, 3.0, 0.75 / 2.0
# Rows of a tile that holds the whole contraction: 128 to 512 in Tokamax's tuned tiles, fewer where
# a group's matrix is large; twice as many beside those of up to `SMALL` elements.
WHOLE_ROWS, SMALL = 256.0, 2.0**21
LIBRARY_ROWS = 512.0  # of MaxText's tiles (`wi_tile_fwd_batch_seq` in its configs/base.yml)
TUNED = "tpu7x"  # its tuned tiles, and its way to choose others, are for this chip
HALVES = 12  # more than any matrix has
# A matrix wider than a tile and no multiple of the lanes is cut so that the last tile lies partly
# beyond it. Tokamax's four products of 2,880 x 2,880 took 1.7 to 1.9 times what the others of its
# timings on tpu7x would; the tiles of v5p, which are no wider than the array, took no longer.
BEYOND = 1.8


def share_tiles(block: Block, where: Where) -> Block:
    """Multiply a tile of rows that two experts share with the matrices of both, and no more."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or not task.groups:
            return [task]
        return [_padded(task, row_tile(_rows(task)))]

    return changed(block, change)


def activate_groups_apart(block: Block, where: Where) -> Block:
    """Run an activation of what a kernel of groups makes in a pass of its own: the kernel is a
    custom call, into which XLA fuses nothing (dropless plans of mixtral-8x7b in docs/compiled.md).
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or not task.groups or not np.any(task.pointwise):
            return [task]
        return in_two(task)

    return changed(block, change)


def multiply_groups(block: Block, where: Where) -> Block:
    """Multiply rows of many experts in a kernel that goes tile by tile: one that two experts share
    with the matrices of both, and each step beside what HBM brings for the next. JAX's megablox
    with tiles of up to 1,024 x 1,024, as emitted (`grouped_matmul` in `shardsim/ops/experts.py`;
    docs/compiled.md)."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or not task.groups:
            return [task]
        return [_in_tiles(task, row_tile(_rows(task)), *_up_to(task, WIDE_TILE))]

    return changed(block, change)


def multiply_groups_as_libraries(block: Block, where: Where) -> Block:
    """Multiply rows of many experts as `multiply_groups` does, in tiles of libraries: the whole
    contraction, and as many columns as on-chip memory takes, where Tokamax has tuned them (tpu7x);
    elsewhere those of 512 rows that maxtext has (AI-Hypercomputer/maxtext at e591f30cb,
    configs/base.yml). Compared with 98 timings of Tokamax's (docs/accuracy.md)."""
    chip = where.machine.chip

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or not task.groups:
            return [task]
        if chip.name != TUNED:
            return [_in_tiles(task, LIBRARY_ROWS, *_up_to(task, WIDE_TILE))]
        beyond = [(side > WIDE_TILE) & (side % LANES > 0) for side in _sides(task)]
        slower = np.where(np.logical_or(*beyond), BEYOND, 1.0)
        fitting = _as_fits(task, ROOM * chip.onchip_bytes / chip.devices_per_chip)
        rows = WHOLE_ROWS * np.where(fitting[0] * fitting[1] <= SMALL, 2.0, 1.0)
        return [_in_tiles(task, rows, *fitting, slower)]

    return changed(block, change)


def _rows(task: Compute) -> Number:
    """Return the rows of a group."""
    return task.m if task.groups == "m" else task.k


def _sides(task: Compute) -> tuple[Number, Number]:
    """Return both sides of a group's matrix; that of the contraction comes first."""
    return (task.k if task.groups == "m" else task.m), task.n


def _up_to(task: Compute, widest: float) -> list[Number]:
    return [np.minimum(side, widest) for side in _sides(task)]


def _as_fits(task: Compute, room_bytes: float) -> tuple[Number, Number]:
    """Return the sides of a tile of a group's matrix: halved until what a kernel has of on-chip
    memory is enough. Of a contraction all stays, if columns can be fewer."""
    tile, forward = WHOLE_ROWS, task.groups == "m"
    tall, wide = (np.asarray(side, dtype=float) for side in _sides(task))
    for _ in range(HALVES):
        read = tile * tall + (tall if forward else tile) * wide
        made = (tile if forward else tall) * wide
        large = (INPUTS * read + RESULTS * made) * width(task) > room_bytes
        first = (wide <= LANES) if forward else (tall > wide)
        tall = np.where(large & first, _half(tall), tall)
        wide = np.where(large & ~first, _half(wide), wide)
    return tall, wide


def _half(side: Number) -> Number:
    return np.ceil(np.maximum(side / 2.0 / LANES, 1.0)) * LANES


def _padded(task: Compute, tile: Number) -> Compute:
    """Return a product whose groups have a tile of rows more."""
    m, k = (size + tile * (task.groups == of) for of, size in (("m", task.m), ("k", task.k)))
    grown = m * k + k * task.n + m * task.n - task.m * task.k - task.k * task.n - task.m * task.n
    return replace(task, m=m, k=k, hbm_bytes=task.hbm_bytes + grown * width(task) * task.batch)


def _in_tiles(
    task: Compute, tile: Number, tall: Number, wide: Number, slower: Number = 1.0
) -> Compute:
    """Return a product in tiles of so many rows, and of `tall` x `wide` of each group's matrix.

    A step reads rows of both sides, or writes those of one; where the contraction is cut it reads a
    tile of the matrix as well, else that is read, or written, once for each group.
    """
    first, second = _sides(task)
    cut = (tall < first) & (task.groups == "m")
    matrix = tall * wide * width(task)
    across = np.ceil(first / tall) * np.ceil(second / wide)
    steps = across * (_rows(task) / tile + 1.0) * task.batch
    rows = tile * (tall + wide * np.logical_not(cut)) * width(task)
    grid = Grid(
        steps=steps,
        step_bytes=rows + matrix * cut,
        groups=across * task.batch * np.logical_not(cut),
        group_bytes=rows + matrix,
        slower=slower * across * tall * wide / (first * second),
    )
    moved = steps * grid.step_bytes + grid.groups * matrix
    return replace(_padded(task, tile), grid=grid, hbm_bytes=moved)
