"""Which slice, what it costs, why not a mesh, and why there is no plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from said import Shardsim, data

from shardsim.answers.illegal import Question, why_illegal
from shardsim.answers.slices import choices, slices_named
from shardsim.answers.training import Training
from shardsim.cost.mfus import utilisations
from shardsim.cost.predict import predict
from shardsim.machine import load_chip, parse_machine
from shardsim.model import load_model
from shardsim.plan import load_plan
from shardsim.planner.changes import parse_assignment
from shardsim.planner.found import OfSlice

BASE = predict(load_plan("vit-22b-published-tp8"))
HELD = ("vit-l", "--on", "v4:4x4x4", "--batch", "64", "--fix")
SMALL = ("--batch", "256", "--max-axes", "1", "--json")


def of_slice(name: str, step_s: float | None) -> OfSlice:
    """Return what a search found on a slice: a plan that takes so long, or none."""
    machine = parse_machine(name)
    best = None
    if step_s is not None:
        best = replace(BASE, plan=replace_machine(machine), step_time_s=step_s)
    return OfSlice(machine=machine, best=best, searched=9, fit=1, smallest_peak_bytes=1e12)


def replace_machine(machine: Any) -> Any:
    plan = object.__new__(type(BASE.plan))
    plan.__dict__.update({**BASE.plan.__dict__, "machine": machine})
    return plan


NAMES = ("v5e:1x1", "v5e:2x2", "v5e:4x4", "v4:2x2x1", "v4:4x4x4", "v5p:4x4x8")


@given(st.lists(st.none() | st.floats(0.1, 100), min_size=6, max_size=6), st.booleans())
def test_the_front_is_what_nothing_beats(steps: list[float | None], priced: bool) -> None:
    training = Training(tokens=1e9, prices={"v4": 2.0, "": 1.0}) if priced else None
    found = choices([of_slice(*pair) for pair in zip(NAMES, steps, strict=True)], training)
    points = [
        (one.best.step_time_s, one.price, one.machine.chips)
        for one in found
        if one.best is not None
    ]
    for one in found:
        if one.best is None:
            assert (one.on_front, one.smallest) == (False, False)
            assert "needs 931.32 GiB" in one.why_not
            continue
        mine = one.best.step_time_s, one.price, one.machine.chips
        better = [p for p in points if all(a <= b for a, b in zip(p, mine)) and p != mine]  # noqa: B905
        assert one.on_front == (not better)
        assert one.smallest == (one.machine.chips == min(p[2] for p in points))
    if points:
        fastest = min(points)
        assert any(one.on_front and one.best.step_time_s == fastest[0] for one in found if one.best)


def test_a_chip_with_a_star_is_its_usual_sizes() -> None:
    names = [machine.name for machine in slices_named("v4:*")]
    assert names[:4] == ["v4:1x1x1", "v4:1x2x1", "v4:2x2x1", "v4:2x2x2"]
    chips = [machine.chips for machine in slices_named("v4:*")]
    assert chips == [2**power for power in range(13)]
    assert [one.name for one in slices_named("v4:*, v4:2x2x1")] == names


def test_days_and_chip_hours_and_money() -> None:
    training = Training(tokens=BASE.plan.tokens * 86400, prices={"v4": 3.0})
    assert training.days(BASE) == pytest.approx(BASE.step_time_s)
    assert training.chip_hours(BASE) == pytest.approx(BASE.step_time_s * 24 * 1024)
    assert training.cost(BASE) == pytest.approx(BASE.step_time_s * 24 * 1024 * 3)
    assert Training(tokens=1e12).cost(BASE) is None


@pytest.mark.slow
def test_the_cheapest_slice_follows_the_prices(shardsim: Shardsim) -> None:
    words = ("plan", "vit-l", "--on", "v4:2x2x1,v5e:2x4", *SMALL, "--objective", "cost")
    dear, cheap = (
        data(shardsim(*words, "--chip-hour-price", f"v4={price},v5e=1", "--tokens", "1e12"))
        for price in (100, 0.01)
    )
    assert dear["plans"][0]["machine"] == "v5e:2x4"
    assert cheap["plans"][0]["machine"] == "v4:2x2x1"
    for found in (dear, cheap):
        assert [one["machine"] for one in found["slices"]] == ["v4:2x2x1", "v5e:2x4"]
        assert [one["smallest"] for one in found["slices"]] == [True, False]
        costs = [one["training"]["cost"] for one in found["slices"]]
        assert found["plans"][0]["training"]["cost"] == pytest.approx(min(costs))


@pytest.mark.slow
def test_several_slices_are_named_in_the_table(shardsim: Shardsim) -> None:
    words = [word for word in SMALL if word != "--json"]
    result = shardsim("plan", "vit-l", "--on", "v4:2x2x1,v5e:2x4", *words, "--objective", "cost")
    assert "the best of each slice:" in result.stdout
    assert "smallest" in result.stdout
    assert "cost counts chip-seconds of all chips alike" in result.stderr


def test_a_price_for_every_chip_or_none(shardsim: Shardsim) -> None:
    words = ("plan", "vit-l", "--on", "v4:2x2x1,v5e:2x4", *SMALL)
    result = shardsim(*words, "--chip-hour-price", "v4=3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no price of a chip-hour of v5e is given; write v4=3,v5e=..." in result.stderr
    for text in ("v9=3", "v4=-1", "=3", "v4=1,v4=2", "much"):
        result = shardsim(*words, "--chip-hour-price", text)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)


@pytest.mark.slow
def test_why_not_a_mesh(shardsim: Shardsim) -> None:
    meshes = ("data=4,fsdp=16", "fsdp=32", "model=64", "data=64")
    words = [word for mesh in meshes for word in ("--why-not", mesh)]
    found = data(
        shardsim(
            "plan",
            "vit-22b",
            "--on",
            "v4:4x4x4",
            "--batch",
            "2048",
            "--max-axes",
            "2",
            *words,
            "--json",
        )
    )
    best = found["plans"][0]["step_time_s"]
    slower, wrong, illegal, large = found["why_not"]
    assert slower["fits"] is True
    assert slower["step_time_s"] >= best
    assert "slower: " in slower["says"] or "as fast" in slower["says"]
    assert "its axes multiply to 32, but v4:4x4x4 has 64 devices" in wrong["says"]
    assert "48 does not divide by 64" in illegal["says"]
    # The best plan keeps all on the devices; this one cannot.
    assert large["fits"] is True
    assert "optimizer state and parameters in the host's memory) against" in large["says"]
    assert large["hbm_peak_bytes"] < load_chip("v4").hbm_usable_bytes
    words = ("--fix", "offload_optimizer=false", "--why-not", "data=64", "--json")
    said = shardsim("plan", "vit-22b", "--on", "v4:4x4x4", "--batch", "2048", *words)
    (held,) = data(said)["why_not"]
    assert held["fits"] is False
    assert "does not fit: its leanest plan needs" in held["says"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("vit-22b", "--on", "v4:4x4x4", "--batch", "16381"),
            "batch: 16,381 sequences do not divide by 64, only by 1 of the 64 devices; the nearest "
            "that do: 16,320 and 16,384",
        ),
        (
            ("vit-l", "--on", "v4:4x4x4", "--batch", "7"),
            "batch: 7 sequences do not divide by 4, only by 1 of the 64 devices; the nearest that "
            "do: 4 and 8",
        ),
        (
            ("vit-22b", "--on", "v4:1x1x1", "--batch", "64"),
            "GiB of 30.75 GiB on a device; v4:2x2x1 would do, or a smaller batch",
        ),
        (
            (*HELD, "mesh.model=3"),
            "no plan: mesh.model=3: no part of the v4:4x4x4 torus is an axis of 3 devices; the "
            "nearest that can be: mesh.model=2 or 4",
        ),
        (
            ("vit-l", "--on", "v4:4x4x4,v4:2x2x1", "--batch", "64", "--fix", "mesh.model=32"),
            "none on these slices; on v4:4x4x4: no plan: mesh.model=32: attention heads over the "
            "tensor axes: 16 does not divide by 32; the nearest that can be: mesh.model=16",
        ),
        (
            (*HELD, "microbatches=7"),
            "microbatches=7: 64 sequences do not divide by 7; the nearest that can be: "
            "microbatches=4 or 8",
        ),
        (
            (*HELD, "mesh.model=8", "--fix", "mesh.fsdp=16"),
            "mesh.model=8, mesh.fsdp=16 cannot be together: axes of 128 devices on 64; the "
            "nearest that can be: mesh.fsdp=8",
        ),
        (
            (*HELD, "mesh.expert=4"),
            "mesh.expert=4: vit-l-16 has no experts; the nearest that can be: mesh.expert=1",
        ),
    ],
)
def test_why_there_is_no_plan(shardsim: Shardsim, words: tuple[str, ...], message: str) -> None:
    result = shardsim("plan", *words, "--max-axes", "2")
    assert result.exit_code == 1
    assert message in result.stderr


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "mesh.model": st.integers(1, 80),
            "mesh.fsdp": st.integers(1, 80),
            "mesh.context": st.sampled_from([1, 2, 3, 4, 32]),
            "microbatches": st.integers(1, 200),
            "overlap.matmul": st.sampled_from(["off", "bidirectional"]),
        },
    )
)
def test_the_nearest_that_can_be_can_be(fix: dict[str, Any]) -> None:
    model = load_model("vit-l")
    asked = Question(
        model=model,
        machine=parse_machine("v4:4x4x4"),
        batch=192,
        sequence=model.sequence,
        attention="flash",
    )
    if asked.legal(fix):
        return
    said = why_illegal(asked, fix)
    named, _, near = said.partition("; the nearest that can be: ")
    blamed = {key: value for key, value in fix.items() if f"{key}={value}" in named}
    assert not asked.legal(blamed)
    for key in blamed if len(blamed) > 1 else ():
        assert asked.legal({name: value for name, value in blamed.items() if name != key})
    if near:
        key, _, values = near.partition("=")
        for value in values.split(" or "):
            assert asked.legal({**blamed, **dict([parse_assignment(f"{key}={value}")])})


def test_every_convention_from_one_step() -> None:
    rows = {row.name: row for row in utilisations(BASE)}
    assert rows["palm"].utilisation == pytest.approx(BASE.mfu, rel=1e-12)
    assert rows["hfu"].utilisation == BASE.hfu
    for row in rows.values():
        ratio = row.utilisation / row.flops_per_token
        assert ratio == pytest.approx(BASE.mfu / rows["palm"].flops_per_token, rel=1e-9)


def test_an_mfu_above_the_hfu_says_why(shardsim: Shardsim) -> None:
    words = ("predict", "llama2-7b", "--on", "v5p:4x4x4", "--batch", "8", "--seq", "256k")
    found = data(shardsim(*words, "--mesh", "data=8,model=8", "--mfu", "all", "--json"))
    assert found["mfu"] > found["hfu"]
    halved = next(row for row in found["mfus"] if row["convention"] == "palm_causal")
    (said,) = [text for text in found["warnings"] if text.startswith("MFU is above")]
    assert f"halved it is {100 * halved['utilisation']:.1f} %" in said
