"""Trainers' configs as plans: the published MaxText runs, round trips, and hostile files."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import shardsim

from shardsim.cost.predict import predict
from shardsim.emit import export_plan
from shardsim.errors import PlanError, ShardsimError
from shardsim.plan import load_plan, plan_from_data, resolve
from shardsim.plan.io import plan_to_data
from shardsim.plan.plan import Context
from shardsim.validate.imports import import_config
from shardsim.validate.rows import Run
from shardsim.validate.runs import published_runs

# What the published scripts set (AI-Hypercomputer/maxtext, MaxText/configs at the commits that
# the rows name), with the sizes of the base.yml of their day where it was another.
_APRIL_2023 = "max_target_length=1024 ici_tensor_parallelism=1"
_LATE_2023 = (
    "max_target_length=2048 use_iota_embed=true reuse_example_batch=1 dataset_type=synthetic "
    "dataset_path=$DATASET_PATH attention='flash'"
)
_V5P = "int8_training=false ici_fsdp_parallelism=-1"
_22B = (
    "base_emb_dim=6144 base_num_heads=24 base_mlp_dim=24576 base_num_decoder_layers=48 "
    f"ici_fsdp_parallelism=64 per_device_batch_size=16 remat_policy=full {_APRIL_2023}"
)
_52B = (
    "base_emb_dim=12288 base_mlp_dim=49152 base_num_heads=32 base_num_decoder_layers=32 "
    f"ici_fsdp_parallelism=192 per_device_batch_size=10 remat_policy=full {_APRIL_2023}"
)
_16B = f"per_device_batch_size=6 remat_policy=full global_parameter_scale=16 {_LATE_2023}"
_64B = f"per_device_batch_size=2 remat_policy=full global_parameter_scale=64 {_LATE_2023}"


def _v5p(scale: int, batch: int, remat: str, tensor: int) -> str:
    return (
        f"per_device_batch_size={batch} remat_policy={remat} global_parameter_scale={scale} "
        f"ici_tensor_parallelism={tensor} {_V5P} {_LATE_2023}"
    )


@cache
def runs() -> dict[str, Run]:
    return {run.id: run for run in published_runs()}


PUBLISHED = {
    "maxtext-v4-22b-1x128": ("v4:4x4x4", _22B),
    "maxtext-v4-22b-2x128": ("2*v4:4x4x4", f"{_22B} dcn_data_parallelism=2"),
    "maxtext-v4-22b-8x128": ("8*v4:4x4x4", f"{_22B} dcn_data_parallelism=8"),
    "maxtext-v4-22b-1x128-mar23": ("v4:4x4x4", _22B),
    "maxtext-v4-52b-1x384": ("v4:4x4x12", _52B),
    "maxtext-v5e-16b-1x256": ("v5e:16x16", _16B),
    "maxtext-v5e-16b-8x256": ("8*v5e:16x16", _16B),
    "maxtext-v5e-16b-32x256": ("32*v5e:16x16", _16B),
    "maxtext-v5e-64b-1x256": ("v5e:16x16", _64B),
    "maxtext-v5e-64b-8x256": ("8*v5e:16x16", _64B),
    "maxtext-v5p-32b-1x64c": ("v5p:4x4x4", _v5p(32, 8, "minimal", 4)),
    "maxtext-v5p-32b-2x64c": ("2*v5p:4x4x4", _v5p(32, 8, "minimal", 4)),
    "maxtext-v5p-128b-1x128c": ("v5p:4x4x8", _v5p(128, 2, "minimal", 8)),
    "maxtext-v5p-512b-1x512c": ("v5p:8x8x8", _v5p(512, 2, "full", 16)),
    "maxtext-v5p-1024b-1x1024c": ("v5p:8x8x16", _v5p(1024, 2, "full", 16)),
}
COMMAND = "python3 MaxText/train.py MaxText/configs/base.yml run_name=$RUN_NAME\\\n    "


def test_every_published_script_has_its_row() -> None:
    rows = {name for name in runs() if name.startswith("maxtext-") and "llama" not in name}
    assert rows == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_script_gives_the_plan_of_its_row(name: str, tmp_path: Path) -> None:
    machine, words = PUBLISHED[name]
    script = tmp_path / "run.sh"
    script.write_text(f"set -e\n{COMMAND}{words}\n", encoding="utf-8")
    found = import_config(str(script), "maxtext", machine=machine).plan
    (wanted,) = runs()[name].plans
    for key in ("machine", "mesh", "batch", "sequence", "remat", "microbatches", "optimizer"):
        assert getattr(found, key) == getattr(wanted, key), key
    assert (found.parameters, found.activations) == (wanted.parameters, wanted.activations)
    assert found.model.parameters_all == wanted.model.parameters_all
    assert found.model.parallel_block
    assert found.model.tied_embeddings


TRIPS = ["maxtext-32b-published-v5p-2x64", "maxtext-16b-published-v5e-8x256", "llama.yaml"]
LLAMA = """
name: llama
model: llama3-8b
machine: v5p:4x4x4
batch: 128
mesh: {fsdp: 16, model: 4}
rules:
  parameters: {embed: [fsdp], heads: [model], mlp: [model], vocab: [model]}
  activations: {batch: [fsdp], seq: [model], heads: [model], mlp: [model], vocab: [model]}
remat: save_qkv
microbatches: 2
overlap: {gradients: false}
"""


@pytest.mark.parametrize("name", TRIPS)
def test_what_is_exported_to_maxtext_is_imported_as_it_was(name: str, tmp_path: Path) -> None:
    if name.endswith(".yaml"):
        (tmp_path / name).write_text(LLAMA, encoding="utf-8")
        name = str(tmp_path / name)
    plan = load_plan(name)
    file = tmp_path / "plan.yml"
    file.write_text(export_plan(plan, "maxtext"), encoding="utf-8")
    found = import_config(str(file), "maxtext").plan
    before, after = resolve(plan), resolve(found)
    for role in ("data", "fsdp", "tensor", "context"):
        assert before.role(role) == after.role(role)
    assert int(before.residual) == int(after.residual)
    for key in ("machine", "batch", "sequence", "remat", "microbatches", "optimizer"):
        assert getattr(found, key) == getattr(plan, key), key
    assert found.attention == plan.attention.removesuffix("-2023")  # what runs today
    assert found.model.parameters_all == plan.model.parameters_all


def test_what_is_exported_to_big_vision_is_imported_as_it_was(tmp_path: Path) -> None:
    plan = load_plan("vit-22b-published-tp8")
    file = tmp_path / "plan.py"
    file.write_text(export_plan(plan, "big_vision"), encoding="utf-8")
    names = {
        "input.batch_size": "BATCH",
        "mesh": "MESH",
        "model": "MODEL",
        "sharding_rules": "SHARDING_RULES",
        "sharding_strategy": "SHARDING_STRATEGY",
        "optax_name": "OPTIMIZER",
    }
    lines = [f"config.{name} = {value}" for name, value in names.items()]
    with file.open("a", encoding="utf-8") as handle:
        handle.write("\n".join(lines) + "\n")
    found = import_config(str(file), "big_vision", machine=plan.machine.name).plan
    before, after = resolve(plan), resolve(found)
    for role in ("data", "fsdp", "tensor"):
        assert before.role(role) == after.role(role)
    assert int(before.residual) == int(after.residual)
    assert (found.batch, found.remat, found.optimizer) == (65536, plan.remat, "adafactor")


BIG_VISION = """
import ml_collections as mlc
import os
os.remove("/nothing")
def get_config():
  config = mlc.ConfigDict()
  config.input = {}
  config.input.batch_size = 4096
  config.num_classes = 1000
  config.input.pp = 'decode_jpeg_and_inception_crop(224)|flip_lr' + some()
  config.model = dict(variant='L/16', pool_type='map', scan=True)
  config.model.update(remat_policy='dots_with_no_batch_dims_saveable')
  config.sharding_strategy = [('.*', 'fsdp(axis="data")')]
  config.optax_name = 'big_vision.scale_by_adafactor'
  return config
"""


def test_a_big_vision_config_is_read_without_running_it(tmp_path: Path) -> None:
    file = tmp_path / "vit.py"
    file.write_text(BIG_VISION, encoding="utf-8")
    plan = import_config(str(file), "big_vision", machine="v4:4x4x4").plan
    assert (plan.model.layers, plan.model.embed, plan.model.image) == (24, 1024, 224)
    assert plan.parameters == {"embed": ("data",)}
    assert plan.activations == {"batch": ("data",)}
    assert plan.axis("data").size == 64
    assert plan.remat.name == "dots"


@pytest.mark.parametrize(
    ("said", "context"),
    [
        ("ulysses", Context(keys="ulysses")),
        ("ring", Context(keys="ring", order="striped", overlap=False)),
        (
            "ring\ncontext_parallel_load_balance: false",
            Context(keys="ring", order="contiguous", overlap=False),
        ),
        ("all_gather", Context(order="striped")),
        ("all_gather\ncontext_parallel_load_balance: false", Context(order="contiguous")),
    ],
)
def test_a_maxtext_config_says_how_members_attend(
    said: str, context: Context, tmp_path: Path
) -> None:
    file = tmp_path / "config.yml"
    text = f"model_name: llama2-7b\nici_context_parallelism: 4\ncontext_parallel_strategy: {said}\n"
    file.write_text(text, encoding="utf-8")
    assert import_config(str(file), "maxtext", machine="v5p:4x4x4").plan.context == context


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decoder_block: deepseek\n", "not modelled"),
        ("remat_policy: nonsense\n", "not known"),
        ("per_device_batch_size: many\n", "positive number"),
        ("ici_context_parallelism: 4\ncontext_parallel_strategy: usp\n", "not modelled"),
        ("ici_expert_parallelism: 4\n", "has no experts"),
        ("ici_tensor_parallelism: 7\n", "ici_tensor_parallelism: sizes multiply"),
        ("dcn_sequence_parallelism: 2\n", "dcn_sequence_parallelism: sizes over slices"),
        ("global_parameter_scale: 3\n", "power of two"),
        ("[1, 2]\n", "expected"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags"),
        ("x: ${oc.env:HOME}\nmlp_activations: []\n", "mlp_activations"),
        ("model_name: gpt-9\n", "unknown model"),
    ],
)
def test_a_maxtext_config_that_cannot_be_read_is_one_line(
    text: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yml"
    file.write_text(text, encoding="utf-8")
    run = shardsim("import", "--from", "maxtext", str(file), "--on", "v5p:4x4x4")
    assert run.exit_code == 2
    assert words in run.output
    assert len(run.output.strip().splitlines()) == 1


def test_a_config_without_keys_says_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ShardsimError, match="no keys; missing what says the model: model_name"):
        import_config(str(file), "maxtext", machine="v5p:4x4x4")


def test_both_axes_of_the_sequence_count(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("ici_sequence_parallelism: 2\nici_context_parallelism: 4\n", encoding="utf-8")
    plan = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    assert {axis.name: axis.size for axis in plan.mesh} == {"fsdp": 8, "context": 8}


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=200), form=st.sampled_from(["maxtext", "big_vision"]))
def test_any_text_is_a_plan_or_an_error(
    text: str, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "config.py"
    file.write_text(text, encoding="utf-8", errors="ignore")
    plan = None
    with contextlib.suppress(ShardsimError):  # and no other error
        plan = import_config(str(file), form, machine="v4:2x2x2", image=224).plan
    assert plan is None or plan.machine.name == "v4:2x2x2"


# Options of a MaxText command that change what HBM holds -> what the plan has of them.
HELD = [
    (
        "weight_dtype=bfloat16",
        lambda plan: (plan.precision.parameters, plan.precision.state),
        "bf16",
    ),
    ("grad_dtype=bfloat16", lambda plan: (plan.precision.gradients,), "bf16"),
    ("mu_dtype=bfloat16", lambda plan: (plan.optimizer,), "adamw-bf16-mu"),
    ("optimizer_memory_host_offload=true", lambda plan: (plan.offload_optimizer,), True),
    ("parameter_memory_host_offload=true", lambda plan: (plan.offload_parameters,), True),
    ("num_vocab_tiling=8", lambda plan: (plan.vocab_tiles,), 8),
]
LLAMA_COMMAND = (
    "python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b "
    "per_device_batch_size=4"
)


@pytest.mark.parametrize(("option", "carried", "value"), HELD, ids=[row[0] for row in HELD])
def test_what_hbm_holds_is_carried(option, carried, value, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"{LLAMA_COMMAND}\n")
    usual = import_config(str(script), "maxtext", machine="v5p:4x4x4").plan
    script.write_text(f"{LLAMA_COMMAND} {option}\n")
    plan = import_config(str(script), "maxtext", machine="v5p:4x4x4").plan
    assert set(carried(plan)) == {value}
    assert set(carried(usual)) != {value}
    less, more = (predict(one, implementation="trainer").hbm for one in (plan, usual))
    assert less["thrifty_bytes"] < more["thrifty_bytes"]
    assert plan_from_data(plan_to_data(plan), "again") == plan
    if option == "mu_dtype=bfloat16":
        return
    if "host_offload" not in option:
        with pytest.raises(PlanError, match="export of"):
            export_plan(plan, "maxtext")
        return
    assert option.replace("=", ": ") in export_plan(plan, "maxtext")
    with pytest.raises(PlanError, match="export to levanter: offload_"):
        export_plan(plan, "levanter")


@pytest.mark.parametrize("option", ["scan_layers=false", "matmul_precision=highest"])
def test_what_no_plan_has_is_listed(option, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"{LLAMA_COMMAND} {option}\n")
    left = import_config(str(script), "maxtext", machine="v5p:4x4x4").not_carried
    assert [item.key for item in left if item.could_change] == [option.split("=")[0]]


def test_the_flag_of_asynchronous_gathers_is_carried(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        f"export LIBTPU_INIT_ARGS='--xla_enable_async_all_gather=true'\n{LLAMA_COMMAND}\n"
    )
    plan = import_config(str(script), "maxtext", machine="v5p:4x4x4").plan
    assert plan.compiler_options == {"xla_enable_async_all_gather": "true"}


@pytest.mark.parametrize("key", ["weight_dtype", "quantization", "remat_policy", "opt_type"])
@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "[[x]]"])
def test_a_list_where_a_word_is_wanted_is_refused(key: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    text = f"model_name: llama2-7b\nper_device_batch_size: 4\n{key}: {value}\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ShardsimError, match=key):
        import_config(str(file), "maxtext", machine="v5p:4x4x4")
