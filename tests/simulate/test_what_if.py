"""What-ifs as people write them, and what is left of a slice with broken chips."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import refused, shardsim

from shardsim.errors import HardwareError
from shardsim.machine import parse_machine
from shardsim.machine.shapes import is_possible
from shardsim.plan import load_plan
from shardsim.planner.changes import changed
from shardsim.simulate import simulate_plan, what_if
from shardsim.simulate.spare import largest_part
from shardsim.simulate.topology import Fault, Topology

SMALL = ("predict", "llama3-8b-published-v6e-1x16", "--set", "model.layers=2")


def test_chips_have_a_place_and_a_number() -> None:
    machine = parse_machine("2*v4:4x4x8")
    for text in ("1:3,0,5", "229"):
        assert what_if(machine, stragglers=[f"{text}=1.5"]).slowdowns == ((229, 1.5),)
    assert what_if(machine, stragglers=["3,0,5=1.5"]).slowdowns == ((101, 1.5),)


def test_a_chip_of_two_devices_is_slow_in_both() -> None:
    machine = parse_machine("tpu7x:4x4x4")
    assert what_if(machine, stragglers=["0,0,1=2"]).slowdowns == ((2, 2.0), (3, 2.0))
    link = what_if(machine, dead_links=["0,0,0-0,0,3"]).faults
    assert link == (Fault(device=0, port=5), Fault(device=1, port=5))


@pytest.mark.parametrize("name", ["v4:4x4x8", "v4:4x4x8_twisted", "v5e:4x8"])
def test_every_wire_can_be_named_from_both_ends(name: str) -> None:
    machine = parse_machine(name)
    topology = Topology(machine)
    for device, port in product(range(topology.devices), range(topology.ports - 1)):
        other = int(topology.neighbour[device, port])
        if other < 0:
            continue
        (fault,) = what_if(machine, slow_links=[f"{device}-{other}=0.5"]).faults
        assert topology.neighbour[fault.device, fault.port] == other
        rates = Topology(machine, (fault,)).rates
        assert np.count_nonzero(rates != topology.rates) == 2


def test_options_do_what_the_library_does() -> None:
    plan = changed(load_plan("vit-22b-published-tp8"), {"model.layers": 6})
    options = ["--dead-link", "0,0,0-0,1,0", "--straggler", "5=1.1", "--fidelity", "events"]
    options += ["--set", "model.layers=6"]
    found = json.loads(shardsim("predict", "vit-22b-published-tp8", "--json", *options).stdout)
    same = simulate_plan(plan, straggler=(5, 1.1), dead_link=(0, 2))
    assert found["step_time_s"] == same.step_time_s
    assert found["events"]["perturbation"]["slowdowns"] == [[5, 1.1]]


def test_a_slow_dcn_and_a_twist_cost_time() -> None:
    def step(*words: str) -> float:
        result = shardsim("predict", *words, "--fidelity", "events", "--json")
        return float(json.loads(result.stdout)["step_time_s"])

    slices = ("maxtext-22b-published-v4-8x64", "--set", "model.layers=8")
    assert step(*slices, "--slow-dcn", "0.25") > 1.02 * step(*slices)
    vit = ("vit-22b-published-tp8", "--set", "model.layers=4")
    assert step(*vit, "--twisted") > 1.02 * step(*vit)


def test_jitter_has_a_seed() -> None:
    def run(seed: str) -> str:
        words = ("--fidelity", "events", "--jitter", "0.05", "--seed", seed)
        return shardsim(*SMALL, *words).stdout

    assert run("1") == run("1") != run("2")


def test_a_timeline_of_what_if(tmp_path: Path) -> None:
    target = tmp_path / "trace.json"
    words = ("timeline", *SMALL[1:], "-o", str(target), "--straggler", "0,0=1.5", "--json")
    data = json.loads(shardsim(*words).stdout)
    plain = json.loads(shardsim(*SMALL, "--fidelity", "events", "--json").stdout)
    assert data["step_time_s"] > 1.2 * plain["step_time_s"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--straggler", "9,0=1.1"], "'9,0' is no chip of v6e:4x4; its chips are 0,0 to 3,3"),
        (["--straggler", "0,0"], "expected a number after '='"),
        (["--straggler", "0,0=nan"], "expected a number after '='"),
        (["--straggler", "0,0=0"], "the slowdown must be positive"),
        (["--straggler", "0,0=1e300"], "at most 1,000,000"),
        (["--straggler", "9999999999999999=2"], "is no chip"),
        (["--straggler", "\u0663=2"], "is no chip"),
        (["--dead-link", "0,0"], "a link is two neighbours"),
        (["--dead-link", "0,0-0,3"], "has no such link"),
        (["--dead-link", "0,0-0,0"], "has no such link"),
        (["--slow-link", "0,0-0,1=0"], "above 0 and at most 1"),
        (["--slow-link", "0,0-0,1=1.5"], "above 0 and at most 1"),
        (["--dead-chip", "-1"], "is no chip"),
        (["--dead-chip", "1,1"], "use --set machine=v6e:2x4"),
        (["--jitter", "-0.1"], "jitter must be 0 to 10"),
        (["--jitter", "inf"], "jitter must be 0 to 10"),
        (["--seed", "-1"], "--seed"),
        (["--slow-dcn", "0.5"], "is one slice"),
        (["--twisted"], "can be twisted"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], told: str) -> None:
    result = shardsim(*SMALL, "--fidelity", "events", *words)
    assert told in refused(result)


def test_what_is_compiled_is_no_closed_form() -> None:
    result = shardsim(*SMALL, "--compiled")
    assert result.exit_code == 2
    assert "--fidelity events" in result.stderr
    result = shardsim(*SMALL, "--fidelity", "compiled", "--dead-chip", "1,1")
    assert result.exit_code == 2
    assert "chip 1,1 is broken" in result.stderr


def test_closed_forms_know_no_stragglers() -> None:
    for words in (["--straggler", "0,0=1.1"], ["--slow-dcn", "0"], ["--twisted"]):
        result = shardsim(*SMALL, *words)
        assert result.exit_code == 2
        assert "--fidelity events" in result.stderr


# Broken chips.


def test_a_broken_chip_takes_its_wires_along() -> None:
    machine = parse_machine("v4:4x4x4")
    made = Topology(machine, broken=(21,))
    assert 21 not in made.graph
    assert made.graph.number_of_edges() == 6 * 64 - 12
    assert np.count_nonzero(made.rates) == 6 * 64 - 12
    assert nx.is_strongly_connected(made.graph)
    for source, target in ((20, 22), (17, 25), (5, 37)):
        route = made.route(source, target)  # the direct way is through 21
        assert len(route) == 2  # the other way round
        assert not made.dead & set(route)
    grid = Topology(parse_machine("v5e:4x4"), broken=(5,))
    assert len(grid.route(4, 6)) == 4
    with pytest.raises(HardwareError, match="no working way"):
        made.route(0, 21)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["v4:4x4x8", "v4:8x8x8", "v5e:8x16", "2*v4:4x4x4", "tpu7x:4x4x8"]),
    data=st.data(),
)
def test_the_largest_part_is_whole_and_none_is_larger(name: str, data: st.DataObject) -> None:
    machine = parse_machine(name)
    broken = data.draw(st.sets(st.integers(0, machine.devices - 1), max_size=4))
    part = largest_part(machine, broken)
    each = machine.devices // machine.chips
    holes = [np.unravel_index(n // each, (machine.slices, *machine.shape)) for n in broken]

    def whole(number: int, first: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        return not any(
            hole[0] == number
            and all(a <= b < a + c for a, b, c in zip(first, hole[1:], shape, strict=True))
            for hole in holes
        )

    assert part is not None
    assert whole(part.slice, part.first, part.shape)
    assert is_possible(machine.chip, part.shape)
    for shape in product(*(range(1, length + 1) for length in machine.shape)):
        if np.prod(shape) > part.chips and is_possible(machine.chip, shape):
            steps = [
                range(0, length - side + 1, min(4, side))
                for length, side in zip(machine.shape, shape, strict=True)
            ]
            for number, first in product(range(machine.slices), product(*steps)):
                assert not whole(number, first, shape)


@pytest.mark.parametrize(
    ("name", "chips", "told"),
    [
        ("vit-22b-published-tp8", ["3,0,5"], r"chip 3,0,5 is broken.* machine=v4:8x8x8 "),
        ("maxtext-16b-published-v5e-8x256", ["1:3,0", "7:0,0"], r"machine=6\*v5e:16x16 "),
        ("llama3-70b-published-tpu7x-1x64", ["0,0,1"], r"chip 0,0,1 is broken.*tpu7x:2x4x4 "),
    ],
)
def test_a_plan_that_needs_the_chip_is_refused(name: str, chips: list[str], told: str) -> None:
    plan = load_plan(name)
    with pytest.raises(HardwareError, match=told):
        simulate_plan(plan, perturbation=what_if(plan.machine, dead_chips=chips))
