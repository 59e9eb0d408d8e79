"""`shardsim serve`: a local page to play with plans."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Any

import click

from shardsim.cli.chosen import chosen_plan
from shardsim.cli.options import words_options
from shardsim.cli.output import emit_json, json_option, note, progress_line
from shardsim.errors import PlanError

PORT = 8741
FIRST = "vit-22b-published-tp8"  # what the page begins with where nothing is named


@click.command()
@click.argument("paths", metavar="[PLAN.yaml|MODEL]...", nargs=-1)
@words_options
@click.option(
    "--port",
    default=PORT,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Where on 127.0.0.1; 0 takes a free port.",
)
@click.option("--no-open", is_flag=True, help="Do not show the page in the browser.")
@json_option
def serve(
    paths: tuple[str, ...], words: dict[str, Any], port: int, no_open: bool, as_json: bool
) -> None:
    """Serve a local page to change and compare plans.

    It is on 127.0.0.1 until Ctrl-C ends it. It has the plans given, and all that ship with
    shardsim. A model needs a slice and a batch; without --mesh it is the best plan that is found.
    The page asks nothing of any other address.

    \b
    Examples:
      shardsim serve plan.yaml vit-22b-published-tp8
      shardsim serve llama3-8b --on v5p:4x4x4 --batch 1024
      shardsim serve --port 0 --no-open --json
    """
    from shardsim.serve.desk import Desk
    from shardsim.serve.server import PageServer

    if not paths and any(value is not None for value in words.values()):
        raise PlanError("name the model that is to be on that slice, such as llama3-8b")
    given = {path: _plan(path, words, alone=len(paths) < 2) for path in paths or (FIRST,)}
    with PageServer(Desk(given), port) as server:
        if as_json:
            emit_json({"url": server.url, "port": server.server_port, "plans": list(given)})
        note(f"serving at {server.url}; Ctrl-C ends it")
        if not no_open and _has_screen():
            webbrowser.open(server.url)
        server.serve_forever()


def _plan(path: str, words: dict[str, Any], alone: bool) -> Any:
    """Return the plan of a file or of words; of a model without a mesh the best.

    Words are for whatever stands alone, and for models beside plans.
    """
    from shardsim.cli.catalog import read_model
    from shardsim.model import model_names
    from shardsim.model.hf import config_path
    from shardsim.planner.search import search

    if not (alone or path in model_names() or config_path(path)):
        return chosen_plan(path, dict.fromkeys(words), ())
    if words["mesh"] or not (words["on"] and words["batch"]):
        return chosen_plan(path, words, ())
    model = read_model(path)
    progress = progress_line("searching")
    result = search(
        model, words["on"], words["batch"], sequence=words["seq"], top=1, progress=progress
    )
    return result.best.plan


def _has_screen() -> bool:
    """Return whether a browser has somewhere to open: not over SSH to a Linux without a screen."""
    if not sys.platform.startswith("linux"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
