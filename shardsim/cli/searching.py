"""`shardsim plan`: the best plans of a model on one slice or on several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import lcm
from typing import Any

import click

from shardsim.cli.amounts import whole
from shardsim.cli.catalog import read_model
from shardsim.cli.compiling import compiler_options, tell_unused
from shardsim.cli.output import (
    INTERRUPTED,
    STDOUT,
    YAML,
    check_output,
    command_errors,
    emit_json,
    json_option,
    note,
    progress_line,
    show,
    write_output,
)
from shardsim.cli.planning import OP_COSTS, training_options

USUAL_TOKENS = 1 << 22  # of a step, as Llama 3 had at first (arXiv 2407.21783, section 3.4.1)


@click.command()
@click.argument("model")
@click.option(
    "--on",
    "slices",
    required=True,
    metavar="SLICE",
    help="v4:8x8x16, 2*v5p:8x8x8, v5e-256; several with commas; v5p:* for all its usual sizes.",
)
@click.option(
    "--batch",
    type=whole,
    help="Sequences (images) per step, all chips: 4096, 64k; if left out, of all devices the "
    "first multiple by a power of two that has four million tokens.",
)
@click.option("--seq", type=whole, help="Tokens per sequence; the model's own if left out.")
@click.option("--top", default=10, show_default=True, type=whole, help="How many plans to show.")
@click.option(
    "--objective",
    default="mfu",
    show_default=True,
    type=click.Choice(["mfu", "step-time", "cost", "chips"]),
    help="What is best, over several slices: cost is chip-seconds, or what --chip-hour-price "
    "makes of them; chips the fewest.",
)
@click.option(
    "--fix",
    multiple=True,
    metavar="KEY=VALUE",
    help="Hold a choice: mesh.model=4, remat=full, microbatches=2, ...; may be repeated.",
)
@click.option(
    "--why-not",
    "asked",
    multiple=True,
    metavar="ROLE=SIZE,...",
    help="Say what makes a mesh slower than the best: fsdp=32,model=8; may be repeated.",
)
@training_options[0]
@training_options[1]
@training_options[2]
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
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help="Write the best plan here; - is stdout."
)
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
    batch: int | None,
    seq: int | None,
    top: int,
    objective: str,
    fix: tuple[str, ...],
    asked: tuple[str, ...],
    tokens: float | None,
    images: float | None,
    prices: dict[str, float] | None,
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

    On several slices it also shows the best plan of each: those marked `front` no other slice beats
    in step time, cost and chips. Exit status 1 if no plan fits.

    \b
    Examples:
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 -o plan.yaml
      shardsim plan vit-22b --on v4:8x8x16 --batch 64k --fix mesh.model=4 --why-not fsdp=128,model=8
      shardsim plan llama3-8b --on v5p:*,v6e:* --batch 1024 --chip-hour-price v5p=4.2,v6e=2.7
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 --compile-top 3
    """
    from shardsim.answers.illegal import Question
    from shardsim.answers.slices import choices, slices_named
    from shardsim.answers.training import training_of
    from shardsim.answers.why_not import none_found, why_not
    from shardsim.emit.specs import no_program
    from shardsim.errors import PlanError
    from shardsim.executors import executor_of
    from shardsim.machine import explain
    from shardsim.plan.io import LARGEST, dump_plan
    from shardsim.planner.attention import default_attention
    from shardsim.planner.changes import parse_assignment
    from shardsim.planner.presets import parse_mesh
    from shardsim.planner.search import search

    for key, value in (("--batch", batch), ("--seq", seq), ("--top", top)):
        if value is not None and not 1 <= value <= LARGEST:
            raise PlanError(f"{key}: must be a whole number from 1 to {LARGEST:,}, not {value}")
    check_output(output, as_json, text=YAML)
    for text in asked:
        parse_mesh(text, "--why-not")
    wanted = read_model(model)
    machines = slices_named(slices)
    for text in slices.split(","):
        if not text.strip().endswith("*") and (told := explain(text)):
            note(told)
    if not compile_top:
        tell_unused("nothing is compiled without --compile-top", "timeout", "no_cache")
        if len(machines) == 1:
            tell_unused("one slice is searched in this process", "workers", "scheduler")
    usual = ""
    if batch is None:
        batch = _usual_batch(seq or wanted.sequence, [one.devices for one in machines])
        tokens_each_step = batch * (seq or wanted.sequence)
        usual = (
            f"batch {batch:,}: {tokens_each_step:,} tokens, as --batch is not given: of all "
            "devices the first multiple by a power of two with four million or more"
        )
    held: dict[str, Any] = {}
    for key, value in map(parse_assignment, fix):
        if key in held:
            raise PlanError(f"--fix: {key} appears twice; hold it once")
        held[key] = value
    if attention is not None and "attention" in held:
        raise PlanError("--attention and --fix attention: give one")
    training = training_of(
        tokens, images, seq or wanted.sequence, prices, [one.chip.name for one in machines]
    )
    options: dict[str, Any] = {
        **{"sequence": seq, "optimizer": optimizer, "attention": attention, "costs": op_costs},
        **{"max_axes": max_axes, "by_layer": by_layer, "fix": held},
    }
    with executor_of(workers, scheduler) if len(machines) > 1 else nullcontext() as executor:
        result = search(
            wanted,
            machines,
            batch,
            top=max(top, compile_top),
            objective=objective,
            prices=prices,
            progress=progress_line("searching"),
            executor=executor,
            **options,
        )

    if usual:  # said of a search alone, not before what is wrong with one
        note(usual)

    def again(machine: Any, batch: int = batch, **other: Any) -> Any:
        return search(wanted, machine, batch, **{**options, **other})

    outcomes, tried = None, min(compile_top, len(result.predictions))
    if compile_top and result.predictions:
        from shardsim.cli.compiling import compiler
        from shardsim.xla.tpu.compiled import compile_top as compile_best

        with compiler(workers, timeout, scheduler, no_cache) as service:
            outcomes = compile_best(result.predictions[:compile_top], service)
        found = tuple(item.compiled for item in outcomes if item.compiled)
        result = replace(result, predictions=found)
    best_of = choices(result.slices, training)
    because = []
    if asked and result.complete:
        best = result.best if result.predictions else None
        machine = best.plan.machine if best else machines[0]
        ask = partial(why_not, model=wanted, machine=machine, batch=batch, sequence=seq, fix=held)
        because = [ask(text, best=best, again=again) for text in asked]
    if as_json:
        data = result.to_data()
        if training:
            for row, item in zip(data["plans"], result.predictions, strict=True):
                row["training"] = training.to_data(item)
        data["slices"] = [one.to_data(training) for one in best_of]
        data["why_not"] = [one.to_data() for one in because]
        if outcomes:
            data["compiled"] = [item.to_data() for item in outcomes]
        emit_json(data)
    else:
        _show(result, outcomes, best_of, training, wanted.name, batch, output == STDOUT)
    for one in because:
        note(one.says)
    if outcomes:
        note(f"compiled {len(result.predictions)} of the {compile_top} best")
    note(
        f"{result.searched:,} plans considered, {result.fit:,} fit, {result.pruned:,} of those "
        f"pruned and {result.priced:,} priced, in {result.seconds:.2f} s"
        + ("" if result.complete else "; interrupted, so these are the best so far")
    )
    if result.predictions and (text := no_program(result.best.plan)):
        note(f"the best plan has no exported program: {text}")
    if objective == "cost" and not prices and len({one.chip.name for one in machines}) > 1:
        note("cost counts chip-seconds of all chips alike; --chip-hour-price says what they cost")
    if output and result.predictions:
        best_plan = result.best.plan
        if not result.complete:
            best_plan = replace(best_plan, note="Best so far of a search that was interrupted.")
        write_output(output, dump_plan(best_plan), "best plan")
    if not result.complete or (outcomes is not None and len(outcomes) < tried):
        sys.exit(INTERRUPTED)
    if not result.predictions:
        if outcomes is not None:
            note("none of the plans compiled; try more of them, or see the reasons above")
        else:
            of = max(result.slices, key=lambda one: one.machine.devices)
            question = Question(
                model=wanted,
                machine=of.machine,
                batch=batch,
                sequence=seq or wanted.sequence,
                attention=attention or default_attention(wanted, seq or wanted.sequence),
                max_axes=max_axes,
            )
            several = f"none on these slices; on {of.machine.name}: " if len(machines) > 1 else ""
            note(several + none_found(of, question, held, again))
        sys.exit(1)


def _usual_batch(sequence: int, devices: Sequence[int]) -> int:
    """Return the first multiple of all numbers of devices, by a power of two as microbatches have
    to divide it, that has USUAL_TOKENS in a step.

    >>> _usual_batch(4096, [64]), _usual_batch(8192, [1024, 512]), _usual_batch(197, [4])
    (1024, 1024, 32768)
    """
    each = lcm(*devices)
    least = -(-USUAL_TOKENS // (sequence * each))
    return each << (least - 1).bit_length()


def _show(
    result: Any,
    outcomes: Any,
    best_of: Any,
    training: Any,
    model: str,
    batch: int,
    err: bool,
) -> None:
    """Print the plans of a search, and what is known of several slices."""
    from shardsim.views import plans as views
    from shardsim.views import slices as of_slices

    if outcomes:
        show(views.ranked(outcomes), err=err)
    elif result.predictions:
        names = ", ".join(one.machine.name for one in best_of[:NAMED])
        names += f" and {len(best_of) - NAMED} more" if len(best_of) > NAMED else ""
        compiled = result.best.costs == "compiler"
        told = ", as the TPU compiler schedules plans" if compiled else ""
        more = of_slices.training_columns(training) if training else []
        found = views.found(result.predictions, slices=len(best_of) > 1, more=more)
        why = [f"\n{text}" for text in views.beyond(result.predictions)]
        head = f"{model} on {names}, batch {batch:,}{told}; MFU as PaLM counts it"
        show(head, "", found, *why, err=err)
    if len(best_of) > 1:
        each = of_slices.best_of_each(best_of, training)
        show("", "the best of each slice:", "", each, err=err)
    if training and result.predictions:
        show("", of_slices.trained(training), err=err)


NAMED = 6  # slices in the first line
