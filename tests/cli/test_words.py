"""`shardsim predict MODEL --on SLICE --batch N --mesh ...`: a plan without its file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import Shardsim

from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.plan import resolve, save_plan
from shardsim.plan.io import plan_from_data, plan_to_data
from shardsim.plan.layout import REPLICATED, ROLES
from shardsim.plan.legality import check
from shardsim.planner.presets import parse_mesh, plan_of_mesh
from shardsim.planner.search import search

WORDS = ["vit-22b", "--on", "v4:8x8x16", "--batch", "65536", "--mesh", "fsdp=128,tensor=8"]

# The same plan, every rule written out.
FILE = """
model: vit-22b
machine: v4:8x8x16
batch: 65536
mesh: {fsdp: {size: 128, torus: [x, z]}, model: {size: 8, torus: [y]}}
rules:
  parameters: {embed: [fsdp], heads: [model], mlp: [model], vocab: [model]}
  activations: {batch: [fsdp], seq: [model], heads: [model], mlp: [model], vocab: [model]}
attention: flash
overlap: {gradients: false}
"""


def predicted(shardsim: Shardsim, *words: str) -> dict[str, object]:
    result = shardsim("predict", *words, "--json")
    assert result.exit_code in (0, 1), result.output
    data: dict[str, object] = json.loads(result.stdout)
    return {key: value for key, value in data.items() if key not in ("plan", "name")}


def test_words_are_the_plan_that_a_file_writes_out(shardsim: Shardsim, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(FILE)
    assert predicted(shardsim, *WORDS) == predicted(shardsim, str(file))
    changes = ("--set", "microbatches=4", "--set", "remat=dots")
    assert predicted(shardsim, *WORDS, *changes) == predicted(shardsim, str(file), *changes)
    assert predicted(shardsim, *WORDS, *changes) != predicted(shardsim, *WORDS)
    longer = predicted(shardsim, *WORDS, "--seq", "512")
    assert longer == predicted(shardsim, str(file), "--set", "sequence=512")


@pytest.mark.parametrize(
    "command",
    [
        ("ablate", "--json"),
        ("sweep", "--vary", "batch=1k,2k", "--json"),
        ("sensitivity", "--json"),
        ("export", "--to", "yaml"),
        ("timeline", "-o", "-"),
    ],
)
def test_every_command_about_one_plan_takes_words(
    shardsim: Shardsim, tmp_path: Path, command: tuple[str, ...]
) -> None:
    words = ("vit-b-16", "--on", "v5e:2x2", "--batch", "256", "--mesh", "fsdp=4")
    file = tmp_path / "plan.yaml"
    model, machine = load_model("vit-b-16"), parse_machine("v5e:2x2")
    save_plan(plan_of_mesh(model, machine, 256, {"fsdp": 4}), file)
    one, other = (shardsim(command[0], *of, *command[1:]) for of in (words, (str(file),)))
    assert (one.exit_code, one.stderr) == (0, other.stderr)
    assert one.stdout == other.stdout
    lone = shardsim(command[0], *words[:5], *command[1:])
    assert (lone.exit_code, lone.stdout) == (2, "")
    assert "--mesh: missing" in lone.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--scheduler", "foo"), "--scheduler: not used, as one slice is searched in this process"),
        (
            ("--workers", "2", "--timeout", "9", "--no-cache"),
            "--timeout, --no-cache: not used, as nothing is compiled without --compile-top\n"
            "--workers: not used, as one slice is searched in this process",
        ),
    ],
)
def test_options_that_nothing_comes_of_are_named(
    shardsim: Shardsim, words: tuple[str, ...], told: str
) -> None:
    search = ("plan", "vit-b-16", "--on", "v5e:2x2", "--batch", "64", "--max-axes", "1")
    result = shardsim(*search, *words)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"{told}\n")
    assert "not used" not in shardsim(*search).stderr


def test_one_device_needs_no_mesh(shardsim: Shardsim) -> None:
    words = ("vit-b-16", "--on", "v5e:1x1", "--batch", "64")
    assert predicted(shardsim, *words) == predicted(shardsim, *words, "--mesh", "data=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS[:1], "--on: missing; a model needs it, such as --on v4:8x8x16"),
        (WORDS[:3], "--batch: missing; a model needs it, such as --batch 1024"),
        (
            WORDS[:5],
            "--mesh: missing; name the roles of the 1,024 devices of v4:8x8x16, such as fsdp=1024",
        ),
        (
            [*WORDS[:6], "fsdp=128,tensor=4"],
            "mesh: its axes multiply to 512, but v4:8x8x16 has 1024 devices",
        ),
        (
            ["vit-22b", "--on", "v3:4x4", "--batch", "64", "--mesh", "fsdp=16"],
            "mesh: its axes multiply to 16, but v3:4x4 has 32 devices on 16 chips",
        ),
        ([*WORDS[:6], "fsdp=128,tensr=8"], "--mesh: no role 'tensr'; did you mean 'tensor'?"),
        ([*WORDS[:6], "tensor=8,model=128"], "--mesh: role 'tensor' appears twice"),
        (
            [*WORDS[:6], "fsdp=128,tensor=0"],
            "--mesh: 'tensor=0': expected role=size, such as fsdp=256,data=4",
        ),
        ([*WORDS[:6], "fsdp"], "--mesh: 'fsdp': expected role=size, such as fsdp=256,data=4"),
        (
            ["vit-22b-published-tp8", "--batch", "64"],
            "--batch: vit-22b-published-tp8 is a plan; change it with --set, or name a model",
        ),
        (
            ["vit-22b", "--on", "v4:8x8x16", "--batch", "1000", "--mesh", "fsdp=1024"],
            "vit-22b-fsdp1024: batch: sequences over data, fsdp and microbatches: 1000 does not "
            "divide by 1024; the nearest that do: 1024",
        ),
        (
            ["vit-22b", "--on", "v4:8x8x16", "--batch", "1024", "--mesh", "fsdp=512,tensor=2",
             "--set", "modl.layers=3"],
            "modl.layers: unknown key; did you mean 'model'?",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said_in_one_line(
    shardsim: Shardsim, words: list[str], message: str
) -> None:
    result = shardsim("predict", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"


MESHES = st.fixed_dictionaries({role: st.sampled_from([1, 2, 4, 8]) for role in ROLES})


@given(MESHES, st.sampled_from(["vit-l-16", "llama2-7b", "gemma-2b", "mixtral-8x7b"]))
@settings(max_examples=40)
def test_every_role_is_what_it_is_called(mesh: dict[str, int], name: str) -> None:
    mesh = mesh if load_model(name).experts else mesh | {"expert": 1}
    devices = 1
    for size in mesh.values():
        devices *= size
    machine = parse_machine(f"{devices // 8}*h100:8" if devices > 8 else f"h100:{devices}")
    text = ",".join(f"{role}={size}" for role, size in mesh.items())
    assert parse_mesh(text) == mesh
    plan = plan_of_mesh(load_model(name), machine, devices, mesh)
    layout = resolve(plan)
    assert {role: int(layout.role(role).size) for role in ROLES} == mesh
    assert plan_from_data(plan_to_data(plan), "again", plan.name, uneven=True) == plan


@pytest.mark.slow
def test_the_search_finds_plans_that_words_name() -> None:
    found = search("vit-l-16", "v5e:2x4", 64, top=20, attention="unfused")  # as is usual
    asked = 0
    for item in found.predictions:
        layout = resolve(item.plan)
        mesh = {role: int(layout.role(role).size) for role in ROLES}
        named = plan_of_mesh(item.plan.model, item.plan.machine, 64, mesh)
        check(named, resolve(named))
        both = resolve(named)
        if layout.residual == both.residual or int(layout.tensor.size) == 1:
            asked += 1
            activations = dict(item.plan.activations)
            assert activations == named.activations
            assert (named.attention, named.op_costs) == (item.plan.attention, item.plan.op_costs)
        assert both.residual != REPLICATED or int(both.tensor.size) == 1
    assert asked > 5


def test_what_a_trainer_holds_otherwise_is_said_beside_the_file(
    shardsim: Shardsim, tmp_path: Path
) -> None:
    """Another model than the plan's is not written without a word; the file alone has no news."""
    result = shardsim("export", *WORDS, "--to", "maxtext", "-o", str(tmp_path / "run.yml"))
    assert result.exit_code == 0, result.output
    assert "MaxText cannot do all that the plan says" in result.stderr
    assert "  family: decoder, not vit" in result.stderr.splitlines()
    assert "torus axis" not in result.stderr  # that is beside the plan
    plain = shardsim("export", "maxtext-16b-published-v5e-8x256", "--to", "maxtext")
    assert plain.exit_code == 0, plain.output
    assert "cannot do all" not in plain.stderr


def test_what_does_not_fit_is_shown_as_its_warning_counts_it(shardsim: Shardsim) -> None:
    result = shardsim("predict", *WORDS, "--set", "remat=none")
    assert result.exit_code == 1, result.output
    shown = re.search(r"of ([\d.]+) GiB.*\(([\d.]+) GiB with", result.stdout)
    told = re.search(r"needs ([\d.]+) GiB more HBM", result.output)
    assert shown
    assert told
    assert float(told[1]) == pytest.approx(float(shown[2]) - float(shown[1]), abs=0.06)
