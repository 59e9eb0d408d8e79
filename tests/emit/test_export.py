"""Exported files: valid, self-contained, and safe whatever the names in the plan are."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plans import MODELS, PLANS, spread
from shardsim.emit import export_plan
from shardsim.emit.dialects.flax import logical_rules
from shardsim.emit.dialects.rules import resolve_names
from shardsim.emit.shrink import shrink
from shardsim.emit.source import module_text, op_modules, program_text
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, load_plan, plan_from_data, plan_names, resolve
from shardsim.plan.precision import NARROW
from shardsim.xla.host import QUICK

FORMS = ("jax", "specs", "flax", "json", "yaml")


def plan_called(name: str, axis: str = "model") -> Plan:
    inside = {key: [axis] for key in ("heads", "mlp", "vocab")}
    data = {
        "name": name,
        "note": name,
        "model": {"name": "vit", **MODELS["vit"]},
        "machine": "v5e:2x4",
        "batch": 16,
        "mesh": {"fsdp": 2, axis: 4},
        "rules": {
            "parameters": {"embed": ["fsdp"], **inside},
            "activations": {"batch": ["fsdp"], "seq": [axis]},
        },
    }
    return plan_from_data(data, "plan")


def without_text(tree: ast.AST) -> str:
    """Return the structure of a program, every string in it replaced by nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


def test_no_name_is_defined_twice_in_one_program() -> None:
    """All modules become one file: a second definition of a name would replace the first."""
    runs = re.findall(r'@runs\("(\w+)"\)', "".join(map(module_text, op_modules())))
    assert {"embed_patches", "soft_experts"} <= set(runs)
    defined: dict[str, str] = {}
    for section in program_text(runs)[1]:
        for node in ast.parse(section).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [item.id for item in node.targets if isinstance(item, ast.Name)]
            for name in names:
                assert defined.setdefault(name, ast.dump(node)) == ast.dump(node), name


@cache
def plain_structure(to: str) -> str:
    return without_text(ast.parse(export_plan(plan_called("plain"), to)))


hostile = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            '"""\nimport os\nos.remove("x")\n"""',
            "'); raise SystemExit('",
            "x\nraise SystemExit",
            "x\r\u2028\u2029\x0c\x85raise SystemExit",
            "\\",
            "\\'",
            "{plan}{0}%s$x",
            "'''",
            "\x00",
            "# \\\n",
        ]
    ),
)


@settings(max_examples=60, deadline=None)
@given(name=hostile)
def test_a_name_is_only_ever_text(name: str) -> None:
    plan = plan_called(name)
    for to in ("jax", "specs", "flax"):
        code = export_plan(plan, to)
        assert code.isascii()
        tree = ast.parse(code)
        found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert name in found
        assert without_text(tree) == plain_structure(to)
    assert json.loads(export_plan(plan, "json"))["plan"]["name"] == name
    assert yaml.safe_load(export_plan(plan, "yaml"))["plan"]["name"] == name


@settings(max_examples=30, deadline=None)
@given(axis=st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,7}", fullmatch=True))
def test_so_is_the_name_of_a_mesh_axis(axis: str) -> None:
    if axis == "fsdp":
        return
    code = export_plan(plan_called("plain", axis), "jax")
    compile(code, "train.py", "exec")
    assert code.isascii()


@pytest.mark.parametrize("name", ["a'b", 'a"b', "a\nb", "exec('x')", "a b"])
def test_a_mesh_axis_must_be_an_identifier(name: str) -> None:
    with pytest.raises(PlanError, match="letters"):
        plan_called("plain", name)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("name", ["tensor, sequence, two directions", "2-D tensor, sequence"])
def test_every_form_says_where_it_comes_from(name: str, to: str) -> None:
    text = export_plan(PLANS[name], to)
    for word in ("test", "v5e:2x4", PLANS[name].model.name, "0.1.0"):
        assert word in text


@pytest.mark.parametrize("to", ["jax", "specs", "flax"])
def test_the_emitted_code_imports_only_what_it_says(to: str) -> None:
    code = export_plan(PLANS["2-D tensor, sequence"], to)
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"jax", "numpy", "optax"}
    assert "shardsim." not in re.sub(r"`shardsim\.\S+`", "", code)


@pytest.mark.parametrize("to", FORMS)
def test_every_form_has_the_plans_compiler_options(to: str) -> None:
    own = {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_enable_async_all_gather": "false"}
    plan = spread("vit", {"fsdp": 8}, compiler_options=own)
    options = plan_data(plan)["plan"]["tpu_options"]
    assert options.items() >= own.items()
    assert options["xla_tpu_enable_async_collective_fusion"] == "true"
    text = export_plan(plan, to)
    for name, value in options.items():
        assert re.search(f"{name}['\"]?: ['\"]{value}['\"]", text)


def test_an_unknown_form_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match="did you mean 'jax'"):
        export_plan(PLANS["data"], "jaxx")


def test_exporting_does_not_import_jax() -> None:
    program = (
        "import sys\nfrom shardsim.emit import export_plan\nfrom shardsim.plan import load_plan\n"
        "plan = load_plan('vit-22b-published-tp8')\n"
        f"for to in {FORMS}:\n    export_plan(plan, to)\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def environment() -> dict[str, str]:
    here = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONPATH": os.pathsep.join(sys.path)}
    return os.environ | here


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]


@pytest.mark.parametrize("name", ["vit-22b-published-tp8", "maxtext-16b-published-v5e-8x256"])
def test_an_exported_file_trains_on_eight_host_devices(name: str, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(export_plan(load_plan(name), "jax"))
    command = [sys.executable, "-W", "error", str(file), "--host-devices", "8", "--steps", "12"]
    clean = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = losses(done.stdout)
    assert len(found) == 12
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


def test_an_exported_file_says_how_many_devices_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(export_plan(load_plan("vit-22b-published-tp8"), "jax"))
    command = [sys.executable, str(file), "--host-devices", "3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs 1024 devices and its tiny copy 8, but there are 3" in done.stderr


@pytest.mark.parametrize("name", plan_names())
def test_every_plan_that_ships_can_be_exported_or_says_why_not(name: str) -> None:
    plan = load_plan(name)
    formats = {plan.precision.compute, plan.precision.parameters, plan.precision.reduce}
    stages = int(resolve(plan).pipeline.size) > 1
    refused = bool(formats & {"fp8", "int8"}) or (stages and plan.pipeline_schedule == "1f1b")
    if refused or not ("published" in name or name == "vit-e-data-parallel"):
        try:
            text = export_plan(plan, "jax")
        except PlanError as error:
            assert "not supported" in str(error) or "is supported for" in str(error)  # noqa: PT017
            return
        assert not refused
        compile(text, name, "exec")
        return
    compile(export_plan(plan, "jax"), name, "exec")
    if plan.accumulation == "repeated" and int(resolve(plan).pipeline.size) == 1:
        export_plan(plan, "flax")


def test_what_cannot_be_emitted_of_stages_and_accumulation_is_refused() -> None:
    mesh, more = {"stage": 2, "data": 4}, {"microbatches": 2}
    plan = spread("vit", mesh, **more)
    with pytest.raises(PlanError, match="pipeline_schedule: export of 1f1b is not supported"):
        export_plan(plan, "jax")
    ticks = replace(plan, pipeline_schedule="gpipe")
    compile(export_plan(ticks, "jax"), "ticks", "exec")
    with pytest.raises(PlanError, match="execution: export of pipeline stages as partitioned"):
        export_plan(replace(ticks, execution="partitioned"), "jax")
    layered = replace(PLANS["fsdp, serial, microbatches"], accumulation="layered")
    for other in (ticks, layered):
        with pytest.raises(PlanError, match=r"export to flax: (pipeline stages|accumulation)"):
            export_plan(other, "flax")


_GPIPE = {"pipeline_schedule": "gpipe"}


@pytest.mark.parametrize(
    ("mesh", "more", "words"),
    [
        ({"fsdp": 4, "context": 2}, {}, "mesh: export of an index of tokens over a context axis"),
        (
            {"stage": 2, "fsdp": 4},
            {"microbatches": 2, "pipeline_schedule": "gpipe"},
            "over pipeline",
        ),
        ({"fsdp": 8}, {"machine": "h100:8"}, "machine: export of an index of tokens for GPUs"),
        (
            {"fsdp": 8},
            {"accumulation": "gathered", "microbatches": 2},
            "accumulation: export of an index of tokens as gathered is not supported; use repeated",
        ),
    ],
)
def test_what_an_index_of_tokens_is_not_emitted_with_is_said(
    mesh: dict[str, int], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        export_plan(spread("index", mesh, **more), "jax")


# Flax rules.


@pytest.mark.parametrize("name", PLANS)
def test_flax_rules_resolve_to_the_specs_of_the_plan(name: str) -> None:
    data = plan_data(PLANS[name])
    rules, parameters = logical_rules(data)
    for weight, names in parameters.items():
        assert resolve_names(names, rules) == data["parameters"][weight]["spec"]


def test_flax_leaves_a_dimension_whole_if_its_mesh_axis_is_taken() -> None:
    rules = [("embed", ("model",)), ("embed", ("data",)), ("mlp", ("model",))]
    assert resolve_names(("embed", "mlp"), rules) == [["model"], []]
    assert resolve_names(("embed", "mlp"), rules[::-1]) == [["data"], ["model"]]
    assert resolve_names(("unknown",), rules) == [[]]


# Tiny copies.


@pytest.mark.parametrize("name", plan_names())
def test_a_tiny_copy_keeps_every_axis_and_technique(name: str) -> None:
    plan = load_plan(name)
    tiny, lost = shrink(plan, 8)
    assert tiny.machine.devices <= 8
    assert [axis.name for axis in tiny.mesh] == [axis.name for axis in plan.mesh]
    for before, after in zip(plan.mesh, tiny.mesh, strict=True):
        if before.size > 1:
            assert after.size > 1 or any(f"'{before.name}'" in text for text in lost)
    before, after = resolve(plan), resolve(tiny)
    assert before.names == after.names
    assert int(before.residual) == int(after.residual)
    assert (plan.remat, plan.overlap, plan.optimizer) == (tiny.remat, tiny.overlap, tiny.optimizer)
    assert plan.fused_projections == tiny.fused_projections
    # Products of 8 bits, sparse ones and sums in bf16 are not run, and that is said.
    formats = {key for key in ("compute", "sparsity") if f"precision.{key} " in "".join(lost)}
    narrow = plan.precision.compute in NARROW
    assert formats == {*["compute"] * narrow, *["sparsity"] * bool(plan.precision.sparsity)}


def test_shardings_are_ready_for_a_notebook() -> None:
    program = """
import jax
from shardsim.emit.runtime.host import use_host_devices
use_host_devices(8)
from plans import PLANS
from shardsim.emit import build_mesh, shardings, trainer
plan = PLANS["2-D tensor, sequence"]
found = shardings(plan, build_mesh(plan))
assert found["parameters"]["mlp_in"].spec == jax.P(None, ("model2", "fsdp"), ("model",))
assert found["activations"]["residual"].spec == jax.P(("fsdp",), ("model",), ("model2",))
assert found["optimizer"].keys() == found["parameters"].keys()
assert trainer(plan).batch(0)["tokens"].shape == (16, 16)
"""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *sys.path])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        env=environment() | {"PYTHONPATH": path},
    )
