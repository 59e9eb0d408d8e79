"""MaxText's keys: each is in the plan, refused, or listed; blocks have the weights they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardsim.carried import Keys
from shardsim.cost.predict import predict
from shardsim.errors import ShardsimError
from shardsim.model import Model, attention_flops_per_token
from shardsim.plan import resolve
from shardsim.validate.imports import Imported, import_config
from shardsim.validate.imports.maxtext_defaults import CURRENT

COMMAND = (
    "python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b "
    "per_device_batch_size=4"
)


def script(folder: Path, words: str = "", *, before: str = "", on: str = "v5p:4x4x4") -> Imported:
    """Return the import of a script of one command."""
    file = folder / "run.sh"
    file.write_text(f"#!/bin/bash\n{before}\n{COMMAND} {words}\n", encoding="utf-8")
    return import_config(str(file), "maxtext", machine=on)


# A value of each key that is not its usual one, from every part of base.yml.
CHANGED = {
    # in the plan
    "per_device_batch_size": "2",
    "max_target_length": "1024",
    "gradient_accumulation_steps": "2",
    "remat_policy": "minimal",
    "dtype": "float32",
    "weight_dtype": "bfloat16",
    "grad_dtype": "bfloat16",
    "mu_dtype": "bfloat16",
    "opt_type": "sgd",
    "quantization": "int8",
    "num_vocab_tiling": "8",
    "optimizer_memory_host_offload": "true",
    "parameter_memory_host_offload": "true",
    "attention": "dot_product",
    "attention_type": "full",
    "ici_tensor_parallelism": "4",
    "ici_tensor_sequence_parallelism": "4",
    "ici_context_parallelism": "4",
    "ici_pipeline_parallelism": "4",
    "ici_data_parallelism": "4",
    # refused
    "ici_expert_parallelism": "4",
    "ici_autoregressive_parallelism": "4",
    "ici_diloco_parallelism": "4",
    "ici_context_usp_ulysses_parallelism": "4",
    "base_num_decoder_layers": "8",
    "vocab_size": "32003",
    "head_dim": "64",
    # listed, and could change a step
    "scan_layers": "false",
    "matmul_precision": "highest",
    "use_dpo": "true",
    "lora_rank": "16",
    "use_multimodal": "true",
    "use_audio": "true",
    "dropout_rate": "0.1",
    "custom_mesh_and_rule": "pure-fsdp",
    "custom_mesh": "hybrid_ring_64x4",
    "mtp_num_layers": "1",
    "trainable_parameters_mask": "['.*norm.*']",
    "enable_diloco": "true",
    "enable_rampup_batch_size": "true",
    "fused_qkv": "true",
    "fused_mlp": "true",
    "attn_logits_soft_cap": "50.0",
    "float32_logits": "true",
    "cast_logits_to_fp32": "false",
    "activations_in_float32": "true",
    "use_qwix_quantization": "true",
    "sa_block_q": "2048",
    "local_sa_block_kv": "1024",
    "use_tokamax_splash": "true",
    "wi_tile_fwd_mlp_dim": "512",
    "megablox": "false",
    "shard_mode": "explicit",
    "allow_split_physical_axes": "true",
    "moba": "true",
    "use_indexer": "true",
    "engram_layers": "[1,4]",
    "training_objective": "block_diffusion",
    "no_such_key": "7",
}
REFUSED = {f"ici_{axis}_parallelism" for axis in ("expert", "autoregressive", "diloco")}
REFUSED |= {"ici_context_usp_ulysses_parallelism", "base_num_decoder_layers", "vocab_size"}
REFUSED |= {"head_dim"}
HARMLESS = {
    "run_name": "mine",
    "base_output_directory": "gs://bucket",
    "enable_checkpointing": "false",
    "checkpoint_period": "100",
    "dataset_type": "synthetic",
    "dataset_path": "$DATASET",
    "tokenizer_path": "assets/tokenizer",
    "packing": "false",
    "steps": "30",
    "learning_rate": "1e-4",
    "adam_b2": "0.99",
    "eval_interval": "10",
    "profiler": "xplane",
    "enable_tensorboard": "false",
    "dump_hlo": "true",
    "rope_max_timescale": "500000",
    "normalization_layer_epsilon": "1e-6",
    "enable_dropout": "true",
    "freeze_vision_encoder_params": "false",
    "image_size_for_vit": "448",
    "max_prefill_predict_length": "128",
    "decode_sampling_strategy": "topk",
    "jax_distributed_initialization_timeout": "600",
    "enable_goodput_recording": "true",
    "init_weights_seed": "7",
    "gdn_chunk_size": "32",
    "mesh_axes": "['data','fsdp']",
    "kv_lora_rank": "256",
    "num_experts_per_tok": "2",
    "shard_optimizer_over_data": "true",
    "compile_xla_flags": "--xla_enable_async_collective_permute=true",
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_changes_the_plan_is_refused_or_listed(key: str, tmp_path: Path) -> None:
    usual = script(tmp_path)
    assert usual.not_carried == ()
    if key in REFUSED:
        with pytest.raises(ShardsimError, match=key):
            script(tmp_path, f"{key}={CHANGED[key]}")
        return
    found = script(tmp_path, f"{key}={CHANGED[key]}")
    could = {item.key for item in found.not_carried if item.could_change}
    assert could == (set() if found.plan != usual.plan else {key})


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_that_changes_no_step_is_listed_as_such(key: str, tmp_path: Path) -> None:
    usual, found = script(tmp_path), script(tmp_path, f"{key}={HARMLESS[key]}")
    assert found.plan == usual.plan
    ((left),) = found.not_carried
    assert (left.key, left.could_change) == (key, ())
    assert "known" not in left.why


_KEYS_FILE = Path(__file__).parents[1] / "maxtext_keys.txt"
BASE_KEYS = sorted(
    word
    for line in _KEYS_FILE.read_text("utf-8").splitlines()
    if not line.startswith("#")
    for word in line.split()
)
# What changes no plan although it is read: the usual values, and words that cost the same.
SAME = {
    ("attention", "flash"),
    ("mu_dtype", "float32"),
    ("lora", "{}"),
    ("head_dim", "128"),
    ("ici_fsdp_parallelism", "64"),
    ("mesh_axes", "[data,fsdp]"),
}
_WORDS = (
    *("true", "false", "1", "2", "8", "-1", "0", "0.5", "''", "[]", "{}", "float32", "flash"),
    *("full", "x y", "[1,2]"),
)


def not_lost(folder: Path, key: str, value: str, usual: Imported) -> None:
    """Assert that a key with a value is carried, refused or listed, or says what is so anyway."""
    try:
        found = script(folder, f"{key}='{value}'")
    except ShardsimError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert key in str(error) or "parallelism" in key or key in _BY_ANOTHER  # noqa: PT017
        return
    if found.plan == usual.plan and key not in {item.key for item in found.not_carried}:
        read = Keys({}, CURRENT).get(key, 1 if "parallelism" in key else None)
        same = (key, value) in SAME or key == "override_model_config"  # nothing to override
        assert same or yaml.safe_load(value) in (read, -1), (key, value)


@settings(max_examples=250, deadline=None)
@given(key=st.sampled_from(BASE_KEYS), value=st.sampled_from(_WORDS))
@example(key="mu_dtype", value="false")
@example(key="quantization", value="0")
@example(key="optimizer_memory_host_offload", value="[]")
def test_any_key_of_base_yml_is_carried_refused_or_listed(
    key: str, value: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    not_lost(folder, key, value, script(folder))


@pytest.mark.deep
@pytest.mark.slow
@pytest.mark.parametrize("value", _WORDS)
def test_no_key_of_base_yml_is_lost_with_any_value(value: str, tmp_path: Path) -> None:
    usual = script(tmp_path)
    for key in BASE_KEYS:
        not_lost(tmp_path, key, value, usual)


_BY_ANOTHER = ("per_device_batch_size", "max_target_length", "sliding_window_size")
_VALUES = st.sampled_from(["true", "false", "0", "4", "-1", "1.5", "bfloat16", "''", "[1]", "x y"])


@settings(max_examples=60, deadline=None)
@given(
    words=st.dictionaries(
        st.one_of(st.sampled_from(sorted({**CHANGED, **HARMLESS})), st.text("abc_é", min_size=3)),
        _VALUES,
        max_size=4,
    )
)
def test_of_any_words_none_is_lost(
    words: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    usual = script(folder)
    try:
        found = script(folder, " ".join(f'{key}="{value}"' for key, value in words.items()))
    except ShardsimError:  # and no other error
        return
    listed = {item.key for item in found.not_carried}
    if not set(words) - listed:
        assert found.plan == usual.plan


# Arrays of a custom remat policy: what they are in a plan, and whether that says them exactly.
CUSTOM = [
    ("llama2-7b", "query_proj=device", {"qkv"}, set(), {"query_proj"}),
    ("llama2-7b", "query_proj=device key_proj=device value_proj=device", {"qkv"}, set(), set()),
    ("llama2-7b", "query_proj=device key_proj=offload value_proj=offload", set(), {"qkv"},
     {"query_proj", "key_proj", "value_proj"}),
    ("llama2-7b", "mlpwi_0=offload mlpwi_1=offload mlpwo=device", {"mlp_output"}, {"mlp_hidden"},
     set()),
    ("llama2-7b", "mlpwi_1=device context=device", {"mlp_hidden", "context"}, set(), {"mlpwi_1"}),
    ("llama2-7b", "decoder_layer_input=offload out_proj=device", {"attention_output"},
     {"layer_input"}, set()),
    ("llama2-7b", "attention=dot_product attention_out=device", {"context"}, set(), set()),
    ("gpt3-175b", "mlpwi=device", {"mlp_hidden"}, set(), set()),
    ("mixtral-8x7b", "moe_mlpwi_0=device moe_mlpwi_1=device", {"mlp_hidden"}, set(), set()),
    ("mixtral-8x7b", "moe_mlpwi_0=device", {"mlp_hidden"}, set(), {"moe_mlpwi_0"}),
    ("deepseek2-16b", "query_proj=device key_proj=device value_proj=device kv_wa_proj=device",
     {"qkv"}, set(), set()),
    ("deepseek2-16b", "key_proj=device", {"qkv"}, set(), {"key_proj"}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "words", "save", "offload", "partly"), CUSTOM)
def test_arrays_of_a_custom_policy(
    model: str, words: str, save: set[str], offload: set[str], partly: set[str], tmp_path: Path
) -> None:
    found = script(tmp_path, f"model_name={model} remat_policy=custom {words}", on="v5p:8x8x8")
    (policy,) = found.plan.remat.groups
    assert (policy.save, policy.offload) == (save, offload)
    assert listed(found) == dict.fromkeys(partly, ("time", "hbm"))


@pytest.mark.parametrize("words", ["mlpwi=device", "qkv_proj=device", "attention_out=device"])
def test_a_name_that_no_array_has_keeps_nothing(words: str, tmp_path: Path) -> None:
    found = script(tmp_path, f"remat_policy=custom {words}")
    assert found.plan.remat.name == "full"
    assert listed(found) == {words.removesuffix("=device"): ()}
    with pytest.raises(ShardsimError, match=r"'host' is no place of an array; .*device"):
        script(tmp_path, "remat_policy=custom context=host")


def listed(found: Imported) -> dict[str, tuple[str, ...]]:
    """Return what is not carried, and what it could change."""
    return {item.key: item.could_change for item in found.not_carried}


def test_sizes_of_a_named_model_are_changed_where_maxtext_would(tmp_path: Path) -> None:
    found = script(tmp_path, "override_model_config=true base_num_decoder_layers=8")
    assert (found.plan.model.layers, found.plan.model.embed) == (8, 4096)
    assert script(tmp_path, "base_emb_dim=4096").plan.model.embed == 4096
    with pytest.raises(ShardsimError, match="override_model_config"):
        script(tmp_path, "base_emb_dim=2048")


# A model, and a key that would make it another one than its name says.
ANOTHER = (
    ("llama2-7b", "decoder_block", "mistral"),
    ("qwen3-8b", "use_qk_norm", "false"),
    ("gemma2-9b", "sliding_window_size", "1024"),
    ("gpt-oss-20b", "attention_bias", "false"),
    ("deepseek2-16b", "kv_lora_rank", "256"),
    ("deepseek2-16b", "shared_experts", "1"),
    ("llama4-17b-16e", "interleave_moe_layer_step", "2"),
)


@pytest.mark.parametrize(("name", "key", "value"), ANOTHER)
def test_a_key_beside_a_name_that_says_another_model_is_listed(
    name: str, key: str, value: str, tmp_path: Path
) -> None:
    words = f"model_name={name} override_model_config=true ici_fsdp_parallelism=16 {key}={value}"
    assert listed(script(tmp_path, words, on="v5p:2x2x4"))[key] == ("time", "hbm")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama2-7b", "decoder_block=llama2 mlp_activations=[silu,linear]"),
        ("gemma2-9b", "decoder_block=gemma2 mlp_activations=[gelu,linear]"),
        ("gpt-oss-20b", "decoder_block=gpt_oss mlp_activations=[sigmoid,linear]"),
        ("qwen3-30b-a3b", "decoder_block=qwen3_moe use_qk_norm=true"),
        ("deepseek2-16b", "kv_lora_rank=512 qk_nope_head_dim=128 v_head_dim=128"),
    ],
)
def test_a_key_that_says_what_the_name_says_changes_nothing(
    name: str, words: str, tmp_path: Path
) -> None:
    usual = script(tmp_path, f"model_name={name}", on="v5p:2x2x4")
    found = script(tmp_path, f"model_name={name} {words}", on="v5p:2x2x4")
    assert found.plan == usual.plan
    assert not any(listed(found).values())


def test_activations_of_a_named_model_are_changed_where_maxtext_would(tmp_path: Path) -> None:
    words = "mlp_activations=[gelu]"
    found = script(tmp_path, f"override_model_config=true {words}").plan.model
    assert (found.activation, found.gated_mlp) == ("gelu", False)
    for refused in (words, "decoder_block=mistral"):
        with pytest.raises(ShardsimError, match="override_model_config"):
            script(tmp_path, refused)


# Weights of MaxText's own files of such names.
NAMED = {
    "qwen3-8b": 8_190_735_360,
    "qwen3-4b-thinking-2507": 4_022_468_096,
    "qwen2.5-7b": 7_615_616_512,
    "gemma2-9b": 9_242_164_736,
    "gemma3-4b": 3_880_099_328,
    "gemma4-31b": 30_697_345_340,
    "gemma4-26b": 25_233_141_790,
    "llama3.3-70b": 70_553_706_496,
    "olmo3-7b-pt": 7_298_011_136,
    "mixtral-8x22b": 140_630_071_296,
    "gpt-oss-20b": 20_914_757_184,
    "llama4-17b-16e": 107_769_861_120,
    "gpt3-175b": 174_780_997_632,
    "deepseek2-236b": 235_741_434_880,
    "deepseek3-671b": 671_026_419_200,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-397b-a17b": 396_346_350_336,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_has_the_weights_of_maxtexts_file(name: str, tmp_path: Path) -> None:
    model = script(tmp_path, f"model_name={name}").plan.model
    assert model.parameters_all == NAMED[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("deepseek4-284b", "compressed attention"), ("gemma4-e2b", "embeddings of each layer")],
)
def test_a_named_model_that_cannot_be_said_has_the_reason(
    name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ShardsimError, match=f"model_name: {name} is not modelled: .*{reason}"):
        script(tmp_path, f"model_name={name}")


def test_windows_of_all_layers(tmp_path: Path) -> None:
    plan = script(tmp_path, "attention_type=local_sliding sliding_window_size=1024").plan
    assert plan.model.windows == (1024,)


def test_pipelines_have_the_microbatches_and_repeats_of_maxtext(tmp_path: Path) -> None:
    def of(words: str) -> tuple[int, int]:
        plan = script(tmp_path, words).plan
        assert int(resolve(plan).pipeline.size) == 4
        return plan.microbatches, plan.pipeline_interleave

    assert of("ici_pipeline_parallelism=4 num_pipeline_microbatches=8") == (8, 8)
    assert of("ici_pipeline_parallelism=4 num_layers_per_pipeline_stage=8") == (4, 1)
    assert of("ici_pipeline_parallelism=4 num_pipeline_repeats=2") == (4, 2)


def test_a_tensor_sequence_axis_beside_a_tensor_axis_is_listed(tmp_path: Path) -> None:
    found = script(tmp_path, "ici_tensor_parallelism=2 ici_tensor_sequence_parallelism=2")
    assert {axis.name: axis.size for axis in found.plan.mesh} == {"fsdp": 16, "model": 4}
    listed = {item.key: item.could_change for item in found.not_carried}
    assert listed == {"ici_tensor_sequence_parallelism": ("time",)}


def test_a_tensor_sequence_axis_splits_the_sequence(tmp_path: Path) -> None:
    plan = script(tmp_path, "ici_tensor_sequence_parallelism=4").plan
    assert plan.activations["seq"] == plan.parameters["heads"] == ("model",)
    assert "embed" not in plan.activations
    plan = script(tmp_path, "ici_tensor_parallelism=4").plan
    assert plan.activations["embed"] == ("model",)


def test_optimizer_state_is_split_over_data(tmp_path: Path) -> None:
    words = "ici_data_parallelism=4 shard_optimizer_over_data=true"
    assert script(tmp_path, words).plan.optimizer_rules == {"embed": ("data",)}


def test_quantized_products_take_the_chips_format_or_are_refused(tmp_path: Path) -> None:
    assert script(tmp_path, "quantization=int8").plan.precision.compute == "int8"
    assert script(tmp_path, "quantization=fp8", on="v6e:8x8").plan.precision.compute == "fp8"
    with pytest.raises(ShardsimError, match="v5p multiplies no fp8"):
        script(tmp_path, "quantization=fp8")
    with pytest.raises(ShardsimError, match="not modelled"):
        script(tmp_path, "quantization=intmp")


def test_experts_lie_on_an_axis_of_their_own(tmp_path: Path) -> None:
    words = "model_name=mixtral-8x7b ici_expert_parallelism=4"
    plan = script(tmp_path, words).plan
    assert int(resolve(plan).expert.size) == 4
    ring = script(tmp_path, f"{words} use_ring_of_experts=true").plan
    assert (plan.experts.exchange, ring.experts.exchange) == ("all-to-all", "ring")
    assert predict(ring).step_time_s > 0


def test_variables_that_a_script_sets_count(tmp_path: Path) -> None:
    before = 'export BATCH=2\nSEQ="1024"\nexport M_REMAT_POLICY=minimal'
    words = "per_device_batch_size=$BATCH max_target_length=${SEQ} steps=${STEPS:-30}"
    found = script(tmp_path, words, before=before)
    assert (found.plan.batch, found.plan.sequence) == (128, 1024)
    assert found.plan.remat == script(tmp_path, "remat_policy=minimal").plan.remat
    assert listed(found) == {"steps": ()}
    with pytest.raises(ShardsimError, match=r"per_device_batch_size: \$1 is set outside"):
        script(tmp_path, "per_device_batch_size=$1")
    assert listed(script(tmp_path, "run_name=$RUN_NAME")) == {"run_name": ()}


# A script -> what it says of the batch of a device and of the sequence, or why it says nothing.
COMMAND_ALONE = COMMAND.removesuffix(" per_device_batch_size=4")
_B = f"{COMMAND_ALONE} per_device_batch_size=$B"
SCRIPTS: list[tuple[str, Any]] = [
    (f"B=${{B:-8}}\n{_B}", (8, 2048)),
    (f"A=2\nB=$A\n{_B}", (2, 2048)),
    (f"export B=4 S=1024\n{_B} max_target_length=$S", (4, 1024)),
    (f"B=4; S=1024; {_B} max_target_length=${{S}}", (4, 1024)),
    (f"for i in 1 2; do\n  B=2\n  {_B}\ndone", (2, 2048)),
    (f"M_PER_DEVICE_BATCH_SIZE=2 {COMMAND_ALONE}", (2, 2048)),
    (f"{_B.replace('$B', '1')}\n{_B.replace('$B', '4')}", (4, 2048)),
    ("python3 train.py mine.yml per_device_batch_size=2 model_name=llama2-7b\n", (2, 4096)),
    ("python3 train.py configs/two.yml max_target_length=1024 model_name=llama2-7b", (1, 1024)),
    (f"if [ $1 = big ]; then\n  B=8\nfi\n{_B}", r"\$B, which a branch or a loop"),
    (f"B=4\nif x; then B=8; else B=2; fi\n{_B}", r"\$B, which a branch or a loop"),
    (f"B=4\ncase $1 in\n a) B=8 ;;\nesac\n{_B}", r"\$B, which a branch or a loop"),
    (f'B=4\n[ -n "$1" ] && B=8\n{_B}', "which the script sets in some cases"),
    (f"f() {{\n  B=8\n}}\nB=4\nf\n{_B}", "which a function of the script sets"),
    (f"B=4\nB=$((2*B))\n{_B}", "which the script takes from elsewhere"),
    (f"B=$(cat b)\n{_B}", "which the script takes from elsewhere"),
    (f"for B in 1 2; do\n  {_B}\ndone", r"\$B is set outside this script"),
    ("python3 train.py other.yml per_device_batch_size=2", "'other.yml' is not beside the config"),
    (f"{COMMAND} attention=cudnn_flash_te", "attention: 'cudnn_flash_te' is not modelled on v5p"),
    (f"{COMMAND} dtype=float16", "dtype: 'float16' is not modelled"),
    (f"{COMMAND} ici_data_parallelism=0", "ici_data_parallelism: expected 1 or more"),
    (f"{COMMAND} ici_diloco_parallelism=2", "ici_diloco_parallelism: MaxText's axis diloco"),
]


@pytest.mark.parametrize(("text", "says"), SCRIPTS, ids=range(len(SCRIPTS)))
def test_a_script_says_a_value_or_why_it_does_not(text: str, says: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("base_config: base.yml\nmax_target_length: 4096\n")
    (tmp_path / "two.yml").write_text("base_config: mine.yml\nper_device_batch_size: 1\n")
    file = tmp_path / "run.sh"
    file.write_text(f"#!/bin/bash\n{text}\n")
    if isinstance(says, str):
        with pytest.raises(ShardsimError, match=says):
            import_config(str(file), "maxtext", machine="v5p:4x4x4")
        return
    found = import_config(str(file), "maxtext", machine="v5p:4x4x4")
    assert (found.plan.batch / 64, found.plan.sequence) == says
    assert found.not_carried == ()
    assert any("2 training commands" in note for note in found.notes) == (text.count("train ") == 2)


def test_a_base_yml_beside_a_config_gives_defaults_and_no_sizes_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "base.yml").write_text("base_emb_dim: 2048\nmax_target_length: 1024\nsteps: 5\n")
    file = tmp_path / "run.yml"
    file.write_text("base_config: base.yml\nmodel_name: llama2-7b\nper_device_batch_size: 4\n")
    found = import_config(str(file), "maxtext", machine="v5p:4x4x4")
    assert (found.plan.model.embed, found.plan.sequence) == (4096, 1024)
    assert listed(found) == {"base_config": ()}


def test_words_of_a_group_are_the_groups(tmp_path: Path) -> None:
    words = "lora.lora_rank=16 lora.enable_lora=true"
    plan = script(tmp_path, words).plan
    assert plan.model.lora is not None
    assert plan.model.lora.rank == 16
    assert listed(script(tmp_path, "own.deep=1")) == {"own": ("time", "hbm")}


def test_adapters_of_experts_are_named_by_their_block(tmp_path: Path) -> None:
    words = (
        "model_name=mixtral-8x7b lora.lora_rank=16 lora.lora_module_path="
        "decoder/layers/.*(self_attention/(query|value)|mlp/MoeBlock_0/(wi_0|wo))"
    )
    lora = script(tmp_path, words).plan.model.lora
    assert lora is not None
    assert lora.on == ("query", "value", "expert_in", "expert_out")
    with pytest.raises(ShardsimError, match="names no projection of mixtral-8x7b"):
        script(tmp_path, "model_name=mixtral-8x7b lora_rank=16 lora_module_path=layers/mlp/wo")


def test_one_axis_takes_what_is_left(tmp_path: Path) -> None:
    with pytest.raises(ShardsimError, match="one axis takes -1, what is left; give the others"):
        script(tmp_path, "ici_data_parallelism=-1")  # beside fsdp's, which is -1 unless given
    plan = script(tmp_path, "ici_data_parallelism=-1 ici_fsdp_parallelism=16").plan
    assert {axis.name: axis.size for axis in plan.mesh} == {"data": 4, "fsdp": 16}


def test_axes_that_turn_weights_are_counted_and_listed(tmp_path: Path) -> None:
    for axis, counted in (("fsdp_transpose", "fsdp"), ("tensor_transpose", "model")):
        found = script(tmp_path, f"ici_{axis}_parallelism=4")
        assert found.plan.axis(counted).size % 4 == 0
        assert listed(found) == {f"ici_{axis}_parallelism": ("time",)}
    assert listed(script(tmp_path, "opt_type=adam_pax")) == {"opt_type": ()}


def test_a_command_in_another_commands_words_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text(f'xpk workload create --command "{COMMAND} remat_policy=minimal"\n')
    found = import_config(str(file), "maxtext", machine="v5p:4x4x4")
    assert found.plan == script(tmp_path, "remat_policy=minimal").plan


def test_flags_of_the_compiler_are_in_the_plan_or_listed(tmp_path: Path) -> None:
    flags = "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_enable_ici_ag_pipelining=true"
    found = script(tmp_path, before=f"export LIBTPU_INIT_ARGS='{flags}'")
    assert listed(found) == {"xla_tpu_enable_ici_ag_pipelining": ("time", "hbm")}
    assert found.plan.compiler_options == {"xla_tpu_scoped_vmem_limit_kib": "98304"}
    with pytest.raises(ShardsimError, match="must be a positive whole number of KiB"):
        script(tmp_path, before=f"export LIBTPU_INIT_ARGS='{flags.replace('98304', 'much')}'")


NOT_MAXTEXT = [
    ("#!/bin/bash\nexport A=1\nbash other.sh --fast\n", "no training command in this script"),
    ("export A=1\n./train_all.sh\n", "no training command in this script"),
    (
        "model: llama2-7b\nmachine: v5p:4x4x4\nbatch: 64\nmesh: {fsdp: 64}\nattention: flash\n",
        "no config of MaxText: 4 of its 5 keys, such as 'batch', are",
    ),
    ("model_type: llama\nhidden_size: 8\nvocab_size: 9\n", "use --from hf"),
    ('{"model_type": "llava", "text_config": {}, "vision_config": {}}', "use --from hf"),
    ('{"peft_type": "LORA", "lora_alpha": 8, "r": 4}', "peft_type is a key of Hugging Face's"),
]


@pytest.mark.parametrize(("text", "words"), NOT_MAXTEXT, ids=range(len(NOT_MAXTEXT)))
def test_a_file_of_another_kind_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text(text)
    with pytest.raises(ShardsimError, match=words):
        import_config(str(file), "maxtext", machine="v5p:4x4x4")


# Small models of each block: what its file says, and its weights beside those of a plain block.
_PLAIN = {
    "base_emb_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 96,
    "base_num_decoder_layers": 12,
    "head_dim": 16,
    "vocab_size": 256,
    "max_target_length": 128,
    "mlp_activations": "[silu, linear]",
}
_ATTENTION = 2 * 64 * 16 * (4 + 2)  # q and output, k and v
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "base_moe_mlp_dim": 96}
_ONE = 3 * 64 * 96
_MIXED = 8 * _ONE + 64 * 8
_POST = {"use_post_attn_norm": "true", "use_post_ffw_norm": "true"}
BLOCKS: dict[str, tuple[dict[str, Any], int]] = {
    "llama2": ({}, 12 * (_ATTENTION + _ONE + 2 * 64)),
    "mixtral": (_EXPERTS, 12 * (_ATTENTION + _MIXED + 2 * 64)),
    "qwen2": ({"attention_bias": "true"}, 12 * (_ATTENTION + 16 * 8 + _ONE + 2 * 64)),
    "qwen3": ({"use_qk_norm": "true"}, 12 * (_ATTENTION + 2 * 16 + _ONE + 2 * 64)),
    "qwen3_moe": (
        {**_EXPERTS, "use_qk_norm": "true"},
        12 * (_ATTENTION + 2 * 16 + _MIXED + 2 * 64),
    ),
    "gemma2": ({**_POST, "sliding_window_size": 32}, 24 * (_ATTENTION + _ONE + 4 * 64)),
    "gemma3": ({**_POST, "sliding_window_size": 32}, 12 * (_ATTENTION + 32 + _ONE + 4 * 64)),
    "gemma4": (
        {
            **_POST,
            "sliding_window_size": 32,
            "v_norm_with_scale": "false",
            "share_kv_projections": "true",
            "global_head_dim": 24,
            "global_num_kv_heads": 1,
        },
        # of two layers in twelve queries, keys and output are 24 wide, and there are no values
        10 * (_ATTENTION + 32) + 2 * (64 * 24 * (2 * 4 + 1) + 48) + 12 * (_ONE + 4 * 64 + 1),
    ),
    "gpt_oss": (
        {
            **_EXPERTS,
            "sliding_window_size": 32,
            "attention_bias": "true",
            "attention_sink": "true",
            "mlp_bias": "true",
            "routed_bias": "true",
        },
        # biases of q, k, v, output, experts and router, and a sink of each head
        12 * (_ATTENTION + 16 * 8 + 64 + 4 + _MIXED + 8 * (2 * 96 + 64) + 8 + 2 * 64),
    ),
    "llama4": (
        {**_EXPERTS, "shared_experts": 1, "interleave_moe_layer_step": 2},
        12 * (_ATTENTION + 2 * 64) + 6 * _ONE + 6 * (_MIXED + _ONE),
    ),
    "envy": (
        {
            **_EXPERTS,
            "use_qk_norm": "true",
            "use_post_ffw_norm": "true",
            "interleave_moe_layer_step": 2,
        },
        12 * (_ATTENTION + 2 * 16 + 3 * 64) + 6 * _ONE + 6 * _MIXED,
    ),
    "deepseek": (
        {
            **_EXPERTS,
            "attention_type": "mla",
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "shared_experts": 2,
            "first_num_dense_layers": 2,
            "routed_bias": "true",
        },
        # down and up of queries, of keys and values, the part of keys that heads share, output
        12 * (64 * 24 + 24 + 24 * 4 * 12 + 64 * 32 + 32 + 32 * 4 * (8 + 10) + 64 * 4 + 40 * 64)
        + 12 * 2 * 64
        + 2 * _ONE
        + 10 * (_MIXED + 8 + 2 * _ONE),
    ),
    "qwen3_custom_moe": (
        {**_EXPERTS, "attention_output_dim": 48, "moe_expert_input_dim": 48},
        # output, a norm, experts and router of 48 numbers a token, and back to 64
        12 * (_ATTENTION - 64 * 16 + 64 + 48 + 48 * 64 + 8 * 3 * 48 * 96 + 48 * 8),
    ),
    "qwen3_next": (
        {
            **_EXPERTS,
            "shared_experts": 1,
            "gdn_num_key_heads": 2,
            "gdn_num_value_heads": 4,
            "gdn_key_head_dim": 8,
            "gdn_value_head_dim": 12,
            "inhomogeneous_layer_cycle_interval": 3,
        },
        # a gate as wide as queries; of eight layers q, k, v, z, out, two numbers a head, taps,
        # decays and a norm; and a shared expert with a gate of one number
        4 * (_ATTENTION + 64 * 16 * 4 + 2 * 16)
        + 8 * (64 * (2 * 16 + 3 * 48 + 2 * 4) + 4 * (2 * 16 + 48) + 2 * 4 + 12)
        + 12 * (_MIXED + _ONE + 64 + 2 * 64),
    ),
    "olmo3": (
        {"use_qk_norm": "true", "sliding_window_size": 32},
        12 * (_ATTENTION + 16 * (4 + 2) + _ONE + 2 * 64),
    ),
}


def block(folder: Path, name: str, **more: Any) -> Model:
    """Return the model of a small file of one block, called by the block's name."""
    file = folder / f"{name}-small.yml"
    lines = {"decoder_block": name, **_PLAIN, **BLOCKS.get(name, ({}, 0))[0], **more}
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    found = import_config(str(file), "maxtext", machine="v5e:2x2")
    assert not any(item.could_change for item in found.not_carried)
    return found.plan.model


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_the_weights_of_maxtexts(name: str, tmp_path: Path) -> None:
    ends = 64 * (2 * 256 + 1)
    assert block(tmp_path, name).parameters_all == BLOCKS[name][1] + ends


def test_windows_of_blocks(tmp_path: Path) -> None:
    assert block(tmp_path, "gemma2").windows == (32, 0)
    assert block(tmp_path, "gemma3").windows == (32, 32, 32, 32, 32, 0)
    assert len(block(tmp_path, "gemma3", base_num_decoder_layers=10).windows) == 10
    assert block(tmp_path, "gpt_oss").windows == (32, 0)
    assert block(tmp_path, "olmo3").windows == (32, 32, 32, 0)


@pytest.mark.parametrize(("key", "value"), [("mhc_expansion_rate", 4), ("engram_layers", "[1]")])
def test_what_adds_weights_to_a_layer_of_deepseeks_is_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ShardsimError, match=f"{key}: .* is not modelled"):
        block(tmp_path, "deepseek", **{key: value})


@pytest.mark.parametrize("name", ["deepseek4", "gemma4_small"])
def test_a_block_that_cannot_be_said_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(ShardsimError, match=f"{name} is not modelled: .*model can say|a model has"):
        block(tmp_path, name)


def test_an_index_of_tokens_has_weights_of_its_own(tmp_path: Path) -> None:
    plain = block(tmp_path, "deepseek")
    words = {"use_indexer": "true", "indexer_n_heads": 2, "indexer_head_dim": 6, "indexer_topk": 32}
    model = block(tmp_path, "deepseek", **words)
    # Queries out of their latent, a key with a norm, and a weight of each head.
    more = 12 * (24 * 2 * 6 + 64 * 6 + 2 * 6 + 64 * 2)
    assert model.parameters_all - plain.parameters_all == more
    # By MaxText's calculate_mla_tflops_per_device: scores of all pairs, halved, then the chosen.
    tokens = 128
    scores = tokens * 2 * (6 + 1)
    pairs = 2 * 4 * (12 + 10) * (32 * tokens - 32**2 / 2) / tokens
    assert attention_flops_per_token(model, halved=True) == 12 * (scores + pairs)
    with pytest.raises(ShardsimError, match="a loss of the index is not modelled"):
        block(tmp_path, "deepseek", **words, indexer_loss_scaling_factor=0.1)


def test_a_model_is_read_from_its_own_file_beside_base_yml(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    block(tmp_path / "models", "qwen3")
    (tmp_path / "models" / "qwen3-small.yml").rename(tmp_path / "models" / "mine-1b.yml")
    (tmp_path / "base.yml").write_text("per_device_batch_size: 1\n")
    file = tmp_path / "run.yml"
    file.write_text("model_name: mine-1b\nper_device_batch_size: 2\n")
    base = tmp_path / "base.yml"
    found = import_config(str(file), "maxtext", machine="v5e:2x2", base=base)
    assert found.plan.model.parameters_all == BLOCKS["qwen3"][1] + 64 * (2 * 256 + 1)
    file.write_text("model_name: mine-1b\nvocab_size: 512\n")
    with pytest.raises(ShardsimError, match="vocab_size: 512, but model_name says 256"):
        import_config(str(file), "maxtext", machine="v5e:2x2", base=base)


@pytest.mark.parametrize(
    ("blocks", "kernel", "listed"),
    [
        ({"q": 2048, "kv": 2048, "q_dkv": 2048, "kv_dkv": 2048, "q_dq": 2048}, "flash-2048", 2),
        ({"q": 1024, "q_dkv": 2048, "q_dq": 2048}, "flash-2048", 0),
        ({"q": 256}, "flash", 1),
        ({"kv": 512}, "flash", 0),
    ],
)
def test_blocks_of_a_kernel_are_taken_as_near_as_they_come(
    tmp_path: Path, blocks: dict[str, int], kernel: str, listed: int
) -> None:
    words = " ".join(f"sa_block_{side}={size}" for side, size in blocks.items())
    found = script(tmp_path, words, on="v6e:8x8")
    assert found.plan.attention == kernel
    assert len([one for one in found.not_carried if one.key.startswith("sa_block")]) == listed
    with pytest.raises(ShardsimError, match="sa_block_q: expected a positive number, found 'abc'"):
        script(tmp_path, "sa_block_q=abc", on="v6e:8x8")
