"""Levanter's YAML as a plan, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.emit import export_plan
from shardsim.errors import ShardsimError
from shardsim.plan import plan_from_data, resolve
from shardsim.validate.imports import Imported, import_config
from shardsim.validate.imports.levanter import read_levanter
from shardsim.validate.over import export_over

# As config/llama2_7b.yaml of the trainer, with tensor parallelism and gradient accumulation.
CONFIG: dict[str, Any] = {
    "data": {"tokenizer": "meta-llama/Llama-2-7b-hf", "train_urls": ["gs://bucket/text"]},
    "model": {
        "type": "llama",
        "seq_len": 4096,
        "hidden_dim": 4096,
        "intermediate_dim": 11008,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "gradient_checkpointing": True,
        "flash_attention_block_size": 1024,
    },
    "trainer": {
        "tracker": {"type": "wandb", "project": "levanter"},
        "mp": "p=f32,c=bfloat16",
        "train_batch_size": 256,
        "per_device_parallelism": 4,
        "num_train_steps": 1000,
        "model_axis_size": 4,
        "tensor_parallel_axes": ["mlp", "heads"],
        "fsdp_axis": "embed",
    },
    "optimizer": {"learning_rate": 1.2e-5, "weight_decay": 0.1},
}


def changed(**more: Any) -> dict[str, Any]:
    """Return the config with keys changed: `trainer__mp="f32"`."""
    data = {name: dict(section) for name, section in CONFIG.items()}
    for key, value in more.items():
        section, _, name = key.partition("__")
        data[section][name] = value
    return data


def imported(tmp_path: Path, data: Any, machine: str = "v5p:4x4x4") -> Imported:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return import_config(str(path), "levanter", machine=machine)


def test_a_config_becomes_a_plan_and_nothing_is_lost(tmp_path: Path) -> None:
    found = imported(tmp_path, CONFIG)
    plan = found.plan
    assert {axis.name: axis.size for axis in plan.mesh} == {"data": 16, "model": 4}
    assert (plan.batch, plan.sequence, plan.microbatches) == (256, 4096, 256 // (4 * 16))
    assert plan.model.parameters_all == 6_738_415_616  # of the model card: 7B, exactly
    assert (plan.precision.compute, plan.precision.parameters) == ("bf16", "f32")
    assert plan.remat.name == "full"
    layout = resolve(plan)
    assert (int(layout.fsdp.size), int(layout.tensor.size)) == (16, 4)
    left = {item.key: item.could_change for item in found.not_carried}
    assert set(left) == {
        "data.train_urls",
        "model.flash_attention_block_size",
        "trainer.tracker.type",
        "trainer.tracker.project",
        "trainer.num_train_steps",
        "trainer.tensor_parallel_axes",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    }
    assert left["model.flash_attention_block_size"] == ("time", "hbm")
    assert left["trainer.num_train_steps"] == ()


def test_replicas_go_over_slices(tmp_path: Path) -> None:
    data = changed(trainer__replica_dcn_axis_size=2, trainer__replica_ici_axis_size=2)
    plan = imported(tmp_path, data, "2*v5p:4x4x4").plan
    assert {axis.name: axis.size for axis in plan.mesh} == {"replica": 4, "data": 8, "model": 4}
    assert plan.axis("replica").torus["dcn"] == 2


def test_what_was_imported_is_exported_to_the_same_trainer(tmp_path: Path) -> None:
    plan = imported(tmp_path, CONFIG).plan
    back = yaml.safe_load(export_plan(plan, "levanter"))
    wanted = changed(trainer__tensor_parallel_axes=["heads", "kv_head", "mlp", "vocab"])["trainer"]
    for key in ("train_batch_size", "per_device_parallelism", "model_axis_size", "mp", "fsdp_axis"):
        assert back["trainer"][key] == wanted[key]
    assert back["trainer"]["tensor_parallel_axes"] == wanted["tensor_parallel_axes"]
    again = {**CONFIG, "trainer": {**CONFIG["trainer"], **back["trainer"]}}
    same = imported(tmp_path, again).plan
    assert (same.mesh, same.parameters, same.activations) == (
        plan.mesh,
        plan.parameters,
        plan.activations,
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"steps": 100}, "no 'model' section"),
        ({**CONFIG, "trainer": None}, "no 'trainer' section"),
        (changed(model__type="rwkv"), "model.type: 'rwkv' is not read"),
        (changed(data__tokenizer="me/mine"), "write them as data.vocab_size"),
        (changed(trainer__model_axis_size=5), "do not divide the 64 devices"),
        (changed(trainer__replica_dcn_axis_size=3), "but v5p:4x4x4 has 1 slices"),
        (changed(trainer__fsdp_axis="mlp"), "only embed or null is read"),
        (changed(trainer__tensor_parallel_axes=["mlp"]), "only heads and mlp together"),
        (changed(trainer__per_device_parallelism=3), "is no multiple of the 48 examples"),
        (changed(trainer__mp="fp7"), "'fp7' is no format that is read"),
        (changed(model__gradient_checkpointing="offload"), "only true and false are"),
        (changed(optimizer__type="sophia-h"), "optimizer.type: 'sophia-h' is not modelled"),
        (changed(model__hidden_dim=4095), "does not divide into 32 heads"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    data: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ShardsimError) as error:
        imported(tmp_path, data)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_that_is_not_known_could_change_time_and_memory(tmp_path: Path) -> None:
    data = changed(trainer__axis_mapping={"mlp": "model"}, trainer__new=3, model__window=128)
    left = {item.key: item.could_change for item in imported(tmp_path, data).not_carried}
    for key in ("trainer.axis_mapping.mlp", "trainer.new", "model.window"):
        assert left[key] == ("time", "hbm")
    data = changed(trainer__batch_axis="batch", model__attn_pdrop=0.0)
    left = {item.key: item.could_change for item in imported(tmp_path, data).not_carried}
    assert left["trainer.batch_axis"] == left["model.attn_pdrop"] == ()


def test_sections_are_taken_from_files_beside(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text("tokenizer: gpt2\n")
    file = tmp_path / "run.yaml"
    text = yaml.safe_dump({key: value for key, value in CONFIG.items() if key != "data"})
    file.write_text(f"data: !include text.yaml\n{text}")
    found = import_config(str(file), "levanter", machine="v5p:4x4x4")
    assert found.plan.model.vocab == 50_257
    file.write_text(f"data: !include other.yaml\n{text}")
    with pytest.raises(ShardsimError, match=r"data: 'other.yaml' is not beside the config"):
        import_config(str(file), "levanter", machine="v5p:4x4x4")
    data = changed(trainer__mp="p=f32")
    assert imported(tmp_path, data).plan.precision.compute == "f32"


values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(allow_nan=False), st.text()
)


@settings(max_examples=150, deadline=None)
@given(
    section=st.sampled_from(["model", "trainer", "data", "optimizer", "odd"]),
    key=st.sampled_from([*CONFIG["model"], *CONFIG["trainer"], "use_bias", "dropout", "new"]),
    value=st.one_of(values, st.lists(values, max_size=2), st.dictionaries(st.text(), values)),
)
def test_any_key_is_carried_refused_or_listed(section: str, key: str, value: Any) -> None:
    data = changed()
    data.setdefault(section, {})[key] = value
    text = yaml.safe_dump(data)
    try:
        plan, _, left = read_levanter(Path("run.yaml"), text, "v5p:4x4x4")
    except ShardsimError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    before, _, _ = read_levanter(Path("run.yaml"), yaml.safe_dump(CONFIG), "v5p:4x4x4")
    named = {item.key for item in left}
    whole = f"{section}.{key}"
    assert (
        plan != before
        or any(one == whole or one.startswith(f"{whole}.") for one in named)
        or (CONFIG.get(section, {}).get(key) == value or _does_nothing(whole, value))
    )


def _does_nothing(key: str, value: Any) -> bool:
    """Return whether a key was read at the value that it has anyway."""
    usual = {"model.use_bias": False, "trainer.mp": CONFIG["trainer"]["mp"]}
    return key in usual and usual[key] == value


@pytest.mark.parametrize("kind", ["llama2-7b", "gpt2", "qwen3-4b"])
def test_an_exported_file_is_a_config_by_itself_where_levanter_has_the_model(
    kind: str, tmp_path: Path
) -> None:
    plan = plan_from_data(
        {
            "name": "out",
            "model": kind,
            "machine": "v5p:4x4x4",
            "batch": 512,
            "mesh": {"data": 64},
            "rules": {"parameters": {"embed": ["data"]}, "activations": {"batch": ["data"]}},
            "microbatches": 2,
            "attention": "unfused",
        },
        "out",
    )
    file = tmp_path / "exported.yaml"
    file.write_text(export_plan(plan, "levanter"))
    if kind == "qwen3-4b":  # it norms queries and keys
        assert set(yaml.safe_load(file.read_text())["model"]) == {
            "gradient_checkpointing",
            "use_flash_attention",
        }
        return
    found = import_config(str(file), "levanter", machine="v5p:4x4x4").plan
    for key in ("batch", "sequence", "microbatches", "remat", "attention", "precision"):
        assert getattr(found, key) == getattr(plan, key)
    assert found.model.tensors == plan.model.tensors
    made = yaml.safe_load(export_over(replace(plan, batch=1024), "levanter", str(file)))
    assert made["trainer"]["train_batch_size"] == 1024
    assert made["model"] == yaml.safe_load(file.read_text())["model"]


@pytest.mark.parametrize("form", ["maxtext", "axlearn", "levanter", "big_vision"])
def test_an_empty_file_is_called_that(form: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(" \n")
    with pytest.raises(ShardsimError, match="the file is empty; expected"):
        import_config(str(file), form, machine="v5p:4x4x4")
