"""Compilations kept on disk, by everything that they depend on.

An entry is a folder: result.json, and hlo.txt.gz if it compiled. Entries appear whole or not at
all, so several processes may share a cache, and an interrupted one leaves nothing half-written.
Of several that want the same compilation at once one compiles, and the others wait for it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1  # raised when entries written before can no longer be read
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
            result: dict[str, Any] = json.loads((entry / "result.json").read_text("utf-8"))
            packed = entry / "hlo.txt.gz"
            if "error" in result:
                return result, None
            return result, gzip.decompress(packed.read_bytes()).decode("utf-8")
        except (OSError, EOFError, ValueError):
            return None

    def __contains__(self, key: str) -> bool:
        return (self.folder / key / "result.json").exists()

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

    def put(self, key: str, result: dict[str, Any], text: str | None) -> None:
        """Keep a compilation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        try:
            (new / "result.json").write_text(json.dumps(result), encoding="utf-8")
            if text is not None:
                (new / "hlo.txt.gz").write_bytes(gzip.compress(text.encode(), 6, mtime=0))
            if (self.folder / key).exists():
                shutil.rmtree(self.folder / key)
            new.rename(self.folder / key)
        except OSError:
            # Another process was quicker; its entry is as good.
            if not (self.folder / key / "result.json").exists():
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
