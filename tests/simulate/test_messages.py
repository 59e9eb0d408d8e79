"""The legs of `groups.py` against every hop of every device."""

from __future__ import annotations

import pytest
from alone import run_alone
from messages import hop_by_hop

from shardsim.machine import parse_machine
from shardsim.plan.layout import AxisLayout

CASES = [("v4:4x4x4", (4, 1, 1)), ("v4:4x4x4", (4, 4, 4)), ("v5e:4x8", (1, 8)), ("v5e:4x4", (4, 4))]


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize(("name", "factors"), CASES)
@pytest.mark.parametrize("size", [2.0**10, pytest.param(2.0**18, marks=pytest.mark.slow), 2.0**28])
def test_hop_by_hop_takes_as_long(
    name: str, factors: tuple[int, ...], kind: str, size: float
) -> None:
    layout = AxisLayout(factors=factors, strides=(1,) * len(factors))
    machine = parse_machine(name)
    hops = hop_by_hop(machine, layout, kind, size)
    assert hops.time_s == pytest.approx(run_alone(machine, layout, kind, size).time_s, rel=1e-9)
    assert hops.bytes_on == hops.bytes_off


def test_links_carry_what_the_legs_say() -> None:
    layout = AxisLayout(factors=(4, 4), strides=(1, 1))
    machine = parse_machine("v5e:4x4")
    hops = hop_by_hop(machine, layout, "all-gather", 2.0**20)
    legs = run_alone(machine, layout, "all-gather", 2.0**20, unfold=True)
    numbers = legs.folded.links.tolist()
    carried = {link: legs.links.bytes_off[place] for place, link in enumerate(numbers)}
    assert carried == pytest.approx(hops.bytes_on)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize(
    ("name", "factors"), [("v5e:4x8", (4, 8)), ("v5e:2x4", (2, 4)), ("v4:2x4x4", (2, 4, 4))]
)
def test_small_chunks_keep_all_links_of_unequal_axes_busy(
    name: str, factors: tuple[int, ...], kind: str
) -> None:
    layout = AxisLayout(factors=factors, strides=(1,) * len(factors))
    machine = parse_machine(name)
    legs = run_alone(machine, layout, kind, 2.0**28)
    times = [hop_by_hop(machine, layout, kind, 2.0**28, chunks=n).time_s for n in (1, 4, 16)]
    assert times[0] > 1.1 * legs.time_s
    assert times[0] > times[1] > times[2]
    assert times[2] == pytest.approx(legs.time_s, rel=0.03)


def test_everybody_waits_for_who_is_late() -> None:
    """A ring that forwards in order ends n hops after its last member has started."""
    layout = AxisLayout(factors=(4, 1, 1), strides=(1, 1, 1))
    machine = parse_machine("v4:4x4x4")
    alone = hop_by_hop(machine, layout, "all-gather", 2.0**20)
    late = hop_by_hop(machine, layout, "all-gather", 2.0**20, late_s={0: 1e-3})
    assert late.time_s == pytest.approx(alone.time_s + 1e-3, rel=1e-9)
