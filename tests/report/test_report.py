"""Reports: self-contained, escaped, and the same numbers in HTML and Markdown."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from said import refused, shardsim

from shardsim.cost.predict import predict
from shardsim.errors import FileError, ShardsimError
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.plan import load_plan, save_plan
from shardsim.plan.layout import ROLES
from shardsim.planner.presets import plan_of_mesh
from shardsim.report import study
from shardsim.report.document import FOLDED_ROWS
from shardsim.report.markdown import to_markdown
from shardsim.report.page import to_html
from shardsim.report.roofline import matmul_points
from shardsim.report.specs import ROLE_WORDS, axis_sentences
from shardsim.report.write import report_document, write_report

pytestmark = pytest.mark.slow  # draws pictures

HOSTILE = '"><script>alert(1)</script> $\\frac{1}$ | `x` \u4e2d <img src=//evil.example/x>'
VOID = {"meta", "br", "img", "hr", "link"}


class Page(HTMLParser):
    """Notes tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words += data + " "


@pytest.fixture(scope="module")
def both() -> tuple[str, str]:
    document, _ = report_document("vit-22b-published-tp8", images=4e9)
    return to_html(document), to_markdown(document)


def test_the_page_is_whole_and_needs_nothing_else(both: tuple[str, str]) -> None:
    page = Page(both[0])
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?:|//\w", re.sub(r"<svg.*?</svg>", "", both[0], flags=re.DOTALL))
    assert len(both[0].encode()) < 3_000_000
    assert "prefers-color-scheme:dark" in both[0]
    assert "@media print" in both[0]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*", text)


def test_markdown_carries_the_same_numbers(both: tuple[str, str]) -> None:
    body = re.sub(r"<(svg|style)\b.*?</\1>|<figcaption>.*?</figcaption>", "", both[0], flags=re.S)
    body = body[body.index("<body>") :]
    words = unescape(re.sub(r"<[^>]*>", " ", body)).replace("\xa0", " ")
    assert sorted(numbers(words)) == sorted(numbers(both[1].replace("\\", "")))


def test_every_section_is_there(both: tuple[str, str]) -> None:
    for title in (
        *("Question", "Answer", "The plan", "Where the time goes", "Where HBM goes"),
        *("Collectives", "Timeline of one layer", "Roofline of every matmul"),
        *("What would change it", "What each technique is worth", "Runners-up, and why they lost"),
        *("How far to trust it", "Commands that reproduce it"),
    ):
        assert f"### {title}" in both[1]
        assert f"<h3>{title}</h3>" in both[0]


def test_the_command_of_the_search_finds_the_runners_up(both: tuple[str, str]) -> None:
    (command,) = re.findall(r"^shardsim (plan .*)$", both[1], flags=re.MULTILINE)
    found = shardsim(*shlex.split(command), "--top", "1", "--json")
    best = json.loads(found.stdout)["plans"][0]
    row = f"| 1 | {100 * best['mfu']:.1f} | {best['step_time_s']:.4g} | "
    assert row in both[1]
    assert "priced as this plan is, with costs calibrated to published runs" in both[1]


@pytest.mark.usefixtures("no_search")
def test_days_and_chip_hours_follow_from_the_step() -> None:
    _, studies = report_document("palm-540b-published-two-pods", tokens=780e9)
    item = predict(load_plan("palm-540b-published-two-pods"))
    days = 780e9 / item.plan.tokens * item.step_time_s / 86400
    assert studies[0].days == pytest.approx(days)
    assert studies[0].chip_hours == pytest.approx(days * 24 * 6144)


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.Studies, "_search", lambda self, plan: None)


@pytest.mark.usefixtures("no_search")
def test_hostile_names_are_shown_and_do_nothing() -> None:
    plan = replace(load_plan("llama3-8b-published-v6e-1x16"), name=HOSTILE, note=HOSTILE)
    document, _ = report_document([plan, plan])
    page = Page(to_html(document))
    assert not {"script", "img"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.words
    prose = re.sub(r"```.*?```", "", to_markdown(document), flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|img)", prose)
    for shown in (plan, predict(plan)):
        assert "<script>" not in shown._repr_html_()


@pytest.mark.parametrize(
    "name", ["vit-e-data-parallel", "llama3-70b-published-tpu7x-1x64", "vit-22b-published-tp16"]
)
@pytest.mark.usefixtures("no_search")
def test_other_plans_make_a_document(name: str) -> None:
    document, _ = report_document(name)
    assert "no plan that fits" in to_markdown(document)


def test_axes_of_every_role_have_their_words() -> None:
    assert set(ROLE_WORDS) == set(ROLES)
    plan = plan_of_mesh(
        load_model("mixtral-8x7b"), parse_machine("v5p:4x4x4"), 256, {"fsdp": 16, "expert": 4}
    )
    assert any("expert parallel" in line for line in axis_sentences(plan))


def test_the_command(tmp_path: Path) -> None:
    target = tmp_path / "r.md"
    words = ["report", "llama3-8b-published-v6e-1x16", "-o", str(target), "--tokens", "1e12"]
    result = shardsim(*words, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["path"] == str(target)
    assert data["plans"][0]["mfu"] == predict(load_plan("llama3-8b-published-v6e-1x16")).mfu
    assert data["plans"][0]["days"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["vit-22b-published-tp8", "-o", "no/where/r.html"], "there is no folder"),
        (["vit-22b-published-tp8", "-o", "r.pdf"], ".html or .md"),
        (["vit-22b-published-tp8", "-o", "-", "--json"], "both write to stdout"),
        (["vit-22b-publishd-tp8", "-o", "r.html"], "did you mean"),
        (["vit-22b-published-tp8", "-o", "r.html", "--tokens", "-1"], "positive"),
        (["vit-22b-published-tp8", "-o", "r.html", "--chip-hour-price", "0"], "positive"),
        (["vit-22b-published-tp8", "-o", "r.html", "--chip-hour-price", "nan"], "positive"),
        (["vit-22b-published-tp8", "-o", "r.html", "--tokens", "1", "--images", "1"], "not both"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = shardsim("report", *words)
    assert told in refused(result)
    assert list(tmp_path.iterdir()) == []


def test_markdown_has_its_pictures_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a report (1).md"
    told: list[tuple[int, int]] = []
    write_report("llama3-8b-published-v6e-1x16", target, progress=lambda *done: told.append(done))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    named = re.findall(r"!\[.+?\]\((.+?)\)", target.read_text(encoding="utf-8"))
    folder = tmp_path / "a report (1)_files"
    files = sorted(path.name for path in folder.iterdir())
    assert files == [f"picture-{number:02}.png" for number in range(1, len(named) + 1)]
    assert [unquote(name) for name in named] == [f"{folder.name}/{name}" for name in files]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    write_report("llama3-8b-published-v6e-1x16", target)
    assert sorted(path.name for path in folder.iterdir()) == files


def test_a_file_where_the_pictures_go_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r_files").write_text("mine", encoding="utf-8")
    with pytest.raises(FileError, match="r_files"):
        write_report("llama3-8b-published-v6e-1x16", tmp_path / "r.md")
    assert (tmp_path / "r_files").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "r.md").exists()


def test_cost_is_chip_hours_times_the_price() -> None:
    name = "llama3-8b-published-v6e-1x16"
    document, (one,) = report_document(name, tokens=1e12, chip_hour_price=2.5)
    assert one.chip_hours is not None
    assert study.headline(one)["cost"] == pytest.approx(2.5 * one.chip_hours)
    assert {item.plan.machine.chips for item in one.sizes} <= {8, 16, 32}
    for item in one.sizes:
        days = 1e12 / item.plan.tokens * item.step_time_s / 86400
        assert one.cost(item) == pytest.approx(days * 24 * item.plan.machine.chips * 2.5)
    text = to_markdown(document)
    assert "### What it costs" in text
    assert f"{2.5 * one.chip_hours:,.0f}" in text


def test_without_a_price_nothing_costs(both: tuple[str, str]) -> None:
    assert "What it costs" not in both[1]
    assert "a chip-hour" not in both[1]


@pytest.mark.usefixtures("no_search")
def test_plans_on_one_page_are_priced_alike() -> None:
    plan = load_plan("vit-22b-published-tp8")
    costed = replace(plan, name="mine", op_costs="compiler")
    document, studies = report_document([costed, plan])
    assert studies[0].prediction.step_time_s == studies[1].prediction.step_time_s
    text = to_markdown(document)
    assert "All plans are priced with costs calibrated to published runs" in text
    assert f"| mine | {100 * predict(plan).mfu:.1f} |" in text
    assert "--set op_costs=calibrated" in text


@pytest.mark.usefixtures("no_search")
def test_the_title_names_all_models() -> None:
    other = replace(load_plan("vit-22b-published-tp8"), model=load_model("vit-e"), name="other")
    document, _ = report_document(["vit-22b-published-tp8", "vit-22b-published-tp4", other])
    assert document.title == "3 sharding plans for vit-22b, vit-e"


@pytest.mark.usefixtures("no_search")
def test_the_events_stand_beside_the_closed_forms() -> None:
    plan = replace(load_plan("vit-22b-published-tp2"), op_costs="physical")
    document, (one,) = report_document(plan)
    text = to_markdown(document)
    assert one.simulation.events.contention
    assert f"{100 * one.simulation.mfu:.2f} | {one.simulation.step_time_s:.4g} |" in text
    assert "gather block input, a hop loses" in text


@pytest.mark.usefixtures("no_search")
def test_without_simpy_there_are_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    document, (one,) = report_document("vit-22b-published-tp2")
    assert one.simulation is None
    assert "| events |" not in to_markdown(document)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import shardsim.report

    monkeypatch.setattr(shardsim.report, "find_spec", lambda name: None)
    with pytest.raises(ShardsimError, match=r"pip install 'shardsim\[report\]'"):
        shardsim.report.require()


def test_a_report_of_nothing_or_into_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ShardsimError, match="at least one plan"):
        report_document([])
    (tmp_path / "r.html").mkdir()
    with pytest.raises(FileError, match="not a folder"):
        write_report("vit-22b-published-tp8", tmp_path / "r.html" / "x" / "r.html")


@pytest.mark.usefixtures("no_search")
def test_a_report_of_gpus_speaks_of_nodes_and_of_measured_kernels(tmp_path: Path) -> None:
    model, machine = load_model("vit-b-16"), parse_machine("2*h100:2")
    save_plan(plan_of_mesh(model, machine, 256, {"data": 4}), tmp_path / "plan.yaml")
    made = shardsim("report", str(tmp_path / "plan.yaml"), "-o", "-")
    assert (made.exit_code, made.stderr.count("MFU ")) == (0, 1)
    page = Page(re.sub("<pre>.*?</pre>", "", made.stdout, flags=re.S))  # but for its file
    for word in ("torus", "data-centre", "compiler offers", "DCN", "ICI", "vendor"):
        assert word not in page.words
    for word in ("2 of the 2 chips of a node", "2 nodes over the network between nodes"):
        assert word in page.words
    assert "priced from kernels measured on the chip, and scheduled as emitted" in page.words


def test_long_tables_are_folded_and_whole(both: tuple[str, str]) -> None:
    html, text = both
    folded = re.findall(r"<details><summary>(\d+) rows: .*?</summary>(.*?)</details>", html, re.S)
    assert folded
    for count, inside in folded:
        assert int(count) > FOLDED_ROWS
        assert inside.count("<tr>") == int(count) + 1
    assert text.count("<details>") == len(folded)
    assert "<details>" not in folded[0][1]
    rest = re.sub(r"<details>.*?</details>", "", html, flags=re.S)
    assert all(one.count("<tr>") <= FOLDED_ROWS + 1 for one in rest.split("<table>"))


@pytest.mark.parametrize("costs", ["calibrated", "compiler", "physical"])
@pytest.mark.parametrize("name", ["vit-22b-published-tp8", "palm-540b-published-two-pods"])
def test_no_mark_crosses_its_roof(name: str, costs: str) -> None:
    points = matmul_points(predict(name, costs=costs))
    assert {point.group for point in points} >= {"forward", "input gradients"}
    for point in points:
        assert point.flops_per_s <= point.roof_flops_per_s * (1 + 1e-9)


@pytest.mark.usefixtures("no_search")
def test_progress_only_grows_and_ends() -> None:
    told: list[tuple[int, int]] = []
    plans = ["vit-22b-published-tp8", "vit-22b-published-tp4"]
    report_document(plans, progress=lambda done, of: told.append((done, of)))
    shares = [done / of for done, of in told]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
