"""`shardsim plan`, `predict`, `ablate`, `sweep` and `sensitivity`."""

from __future__ import annotations

import sys
from typing import Any

import click

from shardsim.cli.catalog import read_model
from shardsim.cli.output import (
    command_errors,
    emit_json,
    json_option,
    note,
    progress_line,
    table,
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
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the best plan here.")
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
    output: str | None,
    as_json: bool,
) -> None:
    """Search the best sharding plans for MODEL (a preset or a YAML file) on a slice.

    \b
    Example:
      shardsim plan vit-22b --on v4:8x8x16 --batch 65536 -o plan.yaml
    """
    from shardsim.cli.show import plans_text
    from shardsim.errors import PlanError
    from shardsim.machine import explain, parse_machine
    from shardsim.plan import save_plan
    from shardsim.search.search import search
    from shardsim.units import show_bytes

    for key, value in (("--batch", batch), ("--seq", seq), ("--top", top)):
        if value is not None and value < 1:
            raise PlanError(f"{key}: must be a positive whole number, not {value}")
    wanted = read_model(model)
    machines = [parse_machine(text) for text in slices.split(",") if text.strip()]
    for text in slices.split(","):
        if told := explain(text):
            note(told)
    result = search(
        wanted,
        machines,
        batch,
        sequence=seq,
        top=top,
        objective=objective,
        optimizer=optimizer,
        attention=attention,
        max_axes=max_axes,
        progress=progress_line("searching"),
    )
    if result.predictions and output:
        save_plan(result.best.plan, output)
    if as_json:
        emit_json(result.to_data())
    elif result.predictions:
        names = ", ".join(machine.name for machine in machines)
        click.echo(f"{wanted.name} on {names}, batch {batch:,}\n")
        click.echo(plans_text(result.predictions))
    note(
        f"{result.searched:,} plans considered, {result.priced:,} priced, {result.fit:,} of those "
        f"fit, in {result.seconds:.2f} s"
        + ("" if result.complete else "; interrupted, so these are the best so far")
    )
    if output and result.predictions:
        note(f"best plan written to {output}")
    if not result.predictions:
        if result.searched == 0:
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


def _load(path: str, changes: tuple[str, ...] = ()) -> Any:
    from shardsim.plan import load_plan
    from shardsim.search.whatif import changed, parse_assignment

    loaded = load_plan(path)
    if not changes:
        return loaded
    return changed(loaded, dict(parse_assignment(text) for text in changes))


set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the plan, model.* or chip.*; may be repeated.",
)


@click.command()
@click.argument("path", metavar="PLAN.yaml")
@set_option
@click.option(
    "--fidelity",
    default="analytic",
    show_default=True,
    type=click.Choice(["analytic"]),
    help="How the step is priced.",
)
@json_option
@command_errors
def predict(path: str, changes: tuple[str, ...], fidelity: str, as_json: bool) -> None:
    """Predict MFU, step time and HBM of one plan: a file, or the name of a shipped one.

    Exit status 1 if the plan does not fit in HBM.

    \b
    Examples:
      shardsim predict vit-22b-published-tp8
      shardsim predict plan.yaml --set microbatches=4 --set chip.link_bytes_per_s=90e9
    """
    from shardsim.cli.show import prediction_text
    from shardsim.cost.predict import predict as run

    item = run(_load(path, changes))
    if as_json:
        emit_json(item.to_data())
    else:
        click.echo(prediction_text(item))
    if not item.fits:
        sys.exit(1)


@click.command()
@click.argument("path", metavar="PLAN.yaml")
@set_option
@json_option
@command_errors
def ablate(path: str, changes: tuple[str, ...], as_json: bool) -> None:
    """Switch each technique off alone and show what it is worth.

    \b
    Example:
      shardsim ablate palm-540b-published-two-pods
    """
    from shardsim.cost.predict import predict as run
    from shardsim.search.whatif import ablate as run_ablations

    base = run(_load(path, changes))
    results = run_ablations(base.plan)
    if as_json:
        emit_json(
            {
                "base": base.to_data(),
                "ablations": [
                    {
                        "technique": item.technique,
                        "change": item.change,
                        "published": item.published or None,
                        "why_not": item.why or None,
                        "step_time_ratio": None
                        if item.prediction is None
                        else item.prediction.step_time_s / base.step_time_s,
                        "prediction": None
                        if item.prediction is None
                        else item.prediction.to_data(),
                    }
                    for item in results
                ],
            }
        )
        return
    rows: list[list[str]] = [
        ["(the plan)", "", f"{100 * base.mfu:.1f}", f"{base.step_time_s:.4g}", "", _fit(base), ""]
    ]
    for item in results:
        if item.prediction is None:
            rows.append([item.technique, item.why, "-", "-", "-", "", item.published])
            continue
        ratio = item.prediction.step_time_s / base.step_time_s - 1
        rows.append(
            [
                item.technique,
                item.change,
                f"{100 * item.prediction.mfu:.1f}",
                f"{item.prediction.step_time_s:.4g}",
                f"{100 * ratio:+.1f}",
                _fit(item.prediction),
                item.published,
            ]
        )
    headers = ["without", "so", "MFU %", "step s", "step +%", "HBM", "published effect"]
    click.echo(table(headers, rows))


def _fit(item: Any) -> str:
    need = f"{item.hbm['peak_bytes'] / 2**30:.1f} GiB"
    return need if item.fits else f"{need}, too much"


@click.command()
@click.argument("path", metavar="PLAN.yaml")
@click.option(
    "--vary",
    multiple=True,
    required=True,
    metavar="KEY=A,B,C",
    help="A key and its values; with several keys, all combinations.",
)
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write the table here.")
@set_option
@json_option
@command_errors
def sweep(
    path: str, vary: tuple[str, ...], csv_path: str | None, changes: tuple[str, ...], as_json: bool
) -> None:
    """Predict a plan for every combination of some keys' values.

    \b
    Examples:
      shardsim sweep vit-22b-published-tp8 --vary batch=16384,32768,65536
      shardsim sweep plan.yaml --vary mesh.model=1,2,4,8 --vary remat=full,dots --csv out.csv
    """
    import csv
    import io

    from shardsim.files import write_text
    from shardsim.search.whatif import parse_vary
    from shardsim.search.whatif import sweep as run

    keys = [parse_vary(text) for text in vary]
    names = [key for key, _ in keys]
    rows: list[dict[str, Any]] = []
    for values, item, why in run(_load(path, changes), keys):
        row: dict[str, Any] = {"values": values, "why_not": why or None, "prediction": None}
        if item is not None:
            row["prediction"] = item.to_data()
        rows.append(row)
    headers = [
        *names,
        "mfu",
        "hfu",
        "step_time_s",
        "tokens_per_s_per_chip",
        "peak_gib",
        "fits",
        "note",
    ]
    lines = []
    for row in rows:
        found = row["prediction"]
        line: list[Any] = [row["values"][name] for name in names]
        if found is None:
            line += ["", "", "", "", "", "", row["why_not"]]
        else:
            line += [
                f"{found['mfu']:.4f}",
                f"{found['hfu']:.4f}",
                f"{found['step_time_s']:.5g}",
                f"{found['tokens_per_s_per_chip']:.5g}",
                f"{found['hbm']['peak_bytes'] / 2**30:.2f}",
                "yes" if found["fits"] else "no",
                "",
            ]
        lines.append(line)
    if csv_path:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([headers, *lines])
        write_text(csv_path, text.getvalue())
        note(f"{len(lines)} rows written to {csv_path}")
    if as_json:
        emit_json({"rows": rows})
    else:
        click.echo(table(headers, lines))


@click.command()
@click.argument("path", metavar="PLAN.yaml")
@set_option
@json_option
@command_errors
def sensitivity(path: str, changes: tuple[str, ...], as_json: bool) -> None:
    """Show which figure of the chip limits a plan: elasticities of the step time.

    \b
    Example:
      shardsim sensitivity vit-22b-published-tp8
    """
    from shardsim.cost.predict import predict as run
    from shardsim.search.whatif import sensitivity as elasticities

    base = run(_load(path, changes))
    results = elasticities(base.plan)
    if as_json:
        emit_json(
            {
                "base": base.to_data(),
                "sensitivities": [
                    {
                        "figure": item.figure,
                        "elasticity": item.elasticity,
                        "step_time_s_at_110_percent": item.step_time_s_at_110,
                        "mfu_at_110_percent": item.mfu_at_110,
                    }
                    for item in results
                ],
            }
        )
        return
    rows = [
        [
            item.figure,
            f"{item.elasticity:+.3f}",
            f"{item.step_time_s_at_110:.4g}",
            f"{100 * (item.step_time_s_at_110 / base.step_time_s - 1):+.2f}",
        ]
        for item in results
    ]
    click.echo(f"step {base.step_time_s:.4g} s, MFU {100 * base.mfu:.1f} %\n")
    headers = ["figure of the chip", "elasticity", "step s with 10 % more", "change %"]
    click.echo(table(headers, rows))
