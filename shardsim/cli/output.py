"""What every command does with its results: tables for people, JSON for scripts."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from shardsim.errors import ShardsimError


def emit_json(data: Any) -> None:
    """Print one JSON document to stdout; not-a-number and infinity become null."""
    click.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a plain table: text to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(header), *(len(row[index]) for row in cells)) if cells else len(header)
        for index, header in enumerate(headers)
    ]
    right = [
        bool(cells) and all(_numeric(row[index]) for row in cells) for index in range(len(headers))
    ]

    def line(parts: Sequence[str]) -> str:
        aligned = [
            part.rjust(width) if to_right else part.ljust(width)
            for part, width, to_right in zip(parts, widths, right, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def _numeric(cell: str) -> bool:
    return cell in ("", "-", "does not fit") or cell.lstrip("+-~")[:1].isdigit()


def note(text: str) -> None:
    """Print a line to stderr."""
    click.echo(text, err=True)


def progress_line(what: str) -> Callable[[int, int], None]:
    """Return a callback that shows `done / total` on stderr, if a person is watching it."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        text = f"\r{what}: {100 * done // max(total, 1)} %"
        end = "\r" + " " * len(text) + "\r" if done >= total else ""
        print(text, end=end, file=sys.stderr, flush=True)

    return show


def command_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn `ShardsimError` into one line on stderr and its exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ShardsimError as error:
            text = " ".join(str(error).split())
            note(f"error: {text}")
            sys.exit(error.exit_code)
        except BrokenPipeError:
            # The reader of a pipe went away; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return run


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
