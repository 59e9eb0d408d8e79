"""`shardsim inspect`: a compiled program of anyone's, every collective and copy priced."""

from __future__ import annotations

import click

from shardsim.cli.output import answer, json_option
from shardsim.views.table import Table


@click.command("inspect")
@click.option(
    "--hlo",
    "path",
    required=True,
    metavar="FILE",
    help="What compiled.as_text() gives, or an XLA dump (after_optimizations.txt); .gz too.",
)
@click.option("--on", help="The slice that it runs on, or its chip: v5p:4x4x4, v5p.")
@click.option("--mesh", help="The axes of its mesh, major first: data=4,fsdp=16.")
@click.option(
    "--causal/--whole",
    default=None,
    help="Whether fused attention is causal: programs leave its mask out.",
)
@json_option
def inspect(
    path: str, on: str | None, mesh: str | None, causal: bool | None, as_json: bool
) -> None:
    """Read a compiled program, every collective and copy priced.

    Those that nothing asked for are listed with the constraint that would remove them. The step is
    the TPU compiler's own schedule; of a program for a host or GPU collectives and copies are read.

    \b
    Examples:
      shardsim inspect --hlo jit_step.after_optimizations.txt --on v5p:4x4x4
      shardsim inspect --hlo step.hlo.gz --on v5e --mesh data=4,model=16 --json
    """
    from shardsim.views import inspect as views
    from shardsim.xla.inspect import inspect_file

    found = inspect_file(path, on, mesh, causal)
    parts: list[Table | str] = [*views.headline(found)]
    if found.operations:
        parts += ["", views.operations(found)]
    if found.rows:
        parts += ["", views.sent(found.rows)]
    if found.unexpected:
        parts += ["", "unexpected:", *views.constraints(found.unexpected)]
    parts += [f"not said: {text}" for text in found.not_said]
    parts += [f"warning: {text}" for text in found.warnings]
    answer(as_json, found.to_data(), *parts)
