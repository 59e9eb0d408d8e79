"""One collective alone on an idle torus takes what the closed form says."""

from __future__ import annotations

import dataclasses

import pytest
from alone import run_alone

from shardsim.cost.collectives import collective_s
from shardsim.machine import Machine, parse_machine
from shardsim.plan.layout import AxisLayout

SIZES = [2.0**power for power in (10, 16, 23, 30)]  # 1 KiB to 1 GiB
SLOW = pytest.mark.slow  # another of the same kind is quick
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")


def group(*factors: int, strides: tuple[int, ...] = (), slices: int = 1) -> AxisLayout:
    return AxisLayout(factors=factors, strides=strides or (1,) * len(factors), slices=slices)


def error(machine: Machine, layout: AxisLayout, kind: str, size: float, **options: int) -> float:
    run = run_alone(machine, layout, kind, size, **options)
    return run.time_s / float(collective_s(kind, run.analytic, size, **options)) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("v4:4x4x16", group(1, 1, 16), id="ring"),
        pytest.param("v4:4x4x12", group(1, 1, 12), id="ring of 12", marks=SLOW),
        pytest.param("v4:4x4x16", group(1, 1, 4), id="line inside a ring"),
        pytest.param("v4:4x4x16", group(1, 1, 4, strides=(1, 1, 4)), id="interleaved rings"),
        pytest.param("v4:4x4x12", group(1, 1, 3, strides=(1, 1, 4)), id="odd ring"),
        pytest.param("v4:4x4x12", group(1, 1, 3), id="odd line", marks=SLOW),
        pytest.param("v5e:4x8", group(1, 8), id="line"),
        pytest.param("v5e:8x8", group(8, 8), id="open 2-D"),
        pytest.param("v5e:16x16", group(16, 16), id="2-D torus"),
        pytest.param("v4:2x2x2", group(2, 2, 2), id="open 3-D"),
        pytest.param("v4:4x4x4", group(4, 4, 4), id="3-D torus"),
        pytest.param("v4:8x8x16", group(8, 8, 1), id="two of three axes", marks=SLOW),
        pytest.param("v5e:4x8", group(4, 8), id="unequal open 2-D", marks=SLOW),
        pytest.param("v5e:8x16", group(8, 16), id="unequal, one axis wrapped"),
        pytest.param("v4:4x4x8", group(4, 1, 8), id="unequal 2-D torus", marks=SLOW),
        pytest.param("v4:8x8x16", group(8, 8, 16), id="unequal 3-D torus"),
        pytest.param("v4:4x8x12", group(4, 8, 12), id="three lengths", marks=SLOW),
        pytest.param("v4:4x4x16", group(4, 4, 4, strides=(1, 1, 4)), id="a slow axis"),
        pytest.param(
            "v4:4x4x16", group(4, 4, 2, strides=(1, 1, 8)), id="an axis too slow", marks=SLOW
        ),
        pytest.param("v4:4x8x8", group(2, 4, 8, strides=(2, 2, 1)), id="parts of axes", marks=SLOW),
        pytest.param("2*v4:4x4x8", group(4, 4, 8, slices=2), id="two unequal slices"),
        pytest.param("tpu7x:4x4x4", group(4, 4, 4, 2), id="chips of two devices"),
        pytest.param("2*v4:4x4x4", group(4, 4, 4, slices=2), id="two slices", marks=SLOW),
        pytest.param("4*v4:4x4x4", group(1, 1, 1, slices=4), id="slices only"),
        pytest.param("h100:8", group(8), id="switch"),
    ],
)
def test_within_one_percent(name: str, layout: AxisLayout, kind: str) -> None:
    machine = parse_machine(name)
    for size in SIZES:
        assert error(machine, layout, kind, size) == pytest.approx(0, abs=0.01), size


def test_all_reduce_of_256_mib_reaches_the_multi_coloured_bound() -> None:
    """2 V / (6 links x 50 GB/s) = 1.79 ms on a wrapped 8x8x16."""
    machine = parse_machine("v4:8x8x16")
    chip = dataclasses.replace(machine.chip, link_bytes_per_s=50e9, link_efficiency=1.0)
    machine = dataclasses.replace(machine, chip=chip)
    run = run_alone(machine, group(8, 8, 16), "all-reduce", 256 * 2.0**20)
    assert run.time_s == pytest.approx(1.7896e-3, rel=0.03)


def test_arrays_pay_the_latency_one_by_one() -> None:
    machine = parse_machine("v4:4x4x4")
    for kind in ("all-gather", "all-reduce"):
        found = error(machine, group(4, 4, 4), kind, 2.0**16, messages=6)
        assert found == pytest.approx(0, abs=0.01)


def test_a_group_of_one_moves_nothing() -> None:
    assert run_alone(parse_machine("v4:4x4x4"), group(1, 1, 1), "all-reduce", 2.0**20).time_s == 0


@pytest.mark.parametrize(
    ("shape", "measured", "bound"), [("4x4x8", 1.63, 1.75), ("4x8x8", 1.31, 1.40)]
)
def test_a_twist_speeds_all_to_all_up(shape: str, measured: float, bound: float) -> None:
    """At least as much as was measured on TPU v4 (arXiv 2304.01433, section 2.8), and not more
    than the shorter ways allow; a gather over the whole slice stays what it was."""
    layout = group(*map(int, shape.split("x")))
    straight, twisted = parse_machine(f"v4:{shape}"), parse_machine(f"v4:{shape}_twisted")

    def gain(kind: str) -> float:
        times = [run_alone(item, layout, kind, 2.0**28).time_s for item in (straight, twisted)]
        return times[0] / times[1]

    assert measured <= gain("all-to-all") <= bound
    assert gain("all-gather") == pytest.approx(1, abs=0.01)


def test_a_short_axis_alone_does_not_close_on_a_twisted_torus() -> None:
    twisted = parse_machine("v4:4x4x8_twisted")
    assert error(twisted, group(1, 4, 1), "all-gather", 2.0**28) > 0.5
    assert error(twisted, group(1, 1, 8), "all-gather", 2.0**28) == pytest.approx(0, abs=0.01)
