"""One table in every form: nothing is lost, nothing is executed, no line leaves the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.planner.search import search
from shardsim.views.plans import found
from shardsim.views.table import Column, Table, table
from shardsim.views.terminal import fitted
from shardsim.views.write import csv_text, frame, html, markdown, plain

TEXT = st.text(max_size=40)
FRACTIONS = st.none() | st.floats(-1e3, 1e3)


@st.composite
def tables(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT) -> Table:
    """Return tables of text and numbers, of any shape."""
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=5))
    columns = []
    for index, number in enumerate(kinds):
        heading = draw(text) or "-"
        if number:
            columns.append(Column(f"c{index}", heading, itemgetter(index), ".1f", "%"))
        else:
            columns.append(Column(f"c{index}", heading, itemgetter(index)))
    row = st.tuples(*(FRACTIONS if number else text for number in kinds))
    return table(columns, draw(st.lists(row, max_size=5)))


class Cells(HTMLParser):
    """Collects what stands in the cells of a table, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and data != "\n":
            self.rows[-1][-1] += data


PRINTED = st.text(
    st.characters(blacklist_categories=("C", "Z"), whitelist_characters=" "), max_size=40
)


@given(tables(PRINTED))
def test_html_holds_every_cell_and_nothing_else(made: Table) -> None:
    page = Cells(html(made))
    assert page.rows == [made.labels, *made.cells]
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td"}


@given(tables())
def test_markdown_is_one_line_a_row_and_says_the_same(made: Table) -> None:
    lines = markdown(made).split("\n")
    assert len(lines) == 2 + len(made.rows)
    for line, cells in zip([lines[0], *lines[2:]], [made.labels, *made.cells], strict=True):
        found = re.split(r"(?<!\\) \| ", f" {line[1:-1]} ".replace("  ", " "))
        shown = [" ".join(cell.split()) for cell in cells]
        assert re.sub(r"\\(.)", r"\1", " | ".join(part.strip() for part in found)).replace(
            " ", ""
        ) == " | ".join(shown).replace(" ", "")
        assert not re.search(r"(?<!\\)<", line)


@pytest.mark.slow
@given(tables())
def test_the_frame_holds_raw_values(made: Table) -> None:
    found = frame(made)
    assert list(found.columns) == made.keys
    assert len(found) == len(made.rows)
    for key, values in zip(made.keys, zip(*made.rows, strict=True), strict=False):
        for got, value in zip(found[key], values, strict=True):
            assert got == value or (value is None and got != got) or got is None


@given(tables(PRINTED), st.integers(40, 160))
@settings(deadline=None)
def test_a_terminal_shows_all_within_its_width(made: Table, width: int) -> None:
    text = fitted(made, width)
    assert all(len(line) <= width for line in text.split("\n"))
    letters = Counter(re.sub(r"\s", "", text))
    for cells in made.cells[:1]:
        assert Counter(re.sub(r"\s", "", "".join(cells).replace("-", ""))) <= letters
    for cells in made.cells:
        for column, cell in zip(made.columns, cells, strict=True):
            assert not column.number or cell == column.missing or cell in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_what_all_rows_share_is_said_once_where_there_is_no_room(width: int) -> None:
    columns = [
        Column("mesh", "mesh (torus axes)", itemgetter(0)),
        Column("remat", "remat policy", itemgetter(1)),
        Column("mfu", "MFU", itemgetter(2), ".1f", "%"),
        Column("why", "limited by", itemgetter(3)),
    ]
    rows = [
        (f"data={n} (y{n}), fsdp=256 (x8 y2 z16)", "save_context", n / 10, "HBM bandwidth")
        for n in (2, 4)
    ]
    made = table(columns, rows)
    wide = max(map(len, plain(made).splitlines())) <= width
    text = fitted(made, width)
    assert text.count("save_context") == (2 if wide else 1)
    assert ("in all rows: remat policy save_context; limited by HBM bandwidth" in text) != wide
    assert "fsdp=256 (x8 y2 z16)" in text


def test_a_narrow_terminal_does_without_what_can_be_spared() -> None:
    columns = [Column(key, f"{key} of a run", itemgetter(0)) for key in "abcdefg"]
    made = table(columns, [("a-word-of-twenty-one",), ("b",)], spare=("g", "e"))
    assert fitted(made, 200).count("of a run") == 7
    assert fitted(made, 80).endswith("in a wider terminal also: g of a run, e of a run")
    assert fitted(table(columns, made.rows[:1]), 20).startswith("a of a run:\na-word-of-twenty-one")


def test_a_search_is_readable_in_eighty_columns() -> None:
    result = search("vit-l-16", "v4:2x2x4", 256, top=4)
    lines = fitted(found(result.predictions), 80).split("\n")
    assert all(len(line) <= 80 for line in lines)
    assert [line[0] for line in lines[1:5]] == ["1", "2", "3", "4"], "one line a plan"
    for item, line in zip(result.predictions, lines[1:5], strict=True):
        assert f"{100 * item.mfu:.1f}" in line


def test_long_words_break_where_their_parts_are_joined() -> None:
    columns = [Column(key, f"llama2-70b-published-{key}", itemgetter(0)) for key in "abcd"]
    text = fitted(table(columns, [("rules.activations.kv_heads",), ("batch",)]), 80)
    assert text.split("\n")[0].split() == 4 * ["llama2-70b-"]
    assert "rules. " in text or "rules.activations. " in text


@given(TEXT)
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    made = table([Column("a", "a", itemgetter(0))], [(f"\x1b[31m{text}",), ("b",)])
    for shown in (plain(made), fitted(made, 60), fitted(text, 60)):
        assert "\x1b" not in shown
        assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_units_show_in_the_heading_and_scale_fractions() -> None:
    column = Column("mfu", "MFU", itemgetter(0), ".1f", "%")
    made = table([column], [(0.5493,), (None,), (float("nan"),)])
    assert (made.labels, made.cells) == (["MFU %"], [["54.9"], ["-"], ["-"]])
    inner = column.within(itemgetter("item"), "compiled_mfu", "compiled")
    rows = [{"item": (0.4,)}, {"item": None}]
    assert table([inner], rows).data() == [{"compiled_mfu": 0.4}, {"compiled_mfu": None}]
    assert unescape(html(made)).count("54.9") == 1


@given(tables(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40)))
def test_csv_holds_raw_values(made: Table) -> None:
    """Fractions stay fractions: a program that reads the file finds no percent."""
    names, *rows = csv.reader(io.StringIO(csv_text(made), newline=""))
    assert names == made.keys
    assert len(rows) == len(made.rows)
    for row, values in zip(rows, made.rows, strict=True):
        for cell, value in zip(row, values, strict=True):
            if isinstance(value, float):
                assert float(cell) == pytest.approx(value, rel=1e-5)
            else:
                assert cell == (value or "")
