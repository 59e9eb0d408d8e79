"""`shardsim plan` and `shardsim predict`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import click

from shardsim.cli.catalog import read_model
from shardsim.cli.chosen import chosen_plan, set_option, words_options
from shardsim.cli.compiling import compiler_options
from shardsim.cli.output import (
    command_errors,
    emit_json,
    json_option,
    note,
    progress_line,
    show,
)
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


@click.command()
@click.argument("model")
@click.option(
    "--on",
    "slices",
    required=True,
    metavar="SLICE",
    help="v4:8x8x16, 2*v5p:8x8x8, v5e-256; several with commas.",
)
@click.option("--batch", required=True, type=int, help="Sequences (images) per step, all chips.")
@click.option("--seq", type=int, help="Tokens per sequence; the model's own if left out.")
@click.option("--top", default=10, show_default=True, help="How many plans to show.")
@click.option(
    "--objective",
    default="mfu",
    show_default=True,
    type=click.Choice(["mfu", "step-time", "cost", "chips"]),
    help="What is best, over several slices: cost is chip-seconds, chips the fewest.",
)
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adafactor, ...")
@click.option("--attention", help="flash or unfused; chosen by sequence length if left out.")
@click.option(
    "--max-axes",
    type=click.IntRange(1, 6),
    default=3,
    show_default=True,
    help="Most mesh axes at once inside a slice.",
)
@click.option(
    "--op-costs",
    default="calibrated",
    show_default=True,
    type=click.Choice(OP_COSTS),
    help="What operations take: calibrated to published runs, as the TPU compiler estimates, or "
    "from the chips' figures alone.",
)
@click.option(
    "--by-layer",
    is_flag=True,
    help="Give free HBM to layers that keep more; today's compiler may crash on such a step.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the best plan here.")
@click.option(
    "--compile-top",
    default=0,
    metavar="K",
    type=click.IntRange(0),
    help="Compile the K best plans for the TPU, rank them anew, and drop those that do not fit.",
)
@compiler_options
@json_option
@command_errors
def plan(
    model: str,
    slices: str,
    batch: int,
    seq: int | None,
    top: int,
    objective: str,
    optimizer: str,
    attention: str | None,
    max_axes: int,
    op_costs: str,
    by_layer: bool,
    output: str | None,
    compile_top: int,
    workers: int,
    timeout: float,
    scheduler: str | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Search the best sharding plans for MODEL (a preset or a YAML file) on a slice.

    \b
    Example:
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 -o plan.yaml
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 --compile-top 3
    """
    from shardsim.errors import PlanError
    from shardsim.executors import executor_of
    from shardsim.files import check_writable
    from shardsim.machine import explain, parse_machine
    from shardsim.plan import save_plan
    from shardsim.plan.io import LARGEST
    from shardsim.planner.search import search
    from shardsim.units import show_bytes
    from shardsim.views import plans as views

    for key, value in (("--batch", batch), ("--seq", seq), ("--top", top)):
        if value is not None and not 1 <= value <= LARGEST:
            raise PlanError(f"{key}: must be a whole number from 1 to {LARGEST:,}, not {value}")
    if output:
        check_writable(output)
    wanted = read_model(model)
    machines = [parse_machine(text) for text in slices.split(",") if text.strip()]
    for text in slices.split(","):
        if told := explain(text):
            note(told)
    with executor_of(workers, scheduler) if len(machines) > 1 else nullcontext() as executor:
        result = search(
            wanted,
            machines,
            batch,
            sequence=seq,
            top=max(top, compile_top),
            objective=objective,
            optimizer=optimizer,
            attention=attention,
            max_axes=max_axes,
            costs=op_costs,
            by_layer=by_layer,
            progress=progress_line("searching"),
            executor=executor,
        )
    outcomes = None
    if compile_top and result.predictions:
        from shardsim.cli.compiling import compiler
        from shardsim.xla.tpu.compiled import compile_top as compile_best

        with compiler(workers, timeout, scheduler, no_cache) as service:
            outcomes = compile_best(result.predictions[:compile_top], service)
        found = tuple(item.compiled for item in outcomes if item.compiled)
        result = replace(result, predictions=found)
    if result.predictions and output:
        save_plan(result.best.plan, output)
    if as_json:
        extra = {"compiled": [item.to_data() for item in outcomes]} if outcomes else {}
        emit_json(result.to_data() | extra)
    elif outcomes:
        show(views.ranked(outcomes))
        note(f"compiled {len(result.predictions)} of the {compile_top} best")
    elif result.predictions:
        names = ", ".join(machine.name for machine in machines)
        costs = result.best.costs
        told = ", as the TPU compiler schedules plans" if costs == "compiler" else ""
        show(
            f"{wanted.name} on {names}, batch {batch:,}{told}", "", views.found(result.predictions)
        )
    note(
        f"{result.searched:,} plans considered, {result.fit:,} fit, {result.pruned:,} of those "
        f"pruned and {result.priced:,} priced, in {result.seconds:.2f} s"
        + ("" if result.complete else "; interrupted, so these are the best so far")
    )
    if output and result.predictions:
        note(f"best plan written to {output}")
    if not result.predictions:
        if outcomes is not None:
            note("none of the plans compiled; try more of them, or see the reasons above")
        elif result.searched == 0:
            note(
                "no legal plan: batch, heads, widths or layers do not divide by any mesh of the "
                "slice; try a batch that is a multiple of a power of two"
            )
        else:
            device = show_bytes(machines[0].chip.hbm_usable_bytes_per_device)
            note(
                f"no plan fits in HBM: the leanest needs "
                f"{show_bytes(result.smallest_peak_bytes)} of {device} on a device; try more "
                "chips or a smaller batch"
            )
        sys.exit(1)


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
      shardsim predict plan.yaml --fidelity events --straggler 3,0,5=1.1
      shardsim predict plan.yaml --fidelity events --compiled
    """
    from shardsim.cli.show import prediction_parts
    from shardsim.cost.predict import predict as run
    from shardsim.errors import PlanError

    if op_costs:
        changes = (*changes, f"op_costs={op_costs}")
    chosen = chosen_plan(path, words, changes)
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
    if as_json:
        emit_json(item.to_data())
    else:
        show(*prediction_parts(item))
    if not item.fits:
        sys.exit(1)
