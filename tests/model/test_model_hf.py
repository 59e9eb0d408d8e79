"""Hugging Face configs: counts as published, no key lost, and files that are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import refused, shardsim

from shardsim.errors import ShardsimError
from shardsim.model import HfModel, load_hf, load_model
from shardsim.model.hf.decoders import FAMILIES
from shardsim.model.hf.defaults import DEFAULTS
from shardsim.model.hf.towers import TOWERS

_CLASSES = {
    "architectures": ["ViTForImageClassification"],
    "id2label": {str(number): "name" for number in range(1000)},
}
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "num_key_value_heads",
)


def _config(
    kind: str, count: int, sizes: Sequence[int | None] = (), **more: Any
) -> tuple[dict[str, Any], int]:
    given = {key: size for key, size in zip(_SIZES, sizes, strict=False) if size is not None}
    return {"model_type": kind, **given, **more}, count


# What published files set beside transformers' defaults, and the count of the weights there.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": _config(
        "llama", 8_030_261_248, (None, 14336, None, None, 8), vocab_size=128256
    ),
    "Llama-3.1-70B": _config("llama", 70_553_706_496, (8192, 28672, 80, 64, 8), vocab_size=128256),
    "Llama-3.2-1B": _config(
        "llama",
        1_235_814_400,
        (2048, 8192, 16, None, 8),
        vocab_size=128256,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "Llama-2-7b": _config("llama", 6_738_415_616),
    "Mistral-7B-v0.1": _config("mistral", 7_241_732_096),
    "Mixtral-8x7B-v0.1": _config("mixtral", 46_702_792_704),
    "Qwen2.5-7B": _config("qwen2", 7_615_616_512, (3584, 18944, 28, 28, 4), vocab_size=152064),
    "Qwen2.5-0.5B": _config("qwen2", 494_032_768, (896, 4864, 24, 14, 2), tie_word_embeddings=True),
    "Qwen3-8B": _config("qwen3", 8_190_735_360, (None, 12288, 36, None, 8)),
    "Qwen3-30B-A3B": _config("qwen3_moe", 30_532_122_624, (None, None, 48), head_dim=128),
    "gemma-2b": _config("gemma", 2_506_172_416, (2048, 16384, 18, 8, 1)),
    "gemma-2-9b": _config("gemma2", 9_241_705_984, (3584, 14336, 42, 16, 8)),
    "gemma-3-1b-pt": _config(
        "gemma3_text", 999_885_952, (1152, 6912, None, 4, 1), vocab_size=262144
    ),
    # Counted by hand from the sizes; published as 30.7 B and, of text, 25.2 B.
    "gemma-4-31B": _config(
        "gemma4_text",
        30_697_345_340,
        (5376, 21504, 60, 32, 16),
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
    ),
    "gemma-4-26B-A4B": _config(
        "gemma4_text",
        25_233_141_790,
        (2816, 2112, 30, 16, 8),
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "Phi-3-mini-4k-instruct": _config("phi3", 3_821_079_552),
    "phi-4": _config("phi3", 14_659_507_200, (5120, 17920, 40, 40, 10), vocab_size=100352),
    "gpt2": _config("gpt2", 124_439_808),
    "gpt2-xl": _config("gpt2", 1_557_611_200, n_embd=1600, n_layer=48, n_head=25),
    "gpt-oss-20b": _config("gpt_oss", 20_914_757_184, (None, None, 24), num_local_experts=32),
    "gpt-oss-120b": _config("gpt_oss", 116_829_156_672),
    "Qwen1.5-MoE-A2.7B": _config("qwen2_moe", 14_315_784_192, (None, None, None, None, 16)),
    # As MaxText's own code makes it; without the layer of a second prediction.
    "Qwen3-Next-80B-A3B": _config("qwen3_next", 79_674_391_296),
    "DeepSeek-V2-Lite": _config(
        "deepseek_v2",
        15_706_484_224,
        (2048, 10944, 27, 16, 16),
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        q_lora_rank=None,
        first_k_dense_replace=1,
        vocab_size=102400,
    ),
    # Without the layer of a second prediction, and biases of routers that no gradient reaches.
    "DeepSeek-V3": _config("deepseek_v3", 671_026_419_200 - 58 * 256),
    # The same with an index in each layer, counted by hand.
    "DeepSeek-V3.2": _config(
        "deepseek_v32",
        671_026_419_200 - 58 * 256 + 61 * (1536 * 64 * 128 + 7168 * 128 + 7168 * 64 + 2 * 128),
        index_topk=2048,
    ),
    "OLMo-2-1124-7B": _config("olmo2", 7_298_617_344, vocab_size=100352),
    "OLMo-2-1124-13B": _config("olmo2", 13_716_198_400, (5120, 13824, 40, 40), vocab_size=100352),
    "Olmo-3-1025-7B": _config("olmo3", 7_298_011_136, vocab_size=100278),
    "phi-2": _config("phi", 2_779_683_840, (2560, 10240, 32)),
    "gpt-neox-20b": _config("gpt_neox", 20_554_567_680),
    "pythia-6.9b": _config("gpt_neox", 6_857_302_016, (4096, 16384, 32, 32)),
    # Of facebook/dinov2-*, less the token of masked patches.
    "dinov2-base": _config("dinov2", 86_580_480 - 768, image_size=518),
    "dinov2-giant": _config(
        "dinov2", 1_136_480_768 - 1536, (1536, None, 40, 24), image_size=518, use_swiglu_ffn=True
    ),
    "dinov2-with-registers-base": _config(
        "dinov2_with_registers", 86_583_552 - 768, image_size=518, patch_size=14
    ),
    # The towers of images of openai/clip-*.
    "clip-vit-base-patch32": _config("clip_vision_model", 87_456_000),
    "clip-vit-large-patch14": _config(
        "clip_vision_model", 303_179_776, (1024, 4096, 24, 16), patch_size=14
    ),
    "vit-base-patch16-224": _config("vit", 86_567_656, **_CLASSES),
    "deit-tiny-patch16-224": _config("vit", 5_717_416, (192, 768, None, 3), **_CLASSES),
}


def read(folder: Path, config: Any) -> HfModel:
    """Return the model of a config that is written to a folder."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_hf(str(folder))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_published_weights(name: str, tmp_path: Path) -> None:
    config, count = PUBLISHED[name]
    assert read(tmp_path, config).model.parameters_all == count


def by_hand(c: dict[str, Any]) -> int:
    """Return the weights of a decoder, module by module as transformers makes them."""
    width, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    deep, kind = c["head_dim"], c["model_type"]
    attention = width * deep * (heads + 2 * kv) + heads * deep * width
    if kind == "qwen2" or c.get("attention_bias"):
        attention += deep * (heads + 2 * kv)
    if c.get("attention_bias"):
        attention += width
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        attention += 2 * deep
    mlp = 3 * width * c.get("intermediate_size", 0)
    if c.get("mlp_bias"):
        mlp += 2 * c["intermediate_size"] + width
    norms = width * (4 if kind in ("gemma2", "gemma3_text") else 2)
    if kind == "mixtral":
        mlp = c["num_local_experts"] * (mlp + width)
    if kind == "qwen3_moe":
        experts = c["num_experts"] * (3 * width * c["moe_intermediate_size"] + width)
        step, layers = c["decoder_sparse_step"], c["num_hidden_layers"]
        sparse = sum((layer + 1) % step == 0 for layer in range(layers))
        return _whole(c, layers * (attention + norms) + sparse * experts + (layers - sparse) * mlp)
    return _whole(c, c["num_hidden_layers"] * (attention + norms + mlp))


def _whole(c: dict[str, Any], blocks: int) -> int:
    tables = 1 if c["tie_word_embeddings"] else 2
    return blocks + c["hidden_size"] * (1 + tables * c["vocab_size"])


@st.composite
def decoders(draw: st.DrawFn) -> dict[str, Any]:
    """Return a config of some sizes."""
    kinds = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
    kind = draw(st.sampled_from((*kinds, "gemma", "gemma2", "gemma3_text", "phi3")))
    kv = draw(st.integers(1, 4))
    small = st.integers(1, 64)
    config = {
        "model_type": kind,
        "hidden_size": draw(small),
        "num_hidden_layers": draw(st.integers(4, 9)),
        "num_attention_heads": kv * draw(st.integers(1, 4)),
        "num_key_value_heads": kv,
        "head_dim": 2 * draw(st.integers(1, 16)),
        "vocab_size": draw(small),
        "tie_word_embeddings": draw(st.booleans()),
        "intermediate_size": draw(small),
    }
    if kind == "llama":
        config["mlp_bias"] = draw(st.booleans())
    if kind in ("llama", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"):
        config["attention_bias"] = draw(st.booleans())
    if kind == "mixtral":
        config["num_local_experts"] = draw(st.integers(2, 8))
    if kind == "qwen3_moe":
        config["num_experts"] = draw(st.integers(8, 16))
        config["moe_intermediate_size"] = draw(small)
        config["decoder_sparse_step"] = draw(st.integers(1, 4))
    return config


@settings(max_examples=60, deadline=None)
@given(config=decoders())
def test_counts_are_those_of_its_modules(
    config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = read(tmp_path_factory.mktemp("model"), config).model
    assert model.parameters_all == by_hand(config)


@pytest.mark.parametrize("kind", [*FAMILIES, *TOWERS])
def test_every_kind_reads_the_keys_that_it_has_defaults_for(kind: str, tmp_path: Path) -> None:
    least = {  # no default, or one that is refused
        "deepseek_v2": {"num_experts_per_tok": 6},
        "gemma4_text": {"hidden_size_per_layer_input": 0},
    }.get(kind, {})
    found = read(tmp_path, {**DEFAULTS[kind], "model_type": kind, **least})
    listed = {item.key for item in found.not_carried}
    assert not any("not a key" in item.why for item in found.not_carried)
    assert set(DEFAULTS[kind]) <= {*found.carried, *listed}
    alone = read(tmp_path, {"model_type": kind, **least})
    assert alone.model == found.model


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
_NAMES = sorted({key for config in DEFAULTS.values() for key in config} | {"rope_scaling", "dtype"})


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(PUBLISHED)),
    changes=st.dictionaries(
        st.one_of(st.sampled_from(_NAMES), st.text(max_size=10)), _VALUES, max_size=4
    ),
    gone=st.sets(st.sampled_from(_NAMES), max_size=2),
)
def test_every_key_is_carried_listed_or_refused(
    name: str, changes: dict[str, Any], gone: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = {k: v for k, v in {**PUBLISHED[name][0], **changes}.items() if k not in gone}
    try:
        found = read(tmp_path_factory.mktemp("model"), config)
    except ShardsimError:  # and no other error
        return
    assert set(config) <= {*found.carried, *(item.key for item in found.not_carried)}
    assert load_model(found.model.to_mapping()) == found.model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_that_is_carried_changes_the_model(name: str, tmp_path: Path) -> None:
    config = {**DEFAULTS[PUBLISHED[name][0]["model_type"]], **PUBLISHED[name][0]}
    usual = read(tmp_path, config)
    sizes = [k for k in usual.carried if type(config[k]) is int and "position" not in k]
    sizes = [k for k in sizes if config[k]]  # twice nothing is nothing
    assert len(sizes) >= 4
    for key in sizes:
        try:
            other = read(tmp_path, {**config, key: 2 * config[key]})
        except ShardsimError:
            continue
        changed = other.model != usual.model
        assert changed or key in {item.key for item in other.not_carried}, key


def test_windows_are_a_round_of_layers_or_all_of_them(tmp_path: Path) -> None:
    gemma2 = read(tmp_path, PUBLISHED["gemma-2-9b"][0]).model
    assert gemma2.windows == (4096, 0)
    gemma3 = read(tmp_path, {**PUBLISHED["gemma-3-1b-pt"][0], "sliding_window": 512}).model
    assert [layer for layer, window in enumerate(gemma3.windows) if not window] == [5, 11, 17, 23]
    assert set(gemma3.windows) == {0, 512}
    qwen = {**PUBLISHED["Qwen2.5-0.5B"][0], "use_sliding_window": True, "max_window_layers": 21}
    assert read(tmp_path, qwen).model.windows == (0,) * 21 + (4096,) * 3
    kinds = ["full_attention", "sliding_attention"] * 12
    by_layer = {**PUBLISHED["gpt-oss-20b"][0], "layer_types": kinds}
    assert read(tmp_path, by_layer).model.windows == (0, 128)


def test_layers_after_the_last_whole_round_are_a_stack_of_their_own(tmp_path: Path) -> None:
    model = read(tmp_path, PUBLISHED["gemma-3-1b-pt"][0]).model
    assert model.stacks == ((4, 6), (2, 1))
    assert model.round_layers == 6


def test_the_text_part_of_a_model_of_several_is_read(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**text, "num_hidden_layers": 34, "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152},
        "mm_tokens_per_image": 256,
    }
    found = read(tmp_path, config)
    assert found.model.parameters_all == 3_880_263_168
    assert "text_config.hidden_size" in found.carried
    left = {item.key: item.could_change for item in found.not_carried}
    assert left["vision_config"] == ("time", "hbm")
    assert left["mm_tokens_per_image"] == ()
    assert "text_config.num_attention_heads 8" in found.assumed
    assert "text_config.hidden_size" not in found.assumed


def test_sizes_that_a_file_leaves_to_defaults_are_said(tmp_path: Path) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    every = dict.fromkeys((*sizes, "vocab_size", "max_position_embeddings"), 64) | {
        "hidden_size": 4096
    }
    assert read(tmp_path, {"model_type": "llama", **every}).assumed == ""
    read(tmp_path, {"model_type": "llama", "hidden_size": 2048})
    words = ["--on", "v5p:2x2x2", "--batch", "16", "--mesh", "fsdp=8"]
    run = shardsim("predict", str(tmp_path), *words, "--json")
    assert run.exit_code == 0, run.output
    assert "assumed, as transformers" in run.stderr
    assert "num_hidden_layers 32, intermediate_size 11008" in run.stderr


def test_a_tower_cuts_pixels_of_no_whole_patch(tmp_path: Path) -> None:
    tower = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    }
    found = read(tmp_path, {"model_type": "siglip", "vision_config": tower, "text_config": {}})
    assert (found.model.sequence, found.model.pooling) == (729, "map")
    assert found.model.parameters_all == 428_225_600
    assert {item.key for item in found.not_carried} == {"image_size", "text_config"}


def test_what_could_change_depends_on_the_value(tmp_path: Path) -> None:
    def could(**more: Any) -> dict[str, tuple[str, ...]]:
        found = read(tmp_path, {"model_type": "llama", **more})
        return {item.key: item.could_change for item in found.not_carried}

    assert could(attention_dropout=0.0, rope_scaling={"factor": 8.0}) == {
        "attention_dropout": (),
        "rope_scaling": (),
    }
    assert could(attention_dropout=0.1, no_such_key=1) == {
        "attention_dropout": ("time", "hbm"),
        "no_such_key": ("time", "hbm"),
    }


REFUSED = [
    ('{"model_type": "mamba2"}', "recurrent state"),
    ('{"model_type": "qwen3_next", "layer_types": ["full_attention"]}', "layer_types"),
    ('{"peft_type": "LORA", "r": 16}', "this file is of an adapter"),
    ('{"metadata": {}, "weight_map": {}}', "this file lists where weights are"),
    ('{"version": "1.0", "added_tokens": []}', "this file is of a tokenizer"),
    ('{"do_sample": true, "eos_token_id": 2}', "this file is for generation"),
    ('{"model_type": "deepseek_v3", "moe_layer_freq": 2}', "moe_layer_freq: 2 is not modelled"),
    ('{"model_type": "umt5"}', "an encoder and a decoder"),
    ('{"model_type": "clip_text_model"}', "without an output head"),
    ('{"model_type": "lama"}', "did you mean 'llama'"),
    ('{"model_type": ["llama"]}', "model_type"),
    ("{}", "model_type"),
    ("[1, 2]", "found a list"),
    ("", "the file is empty"),
    ("model: llama3-8b\n", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"model_type": "llama", "hidden_size": 1, "hidden_size": 2}', "appears twice"),
    ('{"model_type": "llama", "x": "\\ud800"}', "not valid JSON"),
    ('{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"model_type": "llama", "hidden_size": "4096"}', "hidden_size: expected a whole number"),
    ('{"model_type": "llama", "mlp_bias": 1}', "mlp_bias: expected true or false"),
    ('{"model_type": "llama", "hidden_act": "mish"}', "hidden_act: 'mish' is not modelled"),
    ('{"model_type": "qwen3", "layer_types": ["full_attention"]}', "layer_types: expected one"),
    ('{"model_type": "qwen3_moe", "mlp_only_layers": [3]}', "mlp_only_layers"),
    ('{"model_type": "gpt2", "n_head": 12, "num_attention_heads": 16}', "n_head is 12"),
    ('{"model_type": "llama", "is_encoder_decoder": true}', "is_encoder_decoder"),
    ('{"model_type": "vit", "patch_size": [16, 8]}', "only squares"),
    ('{"model_type": "gemma2", "num_hidden_layers": 900000000}', "num_hidden_layers: expected"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_such_file_or_cannot_be_said_is_one_line(
    text: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    for command in (["import", "--from", "hf"], ["models"]):
        run = shardsim(*command, str(file))
        assert words in refused(run)


def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content in (bytes(range(256)), b" " * 2_000_001):
        file.write_bytes(content)
        with pytest.raises(ShardsimError, match=r"UTF-8|larger than"):
            load_hf(str(file))


def test_a_config_stands_where_a_model_does(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    config = {**PUBLISHED["Qwen3-8B"][0], "torch_dtype": "bfloat16"}
    model = read(folder, config).model
    assert model.name == "Qwen3-8B"
    assert load_model(str(folder)) == load_model(str(folder / "config.json")) == model
    words = ["--on", "v5p:2x2x2", "--batch", "16", "--seq", "2048", "--mesh", "fsdp=8"]
    run = shardsim("predict", str(folder), *words, "--json")
    assert run.exit_code == 0, run.output
    assert "not carried: max_position_embeddings, torch_dtype" in run.stderr
    out = tmp_path / "model.yaml"
    run = shardsim("import", "--from", "hf", str(folder), "-o", str(out), "--json")
    assert run.exit_code == 0
    data = json.loads(run.stdout)
    assert {item["key"] for item in data["not_carried"]} == {
        "max_position_embeddings",
        "torch_dtype",
    }
    run = shardsim("models", str(out), "--json")
    assert json.loads(run.stdout)["parameters"] == data["parameters"] == 8_190_735_360
