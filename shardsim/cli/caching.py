"""`shardsim cache`: what is kept of compilations."""

from __future__ import annotations

import click

from shardsim.cli.output import emit_json, json_option, note, show
from shardsim.units import show_bytes


@click.command()
@click.argument("what", type=click.Choice(["list", "size", "clear"]), default="list")
@json_option
def cache(what: str, as_json: bool) -> None:
    """List or clear what is kept of compilations, or say its size.

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
    told = f"{len(entries)} entries, {show_bytes(size)}, in {here.folder}"
    if as_json:
        rows = [
            {"kind": one.kind, "name": one.path.name, "bytes": one.size_bytes, "time_s": one.time_s}
            for one in entries
        ]
        removed = what == "clear"
        emit_json({"folder": str(here.folder), "bytes": size, "removed": removed, "entries": rows})
    elif what == "size":
        show(told)
    else:
        if what == "list" and entries:
            show(kept(entries))
        note(f"removed {told}" if what == "clear" else told)
