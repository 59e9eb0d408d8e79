"""Texts of compiled programs: files, also packed ones, and what a dump has beside them."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

from shardsim.errors import FileError
from shardsim.xla.hlo.buffers import read_assignment
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.module import Module
from shardsim.xla.hlo.text import parse_module

LARGEST_BYTES = 2**30  # of a text
_PLAIN = "after_optimizations.txt"


def read_program(path: str) -> tuple[str, float | None]:
    """Return the text of a file (.gz and .xz too), and its HBM peak if the dump beside it says so.

    Raises `FileError` for a file that is none, or no text.
    """
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        elif raw[:6] == b"\xfd7zXZ\x00":
            raw = lzma.decompress(raw)
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{path}: no text; give what compiled.as_text() returns") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        raise FileError(f"{path}: the compressed file is cut off or damaged") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > LARGEST_BYTES:
        raise FileError(f"{path}: larger than {LARGEST_BYTES} bytes")
    beside = [
        Path(path.removesuffix(".txt") + ending)
        for ending in ("-buffer-assignment.txt", "-live-range.txt")
    ]
    if not path.endswith(_PLAIN) or not all(one.is_file() for one in beside):
        return text, None
    try:
        assignment, ranges = (one.read_text(encoding="utf-8") for one in beside)
        return text, float(read_assignment(assignment, ranges).peak_bytes)
    except (OSError, UnicodeDecodeError, HloError):
        return text, None


def read_text(text: str) -> Module:
    """Parse HLO; raise `HloError` that says what to give instead for StableHLO."""
    start = text.lstrip()[:2000]
    if start.startswith(("module ", "#loc")) or "stablehlo." in start:
        raise HloError("this is StableHLO, before the compiler; give what compiled.as_text() gives")
    try:
        return parse_module(text)
    except RecursionError:
        raise HloError("a text nested too deeply") from None
