"""What a search or a simulation asks of Python's and the system's memory while it runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

FREED_BYTES = 31 * 2**20


def keep_freed_memory() -> None:
    """Let arrays reuse memory instead of handing it back to the system after each operation.

    glibc's allocator keeps free blocks as large as the largest one that was freed so far, up to
    32 MiB (its "dynamic mmap threshold", mallopt(3)). Without one such block a search spends a
    fifth of its time on page faults. Elsewhere this does nothing.
    """
    np.empty(FREED_BYTES, dtype=np.uint8)


@contextmanager
def no_collections() -> Iterator[None]:
    """Look for no cycles of garbage meanwhile, unless someone else has turned that off already.

    Derived blocks, traces and tasks are hundreds of thousands of small objects that stay, and
    hardly a cycle: looking through them again and again is a sixth of a search's time. Marks and
    transfers of events make no cycles either: of every chip for itself it is a fifth.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
