"""`shardsim predict`: one plan, priced."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.options import (
    as_option,
    asked,
    compiled_option,
    op_costs_option,
    plan_argument,
    training_options,
    what_if_options,
)
from shardsim.cli.output import answer, json_option

if TYPE_CHECKING:
    from shardsim.plan import Plan


@click.command()
@plan_argument
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
@training_options
@compiled_option
@what_if_options
@json_option
def predict(
    plan: Plan,
    op_costs: str | None,
    implementation: str | None,
    fidelity: str,
    counted: str | None,
    training: dict[str, Any],
    compiled: bool,
    what_ifs: dict[str, Any],
    as_json: bool,
) -> None:
    """Predict MFU, step time and HBM of one plan.

    A plan is a file, the name of one that ships, or a model. A model needs a slice, a batch and a
    mesh; the rest is as the search has it, unless --set says otherwise. Exit status 1 if the plan
    does not fit in HBM.

    \b
    Examples:
      shardsim predict vit-22b-published-tp8
      shardsim predict vit-22b --on v4:8x8x16 --batch 64k --mesh fsdp=128,tensor=8
      shardsim predict plan.yaml --set remat=full --set chip.link_bytes_per_s=9e10
      shardsim predict plan.yaml --mfu all --tokens 300B --chip-hour-price 3.2
      shardsim predict plan.yaml --fidelity events --straggler 3,0,5=1.1
      shardsim predict plan.yaml --fidelity events --compiled
    """
    from shardsim.answers.training import training_of
    from shardsim.cost.mfus import utilisations
    from shardsim.cost.predict import predict as run
    from shardsim.errors import PlanError
    from shardsim.planner.changes import changed
    from shardsim.views import slices as views
    from shardsim.views.prediction import prediction_parts
    from shardsim.views.table import table

    if op_costs:
        plan = changed(plan, {"op_costs": op_costs})
    trained = training_of(**training, sequence=plan.sequence, chips=[plan.machine.chip.name])
    if implementation and (compiled or fidelity == "compiled"):
        raise PlanError("--as is for plans; what the TPU compiler schedules is what it is")
    if fidelity == "events" or (fidelity == "compiled" and asked(what_ifs)):
        from shardsim.cli.simulation import simulated

        compiled = compiled or fidelity == "compiled"
        item = simulated(plan, what_ifs, compiled, implementation)
    elif asked(what_ifs):
        raise PlanError("slow and broken chips and links, jitter, twists need --fidelity events")
    elif compiled and fidelity == "analytic":
        raise PlanError("--compiled is for --fidelity events; or use --fidelity compiled")
    elif fidelity == "compiled":
        from shardsim.cli.compiling import compiler
        from shardsim.xla.tpu.compiled import predict_compiled

        with compiler() as service:
            item = predict_compiled(plan, service)
    else:
        item = run(plan, implementation=implementation)
    data, parts = item.to_data(), prediction_parts(item)
    if trained:
        data["training"] = trained.to_data(item)
    if counted:
        rows = utilisations(item)
        data["mfus"] = [row.to_data() for row in rows]
        parts += ["", views.mfus(rows)]
    if trained:
        parts += ["", table(views.training_columns(trained), [item]), views.trained(trained)]
    answer(as_json, data, *parts)
    if not item.fits:
        sys.exit(1)
