"""Compilations kept on disk, by everything that they depend on.

An entry is a folder: result.json, hlo.txt.gz if it compiled, and a sum over both. Entries appear
whole or not at all, so several processes may share a cache, and an interrupted one leaves nothing
half-written; one that is damaged is none.
Of several that want the same compilation at once one compiles, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT, HLO, SUM, OPS = "result.json", "hlo.txt.gz", "sha256", "ops"
FORMAT = 2  # raised when entries written before can no longer be read
POLL_S = 0.2


def default_folder() -> Path:
    """Return where compilations are kept: $SHARDSIM_CACHE, else the user's cache folder."""
    if given := os.environ.get("SHARDSIM_CACHE"):
        return Path(given) / "tpu"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardsim" / "tpu"


def key_of(request: dict[str, Any], code: str, versions: dict[str, str]) -> str:
    """Return the name of an entry: a hash of code, topology, options and versions."""
    text = json.dumps([FORMAT, request, code, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """Compilations under one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def get(self, key: str) -> tuple[dict[str, Any], str | None] | None:
        """Return result and HLO text of an entry, or None if there is none that can be read."""
        entry = self.folder / key
        try:
            written = (entry / RESULT).read_bytes()
            result: dict[str, Any] = json.loads(written)
            if not _is_result(result):
                return None
            packed = b"" if "error" in result else (entry / HLO).read_bytes()
            if (entry / SUM).exists() and (entry / SUM).read_text() != _sum(written, packed):
                return None
            return result, gzip.decompress(packed).decode("utf-8") if packed else None
        except (OSError, EOFError, ValueError, zlib.error, RecursionError):
            return None

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    @contextmanager
    def alone(self, key: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait until no other process or thread is here with `key`; false if `stopped` before.

        The lock is of an open file, so a process that ends, however it ends, lets go of it. Whoever
        has it removes the file in the end; who waited for that one opens the next.
        """
        import fcntl  # not on Windows, where nothing is compiled for TPUs

        path = self.folder / f".lock-{key}"
        while not stopped():
            with path.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
                except (BlockingIOError, FileNotFoundError):
                    mine = False
                if mine:
                    try:
                        yield True
                    finally:
                        path.unlink(missing_ok=True)
                    return
            time.sleep(POLL_S)
        yield False

    def put(self, key: str, result: dict[str, Any], text: str | None) -> str:
        """Keep a compilation; return why that is not possible, or nothing.

        It took minutes, so it is used where it cannot be kept.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        except OSError as error:
            return f"{self.folder}: {error.strerror}"
        try:
            written = json.dumps(result).encode()
            packed = b"" if text is None else gzip.compress(text.encode(), 6, mtime=0)
            (new / RESULT).write_bytes(written)
            if packed:
                (new / HLO).write_bytes(packed)
            (new / SUM).write_text(_sum(written, packed))
            _remove(self.folder / key)
            new.rename(self.folder / key)
        except OSError as error:
            # Another process may have been quicker; its entry is as good.
            return "" if key in self else f"{self.folder / key}: {error.strerror}"
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return ""

    def entries(self) -> list[Entry]:
        """Return what is kept, the newest first: compilations and estimates of operations."""
        found = []
        for kind, paths in (
            ("compilation", self.folder.glob("[!.]*")),
            ("estimates", (self.folder / OPS).glob("*.jsonl")),
        ):
            for path in paths:
                with contextlib.suppress(OSError):  # another process removed it
                    if path.name != OPS and path.is_dir() == (kind == "compilation"):
                        files = [*path.iterdir()] if path.is_dir() else [path]
                        stats = [file.stat() for file in files]
                        size = sum(stat.st_size for stat in stats)
                        newest = max((stat.st_mtime for stat in stats), default=0.0)
                        found.append(Entry(kind=kind, path=path, size_bytes=size, time_s=newest))
        return sorted(found, key=lambda entry: -entry.time_s)

    def clear(self) -> list[Entry]:
        """Remove what is kept; return it. What a process compiles now is kept after that."""
        entries = self.entries()
        for entry in entries:
            _remove(entry.path)
        return entries


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something kept in a cache."""

    kind: str  # compilation, estimates
    path: Path
    size_bytes: int
    time_s: float  # when it was written, in seconds of the epoch


def _is_result(result: object) -> bool:
    """Return whether this is what a compiling process answers."""
    if not isinstance(result, dict):
        return False
    if "error" in result:
        return isinstance(result["error"], str) and isinstance(result.get("message"), str)
    return isinstance(result.get("memory"), dict)


def _remove(path: Path) -> None:
    """Remove a folder, or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sum(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
