"""What every command does with its results: tables for people, JSON for scripts."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from shardsim.cli.settings import read_settings, unknown_variables
from shardsim.errors import ShardsimError, one_line
from shardsim.files import check_writable, write_text
from shardsim.views.table import Table
from shardsim.views.write import json_text, plain, printable

INTERRUPTED = 130  # the exit status of a shell's command that a Ctrl-C ended


class FilePath(click.Path):
    """The type of options that name a file or a folder: an empty text names none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty text, which click takes for a file that is not there."""
        if not os.fspath(value):
            self.fail("an empty text names no file", param, ctx)
        return super().convert(value, param, ctx)


def emit_json(data: Any) -> None:
    """Print one JSON document to stdout; not-a-number and infinity become null."""
    click.echo(json_text(data, indent=2))


def answer(as_json: bool, data: Any, *parts: Table | str) -> None:
    """Print what a command found: `data` for scripts, or tables and lines for people."""
    if as_json:
        emit_json(data)
    else:
        show(*parts)


def show(*parts: Table | str, err: bool = False) -> None:
    """Print tables and lines: fitted to the terminal, or plain where nobody watches; with `err` to
    stderr."""
    if not parts:
        return
    if not (sys.stderr if err else sys.stdout).isatty():
        lines = (part if isinstance(part, str) else plain(part) for part in parts)
        click.echo("\n".join(lines), err=err)
        return
    from shardsim.views.terminal import fitted

    width = shutil.get_terminal_size().columns
    colour = "NO_COLOR" not in os.environ
    click.echo("\n".join(fitted(part, width, colour) for part in parts), err=err)


def note(text: str) -> None:
    """Print one line to stderr; where a person watches, broken between words."""
    line = printable(text)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    click.echo(line, err=True)


STDOUT = "-"
SOON_S, EVERY_S = 1.0, 0.1  # when progress is shown first, and how often
LONG_S = 100  # what is longer is told in minutes


# How files of text are called; who asks for another kind would find the wrong thing in it.
YAML, JSON, PYTHON, CSV = (".yaml", ".yml"), (".json",), (".py",), (".csv",)
KNOWN = (*YAML, *JSON, *PYTHON, *CSV, ".html", ".png", ".svg", ".pdf")


def check_output(
    path: str | None, as_json: bool, endings: tuple[str, ...] = (), text: tuple[str, ...] = ()
) -> None:
    """Raise `ShardsimError` if -o cannot be written: before the work, not after it.

    "-" is stdout, which --json takes for itself. A name must end with one of `endings`, if any are
    given; of what is `text`, only not as other kinds of files do.
    """
    if path == STDOUT and as_json:
        raise ShardsimError("-o - and --json would both write to stdout; choose one")
    if path and path != STDOUT:
        if endings and not path.lower().endswith(endings):
            raise ShardsimError(f"-o {path}: must end with {', '.join(endings)}")
        ending = os.path.splitext(path)[1].lower()
        if text and ending in KNOWN and ending not in text:
            raise ShardsimError(
                f"-o {path}: what is written is no {ending}; name it "
                f"{os.path.basename(path)[: -len(ending)]}{text[0]}"
            )
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with its whole first sentence, however narrow the terminal is."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, one.get_short_help_str(limit=200))
                    for name, one in sorted(self.commands.items())
                ]
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words of a command line; only calls from Python can have a null byte in one."""
        if any("\0" in word for word in args):
            raise click.UsageError("a null byte is in no word of a command", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Read a command's options, from settings too, and run it."""
        with _one_line():
            try:
                for text in unknown_variables(self.commands):
                    note(text)
                ctx.default_map = read_settings(self.commands)
                return super().invoke(ctx)
            except ShardsimError as error:
                complain(error)
                ctx.exit(error.exit_code)
            except BrokenPipeError:
                # The reader of a pipe went away; Python would complain again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                ctx.exit(1)
            except (Exception, KeyboardInterrupt) as error:
                if not _of_interrupt(error):
                    raise
                note("interrupted")
                ctx.exit(INTERRUPTED)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:  # nothing was asked, so nothing is wrong
        click.echo(error.format_message())
        raise click.exceptions.Exit(0) from None
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "shardsim"
        text = error.format_message().rstrip(".")
        text = text[:1].lower() + text[1:]
        raise OneLineUsageError(f"{text} (see {where} --help)") from None


def progress_line(what: str) -> Callable[[int, int], None]:
    """Return a callback that shows on stderr how much of a whole is done and how long the rest may
    take, if a person is watching it; a second after it began, and then ten times a second."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    began = time.monotonic()
    shown = [began + SOON_S, 0.0]  # when it was shown last, and how long the line was

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total:
            print(f"\r{' ' * int(shown[1])}\r", end="", file=sys.stderr, flush=True)
            shown[1] = 0.0
        elif now - shown[0] > EVERY_S:
            text = f"{what}: {100 * done // max(total, 1)} %"
            if 100 * done >= total:  # of less there is no telling
                left_s = (now - began) * (total - done) / done
                text += f", about {left_s:.0f} s left" if left_s < LONG_S else ""
                text += f", about {left_s / 60:.0f} min left" if left_s >= LONG_S else ""
            print(f"\r{text:{int(shown[1])}}", end="", file=sys.stderr, flush=True)
            shown[:] = [now, max(shown[1], float(len(text)))]

    return show


def _of_interrupt(error: BaseException | None) -> bool:
    """Return whether a Ctrl-C lies behind an exception: an import that it ends says another."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
