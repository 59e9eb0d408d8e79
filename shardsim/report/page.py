"""A report's document as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from html import escape

from shardsim.report.document import (
    Beside,
    Bullets,
    Code,
    Document,
    Drawing,
    Facts,
    Item,
    Section,
    Text,
    folded,
)
from shardsim.report.style import to_svg
from shardsim.views.colours import root_css
from shardsim.views.write import html

CSS = f"""
{root_css()}*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1.2rem 1rem 4rem;max-width:70rem;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
h1{{font-size:1.6rem;line-height:1.2;margin:.4rem 0;overflow-wrap:anywhere}}
h2{{font-size:1.3rem;margin:2.6rem 0 .4rem;padding-top:.8rem;border-top:2px solid var(--ink);
overflow-wrap:anywhere}}
h3{{font-size:1.05rem;margin:2rem 0 .4rem}}
p,li{{max-width:48rem;overflow-wrap:anywhere}}
p{{margin:.5rem 0}}
.sub{{color:var(--muted)}}
nav{{font-size:.88rem;line-height:1.9;max-width:none}}
nav a{{margin-right:1rem;white-space:nowrap}}
a{{color:inherit;text-underline-offset:3px}}
.warn{{color:var(--warn);font-weight:600}}
.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16rem,46%),1fr));gap:.6rem;
margin:.8rem 0;padding:0}}
.facts div{{background:var(--soft);border-radius:6px;padding:.55rem .75rem}}
.facts dt{{font-size:.8rem;color:var(--muted)}}
.facts dd{{margin:0;font-size:1.15rem;font-weight:650;overflow-wrap:anywhere}}
.scroll{{overflow-x:auto;margin:.7rem 0;max-width:100%;
background:linear-gradient(90deg,var(--paper) 40%,transparent) 0 0/2.5rem 100% no-repeat local,
linear-gradient(270deg,var(--paper) 40%,transparent) 100% 0/2.5rem 100% no-repeat local,
linear-gradient(90deg,var(--grid),transparent) 0 0/.8rem 100% no-repeat scroll,
linear-gradient(270deg,var(--grid),transparent) 100% 0/.8rem 100% no-repeat scroll}}
table{{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--grid);
vertical-align:top}}
th{{color:var(--muted);font-weight:600;vertical-align:bottom}}
td.n,th.n{{text-align:right;white-space:nowrap}}
td.t{{min-width:11rem;max-width:26rem}}
td.l{{min-width:20rem;max-width:32rem}}
td.s{{white-space:nowrap}}
.beside{{display:flex;flex-wrap:wrap;gap:0 3rem;align-items:flex-start}}
.beside>div{{flex:1 1 21rem;min-width:0}}
pre{{background:var(--soft);border-radius:6px;padding:.7rem .9rem;overflow-x:auto;
font:.82rem/1.5 ui-monospace,"DejaVu Sans Mono",monospace}}
figure{{margin:.9rem 0;max-width:38rem}}
figure svg{{display:block;width:100%;height:auto}}
summary{{cursor:pointer;color:var(--muted);font-weight:600;margin:.6rem 0}}
figcaption{{color:var(--muted);font-size:.84rem;margin-top:.2rem}}
@media (max-width:30rem){{pre{{white-space:pre-wrap;overflow-wrap:anywhere}}}}
@media (max-width:30rem){{body{{padding-left:.7rem;padding-right:.7rem}}ul{{padding-left:1.2rem}}}}
@media print{{body{{max-width:none;padding:0;font-size:10pt}}nav{{display:none}}
h2{{break-before:page}}h2.first{{break-before:auto}}h3{{break-after:avoid}}
figure,.facts,tr{{break-inside:avoid}}figure{{max-width:15cm}}pre{{white-space:pre-wrap}}
details::details-content{{content-visibility:visible;block-size:auto}}
.scroll{{overflow:visible;background:none}}table{{font-size:8pt}}}}
"""


def to_html(document: Document) -> str:
    """Return the document as one page."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{escape(document.title)}</title><style>{CSS}</style></head><body>",
        f"<header><h1>{escape(document.title)}</h1>",
        f'<p class="sub">{escape(document.subtitle)}</p></header><main>',
    ]
    for number, chapter in enumerate(document.chapters):
        first = ' class="first"' if number == 0 else ""
        if chapter.title:
            parts.append(f"<h2{first}>{escape(chapter.title)}</h2>")
        links = "".join(
            f'<a href="#s{number}-{index}">{escape(section.title)}</a> '
            for index, section in enumerate(chapter.sections)
        )
        if len(chapter.sections) > 1:
            parts.append(f"<nav>{links}</nav>")
        for index, section in enumerate(chapter.sections):
            parts.append(_section(section, f"s{number}-{index}"))
    return "\n".join([*parts, "</main></body></html>"]) + "\n"


def _words(text: str) -> str:
    """Return escaped text in which a number keeps its unit on its line."""
    return escape(text).replace(" %", "&nbsp;%")


def _section(section: Section, name: str) -> str:
    body = "\n".join(_item(item, f"{name}-{index}") for index, item in enumerate(section.items))
    return f'<section id="{name}"><h3>{escape(section.title)}</h3>\n{body}\n</section>'


def _item(item: Item, name: str) -> str:
    if isinstance(item, Text):
        kind = ' class="warn"' if item.warning else ""
        return f"<p{kind}>{_words(item.text)}</p>"
    if isinstance(item, Facts):
        pairs = "".join(
            f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>"
            for what, value in item.pairs
        )
        return f'<dl class="facts">{pairs}</dl>'
    if isinstance(item, Bullets):
        return "<ul>" + "".join(f"<li>{_words(line)}</li>" for line in item.lines) + "</ul>"
    if isinstance(item, Code):
        return f"<pre>{escape(item.text.rstrip())}</pre>"
    if isinstance(item, Drawing):
        caption = escape(item.caption)
        svg = to_svg(item.figure, name).replace(
            "<svg", f'<svg role="img" aria-label="{caption}"', 1
        )
        return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    if isinstance(item, Beside):
        parts = "\n".join(
            f"<div>{_item(part, f'{name}-{index}')}</div>" for index, part in enumerate(item.items)
        )
        return f'<div class="beside">{parts}</div>'
    shown = f'<div class="scroll">{html(item)}</div>'
    if summary := folded(item):
        return f"<details><summary>{escape(summary)}</summary>{shown}</details>"
    return shown
