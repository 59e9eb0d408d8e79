"""AXLearn's experiments as plans: by name, and by the text that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.errors import ShardsimError
from shardsim.plan import plan_from_data, resolve
from shardsim.plan.io import plan_to_data
from shardsim.validate.imports import Imported, import_config
from shardsim.validate.imports.axlearn import read_axlearn

_AXES = ("pipeline", "data", "expert", "fsdp", "seq", "model")
_D = "model.decoder"
_L = f"{_D}.transformer.layer"
_A = f"{_L}.self_attention.attention"
_POLICIES = f"remat_policies['{_L}']"
_REGEX = "axlearn.common.utils.save_and_offload_only_these_names_regex"
_EMBED = ["expert", "fsdp", "seq"]


def flat(key: str, value: Any) -> dict[str, Any]:
    """Return lists by the paths of their items."""
    if not isinstance(value, list):
        return {key: value}
    return {
        path: one
        for number, inner in enumerate(value)
        for path, one in flat(f"{key}[{number}]", inner).items()
    }


def sized(key: str, **sizes: int) -> dict[str, Any]:
    return flat(key, [sizes.get(axis, 1) for axis in _AXES])


def remat(key: str, save: str | None, offload: str | None) -> dict[str, Any]:
    return {
        f"{key}['prevent_cse']": False,
        f"{key}['policy'].fn": _REGEX,
        f"{key}['policy'].names_which_can_be_saved": save,
        f"{key}['policy'].names_which_can_be_offloaded": offload,
    }


def rule(number: int, pattern: str, *modifiers: dict[str, Any]) -> dict[str, Any]:
    """Return a mesh rule of modifiers, each by its own paths."""
    found: dict[str, Any] = {f"mesh_rules[{number}][0]": pattern}
    chain = f"mesh_rules[{number}][1]"
    found[f"{chain}.klass"] = "axlearn.common.trainer_config_modifier.ChainConfigModifier"
    for at, modifier in enumerate(modifiers):
        for path, value in modifier.items():
            found[f"{chain}.config_modifiers[{at}].{path}"] = value
    return found


def modifier(name: str, **more: Any) -> dict[str, Any]:
    return {"klass": f"axlearn.common.trainer_config_modifier.{name}", **more}


# A decoder of a small Llama: 4 layers, 256 wide.
CONFIG: dict[str, Any] = {
    "klass": "axlearn.common.trainer.SpmdTrainer",
    "input.input_dispatcher.global_logical_batch_size": 512,
    "input.source.max_sequence_length": 1024,
    "learner.optimizer.fn": "axlearn.common.optimizers.chain",
    "learner.optimizer.args[1].fn": "axlearn.common.optimizers.adamw_decoupled_optimizer",
    "learner.optimizer.args[1].learning_rate": 0.1,
    **flat("mesh_axis_names", [*_AXES]),
    **sized("mesh_shape", fsdp=-1),
    **rule(
        0,
        "tpu-v5p-(64|128)",
        modifier("MeshShapeModifier", **sized("mesh_shape", data=-1, fsdp=8, model=2)),
        modifier(
            "RematSpecModifier", **remat(f"remat_policies['{_L}']", ".*[kqv]_proj", ".*input")
        ),
        modifier("GradientAccumulationModifier", grad_acc_steps=4),
        modifier("PartitionSpecModifier", partition_specs=None),
    ),
    f"{_D}.dim": 256,
    f"{_D}.vocab_size": 1024,
    f"{_D}.klass": "axlearn.common.decoder.Decoder",
    f"{_D}.dropout_rate": 0.0,
    f"{_D}.output_norm.klass": "axlearn.common.layers.RMSNorm",
    **flat(f"{_D}.emb.token_emb.param_partition_spec", ["model", _EMBED]),
    f"{_D}.transformer.klass": "axlearn.common.attention.RepeatedTransformerLayer",
    f"{_D}.transformer.num_layers": 4,
    f"{_L}.klass": "axlearn.common.attention.TransformerLayer",
    **flat(f"{_L}.feed_forward.activation", ["nn.silu", "linear"]),
    f"{_L}.feed_forward.klass": "axlearn.common.attention.TransformerFeedForwardLayer",
    f"{_L}.feed_forward.hidden_dim.fn": "axlearn.experiments.text.gpt.common.scale_fn",
    f"{_L}.feed_forward.hidden_dim.scale": 8 / 3,
    f"{_L}.feed_forward.hidden_dim.round_up_to_multiples_of": 256,
    f"{_L}.feed_forward.structure": "prenorm",
    **flat(f"{_L}.feed_forward.linear1.param_partition_spec", [_EMBED, "model"]),
    **flat(f"{_L}.feed_forward.linear2.output_partition_spec", [["data", "fsdp"], "seq", "model"]),
    **remat(f"{_L}.remat_spec", ".*([qkvo]_proj|context)", None),
    f"{_A}.klass": "axlearn.common.flash_attention.layer.FlashAttention",
    f"{_A}.causal": True,
    f"{_A}.num_heads": 4,
    f"{_A}.tpu_block_size": 512,
    f"{_A}.output_linear.bias": False,
    f"{_A}.input_linear.klass": "axlearn.common.attention.RoFormerQKVLinear",
    f"{_A}.input_linear.input_linear.klass": "axlearn.common.attention.FusedGroupedQKVLinear",
    f"{_A}.input_linear.input_linear.layer.bias": False,
    f"{_A}.input_linear.input_linear.num_kv_heads": 2,
    f"{_L}.self_attention.structure": "prenorm",
    "model.dtype": "jax.numpy.float32",
    "model.klass": "axlearn.common.causal_lm.Model",
    "train_dtype": "jax.numpy.bfloat16",
    "max_step": 1000,
}
# Query and output, keys and values, a gated MLP of 768 (8/3 of 256 rounded up), two norms; ends.
COUNT = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768 + 2 * 256) + 256 * 1024 + 256


def text_of(config: dict[str, Any]) -> str:
    return "".join(f"{key}: {value!r}\n" for key, value in config.items())


def read(config: dict[str, Any], machine: str = "v5p:4x4x4") -> Imported:
    plan, notes, left = read_axlearn(Path("trainer_config"), text_of(config), machine)
    return Imported(plan, tuple(notes), tuple(left))


def test_a_trainer_config_becomes_a_plan_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "trainer_config"
    file.write_text(text_of(CONFIG))
    found = import_config(str(file), "axlearn", machine="v5e:8x8")  # no rule of v5e
    plan = found.plan
    assert plan.model.parameters_all == COUNT
    assert (plan.batch, plan.sequence, plan.microbatches) == (512, 1024, 1)
    assert {axis.name: axis.size for axis in plan.mesh} == {"fsdp": 64}
    assert (plan.remat.groups[0].save, plan.attention) == ({"qkv", "attention_output"}, "flash")
    could = {item.key for item in found.not_carried if item.could_change}
    assert could == {f"{_A}.tpu_block_size"}
    assert "max_step" in {item.key for item in found.not_carried}


def test_the_rule_of_the_slice_decides_mesh_remat_and_accumulation() -> None:
    found = read(CONFIG)
    plan, layout = found.plan, resolve(found.plan)
    assert "tpu-v5p-128 matches" in found.notes[0]
    sizes = (int(layout.data.size), int(layout.fsdp.size), int(layout.tensor.size))
    assert sizes == (4, 8, 2)
    (policy,) = plan.remat.groups
    assert (policy.save, policy.offload) == ({"qkv"}, {"layer_input"})
    assert plan.microbatches == 4
    assert plan.activations["embed"] == ("model",)
    left = [item for item in found.not_carried if "PartitionSpecModifier" in item.key]
    assert [item.could_change for item in left] == [("time", "hbm")]
    other = read(CONFIG, "v5p:4x4x8")  # tpu-v5p-256
    assert "none matches tpu-v5p-256" in other.notes[0]
    assert other.plan.microbatches == 1


def test_slices_take_the_first_axis_that_they_divide_or_the_one_that_is_said() -> None:
    plan = read({**CONFIG, **sized("mesh_shape", data=-1, fsdp=16)}, "2*v5e:4x8").plan
    assert (plan.axis("data").size, plan.axis("data").torus["dcn"]) == (4, 2)
    plan = read(CONFIG, "2*v5e:4x8").plan
    assert (plan.axis("fsdp").size, plan.axis("fsdp").torus["dcn"]) == (64, 2)
    without = {key: value for key, value in CONFIG.items() if not key.startswith("mesh_shape")}
    hybrid = sized("mesh_shape['ici_mesh_shape']", fsdp=-1, model=4)
    hybrid |= sized("mesh_shape['dcn_mesh_shape']", data=-1)
    plan = read({**without, **hybrid}, "2*v5e:4x8").plan
    assert {axis.name: axis.size for axis in plan.mesh} == {"data": 2, "fsdp": 8, "model": 4}


# Names that are saved and offloaded -> what a plan keeps and offloads, unfused and in flash.
POLICIES = [
    (".*([qkvo]_proj|context)", None, {"qkv", "attention_output", "context"}, set()),
    (".*linear1_[01]|.*linear2(_[01])?", ".*[kqv]_proj", {"mlp_hidden", "mlp_output"}, {"qkv"}),
    (None, ".*input", set(), {"layer_input"}),
    (".*flash_residuals", None, set(), set()),
    ("", "", set(), set()),
]


@pytest.mark.parametrize(("save", "offload", "kept", "away"), POLICIES)
def test_patterns_of_names_keep_tensors(save: Any, offload: Any, kept: set, away: set) -> None:
    config = {**CONFIG, **remat(f"{_L}.remat_spec", save, offload)}
    unfused = config | {f"{_A}.klass": "axlearn.common.attention.GroupedQueryAttention"}
    (policy,) = read(unfused, "v5e:8x8").plan.remat.groups
    assert (policy.save, policy.offload) == (kept, away)
    (policy,) = read(config, "v5e:8x8").plan.remat.groups  # flash names no context
    residuals = {"context"} if save and "flash" in save else set()
    assert (policy.save, policy.offload) == ((kept - {"context"}) | residuals, away)


def test_of_a_tensor_kept_in_part_all_is_kept_and_it_is_said() -> None:
    found = read({**CONFIG, **remat(f"{_L}.remat_spec", ".*q_proj", None)}, "v5e:8x8")
    assert found.plan.remat.groups[0].save == {"qkv"}
    assert "remat: q_proj" in {item.key for item in found.not_carried if item.could_change}


# Exact counts: Llama 3's and Qwen3's model cards give those of four.
COUNTS = {
    "fuji-1B-v3-tiktoken": 1_235_814_400,
    "fuji-3B-v3-tiktoken-flash": 3_212_749_824,
    "fuji-8B-v3-tiktoken": 8_030_261_248,
    "fuji-70B-v3-tiktoken-flash": 70_553_706_496,
    "fuji-405B-v3-tiktoken": 405_853_388_800,
    "qwen3-30B-A3B-bs8m-seq8k": 30_532_122_624,
    "gala-7B-flash-sp-rp": 6_610_497_536,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_name_has_its_weights_and_its_rule(name: str) -> None:
    found = import_config(name, "axlearn", machine="v5p:8x8x8")
    assert found.plan.model.parameters_all == COUNTS[name]
    assert plan_from_data(plan_to_data(found.plan), "again") == found.plan
    assert (found.plan.attention == "flash") == ("flash" in name or "qwen" in name)


def test_rules_of_a_published_name_by_slice() -> None:
    def of(machine: str) -> Any:
        return import_config("fuji-70B-v2-flash", "axlearn", machine=machine).plan

    assert of("v5p:8x8x8").remat.groups[0].offload == {"layer_input"}
    assert of("v6e:16x16").microbatches == 4
    plan = of("4*v5e:16x16")  # tpu-v5litepod-256-4
    assert plan.axis("data").torus == {"dcn": 4}
    assert plan.remat.groups[0].offload == {"qkv", "attention_output", "mlp_hidden", "mlp_output"}
    one = import_config("fuji-7B-v2-flash-single-host", "axlearn", machine="v5e:4x8").plan
    assert one.batch == 1024 // 32


REFUSED = [
    ({"klass": "axlearn.common.inference.InferenceRunner"}, "is no axlearn.common.trainer"),
    ({"model.klass": "axlearn.vision.model"}, "causal_lm.Model is"),
    ({f"{_D}.transformer.klass": "my.Stack"}, "transformer.klass: 'my.Stack' is not read"),
    ({f"{_L}.feed_forward.activation[0]": "nn.swish2"}, "activation"),
    ({f"{_A}.num_heads": 3}, "does not divide by 3 heads"),
    ({"mesh_shape[1]": 7}, "does not make 64 devices"),
    ({"mesh_shape[1]": -1}, "does not make 64 devices"),
    ({"mesh_shape[1]": "x"}, "expected a size for each"),
    ({"mesh_axis_names[1]": "mine"}, "only pipeline, data"),
    ({"train_dtype": "jax.numpy.float16"}, "train_dtype: 'jax.numpy.float16' is not modelled"),
    ({"learner.optimizer.args[1].fn": "my.lion"}, "learner.optimizer"),
    ({"mesh_rules[0][0]": "tpu-(a*)*b"}, "a pattern that is not read"),
    ({"mesh_rules[0][0]": "tpu-(a"}, "no pattern"),
    ({f"{_L}.remat_spec['policy'].fn": "my.policy"}, "'my.policy' is not modelled"),
    ({f"{_L}.self_attention.structure": "postnorm"}, "structure: 'postnorm' is not modelled"),
]


@pytest.mark.parametrize(("more", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_said_is_refused_in_one_line(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardsimError) as error:
        read({**CONFIG, **more}, "v5e:8x8")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "a: 1\n", "model: {a: 1}\n", "#!/bin/sh\n", "\x00"])
def test_a_file_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text(text)
    with pytest.raises(ShardsimError):
        import_config(str(file), "axlearn", machine="v5e:8x8")
    with pytest.raises(ShardsimError, match="no experiment of AXLearn that is known; did you mean"):
        import_config("fuji-7B-v9", "axlearn", machine="v5e:8x8")


def test_an_unknown_name_is_named_before_a_slice_is_asked_for() -> None:
    with pytest.raises(ShardsimError, match="no experiment of AXLearn that is known"):
        import_config("fuji-7B-v9", "axlearn")
    with pytest.raises(ShardsimError, match="names no slice"):
        import_config("fuji-7B-v2", "axlearn")


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**9), st.floats(), st.text(max_size=8)
)
_NEW = (f"{_L}.new", f"{_A}.mask.new", f"{_D}.attention_mask.klass", "new", "new.deep[0]")
_NEW += ("learner.ema.decay", f"{_D}.emb.pos_emb.klass", f"{_A}.query_scale.norm.klass")


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from([*CONFIG, *_NEW]), value=_VALUES)
def test_any_key_is_carried_refused_or_listed(key: str, value: Any) -> None:
    before = read(CONFIG, "v5e:8x8")
    try:
        found = read({**CONFIG, key: value}, "v5e:8x8")
    except ShardsimError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    named = {item.key for item in found.not_carried}
    for item in found.not_carried:
        named.update(map(str, item.value if isinstance(item.value, list) else ()))
    stem = key.partition("[")[0]
    if found.plan == before.plan and CONFIG.get(key, ...) != value:
        of_others = key.startswith("mesh_rules")  # of other slices
        nothing = "names_which" in key and not value
        assert {key, stem, "remat: save", "remat: offload"} & named or of_others or nothing
