"""The section `compiler` of a hardware file, and the switch that uses it."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.errors import FileError, HardwareError
from shardsim.machine import chip_names, load_chip, override_chip, parse_machine, with_op_costs
from shardsim.machine.op_costs import SHARES, op_costs_from_data
from shardsim.plan import load_plan
from shardsim.planner.changes import changed

LEARNED = [name for name in chip_names() if load_chip(name).compiler]


@pytest.mark.parametrize("name", LEARNED)
def test_a_section_says_where_it_comes_from(name):
    costs = load_chip(name).compiler
    assert costs is not None
    assert set(costs.versions) == {"jax", "libtpu"}
    assert str(sum(one.ops for one in costs.residuals.values())) in costs.fitted_to
    assert all(0 < getattr(costs, share) <= 1 for share in SHARES)
    assert op_costs_from_data(costs.to_data(), name).to_data() == costs.to_data()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("status",), "measured", "status must be fitted"),
        (("date",), "", "date must be a text"),
        (("versions",), ["libtpu"], "versions must be a mapping"),
        (("constants", "matmul_efficiency"), 1.2, "at most 1"),
        (("constants", "fixed_cycles"), -1, "zero or more"),
        (("constants", "results_per_cycle"), 0, "must be positive"),
        (("constants", "results_per_cycle"), True, "must be a number"),
        (("constants", "resultsper_cycle"), 1, "did you mean 'results_per_cycle'"),
        (("residuals", "copy"), {"ops": 1}, "missing key"),
        (("fitted_to",), "a\x1bb", "fitted_to must be a text"),
    ],
)
def test_a_damaged_section_is_refused_in_one_line(path, value, message):
    costs = load_chip("v4").compiler
    assert costs is not None
    data: Any = costs.to_data()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FileError) as caught:
        op_costs_from_data(data, "mine.yaml: compiler")
    assert str(caught.value).startswith("mine.yaml: compiler")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_switch_needs_a_section():
    with pytest.raises(HardwareError, match="op_costs cannot be compiler"):
        override_chip(load_chip("h100"), {"op_costs": "compiler"})
    with pytest.raises(HardwareError, match="must be one of physical, compiler"):
        override_chip(load_chip("v4"), {"op_costs": "guessed"})


def test_the_switch_is_a_key_of_what_if():
    plan = load_plan("vit-22b-published-tp8")
    there = changed(plan, {"chip.op_costs": "compiler"})
    assert there.machine == with_op_costs(parse_machine(plan.machine.name), "compiler")
    assert changed(there, {"chip.op_costs": "physical"}) == plan
