"""`shardsim cache`: what is kept of compilations."""

from __future__ import annotations

import click

from shardsim.cli.output import emit_json, json_option, note, show
from shardsim.units import show_bytes


@click.command()
@click.argument("what", type=click.Choice(["list", "size", "clear"]), default="list")
@json_option
def cache(what: str, as_json: bool) -> None:
    """List what is kept of compilations and estimates, say how large it is, or remove it.

    It lies in ~/.cache/shardsim, or where $SHARDSIM_CACHE says.

    \b
    Examples:
      shardsim cache
      shardsim cache size
      shardsim cache clear
    """
    from shardsim.views.catalog import kept
    from shardsim.xla.tpu.cache import Cache

    here = Cache()
    entries = here.clear() if what == "clear" else here.entries()
    size = sum(entry.size_bytes for entry in entries)
    if as_json:
        rows = [
            {
                "kind": entry.kind,
                "name": entry.path.name,
                "bytes": entry.size_bytes,
                "time_s": entry.time_s,
            }
            for entry in entries
        ]
        removed = what == "clear"
        emit_json({"folder": str(here.folder), "bytes": size, "removed": removed, "entries": rows})
        return
    if what == "list" and entries:
        show(kept(entries))
    told = f"{len(entries)} entries, {show_bytes(size)}, in {here.folder}"
    if what == "size":
        click.echo(told)
    else:
        note(f"removed {told}" if what == "clear" else told)
