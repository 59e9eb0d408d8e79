"""Options that several commands share; a command gets those that go together as one argument."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from shardsim.cli.amounts import amount, prices, whole
from shardsim.cli.chosen import chosen_plan

Function = Callable[..., Any]


def together(name: str, *options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Return a decorator that adds options; the command gets their values as one mapping."""

    def nothing() -> None: ...

    added: Any = functools.reduce(lambda made, option: option(made), options, nothing)
    names = [option.name for option in added.__click_params__]

    def add(function: Function) -> Function:
        @functools.wraps(function)
        def run(**values: Any) -> Any:
            return function(**{name: {one: values.pop(one) for one in names}}, **values)

        command: Function = run
        for option in reversed(options):
            command = option(command)
        return command

    return add


words_options = together(
    "words",
    click.option("--on", metavar="SLICE", help="With MODEL: where it trains, such as v4:8x8x16."),
    click.option(
        "--batch",
        metavar="N",
        type=whole,
        help="With MODEL: sequences (images) per step over all chips.",
    ),
    click.option(
        "--seq",
        metavar="N",
        type=whole,
        help="With MODEL: tokens per sequence; by default its own.",
    ),
    click.option(
        "--mesh",
        metavar="ROLE=SIZE,...",
        help="With MODEL: data, fsdp, expert, context, tensor, tensor2, pipeline: fsdp=256,data=4.",
    ),
)


def plan_argument(function: Function) -> Function:
    """Add what says one plan, a file or a model in words, and --set; the command gets the plan."""

    @click.argument("path", metavar="PLAN.yaml|MODEL")
    @words_options
    @click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a key of the plan, model.* or chip.*; may be repeated.",
    )
    @functools.wraps(function)
    def run(path: str, words: dict[str, Any], changes: tuple[str, ...], **values: Any) -> Any:
        return function(plan=chosen_plan(path, words, changes), **values)

    return run


OP_COSTS = ("calibrated", "compiler", "physical")

op_costs_option = click.option(
    "--op-costs",
    type=click.Choice(OP_COSTS),
    help="What operations take: calibrated to published runs, as the TPU compiler estimates, or "
    "from the chip's figures alone; as the plan files say if left out.",
)

as_option = click.option(
    "--as",
    "implementation",
    type=click.Choice(["emitted", "trainer", "combined-1f1b", "torchtitan", "ideal"]),
    help="What is done beyond the plan: what the exported code does under the TPU compiler, what a "
    "training library does (on GPUs combined-1f1b, with what goes to experts beside another "
    "microbatch, and torchtitan with what its own code adds), or nothing; if left "
    "out, emitted, with physical costs ideal.",
)

training_options = together(
    "training",
    click.option("--tokens", type=amount, help="Tokens to train on, 300B: days and chip-hours."),
    click.option("--images", type=amount, help="The same in images (sequences)."),
    click.option(
        "--chip-hour-price",
        "prices",
        type=prices,
        metavar="PRICES",
        help="What a chip costs for an hour, in any currency: 4.2, or v5p=4.2,v5e=1.2.",
    ),
)

scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Run it on the Dask cluster whose scheduler is there, such as tcp://127.0.0.1:8786.",
)

compiler_options = together(
    "service",
    click.option(
        "--workers",
        default=1,
        show_default=True,
        type=click.IntRange(1, 256),
        help="Compilations, or searches of slices, side by side; a compilation may take 4 GB.",
    ),
    scheduler_option,
    click.option(
        "--timeout",
        default=1200.0,
        show_default=True,
        type=click.FloatRange(1.0),
        help="Seconds that one compilation may take.",
    ),
    click.option(
        "--no-cache", is_flag=True, help="Compile anew, and keep nothing that is compiled."
    ),
)

what_if_options = together(
    "what_ifs",
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


def asked(what_ifs: dict[str, Any]) -> bool:
    """Return whether any what-if was asked for; a seed alone changes nothing."""
    usual = {"seed": what_ifs["seed"], "jitter": 0.0, "slow_dcn": 1.0, "twisted": False}
    return any(value != usual.get(name, ()) for name, value in what_ifs.items())
