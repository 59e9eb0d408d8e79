"""Constants learned from single operations: recovered where known, and made anew from the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
import yaml

from shardsim.errors import ShardsimError
from shardsim.machine import chip_names, load_chip, load_chip_file
from shardsim.machine.op_costs import CONSTANTS, OpCosts
from shardsim.validate.op_file import hardware_text
from shardsim.validate.op_fit import (
    OF_CLASS,
    OWN,
    Estimates,
    Points,
    constants_lines,
    fit,
    fitted_cycles,
    points_text,
    points_with,
    read_points,
    refit,
    residuals_lines,
)
from shardsim.validate.ops import CLASSES, Op, parse_op, standard_ops
from shardsim.validate.runs import validate

KNOWN = OpCosts(
    matmul_efficiency=0.9,
    results_per_cycle=200.0,
    resident_contraction=1700.0,
    matmul_hbm_efficiency=0.6,
    prologue_bytes=3e6,
    elementwise_hbm_efficiency=0.3,
    vector_ops_per_cycle=700.0,
    attention_hbm_efficiency=0.4,
    optimizer_hbm_efficiency=0.65,
    copy_hbm_efficiency=0.25,
    transpose_hbm_efficiency=0.2,
    fixed_cycles=3000.0,
)


def shipped_costs(label: str) -> OpCosts:
    chip = load_chip(label.removesuffix(OWN))
    costs = chip.compilers[1] if label.endswith(OWN) else chip.compiler
    assert costs is not None
    return costs


@pytest.fixture(scope="module")
def points() -> Points:
    return read_points()


def test_known_constants_are_recovered():
    chip = replace(load_chip("v4"), compiler=KNOWN)
    cycles = {op: round(fitted_cycles(chip, op)) for op in standard_ops()}
    found = fit(chip, cycles)
    for name in CONSTANTS:
        # No operation has a contraction between 1408 and 2048: any value there is as good.
        close = 0.25 if name == "resident_contraction" else 0.03
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=close), name
    assert max(one.p90 for one in found.residuals.values()) < 0.01


def test_every_chip_with_points_has_constants(points):
    known = [load_chip(name) for name in chip_names() if load_chip(name).compiler]
    own = {chip.name + OWN for chip in known if chip.compilers}
    assert set(points.cycles) == {chip.name for chip in known} | own
    assert len(own) == sum(chip.scoped_vmem_bytes is not None for chip in known) > 0
    assert len(points.cycles) >= 3


@pytest.mark.parametrize("name", list(read_points().cycles))
def test_refitting_gives_the_constants_of_the_hardware_file(name, points):
    found, shipped = refit(name, points), shipped_costs(name)
    assert found.to_data() == shipped.to_data()


def test_residuals_are_those_of_the_points(points):
    chip = load_chip("v4")
    assert chip.compiler is not None
    for group in CLASSES:
        cycles = {op: n for op, n in points.cycles["v4"].items() if op.group == group}
        apart = [abs(np.log(fitted_cycles(chip, op) / n)) for op, n in cycles.items()]
        residual = chip.compiler.residuals[group]
        assert residual.ops == len(apart)
        assert residual.median == pytest.approx(np.median(apart), abs=1e-4)
        assert residual.worst == pytest.approx(max(apart), abs=1e-4)
        assert apart[list(cycles).index(parse_op(residual.worst_op))] == max(apart)


def test_no_constant_moved_alone_fits_better(points):
    chip = load_chip("v4")
    assert chip.compiler is not None
    for group, names in OF_CLASS.items():
        mine = {op: n for op, n in points.cycles["v4"].items() if op.group == group}
        estimates = Estimates(chip, mine)
        best = estimates.loss(chip.compiler)
        for name in names:
            for factor in (0.95, 1.05):
                value = getattr(chip.compiler, name) * factor
                if name.endswith("efficiency") and value > 1:
                    continue
                assert estimates.loss(replace(chip.compiler, **{name: value})) >= best - 1e-7


def test_points_are_written_as_they_are_read(points, tmp_path):
    path = tmp_path / "points.csv"
    path.write_text(points_text(points), encoding="utf-8")
    assert read_points(path) == points


def test_points_of_another_chip_are_added_and_of_another_compiler_refused(points):
    (op,) = list(points.cycles["v4"])[:1]
    more = replace(points, cycles={"v6e": {op: 5}})
    added = points_with(points, "v6e", more)
    assert added.cycles == {**points.cycles, "v6e": {op: 5}}
    with pytest.raises(ShardsimError, match="cannot be mixed with jax 1, libtpu 2"):
        points_with(points, "v6e", replace(more, versions={"jax": "1", "libtpu": "2"}))


def test_a_class_without_operations_cannot_be_fitted(points):
    chip = load_chip("v4")
    cycles = {op: n for op, n in points.cycles["v4"].items() if op.group != "copy"}
    with pytest.raises(ShardsimError, match="0 operations of the class copy"):
        fit(chip, cycles)


def test_a_hardware_file_with_new_constants_is_the_chip_with_them(tmp_path):
    chip = load_chip("v5e")
    costs = replace(KNOWN, fitted_to="nothing", date="2026-01-01", versions={"libtpu": "0"})
    path = tmp_path / "v5e.yaml"
    own = replace(costs, fixed_cycles=1.0)
    path.write_text(hardware_text("v5e", costs, own), encoding="utf-8")
    again = load_chip_file(path)
    assert again.compiler == costs
    assert again.compilers == (costs, own)
    shipped = {name: getattr(chip, name) for name in ("compiler", "compilers", "aliases")}
    assert replace(again, **shipped) == chip
    assert yaml.safe_load(path.read_text())["compiler"]["constants"]["fixed_cycles"] == 3000.0


def test_the_page_has_the_tables_of_the_hardware_files():
    chips = {label: shipped_costs(label) for label in read_points().cycles}
    page = Path(__file__).parents[2] / "docs" / "cost-model.md"
    text = page.read_text(encoding="utf-8")
    assert "\n".join(constants_lines(chips)) in text
    assert "\n".join(residuals_lines(chips)) in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("matmull:1,2,3,4:bf16", "did you mean 'matmul'"),
        ("matmul:1,2,3:bf16", "expected name:batch,m,k,n:dtype"),
        ("matmul:1,2,3,4:f16", "unknown dtype"),
        ("matmul:1,0,3,4:f32", "sizes must be positive"),
        ("\x1b[31m", "expected name"),
    ],
)
def test_what_is_no_operation_is_told_in_one_line(text, message):
    with pytest.raises(ShardsimError, match=message) as caught:
        parse_op(text)
    assert str(caught.value).isprintable()


def test_every_standard_operation_is_read_back():
    ops = standard_ops()
    assert len(set(ops)) == len(ops)
    assert [parse_op(op.text) for op in ops] == ops
    assert {op.group for op in ops} == set(CLASSES)


def test_tasks_have_the_flops_and_bytes_of_the_arrays():
    (task,) = Op(name="matmul_residual", batch=3, m=8, k=128, n=256, dtype="f32").tasks()
    assert task.flops == 3 * 2 * 8 * 128 * 256
    assert task.hbm_bytes == 3 * (2 * 8 * 128 + 2 * 128 * 256 + 8 * 256 * (4 + 2))
    scores, softmax = Op(name="attention", batch=2, m=256, k=64, n=256).tasks()
    assert scores.flops == 2 * 2.0 * 2 * 16 * 256 * 256 * 64
    assert softmax.hbm_bytes == 2 * 16 * 256 * 256 * 3 * 2


@pytest.mark.slow
def test_the_page_has_the_errors_under_both_costs():
    page = Path(__file__).parents[2] / "docs" / "accuracy.md"
    text = page.read_text(encoding="utf-8")
    calibrated, compiler = (
        {row.id: row for row in validate(op_costs=costs).rows}
        for costs in ("calibrated", "compiler")
    )
    for family in ("v3", "v4", "v5e", "v5p", "v6e", "tpu7x"):
        pairs = [
            (row.error, compiler[name].error)
            for name, row in calibrated.items()
            if row.family == family and row.error is not None
        ]
        cells = [family, str(len(pairs))]
        for errors in zip(*pairs, strict=True):
            apart = [abs(error) for error in errors]
            cells += [f"{100 * median(apart):.1f}", f"{100 * mean(apart):.1f}"]
        cells.append(f"{100 * mean(pair[1] for pair in pairs):+.1f}")
        assert f"| {' | '.join(cells)} |" in text
