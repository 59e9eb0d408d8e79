"""What every command does with its results: tables for people, JSON for scripts."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from shardsim.cli.settings import read_settings
from shardsim.errors import ShardsimError, one_line
from shardsim.files import check_writable, write_text
from shardsim.views.table import Table
from shardsim.views.write import json_text, plain, printable

INTERRUPTED = 130  # the exit status of a shell's command that a Ctrl-C ended


def emit_json(data: Any) -> None:
    """Print one JSON document to stdout; not-a-number and infinity become null."""
    click.echo(json_text(data, indent=2))


def show(*parts: Table | str, err: bool = False) -> None:
    """Print tables and lines: fitted to the terminal, or plain where nobody watches; with `err` to
    stderr."""
    if not (sys.stderr if err else sys.stdout).isatty():
        lines = (part if isinstance(part, str) else plain(part) for part in parts)
        click.echo("\n".join(lines), err=err)
        return
    from shardsim.views.terminal import fitted

    width = shutil.get_terminal_size().columns
    colour = "NO_COLOR" not in os.environ
    click.echo("\n".join(fitted(part, width, colour) for part in parts), err=err)


def note(text: str) -> None:
    """Print one line to stderr."""
    click.echo(printable(text), err=True)


STDOUT = "-"


def check_output(path: str | None, as_json: bool, endings: tuple[str, ...] = ()) -> None:
    """Raise `ShardsimError` if -o cannot be written: before the work, not after it.

    "-" is stdout, which --json takes for itself.
    """
    if path == STDOUT and as_json:
        raise ShardsimError("-o - and --json would both write to stdout; choose one")
    if path and path != STDOUT:
        if endings and not path.lower().endswith(endings):
            raise ShardsimError(f"-o {path}: must end with {', '.join(endings)}")
        check_writable(path)


def write_output(path: str, text: str, what: str = "") -> None:
    """Write text to a file, whole or not at all, and say so on stderr; "-" is stdout."""
    if path == STDOUT:
        click.echo(text, nl=False)
        return
    write_text(path, text)
    note(f"{what or 'written'}{' written' if what else ''} to {path}")


def complain(text: object) -> None:
    """Print what is wrong as one line on stderr, its middle left out if it is very long."""
    note(f"error: {one_line(text)}")


class OneLineUsageError(click.ClickException):
    """A mistake in the command line itself, told in one line."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the message to stderr."""
        complain(self.message)


class OneLineGroup(click.Group):
    """A group of commands that tells of mistakes in its own and their options in one line."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the group's own options."""
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Read a command's options, from settings too, and run it."""
        with _one_line():
            try:
                ctx.default_map = read_settings(self.commands)
                return super().invoke(ctx)
            except KeyboardInterrupt:
                note("interrupted")
                ctx.exit(INTERRUPTED)
            except ShardsimError as error:  # of the settings: commands tell of their own
                complain(error)
                ctx.exit(error.exit_code)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "shardsim"
        text = error.format_message().rstrip(".")
        text = text[:1].lower() + text[1:]
        raise OneLineUsageError(f"{text} (see {where} --help)") from None


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
            complain(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            note("interrupted")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader of a pipe went away; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return run


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
