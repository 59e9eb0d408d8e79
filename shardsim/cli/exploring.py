"""`shardsim ablate`, `sweep` and `sensitivity`: a plan with one thing changed."""

from __future__ import annotations

from typing import Any

import click

from shardsim.cli.output import command_errors, emit_json, json_option, note, table
from shardsim.cli.planning import as_option, load, set_option


@click.command()
@click.argument("path", metavar="PLAN.yaml")
@set_option
@as_option
@json_option
@command_errors
def ablate(path: str, changes: tuple[str, ...], implementation: str | None, as_json: bool) -> None:
    """Switch each technique off alone and show what it is worth.

    \b
    Example:
      shardsim ablate palm-540b-published-two-pods
    """
    from shardsim.cost.predict import predict as run
    from shardsim.planner.whatif import ablate as run_ablations

    base = run(load(path, changes), implementation=implementation)
    results = run_ablations(base.plan, implementation)
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
@as_option
@json_option
@command_errors
def sweep(
    path: str,
    vary: tuple[str, ...],
    csv_path: str | None,
    changes: tuple[str, ...],
    implementation: str | None,
    as_json: bool,
) -> None:
    """Predict a plan for every combination of some keys' values.

    \b
    Examples:
      shardsim sweep vit-22b-published-tp8 --vary batch=16384,32768,65536
      shardsim sweep plan.yaml --vary mesh.model=1,2,4,8 --vary remat=full,dots --csv out.csv
    """
    import csv
    import io

    from shardsim.errors import PlanError
    from shardsim.files import check_writable, write_text
    from shardsim.planner.changes import parse_vary
    from shardsim.planner.whatif import sweep as run

    if csv_path:
        check_writable(csv_path)
    keys = [parse_vary(text) for text in vary]
    names = [key for key, _ in keys]
    rows: list[dict[str, Any]] = []
    for values, item, why in run(load(path, changes), keys, implementation):
        row: dict[str, Any] = {"values": values, "why_not": why or None, "prediction": None}
        if item is not None:
            row["prediction"] = item.to_data()
        rows.append(row)
    if all(row["prediction"] is None for row in rows):
        raise PlanError(f"no combination makes a plan: {rows[0]['why_not']}")
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
@as_option
@json_option
@command_errors
def sensitivity(
    path: str, changes: tuple[str, ...], implementation: str | None, as_json: bool
) -> None:
    """Show which figure of the chip limits a plan: elasticities of the step time.

    \b
    Example:
      shardsim sensitivity vit-22b-published-tp8
    """
    from shardsim.cost.predict import predict as run
    from shardsim.planner.whatif import sensitivity as elasticities

    base = run(load(path, changes), implementation=implementation)
    results = elasticities(base.plan, implementation)
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
