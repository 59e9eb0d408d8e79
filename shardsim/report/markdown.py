"""A report's document as Markdown: GitHub's tables, pictures as files, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from matplotlib.figure import Figure

from shardsim.report.document import (
    Beside,
    Bullets,
    Code,
    Document,
    Drawing,
    Facts,
    Item,
    Text,
    folded,
)
from shardsim.views.write import markdown, safe

Show = Callable[[Drawing], str]  # what stands for a picture


def to_markdown(document: Document, show: Show = lambda drawing: "") -> str:
    """Return the document as one Markdown file; without `show`, pictures are left out."""
    parts = [f"# {safe(document.title)}", safe(document.subtitle)]
    for chapter in document.chapters:
        if chapter.title:
            parts.append(f"## {safe(chapter.title)}")
        for section in chapter.sections:
            parts.append(f"### {safe(section.title)}")
            parts += filter(None, (_item(item, show) for item in section.items))
    return "\n\n".join(parts) + "\n"


def with_pictures(document: Document, folder: str) -> tuple[str, dict[str, Figure]]:
    """Return the Markdown, and its pictures by the names that they have in `folder`."""
    figures: dict[str, Figure] = {}

    def show(drawing: Drawing) -> str:
        name = f"picture-{len(figures) + 1:02}.png"
        figures[name] = drawing.figure
        return f"![{safe(drawing.caption)}]({quote(folder)}/{name})"

    return to_markdown(document, show), figures


def _item(item: Item, show: Show) -> str:
    if isinstance(item, Text):
        return f"**{safe(item.text)}**" if item.warning else safe(item.text)
    if isinstance(item, Facts):
        return "\n".join(f"- {safe(what)}: **{safe(value)}**" for what, value in item.pairs)
    if isinstance(item, Bullets):
        return "\n".join(f"- {safe(line)}" for line in item.lines)
    if isinstance(item, Code):
        fence = "```"
        while fence in item.text:
            fence += "`"
        return f"{fence}\n{item.text.rstrip()}\n{fence}"
    if isinstance(item, Drawing):
        return show(item)
    if isinstance(item, Beside):
        return "\n\n".join(filter(None, (_item(one, show) for one in item.items)))
    if summary := folded(item):
        return f"<details><summary>{safe(summary)}</summary>\n\n{markdown(item)}\n\n</details>"
    return markdown(item)
