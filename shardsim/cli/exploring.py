"""`shardsim ablate`, `sweep` and `sensitivity`: a plan with one thing changed."""

from __future__ import annotations

import sys
from math import prod
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.options import as_option, plan_argument, scheduler_option
from shardsim.cli.output import (
    CSV,
    INTERRUPTED,
    STDOUT,
    FilePath,
    answer,
    check_output,
    json_option,
    note,
    progress_line,
    write_output,
)

if TYPE_CHECKING:
    from shardsim.plan import Plan


@click.command()
@plan_argument
@as_option
@json_option
def ablate(plan: Plan, implementation: str | None, as_json: bool) -> None:
    """Switch each technique off alone and show what it is worth.

    \b
    Example:
      shardsim ablate palm-540b-published-two-pods
    """
    from shardsim.cost.predict import predict as run
    from shardsim.planner.whatif import ablate as run_ablations
    from shardsim.views import what_ifs as views

    base = run(plan, implementation=implementation)
    results = run_ablations(base.plan, implementation)
    rows = [
        {
            "technique": item.technique,
            "change": item.change,
            "published": item.published or None,
            "why_not": item.why or None,
            "step_time_ratio": found and found.step_time_s / base.step_time_s,
            "prediction": found and found.to_data(),
        }
        for item in results
        for found in (item.prediction,)
    ]
    made = views.ablations(base, results, whole=True)
    hbm = ("hbm_peak_gib", "fits")
    shown = made.only("without", "so", "mfu", "step_time_s", "step_change", *hbm, "published")
    answer(as_json, {"base": base.to_data(), "ablations": rows}, shown)


@click.command()
@click.option(
    "--vary",
    multiple=True,
    required=True,
    metavar="KEY=A,B,C",
    help="A key and its values; with several keys, all combinations.",
)
@click.option(
    "--csv", "csv_path", type=FilePath(dir_okay=False), help="Write the table here; - is stdout."
)
@click.option(
    "--fidelity",
    default="analytic",
    show_default=True,
    type=click.Choice(["analytic", "events"]),
    help="Closed forms, or every plan's step played on the torus.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Processes that predict side by side.",
)
@scheduler_option
@plan_argument
@as_option
@json_option
def sweep(
    plan: Plan,
    vary: tuple[str, ...],
    csv_path: str | None,
    fidelity: str,
    workers: int,
    scheduler: str | None,
    implementation: str | None,
    as_json: bool,
) -> None:
    """Predict a plan for every combination of some keys' values.

    An interrupt ends it with what is done.

    \b
    Examples:
      shardsim sweep plan.yaml --vary microbatches=1,2,4 --fidelity events
      shardsim sweep vit-22b-published-tp8 --vary batch=16384,32768,65536
      shardsim sweep plan.yaml --vary mesh.model=1,2,4 --vary remat=full,dots
    """
    from dataclasses import replace

    from shardsim.cli.simulation import predictor
    from shardsim.errors import PlanError
    from shardsim.executors import executor_of
    from shardsim.planner.changes import parse_vary
    from shardsim.planner.whatif import sweep as run
    from shardsim.views import what_ifs as views
    from shardsim.views.write import csv_text

    check_output(csv_path, as_json, text=CSV)
    keys = [parse_vary(text) for text in vary]
    with executor_of(workers, scheduler) as executor:
        options: dict[str, Any] = {"executor": executor, "progress": progress_line("sweeping")}
        rows = [*run(plan, keys, implementation, run=predictor(fidelity), **options)]
    if (every := prod(len(values) for _, values in keys)) > len(rows):
        note(f"interrupted: {len(rows)} of {every} combinations")
    if rows and all(item is None for _, item, _ in rows):
        raise PlanError(f"no combination makes a plan: {rows[0][2]}")
    made = views.swept(rows)
    data = [
        {"values": values, "why_not": why or None, "prediction": item and item.to_data()}
        for values, item, why in rows
    ]
    if csv_path != STDOUT:
        answer(as_json, {"rows": data}, made)
    if csv_path:
        names = {"hbm_peak_gib": "peak_gib", "why_not": "note"}
        columns = (replace(one, key=names.get(one.key, one.key)) for one in made.columns)
        text = csv_text(replace(made, columns=tuple(columns)))
        write_output(csv_path, text, f"{len(rows)} rows")
    if every > len(rows):
        sys.exit(INTERRUPTED)


@click.command()
@plan_argument
@as_option
@json_option
def sensitivity(plan: Plan, implementation: str | None, as_json: bool) -> None:
    """Show which figures limit a plan: elasticities of the step.

    \b
    Example:
      shardsim sensitivity vit-22b-published-tp8
    """
    from shardsim.cost.predict import predict as run
    from shardsim.cost.sensitivity import sensitivity as elasticities
    from shardsim.planner.whatif import model_sensitivity
    from shardsim.views import what_ifs as views

    base = run(plan, implementation=implementation)
    results = elasticities(base.plan, implementation)
    results += model_sensitivity(base.plan, implementation)
    rows = [
        {
            "figure": item.figure,
            "elasticity": item.elasticity,
            "step_time_s_at_110_percent": item.step_time_s_at_110,
            "mfu_at_110_percent": item.mfu_at_110,
        }
        for item in results
    ]
    made = views.sensitivities(base, results)
    head = f"step {base.step_time_s:.4g} s, MFU {100 * base.mfu:.1f} %\n"
    shown = made.only("figure", "elasticity", "step_time_s_at_110_percent", "change")
    answer(as_json, {"base": base.to_data(), "sensitivities": rows}, head, shown)
