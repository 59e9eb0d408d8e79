"""Options of the event simulation: what is not as it should be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--straggler",
        "stragglers",
        multiple=True,
        metavar="CHIP=FACTOR",
        help="A slow chip: 3,0,5=1.1 takes 10 % longer for all it computes; may be repeated.",
    ),
    click.option(
        "--dead-link",
        "dead_links",
        multiple=True,
        metavar="A-B",
        help="A broken link between two neighbours: 0,0,0-1,0,0; may be repeated.",
    ),
    click.option(
        "--slow-link",
        "slow_links",
        multiple=True,
        metavar="A-B=SHARE",
        help="A link at a share of its rate: 0,0,0-1,0,0=0.5; may be repeated.",
    ),
    click.option(
        "--dead-chip",
        "dead_chips",
        multiple=True,
        metavar="CHIP",
        help="A broken chip: says on what part of the slice the plan can run.",
    ),
    click.option(
        "--jitter",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="Relative standard deviation of each chip's time for a layer, such as 0.02.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the jitter."),
    click.option(
        "--slow-dcn",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="The share of its rate that the network between slices gives.",
    ),
    click.option("--twisted", is_flag=True, help="On the twisted torus of the same shape."),
)
compiled_option = click.option(
    "--compiled",
    is_flag=True,
    help="Simulate what the TPU compiler schedules, not the plan (needs the extra `tpu`).",
)

_UNUSED: dict[str, Any] = {
    "stragglers": (),
    "dead_links": (),
    "slow_links": (),
    "dead_chips": (),
    "jitter": 0.0,
    "slow_dcn": 1.0,
    "twisted": False,
}


def what_if_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command gets them as one argument, `what_ifs`."""

    @functools.wraps(function)
    def run(**values: Any) -> Any:
        what_ifs = {name: values.pop(name) for name in (*_UNUSED, "seed")}
        return function(**values, what_ifs=what_ifs)

    command: Callable[..., Any] = run
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given(what_ifs: dict[str, Any]) -> bool:
    """Return whether any of the options was used; a seed alone changes nothing."""
    return any(what_ifs[name] != unused for name, unused in _UNUSED.items())
