"""`shardsim predict`, and the options of how a plan is priced."""

from __future__ import annotations

import sys
from typing import Any

import click

from shardsim.cli.amounts import amount, prices
from shardsim.cli.chosen import chosen_plan, set_option, words_options
from shardsim.cli.output import command_errors, emit_json, json_option, show
from shardsim.cli.what_ifs import compiled_option, given, what_if_options

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
    type=click.Choice(["emitted", "trainer", "ideal"]),
    help="What is done beyond the plan: what the exported code does under the TPU compiler, what a "
    "training library does, or nothing; if left out, emitted, with physical costs ideal.",
)


training_options = (
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


@click.command()
@click.argument("path", metavar="PLAN.yaml|MODEL")
@words_options
@set_option
@op_costs_option
@as_option
@click.option(
    "--fidelity",
    default="analytic",
    show_default=True,
    type=click.Choice(["analytic", "events", "compiled"]),
    help="Closed forms; an event simulation of the torus (needs the extra `simulate`); or what "
    "the TPU compiler schedules, replayed (needs the extra `tpu`).",
)
@click.option(
    "--mfu",
    "counted",
    type=click.Choice(["all"]),
    help="Show the utilisation in every way of counting FLOPs, beside the prediction.",
)
@training_options[0]
@training_options[1]
@training_options[2]
@compiled_option
@what_if_options
@json_option
@command_errors
def predict(
    path: str,
    words: dict[str, Any],
    changes: tuple[str, ...],
    op_costs: str | None,
    implementation: str | None,
    fidelity: str,
    counted: str | None,
    tokens: float | None,
    images: float | None,
    prices: dict[str, float] | None,
    compiled: bool,
    what_ifs: dict[str, Any],
    as_json: bool,
) -> None:
    """Predict MFU, step time and HBM of one plan: a file, the name of a shipped one, or a model.

    A model needs a slice, a batch and a mesh; the rest is as the search has it, unless --set says
    otherwise. Exit status 1 if the plan does not fit in HBM.

    \b
    Examples:
      shardsim predict vit-22b-published-tp8
      shardsim predict vit-22b --on v4:8x8x16 --batch 65536 --mesh fsdp=128,tensor=8
      shardsim predict plan.yaml --set microbatches=4 --set chip.link_bytes_per_s=90e9
      shardsim predict plan.yaml --mfu all --tokens 300B --chip-hour-price 3.2
      shardsim predict plan.yaml --fidelity events --straggler 3,0,5=1.1
      shardsim predict plan.yaml --fidelity events --compiled
    """
    from shardsim.answers.training import training_of
    from shardsim.cli.show import prediction_parts
    from shardsim.cost.mfus import utilisations
    from shardsim.cost.predict import predict as run
    from shardsim.errors import PlanError
    from shardsim.views import slices as views
    from shardsim.views.table import table

    if op_costs:
        changes = (*changes, f"op_costs={op_costs}")
    chosen = chosen_plan(path, words, changes)
    chips = [chosen.machine.chip.name]
    training = training_of(tokens, images, chosen.sequence, prices, chips)
    if implementation and (compiled or fidelity == "compiled"):
        raise PlanError("--as is for plans; what the TPU compiler schedules is what it is")
    if fidelity == "events" or (fidelity == "compiled" and given(what_ifs)):
        from shardsim.cli.simulation import simulated

        compiled = compiled or fidelity == "compiled"
        item = simulated(chosen, what_ifs, compiled, implementation)
    elif given(what_ifs):
        raise PlanError("slow and broken chips and links, jitter, twists need --fidelity events")
    elif compiled and fidelity == "analytic":
        raise PlanError("--compiled is for --fidelity events; or use --fidelity compiled")
    elif fidelity == "compiled":
        from shardsim.cli.compiling import compiler
        from shardsim.xla.tpu.compiled import predict_compiled
        from shardsim.xla.tpu.service import TIMEOUT_S

        with compiler(1, TIMEOUT_S, None, no_cache=False) as service:
            item = predict_compiled(chosen, service)
    else:
        item = run(chosen, implementation=implementation)
    rows = utilisations(item) if counted else []
    if as_json:
        more: dict[str, Any] = {"training": training.to_data(item)} if training else {}
        more |= {"mfus": [row.to_data() for row in rows]} if rows else {}
        emit_json(item.to_data() | more)
    else:
        show(*prediction_parts(item))
        if rows:
            show("", views.mfus(rows))
        if training:
            show("", table(views.training_columns(training), [item]), views.trained(training))
    if not item.fits:
        sys.exit(1)
