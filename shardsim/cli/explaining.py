"""`shardsim explain`: why a plan fits, what limits it, what would help."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from shardsim.cli.amounts import seconds, share
from shardsim.cli.options import as_option, op_costs_option, plan_argument
from shardsim.cli.output import answer, json_option, progress_line

if TYPE_CHECKING:
    from shardsim.plan import Plan


@click.command()
@click.option("--measured-step", type=seconds, help="What a step of a real run took: 14.2, 850ms.")
@click.option("--measured-mfu", type=share, help="Or the MFU that it reached: 0.41, 41%.")
@click.option(
    "--counted",
    default="palm",
    show_default=True,
    metavar="CONVENTION",
    help="How that MFU counts FLOPs; `predict --mfu all` lists the ways.",
)
@plan_argument
@op_costs_option
@as_option
@json_option
def explain(
    plan: Plan,
    measured_step: float | None,
    measured_mfu: float | None,
    counted: str,
    op_costs: str | None,
    implementation: str | None,
    as_json: bool,
) -> None:
    """Say what fills HBM, what limits a plan, and what would help.

    Changes are single ones. With a measured step or MFU it says what may explain the gap, and the
    published runs most like it. Exit status 1 if the plan does not fit in HBM.

    \b
    Examples:
      shardsim explain vit-22b-published-tp8
      shardsim explain plan.yaml --measured-step 14.9
      shardsim explain llama2-70b --on v5p:4x4x4 --batch 256 --mesh fsdp=64
    """
    from shardsim.answers.explain import explain as run
    from shardsim.model import accounting_named
    from shardsim.views.explain import explained

    made = run(
        plan,
        measured_step_s=measured_step,
        measured_mfu=measured_mfu,
        accounting=accounting_named(counted),
        costs=op_costs,
        implementation=implementation,
        progress=progress_line("trying changes"),
    )
    answer(as_json, made.to_data(), *explained(made))
    if not made.fits:
        sys.exit(1)
