"""`shardsim report`: one self-contained page about plans."""

from __future__ import annotations

from collections.abc import Mapping

import click

from shardsim.cli.amounts import amount, prices
from shardsim.cli.output import (
    STDOUT,
    check_output,
    command_errors,
    emit_json,
    json_option,
    note,
    progress_line,
    write_output,
)


@click.command()
@click.argument("paths", metavar="PLAN.yaml...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="report.html: one page; - the same on stdout; report.md: Markdown, with pictures in "
    "report_files.",
)
@click.option("--tokens", type=amount, help="Tokens to train on, such as 1e12: days, chip-hours.")
@click.option("--images", type=amount, help="The same in images (sequences).")
@click.option(
    "--chip-hour-price",
    type=prices,
    metavar="PRICES",
    help="What a chip costs for an hour, in any currency: 4.2, or v5p=4.2,v5e=1.2; what training "
    "costs, on more and fewer.",
)
@json_option
@command_errors
def report(
    paths: tuple[str, ...],
    output: str,
    tokens: float | None,
    images: float | None,
    chip_hour_price: Mapping[str, float] | None,
    as_json: bool,
) -> None:
    """Write what is known about one or several plans as one self-contained page.

    \b
    Examples:
      shardsim report plan.yaml -o report.html --tokens 1e12
      shardsim report plan.yaml vit-22b-published-tp8 -o report.html --images 4e9
    """
    from shardsim.report import require

    require()
    from shardsim.report.page import to_html
    from shardsim.report.study import headline
    from shardsim.report.write import check_target, report_document, save_report

    check_output(output, as_json)
    if output != STDOUT:
        check_target(output)
    document, studies = report_document(
        list(paths),
        tokens=tokens,
        images=images,
        chip_hour_price=chip_hour_price,
        progress=progress_line("report"),
    )
    if output == STDOUT:
        write_output(output, to_html(document))
    else:
        save_report(document, output)
    if as_json:
        emit_json({"path": output, "plans": [headline(study) for study in studies]})
    else:
        for study in studies:
            item = study.prediction
            fits = "fits" if item.fits else "does not fit"
            click.echo(
                f"{study.plan.name}: MFU {100 * item.mfu:.1f} %, step {item.step_time_s:.4g} s, "
                f"{fits}",
                err=output == STDOUT,
            )
    if output != STDOUT:
        note(f"report written to {output}")
