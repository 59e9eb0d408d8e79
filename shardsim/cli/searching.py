"""`shardsim plan`: the best plans of a model on one slice or on several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.amounts import check_wholes, whole
from shardsim.cli.catalog import read_model
from shardsim.cli.compiling import tell_unused
from shardsim.cli.options import OP_COSTS, compiler_options, training_options
from shardsim.cli.output import (
    INTERRUPTED,
    STDOUT,
    YAML,
    FilePath,
    check_output,
    emit_json,
    json_option,
    note,
    progress_line,
    show,
    write_output,
)
from shardsim.errors import PlanError

if TYPE_CHECKING:
    from shardsim.answers.slices import Choice
    from shardsim.answers.training import Training
    from shardsim.answers.why_not import WhyNot
    from shardsim.machine import Machine
    from shardsim.model import Model
    from shardsim.planner.found import SearchResult
    from shardsim.views.table import Table
    from shardsim.xla.tpu.compiled import Ranked

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
    metavar="N",
    type=whole,
    help="Sequences (images) per step over all chips: 4096, 64k; by default as many as make four "
    "million tokens, a power of two for each device.",
)
@click.option(
    "--seq", metavar="N", type=whole, help="Tokens per sequence; by default the model's own."
)
@click.option(
    "--top", metavar="N", default=10, show_default=True, type=whole, help="Plans to show."
)
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
@training_options
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
    "-o", "--output", type=FilePath(dir_okay=False), help="Write the best plan here; - is stdout."
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
def plan(
    model: str,
    slices: str,
    batch: int | None,
    seq: int | None,
    top: int,
    objective: str,
    fix: tuple[str, ...],
    asked: tuple[str, ...],
    training: dict[str, Any],
    optimizer: str,
    attention: str | None,
    max_axes: int,
    op_costs: str,
    by_layer: bool,
    output: str | None,
    compile_top: int,
    service: dict[str, Any],
    as_json: bool,
) -> None:
    """Search the best sharding plans of MODEL on a slice.

    MODEL is a preset, a YAML file or a config.json. On several slices it also shows the best plan
    of each: those marked `front` no other slice beats in step time, cost and chips. Exit status 1
    if no plan fits.

    \b
    Examples:
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 -o plan.yaml
      shardsim plan vit-22b --on v4-2048 --batch 64k --why-not fsdp=128,model=8
      shardsim plan llama3-8b --on v5p:*,v6e:* --batch 1024 --tokens 300B
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 --compile-top 3
    """
    from shardsim.answers.slices import choices, slices_named
    from shardsim.answers.training import training_of
    from shardsim.executors import executor_of
    from shardsim.planner.presets import parse_mesh

    check_wholes({"--batch": batch, "--seq": seq, "--top": top})
    check_output(output, as_json, text=YAML)
    for text in asked:
        parse_mesh(text, "--why-not")
    wanted = read_model(model)
    machines = slices_named(slices)
    _tell_slices(slices)
    _tell_unused(compile_top, len(machines))
    sequence = seq or wanted.sequence
    many, usual = _batch(batch, sequence, [one.devices for one in machines])
    held = _held(fix)
    if attention is not None and "attention" in held:
        raise PlanError("--attention and --fix attention: give one")
    chips = [one.chip.name for one in machines]
    trained = training_of(**training, sequence=sequence, chips=chips)
    again = partial(
        _search,
        wanted,
        batch=many,
        sequence=seq,
        max_axes=max_axes,
        by_layer=by_layer,
        fix=held,
        optimizer=optimizer,
        attention=attention,
        costs=op_costs,
    )
    workers, scheduler = service["workers"], service["scheduler"]
    with executor_of(workers, scheduler) if len(machines) > 1 else nullcontext() as executor:
        result = again(
            machines,
            top=max(top, compile_top),
            objective=objective,
            prices=training["prices"],
            progress=progress_line("searching"),
            executor=executor,
        )
    if usual:  # said of a search alone, not before what is wrong with one
        note(usual)
    outcomes, tried = None, min(compile_top, len(result.predictions))
    if tried:
        outcomes, result = _compiled(result, compile_top, service)
    best_of = choices(result.slices, trained)
    because = _because(asked, result, machines[0], again)
    if as_json:
        data = _data(result, outcomes, best_of, trained)
        emit_json({**data, "why_not": [one.to_data() for one in because]})
    else:
        parts = _parts(result, outcomes, best_of, trained, wanted.name, many)
        show(*parts, err=output == STDOUT)
    for one in because:
        note(one.says)
    if outcomes:
        note(f"compiled {len(result.predictions)} of the {compile_top} best")
    seen = {one.machine.name for one in result.slices}
    left = [one.name for one in machines if one.name not in seen]
    _tell_search(result, left, compared_by_cost=objective == "cost" and not training["prices"])
    if output and result.predictions:
        _write(result, output)
    if not result.complete or (outcomes is not None and len(outcomes) < tried):
        sys.exit(INTERRUPTED)
    if not result.predictions:
        _tell_none(result, outcomes is not None, again)
        sys.exit(1)


def _search(
    model: Model, machine: Machine | list[Machine], batch: int, **options: Any
) -> SearchResult:
    from shardsim.planner.search import search

    return search(model, machine, batch, **options)


def _tell_unused(compile_top: int, slices: int) -> None:
    """Say which options of the compiler a search has no use for."""
    if not compile_top:
        tell_unused("nothing is compiled without --compile-top", "timeout", "no_cache")
        if slices == 1:
            tell_unused("one slice is searched in this process", "workers", "scheduler")


def _batch(batch: int | None, sequence: int, devices: Sequence[int]) -> tuple[int, str]:
    """Return the sequences of a step, the usual ones where none are given, and what to say then."""
    if batch is not None:
        return batch, ""
    batch = _usual_batch(sequence, devices)
    return batch, (
        f"batch {batch:,}: {batch * sequence:,} tokens, as --batch is not given: of all devices "
        "the first multiple by a power of two with four million or more"
    )


def _because(
    asked: Sequence[str], result: SearchResult, machine: Machine, again: partial[SearchResult]
) -> list[WhyNot]:
    """Return why each mesh that was `asked` about is not the best; `machine` is the first one."""
    from shardsim.answers.why_not import why_not

    if not asked or not result.complete:
        return []
    best = result.best if result.predictions else None
    (model,), given = again.args, again.keywords
    machine = best.plan.machine if best else machine
    batch, sequence, fix = (given[key] for key in ("batch", "sequence", "fix"))
    return [why_not(text, model, machine, batch, sequence, best, again, fix) for text in asked]


def _compiled(
    result: SearchResult, top: int, service: dict[str, Any]
) -> tuple[Sequence[Ranked], SearchResult]:
    """Compile the best plans; return what came of each, and the search with those that compiled."""
    from shardsim.cli.compiling import compiler
    from shardsim.xla.tpu.compiled import compile_top

    with compiler(**service) as tpu:
        outcomes = compile_top(result.predictions[:top], tpu)
    found = tuple(item.compiled for item in outcomes if item.compiled)
    return outcomes, replace(result, predictions=found)


def _data(
    result: SearchResult,
    outcomes: Sequence[Ranked] | None,
    best_of: Sequence[Choice],
    trained: Training | None,
) -> dict[str, Any]:
    """Return what was found as plain data."""
    data = result.to_data()
    if trained:
        for row, item in zip(data["plans"], result.predictions, strict=True):
            row["training"] = trained.to_data(item)
    data["slices"] = [one.to_data(trained) for one in best_of]
    if outcomes:
        data["compiled"] = [item.to_data() for item in outcomes]
    return data


def _tell_slices(slices: str) -> None:
    """Say what names of slices stand for, where they do not say it themselves."""
    from shardsim.machine import explain

    for text in slices.split(","):
        if not text.strip().endswith("*") and (told := explain(text)):
            note(told)


def _held(fix: Sequence[str]) -> dict[str, Any]:
    """Return the choices that are held, by their keys."""
    from shardsim.planner.changes import parse_assignment

    held: dict[str, Any] = {}
    for key, value in map(parse_assignment, fix):
        if key in held:
            raise PlanError(f"--fix: {key} appears twice; hold it once")
        held[key] = value
    return held


def _usual_batch(sequence: int, devices: Sequence[int]) -> int:
    """Return the first multiple of all numbers of devices, by a power of two as microbatches have
    to divide it, that has USUAL_TOKENS in a step.

    >>> _usual_batch(4096, [64]), _usual_batch(8192, [1024, 512]), _usual_batch(197, [4])
    (1024, 1024, 32768)
    """
    each = lcm(*devices)
    least = -(-USUAL_TOKENS // (sequence * each))
    return each << (least - 1).bit_length()


def _parts(
    result: SearchResult,
    outcomes: Sequence[Ranked] | None,
    best_of: Sequence[Choice],
    training: Training | None,
    model: str,
    batch: int,
) -> list[Table | str]:
    """Return the plans of a search, and what is known of several slices."""
    from shardsim.views import plans as views
    from shardsim.views import slices as of_slices

    parts: list[Table | str] = []
    if outcomes:
        parts = [views.ranked(outcomes)]
    elif result.predictions:
        names = ", ".join(one.machine.name for one in best_of[:NAMED])
        names += f" and {len(best_of) - NAMED} more" if len(best_of) > NAMED else ""
        compiled = result.best.costs == "compiler"
        told = ", as the TPU compiler schedules plans" if compiled else ""
        more = of_slices.training_columns(training) if training else []
        found = views.found(result.predictions, slices=len(best_of) > 1, more=more)
        head = f"{model} on {names}, batch {batch:,}{told}; MFU as PaLM counts it"
        parts = [head, "", found]
        parts += [f"\n{text}" for text in views.beyond(result.predictions)]
    if len(best_of) > 1:
        each = of_slices.best_of_each(best_of, training)
        parts += ["", "the best of each slice:", "", each]
    if training and result.predictions:
        parts += ["", of_slices.trained(training)]
    return parts


NAMED = 6  # slices in the first line


def _tell_search(result: SearchResult, left: Sequence[str], compared_by_cost: bool) -> None:
    """Say how many plans were considered, what to know of the best, and what slices are `left`."""
    from shardsim.emit.specs import no_program

    cut = ""
    if not result.complete:
        found = "these are the best so far" if result.predictions else "nothing is found yet"
        cut = f"; interrupted, so {found}"
    if left and not result.complete:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        cut += f"; not looked at: {', '.join(left[:NAMED])}{more}"
    if text := _counted(result) + cut:
        note(text.removeprefix("; "))
    if result.predictions and (text := no_program(result.best.plan)):
        note(f"the best plan has no exported program: {text}")
    if compared_by_cost and len({one.machine.chip.name for one in result.slices}) > 1:
        note("cost counts chip-seconds of all chips alike; --chip-hour-price says what they cost")


def _counted(result: SearchResult) -> str:
    """Return how many plans were looked at; nothing where there is none, for which reasons follow.

    >>> from shardsim.planner.found import SearchResult
    >>> looked = {"predictions": (), "seconds": 2.0, "smallest_peak_bytes": 0.0}
    >>> _counted(SearchResult(searched=9000, fit=0, priced=0, **looked))
    '9,000 plans considered in 2.00 s: none fits in HBM'
    >>> _counted(SearchResult(searched=9000, fit=400, priced=30, **looked)).partition(": ")[2]
    '400 fit in HBM, 30 of those priced, and the other 370 cannot be among the best'
    """
    if not result.searched:
        return ""
    fit = "none fits in HBM"
    if result.fit:
        fit = f"{result.fit:,} fit in HBM, {result.priced:,} of those priced"
        if result.complete and result.pruned:
            fit += f", and the other {result.pruned:,} cannot be among the best"
    return f"{result.searched:,} plans considered in {result.seconds:.2f} s: {fit}"


def _write(result: SearchResult, output: str) -> None:
    from shardsim.plan.io import dump_plan

    best = result.best.plan
    if not result.complete:
        best = replace(best, note="Best so far of a search that was interrupted.")
    write_output(output, dump_plan(best), "best plan")


def _tell_none(result: SearchResult, compiled: bool, again: partial[SearchResult]) -> None:
    """Say why no plan was found on the largest slice, and what would change that."""
    from shardsim.answers.illegal import Question
    from shardsim.answers.why_not import none_found
    from shardsim.planner.attention import default_attention

    if compiled:
        note("none of the plans compiled; try more of them, or see the reasons above")
        return
    of = max(result.slices, key=lambda one: one.machine.devices)
    (model,), given = again.args, again.keywords
    sequence = given["sequence"] or model.sequence
    question = Question(
        model=model,
        machine=of.machine,
        batch=given["batch"],
        sequence=sequence,
        attention=given["attention"] or default_attention(model, sequence),
        max_axes=given["max_axes"],
    )
    several = len(result.slices) > 1
    start = f"none on these slices; on {of.machine.name}: " if several else ""
    note(start + none_found(of, question, given["fix"], again))
