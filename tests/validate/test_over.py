"""A config, planned anew and exported over itself: only what the plan changes differs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.errors import PlanError, ShardsimError
from shardsim.plan import Plan, Remat
from shardsim.plan.legality import check
from shardsim.plan.plan import Rules
from shardsim.plan.remat import Policy
from shardsim.plan.resolve import resolve, rules_by_name
from shardsim.validate.imports import import_config
from shardsim.validate.over import export_over
from shardsim.validate.words import Split

SCRIPT = """#!/bin/bash
# python3 MaxText/train.py base.yml steps=1 per_device_batch_size=9
export LIBTPU_INIT_ARGS="--xla_tpu_scoped_vmem_limit_kib=98304"
B=4
python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b \\
    per_device_batch_size=$B  learning_rate=3e-4 remat_policy="full" \\
    steps=30 dataset_type=synthetic  # go
echo done per_device_batch_size=1
"""
YAML = """# mine
model_name: llama2-7b
per_device_batch_size: 4   # sequences
remat_policy: custom
query_proj: device
key_proj: device
value_proj: device
logical_axis_rules:
  - [activation_embed, [tensor]]
steps: 30
"""
LEVANTER = {
    "data": {"tokenizer": "meta-llama/Llama-2-7b-hf"},
    "model": {"type": "llama", "gradient_checkpointing": True},
    "trainer": {"mp": "p=f32,c=bfloat16", "train_batch_size": 256, "num_train_steps": 9},
    "optimizer": {"learning_rate": 1e-4},
}
TENSORS = ("qkv", "context", "attention_output", "mlp_hidden", "mlp_output")


def rules(plan: Plan, names: list[str]) -> tuple[Rules, Rules]:
    """Return the rules that an import of MaxText's gives a mesh of these axes."""
    parameters, activations, _ = rules_by_name(names)
    return parameters, activations


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Return what a plan may change: mesh by role, sequences of a device, steps, remat."""
    left, sizes = 64, {}
    for role in ("data", "tensor", "context"):
        sizes[role] = draw(st.sampled_from([size for size in (1, 2, 4) if left % size == 0]))
        left //= sizes[role]
    kept = draw(st.sets(st.sampled_from(TENSORS)))
    away = draw(st.sets(st.sampled_from(sorted(kept)), max_size=2)) if kept else set()
    return {
        "sizes": {**sizes, "fsdp": left},
        "each": draw(st.sampled_from([4, 8])),
        "microbatches": draw(st.sampled_from([1, 2, 4])),
        "sequence": draw(st.sampled_from([2048, 4096])),
        "remat": Policy(save=frozenset(kept - away), offload=frozenset(away)),
        "vocab_tiles": draw(st.sampled_from([1, 4])),
        "attention": draw(st.sampled_from(["flash", "unfused"])),
    }


def planned(plan: Plan, change: dict[str, Any]) -> Plan:
    """Return a plan that differs from one that was imported."""
    split = Split(inside={role: size for role, size in change["sizes"].items() if size > 1})
    mesh = split.mesh(plan.machine, "data")
    parameters, activations = rules(plan, [axis.name for axis in mesh])
    groups = change["sizes"]["data"] * change["sizes"]["fsdp"]
    return replace(
        plan,
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        batch=change["each"] * groups * change["microbatches"],
        sequence=change["sequence"],
        model=replace(plan.model, sequence=change["sequence"]),
        microbatches=change["microbatches"],
        remat=Remat((change["remat"],)),
        vocab_tiles=change["vocab_tiles"],
        attention=change["attention"],
    )


def words(text: str) -> dict[str, str]:
    """Return the words of a script's or the keys of a YAML's, by name."""
    last = text[text.index("\npython3 ") :].partition("echo")[0] if "#!" in text else text
    pattern = r"(\w+)=(\S*)" if "#!" in text else r"(?m)^(\w+):(.*(?:\n  .*)*)"
    return dict(re.findall(pattern, last))


@pytest.mark.parametrize(("name", "text"), [("run.sh", SCRIPT), ("run.yml", YAML)])
@settings(max_examples=12, deadline=None)
@given(change=changes())
def test_only_what_the_plan_changes_differs(
    name: str, text: str, change: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("over") / name
    file.write_text(text)
    before = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    plan = planned(before, change)
    try:
        check(plan, resolve(plan))
    except ShardsimError:
        return
    made = export_over(plan, "maxtext", str(file))
    old, new = words(text), words(made)
    untouched = {"model_name", "learning_rate", "steps", "dataset_type", "logical_axis_rules"}
    for key in untouched & set(old):
        assert new[key] == old[key]
    lines = [line for line in text.splitlines() if "python3 -m" not in line and "\\" not in line]
    for line in lines:
        if not re.match(r"\w+_?\w*: ", line) or line.partition(":")[0] in untouched:
            assert line in made.splitlines()
    file.write_text(made)
    again = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    for key in ("mesh", "parameters", "activations", "batch", "sequence", "microbatches", "remat"):
        assert getattr(again, key) == getattr(plan, key), key
    assert (again.vocab_tiles, again.attention) == (plan.vocab_tiles, plan.attention)
    assert export_over(again, "maxtext", str(file)) == made  # nothing is left to change


def test_an_unchanged_plan_changes_nothing(tmp_path: Path) -> None:
    for name, text in (("run.sh", SCRIPT), ("run.yml", YAML)):
        file = tmp_path / name
        file.write_text(text)
        plan = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
        assert export_over(plan, "maxtext", str(file)) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yml", "# python -m maxtext.trainers.pre_train.train THIS.yml steps=1\n" + YAML),
        ("run.cfg", "# python -m maxtext.trainers.pre_train.train THIS.yml steps=1\n" + YAML),
        ("run.yml", YAML + "run_name: python3 train\n"),
        ("run.sh", SCRIPT.replace("python3 -m", "python3 \\\n  -m")),
    ],
)
def test_a_config_goes_over_as_what_it_is_read_as(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    plan = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    made = export_over(replace(plan, batch=2 * plan.batch), "maxtext", str(file))
    old = "=$B" if name == "run.sh" else ": 4   # sequences"
    assert made == text.replace(
        f"per_device_batch_size{old}", f"per_device_batch_size{old[0]}{' ' * (old[0] == ':')}8"
    )


def test_experts_pipelines_and_slices_go_over_a_config_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text("model_name: mixtral-8x7b\nper_device_batch_size: 4\n")
    before = import_config(str(file), "maxtext", machine="2*v5p:4x4x4").plan
    other = tmp_path / "other.yml"
    other.write_text(
        "model_name: mixtral-8x7b\nper_device_batch_size: 2\nici_expert_parallelism: 4\n"
        "dcn_data_parallelism: 2\nquantization: int8\nuse_ring_of_experts: true\n"
    )
    plan = import_config(str(other), "maxtext", machine="2*v5p:4x4x4").plan
    made = yaml.safe_load(export_over(plan, "maxtext", str(file)))
    assert made["ici_expert_parallelism"] == 4
    assert (made["quantization"], made["use_ring_of_experts"]) == ("int8", True)
    assert before.batch != plan.batch == 2 * 128
    other.write_text(
        "model_name: mixtral-8x7b\nper_device_batch_size: 4\nici_pipeline_parallelism: 4"
    )
    plan = import_config(str(other), "maxtext", machine="v5p:4x4x4").plan
    made = yaml.safe_load(export_over(plan, "maxtext", str(file)))
    assert (made["ici_pipeline_parallelism"], made["num_pipeline_microbatches"]) == (4, 4)


def test_what_its_keys_cannot_say_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(YAML)
    plan = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    for change, why in (
        ({"optimizer": "adafactor"}, "optimizer: adafactor cannot be said"),
        ({"remat": Remat.of(save=frozenset({"rest"}))}, "remat: MaxText cannot keep everything"),
        (
            {"model": replace(plan.model, layers=16)},
            r"model: 16 (\w+ of 4096) cannot be said in its keys, which give 32 \1;",
        ),
    ):
        with pytest.raises(PlanError, match=why):
            export_over(replace(plan, **change), "maxtext", str(file))
    with pytest.raises(PlanError, match="what is written for axlearn changes a config by itself"):
        export_over(plan, "axlearn", str(file))


def test_places_that_its_keys_cannot_say_are_written_as_in_plans(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(YAML)
    other = tmp_path / "other.yml"
    other.write_text(YAML + "ici_tensor_parallelism: 4\nici_fsdp_parallelism: 16\n")
    plan = import_config(str(other), "maxtext", machine="v5p:4x4x4").plan
    places = {"fsdp": {"x": 4, "z": 4}, "model": {"y": 4}}
    mesh = tuple(replace(axis, torus=places.get(axis.name, axis.torus)) for axis in plan.mesh)
    with pytest.raises(PlanError, match="fsdp: x4 z4 cannot be said in its keys, which give x4 y4"):
        export_over(replace(plan, mesh=mesh), "maxtext", str(file))


@settings(max_examples=10, deadline=None)
@given(
    model=st.sampled_from([1, 2, 4]),
    replicas=st.sampled_from([1, 2, 8]),
    steps=st.sampled_from([1, 2]),
    kept=st.booleans(),
)
def test_levanters_other_sections_stay(
    model: int, replicas: int, steps: int, kept: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("over")
    file, other = folder / "run.yaml", folder / "other.yaml"
    file.write_text(yaml.safe_dump(LEVANTER))
    trainer = {
        **LEVANTER["trainer"],
        "model_axis_size": model,
        "replica_ici_axis_size": replicas,
        "per_device_parallelism": 256 // (64 // model * steps),
        **({"tensor_parallel_axes": ["heads", "mlp", "vocab"]} if model > 1 else {}),
    }
    checkpointing = {"gradient_checkpointing": not kept}
    changed = {**LEVANTER, "trainer": trainer, "model": {**LEVANTER["model"], **checkpointing}}
    other.write_text(yaml.safe_dump(changed))
    plan = import_config(str(other), "levanter", machine="v5p:4x4x4").plan
    made = yaml.safe_load(export_over(plan, "levanter", str(file)))
    assert {key: made[key] for key in ("data", "optimizer")} == {
        key: LEVANTER[key] for key in ("data", "optimizer")
    }
    assert made["trainer"]["num_train_steps"] == 9
    assert made["model"]["gradient_checkpointing"] is (not kept)
    assert set(made["trainer"]) <= {*trainer, "replica_dcn_axis_size", "fsdp_axis"}


def test_a_section_of_another_file_stays_there(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text("tokenizer: gpt2\n")
    file = tmp_path / "run.yaml"
    sections = {key: value for key, value in LEVANTER.items() if key != "data"}
    file.write_text(f"data: !include text.yaml\n{yaml.safe_dump(sections)}")
    plan = import_config(str(file), "levanter", machine="v5p:4x4x4").plan
    made = export_over(replace(plan, microbatches=2), "levanter", str(file))
    assert made.startswith("data: !include text.yaml\n")
    assert yaml.safe_load(made.partition("\n")[2])["trainer"]["per_device_parallelism"] == 2


def test_an_axis_that_is_counted_with_another_is_none_any_more(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(
        "model_name: llama2-7b\nper_device_batch_size: 4\nici_fsdp_parallelism: 1\n"
        "ici_fsdp_transpose_parallelism: 64\n"
    )
    before = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    assert export_over(before, "maxtext", str(file)) == file.read_text()
    file_of = tmp_path / "other.yml"
    file_of.write_text("model_name: llama2-7b\nici_tensor_parallelism: 4\n")
    other = import_config(str(file_of), "maxtext", machine="v5p:4x4x4").plan
    made = yaml.safe_load(export_over(other, "maxtext", str(file)))
    assert made["ici_fsdp_transpose_parallelism"] == 1
    assert (made["ici_fsdp_parallelism"], made["ici_tensor_parallelism"]) == (16, 4)


def test_a_word_that_ends_a_line_leaves_the_line_going_on(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text(
        "python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b\\\n"
        "  per_device_batch_size=4 ici_fsdp_parallelism=-1\\\n"
        "  max_target_length=8192 steps=30\n"
    )
    plan = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    wider = replace(plan, mesh=Split(inside={"data": 4, "fsdp": 16}).mesh(plan.machine, None))
    parameters, activations = rules(wider, ["data", "fsdp"])
    wider = replace(wider, parameters=parameters, activations=activations)
    made = export_over(wider, "maxtext", str(file))
    assert "ici_fsdp_parallelism=16\\\n  max_target_length=8192" in made
