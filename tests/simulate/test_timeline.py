"""The trace opens and says what ran; pictures are written whole."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest

from shardsim.errors import FileError
from shardsim.plan import Plan, Remat, load_plan
from shardsim.simulate.timeline import draw_layer, write_trace


@pytest.fixture
def plan() -> Plan:
    loaded = load_plan("vit-22b-published-tp8")
    return dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, layers=3))


def test_trace(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = write_trace(plan, path)
    data = json.loads(path.read_text())
    events = data["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    end = max(event["ts"] + event["dur"] for event in spans)
    assert end == pytest.approx(found.step_time_s * 1e6)
    names = {event["name"] for event in spans}
    assert {
        "gather weights forward",
        "gather block input, a pair of hops",
        "optimizer update",
    } <= names
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "layer", "link x+", "link y-", "link z+"} <= rows
    gather = next(event for event in spans if event["name"] == "gather weights forward")
    assert gather["args"]["bytes"] > 0
    by_row: dict[int, list[tuple[float, float]]] = {}
    for event in spans:
        by_row.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for row in by_row.values():
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(sorted(row)))
    assert [item.name for item in tmp_path.iterdir()] == ["trace.json"]


def test_compute_row_is_never_double_booked(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(plan, path, straggler=(0, 1.2))
    events = json.loads(path.read_text())["traceEvents"]
    rows = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert rows.count("compute") == 4
    assert "compute (2)" not in rows


def test_traffic_with_the_host_has_a_row_of_its_own(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    plan = dataclasses.replace(plan, remat=Remat.of(offload=frozenset({"qkv"})))
    found = write_trace(plan, path)
    spans = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "host"]
    (use,) = [use for use in found.collectives if use.kind == "host-transfer"]
    assert sum(span["dur"] for span in spans) == pytest.approx(use.time_s * 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(plan: Plan, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"layer.{ending}"
    draw_layer(plan, path)
    assert path.stat().st_size > 10_000


def test_other_endings_are_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"\.png"):
        draw_layer(plan, tmp_path / "layer.gif")
    assert not list(tmp_path.iterdir())
