"""`export --to specs`, imported by a process with eight host devices."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_export import environment

from plans import PLANS, make
from shardsim.emit import export_plan
from shardsim.emit.specs import activation_specs, parameter_table
from shardsim.plan import load_plan, resolve
from shardsim.planner.search import search
from shardsim.xla.host import QUICK, host_environment

NAMES = [
    "data, sharded optimizer",
    "fsdp, serial, microbatches",
    "data and fsdp",
    "tensor, sequence, two directions",
    "2-D tensor, sequence",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a process with eight devices makes of the modules of some plans."""
    folder = tmp_path_factory.mktemp("specs")
    asked = {}
    for number, name in enumerate(NAMES):
        plan = PLANS[name]
        (folder / f"laid{number}.py").write_text(export_plan(plan, "specs"))
        table = parameter_table(plan, resolve(plan))
        asked[name] = f"laid{number}.py", {key: one["shape"] for key, one in table.items()}
    (folder / "asked.json").write_text(json.dumps(asked))
    here = Path(__file__).parent
    devices = host_environment(8, QUICK)
    command = [sys.executable, "-W", "error", str(here / "run_specs.py"), str(folder)]
    without = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, env=without | devices, cwd=os.sep)
    answers: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return answers


@pytest.mark.parametrize("name", NAMES)
def test_every_array_lies_as_in_the_plan(name: str, told: dict[str, Any]) -> None:
    table = parameter_table(PLANS[name], resolve(PLANS[name]))
    assert told[name]["mesh"] == {axis.name: axis.size for axis in PLANS[name].mesh}
    for key, entry in table.items():
        for found, wanted in (("specs", "spec"), ("states", "optimizer_spec")):
            spec = told[name][found][key]
            spec += [[]] * (len(entry[wanted]) - len(spec))
            assert spec == entry[wanted], key
    assert told[name]["check"] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_array_that_lies_otherwise_is_named(name: str, told: dict[str, Any]) -> None:
    wrong = told[name]["wrong"]
    assert wrong or name == "data, sharded optimizer"
    for array, lines in wrong.items():
        (line,) = lines
        assert line.startswith(f"layers/{array} [")
        assert ": lies as " in line
        assert ", planned is " in line
    (line,) = told[name]["unnamed"]
    assert line == "odd [999, 997]: no rule and no shape of the plan names it"


@pytest.mark.parametrize("name", NAMES)
def test_the_devices_stand_as_the_emitted_step_has_them(name: str, told: dict[str, Any]) -> None:
    """Each place once, members of a mesh axis along the torus axes that the plan names."""
    plan, places = PLANS[name], told[name]["places"]
    assert len({tuple(place) for place in places}) == plan.machine.devices
    inner = 1
    for axis in reversed(plan.mesh):
        torus = {name for name, factor in axis.torus.items() if factor > 1}
        first = [places[step * inner] for step in range(axis.size)]
        moved = {
            torus_axis.name
            for place, torus_axis in enumerate(plan.machine.axes, 1)
            if len({member[place] for member in first}) > 1
        }
        assert moved == torus
        inner *= axis.size


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_constrained_under_the_policy(name: str, told: dict[str, Any]) -> None:
    plan = PLANS[name]
    assert any(activation_specs(plan, resolve(plan))["residual"])
    assert told[name]["constrained"] >= 1


def test_names_of_trainers_and_matrices_of_two_dimensions(tmp_path: Path) -> None:
    """Paths as Flax, MaxText and Hugging Face have them; heads of one head in one dimension."""
    plan = make(
        "llama",
        {"fsdp": 2, "model": 4},
        {"embed": ["fsdp"], "heads": ["model"]} | {"mlp": ["model"], "vocab": ["model"]},
        {"batch": ["fsdp"], "heads": ["model"], "mlp": ["model"], "vocab": ["model"]},
    )
    (tmp_path / "laid.py").write_text(export_plan(plan, "specs"))
    program = """
import laid, jax, json, sys
def spec(path, *shape):
    tree = jax.ShapeDtypeStruct(shape, "float32")
    for part in reversed(path.split("/")):
        tree = {part: tree}
    (found,) = jax.tree.leaves(laid.specs(tree), is_leaf=lambda x: isinstance(x, jax.P))
    return list(found)
assert spec("layers_0/attention/query/kernel", 64, 64) == ["fsdp", "model"]
assert spec("decoder/layers/self_attention/query/kernel", 64, 2, 8, 8) == [
    "fsdp", None, "model", None]
assert spec("decoder/layers/self_attention/out/kernel", 8, 2, 8, 64) == [
    "model", None, None, "fsdp"]
assert spec("decoder/layers/mlp/wi_0/kernel", 64, 2, 128) == ["fsdp", None, "model"]
assert spec("decoder/layers/mlp/wo/kernel", 128, 2, 64) == ["model", None, "fsdp"]
assert spec("model/layers/0/mlp/down_proj/weight", 64, 128) == ["fsdp", "model"]
assert spec("0/mu/layers/mlp_in", 2, 64, 128) == [None, "fsdp", "model"]
assert spec("step") == []
"""
    there = environment()
    there["PYTHONPATH"] = os.pathsep.join([str(tmp_path), there["PYTHONPATH"]])
    subprocess.run([sys.executable, "-c", program], check=True, env=there)


@pytest.mark.parametrize("name", ["vit-22b-published-tp8", "llama2-70b-published-v6e-1x256"])
def test_a_module_is_short_and_says_the_options(name: str) -> None:
    text = export_plan(load_plan(name), "specs")
    code = text.partition("def build_mesh")[2]
    assert len(code.splitlines()) < 200
    assert math.isfinite(len(text))
    assert "xla_enable_async_all_gather" in text


def test_kinds_of_layers_are_told_apart_by_their_sizes() -> None:
    """Dense layers before those with experts have an MLP of the same name and other sizes."""
    plan = search("deepseek-v2-lite", "v5p:2x2x2", batch=64, top=1, max_axes=1).best.plan
    text = export_plan(plan, "specs")
    values: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id.isupper():
                values[node.targets[0].id] = ast.literal_eval(node.value)
    sizes = [tuple(sizes) for name, sizes, *_ in values["WEIGHTS"] if name == "mlp_out"]
    assert sizes == [t.shape for t in plan.model.tensors if t.name == "mlp_out"]
    assert values["LAYERS"] == [1, 26, 27]  # dense, with experts, attention of all
