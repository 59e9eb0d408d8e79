"""Writing a report: from plans to one HTML page or one Markdown file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shardsim.errors import FileError, ShardsimError
from shardsim.files import write_bytes, write_text
from shardsim.plan import Plan, PlanOrPath, as_plan, plan_names
from shardsim.planner.compare import priced_alike
from shardsim.planner.prices import Prices
from shardsim.report import sections, sections_evidence, sections_step
from shardsim.report.document import Chapter, Document, Section
from shardsim.report.markdown import with_pictures
from shardsim.report.page import to_html
from shardsim.report.sections_cost import cost_section
from shardsim.report.study import Progress, Studies, Study, validated
from shardsim.report.style import to_png

STEPS = 1000  # of progress for one plan
HTML = (".html", ".htm")
MARKDOWN = (".md", ".markdown")


def check_target(path: str | os.PathLike[str]) -> str:
    """Return "html" or "markdown" by the ending of `path`, whose folder must exist."""
    target = Path(path)
    kind = {**dict.fromkeys(HTML, "html"), **dict.fromkeys(MARKDOWN, "markdown")}.get(
        target.suffix.lower()
    )
    if kind is None:
        raise FileError(f"{path}: a report ends with .html or .md")
    if os.path.isdir(target) or not os.path.isdir(target.parent):
        raise FileError(f"cannot write {path}: {target.parent} is not a folder")
    if not os.access(target.parent, os.W_OK):
        raise FileError(f"cannot write {path}: Permission denied")
    return kind


def write_report(
    plans: Sequence[PlanOrPath] | PlanOrPath,
    path: str | os.PathLike[str],
    *,
    tokens: float | None = None,
    images: float | None = None,
    chip_hour_price: float | Prices | None = None,
    progress: Progress | None = None,
) -> list[Study]:
    """Write what is known about `plans` to `path` (.html or .md), each file whole or not at all.

    `plans` are plans, plan files or names of shipped plans. With `tokens` (or `images`) to train
    on, days and chip-hours are given, with `chip_hour_price` (in any currency) what they cost
    (or a price by the chip's name).
    The pictures of report.md go into the folder report_files. `progress` is told (done, of how
    many). Returns the studies behind it.

        write_report(["vit-22b-published-tp8", "plan.yaml"], "report.html", images=4e9)
    """
    check_target(path)
    document, studies = report_document(
        plans, tokens=tokens, images=images, chip_hour_price=chip_hour_price, progress=progress
    )
    save_report(document, path)
    return studies


def save_report(document: Document, path: str | os.PathLike[str]) -> None:
    """Write a report to `path` (.html or .md), each file whole or not at all."""
    if check_target(path) == "html":
        write_text(path, to_html(document))
    else:
        _write_markdown(document, Path(path))


def _write_markdown(document: Document, path: Path) -> None:
    """Write pictures first, so that the text never names one that is not there."""
    folder = path.with_name(f"{path.stem}_files")
    text, figures = with_pictures(document, folder.name)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}") from None
    for name, figure in figures.items():
        write_bytes(folder / name, to_png(figure, dpi=130))
    write_text(path, text)


def report_document(
    plans: Sequence[PlanOrPath] | PlanOrPath,
    *,
    tokens: float | None = None,
    images: float | None = None,
    chip_hour_price: float | Prices | None = None,
    progress: Progress | None = None,
) -> tuple[Document, list[Study]]:
    """Return a report as a document, and the studies behind it."""
    given = [plans] if isinstance(plans, (Plan, str, os.PathLike)) else list(plans)
    if not given:
        raise ShardsimError("a report needs at least one plan")
    by_chip = chip_hour_price if isinstance(chip_hour_price, Mapping) else {"": chip_hour_price}
    wanted = [("tokens", tokens), ("images", images)]
    wanted += [("chip_hour_price", price) for price in by_chip.values()]
    for name, value in wanted:
        if value is not None and not 0 < value < float("inf"):
            raise ShardsimError(f"{name}: must be a positive number, not {value:g}")
    if tokens is not None and images is not None:
        raise ShardsimError("give tokens or images to train on, not both")
    plans, costs = priced_alike([as_plan(one) for one in given])
    paths = tuple(_path(one) for one in given)
    makes = Studies(tokens=tokens, images=images, chip_hour_price=chip_hour_price)
    validation = validated({plan.machine.chip.name for plan in plans})
    studies: list[Study] = []

    def tell(done: int, of: int) -> None:
        """Tell how far a search is as a part of all that is done for the plans and the page."""
        if progress is not None:
            progress(int(STEPS * (len(studies) + done / of)), STEPS * (len(plans) + 1))

    makes = replace(makes, progress=tell)
    for plan, path in zip(plans, paths, strict=True):
        tell(0, 1)
        studies.append(makes.of(plan, path, paths, validation))
    tell(0, 1)
    document = _document(studies, costs)
    tell(1, 1)
    return document, studies


def _path(plan: PlanOrPath) -> str:
    """Return what commands call a plan, quoted for a shell."""
    if not isinstance(plan, Plan):
        return shlex.quote(str(plan))
    return shlex.quote(plan.name if plan.name in plan_names() else "plan.yaml")


def _document(studies: list[Study], costs: str) -> Document:
    first = studies[0]
    several = len(studies) > 1
    chapters = []
    if several:
        side = sections_evidence.comparison_section(studies, costs)
        chapters.append(Chapter("All plans", [side]))
    for study in studies:
        chapters.append(Chapter(study.plan.name if several else "", _sections(study)))
    models = dict.fromkeys(study.plan.model.name for study in studies)
    title = (
        f"{len(studies)} sharding plans for {', '.join(models)}"
        if several
        else f"{first.plan.name}: {first.plan.model.name} on {first.plan.machine.name}"
    )
    return Document(
        title=title,
        subtitle="What shardsim predicts, before any chip is used. Figures are per device and per "
        "optimizer step unless stated otherwise.",
        chapters=chapters,
    )


def _sections(study: Study) -> list[Section]:
    return [
        sections.question(study),
        sections.answer(study),
        sections.the_plan(study),
        sections_step.time_section(study),
        sections_step.hbm_section(study),
        sections_step.collectives_section(study),
        sections_step.layer_section(study),
        sections_step.roofline_section(study),
        sections_evidence.sensitivity_section(study),
        sections_evidence.ablation_section(study),
        sections_evidence.runners_section(study),
        *([cost_section(study)] if study.chip_hour_price is not None else []),
        sections_evidence.trust_section(study),
        sections.reproduce(study),
    ]
