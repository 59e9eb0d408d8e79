"""Products of rows in groups: the price of their kernel against timings of it."""

from __future__ import annotations

import csv
from statistics import median
from typing import cast

import pytest

from shardsim.cost.costs import costs_of
from shardsim.files import data_folder
from shardsim.machine import Machine, load_chip
from shardsim.plan import Layout
from shardsim.program.grouped import multiply_groups, multiply_groups_as_libraries
from shardsim.program.rules import Rule, Where
from shardsim.program.schedule import Block
from shardsim.program.tasks import Compute

TIMINGS = data_folder("plans").parent / "shardsim" / "validate" / "data" / "tokamax_grouped.csv"
NOWHERE = cast(Layout, None)  # rules of single products read none


def priced(rule: Rule, chip: str, rows: float, k: float, n: float, groups: int) -> float:
    """Return the seconds of rows [groups x rows, k] times a matrix [k, n] for each group; with
    `rows` negative of the gradient of those matrices."""
    gradient = rows < 0
    m, k = (k, -rows) if gradient else (rows, k)
    of = "k" if gradient else "m"
    task = Compute(name="p", kind="matmul", m=m, k=k, n=n, batch=groups, matmuls=1, groups=of)
    machine = Machine(chip=load_chip(chip), shape=(1,) * load_chip(chip).torus_dims)
    block = Block(name="b", phase="forward", trips=1, tasks=(task,))
    (made,) = rule(block, Where(machine=machine, layout=NOWHERE)).tasks
    assert isinstance(made, Compute)
    return float(costs_of("calibrated", machine.chip).operation(made).total_s)


def test_tokamaxs_kernel_takes_about_what_it_was_timed_at() -> None:
    with TIMINGS.open(encoding="utf-8") as file:
        found = list(csv.DictReader(line for line in file if not line.startswith("#")))
    errors = []
    for row in found:
        m, k, n, groups = (int(row[name]) for name in ("rows", "k", "n", "groups"))
        k, n = (n, k) if row["product"] == "dlhs" else (k, n)
        rows = m / groups * (-1 if row["product"] == "drhs" else 1)
        took = priced(multiply_groups_as_libraries, "tpu7x", rows, k, n, groups)
        errors.append(took / float(row["ms"]) * 1e3 - 1)
    assert len(errors) == 98
    assert abs(median(errors)) < 0.02
    assert median(map(abs, errors)) < 0.07


@pytest.mark.parametrize("rule", [multiply_groups, multiply_groups_as_libraries])
@pytest.mark.parametrize("chip", ["v4", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("sign", [1, -1])
def test_fewer_rows_a_group_take_longer_in_all(rule: Rule, chip: str, sign: int) -> None:
    """The same rows in more groups: more tiles are shared, more matrices brought."""
    took = [
        priced(rule, chip, sign * 2**18 / groups, 4096, 1536, groups)
        for groups in (8, 32, 128, 512)
    ]
    assert took == sorted(took)
    assert took[-1] > 1.3 * took[0]
