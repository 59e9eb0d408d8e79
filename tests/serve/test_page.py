"""The page in a headless Chromium, as a person uses it; skipped where there is none."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardsim.plan import load_plan
from shardsim.serve.server import PageServer

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]

PLAN = "vit-22b-published-tp8"
WAIT_MS = 60_000
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=alone)
        yield made
        made.close()


@pytest.fixture
def opened(browser: Any, server: PageServer) -> Iterator[Open]:
    """Open the page; at the end nothing was asked of other addresses, and no script failed."""
    wrong: list[str] = []
    pages = []

    def open_page(width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(WAIT_MS)
        pages.append(page)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Policy" in line.text else None)
        page.on("request", lambda one: None if own(one.url) else wrong.append(one.url))
        page.goto(server.url)
        page.wait_for_selector("#parts table")
        return page

    def own(url: str) -> bool:
        return url.startswith((server.url, "data:", f"blob:{server.url}"))

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def said(page: Any, change: Callable[[], None]) -> str:
    """Return what the page says after a change, once that is another thing than before."""
    before = page.text_content("#says")
    change()
    page.wait_for_function("before => says.textContent !== before", arg=before)
    return str(page.text_content("#says"))


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_page(opened: Open, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    page.click("#pin")
    page.wait_for_selector("#side:not([hidden])")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 100) == (scheme == "dark")


def test_the_keyboard_alone_will_do(opened: Open) -> None:
    page = opened()
    names = "one => one.labels?.length || one.ariaLabel || one.textContent.trim()"
    named = page.evaluate(
        f"[...document.querySelectorAll('input, select, textarea, button')].every({names})"
    )
    assert named
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "mesh-model":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2
    text = said(page, lambda: page.keyboard.press("ArrowLeft"))
    assert "limited by" in text
    assert page.get_attribute("#mesh-model", "aria-valuetext") == "4"
    assert page.text_content("#size-fsdp") == "256"  # takes what is left of 1,024
    assert "--set mesh.model=4" in page.text_content("#command")
    page.focus("#reset")
    said(page, lambda: page.keyboard.press("Enter"))
    assert "--set" not in page.text_content("#command")


def test_what_cannot_be_is_said_and_the_rest_stays(opened: Open) -> None:
    page = opened()
    before = page.text_content("#headline")
    page.fill("#machine", "v4:3x5")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "v4" in page.text_content("#error")
    assert page.get_attribute("#error", "role") == "alert"
    assert page.text_content("#headline") == before
    page.fill("#machine", "v4:8x8x8")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error", state="hidden")
    assert "v4:8x8x8" in page.text_content("#about")


def test_text_is_never_read_as_html(opened: Open) -> None:
    page = opened()
    page.evaluate("text.closest('details').open = true")
    page.fill("#text", "name=<img src=x onerror=alert(1)>")
    page.press("#text", "Tab")
    page.click("#pin")
    page.wait_for_selector("#side:not([hidden])")
    page.fill("#text", "<b>x</b>")
    page.press("#text", "Tab")
    page.wait_for_selector("#error:not([hidden])")
    assert "<b>x</b>" in page.text_content("#error")
    assert page.query_selector("main img, #error b") is None


def test_best_plans_are_taken_beside_the_pinned_one_and_go_home(
    opened: Open, tmp_path: Path
) -> None:
    page = opened()
    page.click("#pin")
    page.click("#search")
    said(page, lambda: page.click("#found tbody tr:first-child button"))
    columns = page.text_content("#beside thead")
    assert "pinned" in columns
    assert "this plan" in columns
    assert page.locator("#time-bars .bar").count() == 2
    with page.expect_download() as waiting:
        page.click("#export")
    path = tmp_path / "best.yaml"
    waiting.value.save_as(path)
    assert load_plan(path).model.name == "vit-22b"
    page.click("#unpin")
    page.wait_for_selector("#side", state="hidden")
