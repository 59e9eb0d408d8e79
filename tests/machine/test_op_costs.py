"""The section `compiler` of a hardware file, and the key of a plan that uses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.errors import FileError, HardwareError, PlanError
from shardsim.machine import chip_names, load_chip
from shardsim.machine.op_costs import SHARES, op_costs_from_data
from shardsim.plan import load_plan, plan_to_data
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


def test_the_key_needs_a_section():
    plan = load_plan("vit-22b-published-tp8")
    with pytest.raises(PlanError, match="'guessed' is not possible"):
        replace(plan, op_costs="guessed")
    bare = replace(plan.machine, chip=replace(plan.machine.chip, compiler=None))
    with pytest.raises(PlanError, match="op_costs: the file of v4 has none"):
        replace(plan, op_costs="compiler", machine=bare)
    with pytest.raises(HardwareError, match="compiler's op costs are not known"):
        predict(replace(plan, machine=bare), costs="compiler")


def test_costs_are_the_plans_and_not_the_chips():
    plan = load_plan("vit-22b-published-tp8")
    there = changed(plan, {"op_costs": "compiler"})
    assert there.machine == plan.machine
    assert plan_to_data(there) == plan_to_data(plan) | {"op_costs": "compiler"}
    assert changed(there, {"op_costs": "calibrated"}) == plan
    with pytest.raises(HardwareError, match="no figure of a chip"):
        changed(plan, {"chip.op_costs": "compiler"})
