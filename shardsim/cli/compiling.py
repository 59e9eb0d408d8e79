"""What the commands that use the TPU compiler share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from shardsim.cli.output import note
from shardsim.views.table import Table


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
def compiler(
    workers: int = 1,
    scheduler: str | None = None,
    timeout: float | None = None,
    no_cache: bool = False,
) -> Iterator[Any]:
    """Give a `TpuCompiler` that tells on stderr how far it is."""
    from shardsim.executors import executor_of
    from shardsim.xla.tpu import Cache, TpuCompiler
    from shardsim.xla.tpu.service import TIMEOUT_S

    cache = None if no_cache else Cache()
    with (
        executor_of(1, scheduler) as executor,
        TpuCompiler(
            workers=workers,
            executor=executor,
            timeout_s=timeout or TIMEOUT_S,
            cache=cache,
            progress=note,
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
