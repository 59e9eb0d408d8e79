"""`shardsim report`: one self-contained page about plans."""

from __future__ import annotations

from typing import Any

import click

from shardsim.cli.options import training_options
from shardsim.cli.output import (
    STDOUT,
    FilePath,
    check_output,
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
    type=FilePath(),
    help="report.html: one page; - the same on stdout; report.md: Markdown, with pictures in "
    "report_files.",
)
@training_options
@json_option
def report(paths: tuple[str, ...], output: str, training: dict[str, Any], as_json: bool) -> None:
    """Write what is known about plans as one self-contained page.

    \b
    Examples:
      shardsim report plan.yaml -o report.html --tokens 1e12
      shardsim report a.yaml b.yaml -o report.html --images 4e9
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
        tokens=training["tokens"],
        images=training["images"],
        chip_hour_price=training["prices"],
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
