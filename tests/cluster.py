"""A Dask cluster on loopback, of processes that tests may kill, and calls that leave traces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Cluster:
    """The address of a scheduler, its process, and those of its workers."""

    address: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@contextmanager
def started(folder: Path, path: tuple[Path, ...] = ()) -> Iterator[Cluster]:
    """Give a scheduler and two workers of one thread each, with `path` before what they import."""
    places = map(str, (*path, TESTS, TESTS.parent))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    made: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> subprocess.Popen[bytes]:
        made.append(
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{name}", *words, "--no-dashboard"],
                env=environment,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return made[-1]

    try:
        file = folder / "scheduler.json"
        words = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        scheduler = start("scheduler", *words)
        deadline = time.monotonic() + 60
        while not (file.exists() and file.read_text().endswith("}")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        words = ("--nthreads", "1", "--no-nanny", "--local-directory", str(folder))
        workers = [start("worker", address, *words) for _ in range(2)]
        yield Cluster(address, scheduler, workers)
    finally:
        for process in made:
            process.kill()
            process.wait()


def slow_square(number: int) -> tuple[int, int]:
    """Return a square, and the process that took its time over it."""
    time.sleep(0.3)
    return number**2, os.getpid()
