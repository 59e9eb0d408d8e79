"""What the commands that use the TPU compiler share: options, and what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from shardsim.cli.output import note
from shardsim.views.table import Table

scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Run it on the Dask cluster whose scheduler is there, such as tcp://127.0.0.1:8786.",
)


def compiler_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the compile service to a command."""
    for option in (
        click.option(
            "--no-cache", is_flag=True, help="Compile anew, and keep nothing that is compiled."
        ),
        click.option(
            "--timeout",
            default=1200.0,
            show_default=True,
            type=click.FloatRange(1.0),
            help="Seconds that one compilation may take.",
        ),
        scheduler_option,
        click.option(
            "--workers",
            default=1,
            show_default=True,
            type=click.IntRange(1, 256),
            help="Compilations, or searches of slices, side by side; a compilation may take 4 GB.",
        ),
    ):
        function = option(function)
    return function


def tell_unused(why: str, *names: str) -> None:
    """Say which of some options were written on the command line though nothing comes of them."""
    context = click.get_current_context()
    written = [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if written:
        note(f"{', '.join(written)}: not used, as {why}")


@contextmanager
def compiler(workers: int, timeout: float, scheduler: str | None, no_cache: bool) -> Iterator[Any]:
    """Give a `TpuCompiler` that tells on stderr how far it is."""
    from shardsim.executors import executor_of
    from shardsim.xla.tpu import Cache, TpuCompiler

    cache = None if no_cache else Cache()
    with (
        executor_of(1, scheduler) as executor,
        TpuCompiler(
            workers=workers, executor=executor, timeout_s=timeout, cache=cache, progress=note
        ) as service,
    ):
        yield service


def evidence_parts(data: dict[str, Any]) -> list[Table | str]:
    """Return what `verify --against tpu` found, as lines and tables."""
    from shardsim.views import evidence as views

    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    if data.get("problem"):
        problem = f"NOT VERIFIED: {data['problem']}"
        return [problem, views.figures(data), f"\ncompiled with {versions}"]
    verdict = "verified: it compiles and fits, collectives as planned"
    if not data["ok"]:
        verdict = "NOT VERIFIED: it compiles and fits, but not as planned"
    found: list[Table | str] = [verdict, f"compiled with {versions}", "", views.figures(data)]
    found += ["", *views.collectives(data["collectives"])]
    if data["unplanned"]:
        found += ["", views.unplanned(data["unplanned"])]
    return [*found, *(f"warning: {text}" for text in data["warnings"])]
