"""The command line: `shardsim COMMAND`. Every command is a call that a notebook can make too."""

from __future__ import annotations

import click

import shardsim
from shardsim.cli.caching import cache
from shardsim.cli.calibrating import calibrate
from shardsim.cli.catalog import hardware, models
from shardsim.cli.comparing import compare
from shardsim.cli.evidence import evidence, validate
from shardsim.cli.explaining import explain
from shardsim.cli.exploring import ablate, sensitivity, sweep
from shardsim.cli.inspecting import inspect
from shardsim.cli.narrow import Context
from shardsim.cli.output import OneLineGroup
from shardsim.cli.predicting import predict
from shardsim.cli.reporting import report
from shardsim.cli.running import export, verify
from shardsim.cli.searching import plan
from shardsim.cli.serving import serve
from shardsim.cli.settings import name_variables
from shardsim.cli.simulation import timeline
from shardsim.cli.trainers import import_


@click.group(
    cls=OneLineGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(shardsim.__version__, prog_name="shardsim")
def main() -> None:
    """Plan how to shard a model on TPU slices: predict MFU, search, compare, explain.

    \b
    Start with:
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 -o plan.yaml
      shardsim predict plan.yaml

    An option can also be set in the environment: SHARDSIM_PLAN_TOP=3 is plan --top 3. So it
    can in ~/.config/shardsim/settings.yaml: "plan: {top: 3}".

    Exit status: 0 done, 1 the answer is no (does not fit), 2 bad input, 130 interrupted.
    """


COMMANDS = (
    *(plan, predict, explain, compare, ablate, sweep, sensitivity, timeline, report, serve),
    *(export, inspect, verify, import_, validate, evidence, calibrate, hardware, models, cache),
)
for command in COMMANDS:
    main.add_command(command)
for command in (main, *COMMANDS):
    command.context_class = Context
name_variables(main.commands)
