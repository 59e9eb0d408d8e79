"""Presets are found by name, and models are made from few lines."""

import re
from pathlib import Path
from typing import Any

import pytest

from shardsim.errors import FileError, ModelError
from shardsim.model import (
    Biases,
    load_model,
    load_model_file,
    model_aliases,
    model_names,
    override_model,
)

FEW_LINES = {
    "name": "mine",
    "family": "decoder",
    "layers": 4,
    "embed": 512,
    "heads": 8,
    "vocab": 1000,
    "sequence": 128,
}


@pytest.mark.parametrize("name", model_names())
def test_presets_are_sound(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert model.source
    assert re.search(r"arXiv|weights|@[0-9a-f]{9}", model.source)
    assert load_model(name.upper() if name != "vit-g" else name) == model
    assert load_model(model.to_mapping()) == model
    for alias in model_aliases(name):
        assert load_model(alias) == model


def test_names_are_unique_whatever_their_case() -> None:
    names = [name.lower() for name in model_names()]
    assert len(set(names)) == len(names)


def test_case_tells_the_two_gs_apart() -> None:
    assert load_model("ViT-g/14").name == "vit-g"
    assert load_model("ViT-G/14").name == "vit-bigg"
    with pytest.raises(ModelError, match=r"could be any of vit-bigg, vit-g$"):
        load_model("VIT-G")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("vit22b", "did you mean 'vit-22b'"),
        ("palm-540", "did you mean 'palm-540b'"),
        ("lama3-8b", "did you mean 'llama3-8b'"),
        ("", "shardsim models shows all"),
        ("../vit", "unknown model"),
        ("a\nb", "unknown model"),
    ],
)
def test_unknown_names_lead_to_known_ones(wrong: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(wrong)
    assert "\n" not in str(caught.value)


def test_a_model_takes_few_lines() -> None:
    model = load_model(FEW_LINES)
    assert (model.head_dim, model.kv_heads, model.mlp) == (64, 8, 2048)
    vit = load_model(
        {
            "name": "small",
            "family": "vit",
            "layers": 2,
            "embed": 64,
            "heads": 4,
            "patch": 16,
            "image": 64,
            "biases": True,
            "pooling": "cls",
        }
    )
    assert vit.sequence == 17
    assert vit.biases == Biases(qkv=True, attention_output=True, mlp=True, norm=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 3}, "unknown key 'layer'; did you mean 'layers'"),
        ({"biases": {"qvk": True}}, "biases: unknown key 'qvk'; did you mean 'qkv'"),
        ({"biases.qvk": True}, "unknown key 'biases.qvk'; did you mean 'biases.qkv'"),
        ({"biases.qkv": 1}, "biases: qkv: expected true or false, found 1"),
        ({"biases": None}, "biases: expected a mapping"),
        ({"base": 3}, "base: expected the name of a preset"),
        ({"base": "vit-23b"}, "did you mean 'vit-22b'"),
        ({"embed": "wide"}, "embed: expected a positive whole number"),
        ({"embed": None}, "embed: expected a positive whole number"),
        ({"embed": 10**5000 + 1}, "embed: expected a positive whole number"),
        ({"embed": 500}, "head_dim"),
        ({"heads": 0}, "heads: expected a positive whole number"),
        ({1: 2}, "unknown key '1'"),
    ],
)
def test_bad_mappings_give_one_clear_line(changes: dict[Any, Any], words: str) -> None:
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load_model(FEW_LINES | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "family", "layers", "embed", "heads", "sequence"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"missing key '{key}'"):
        load_model({k: v for k, v in FEW_LINES.items() if k != key})


@pytest.mark.parametrize("wrong", [None, 3, ["vit-22b"]])
def test_a_model_is_a_name_or_a_mapping(wrong: Any) -> None:
    with pytest.raises(ModelError, match="expected a mapping of keys"):
        load_model(wrong)


def test_overrides_change_only_what_they_say() -> None:
    base = load_model("vit-22b")
    changed = override_model(base, {"parallel_block": False, "biases.qkv": True, "layers": 12})
    assert not changed.parallel_block
    assert changed.biases == Biases(qkv=True, attention_output=True, mlp=True, norm=False)
    assert (changed.layers, changed.embed, changed.name) == (12, 6144, "vit-22b")
    assert changed.note.endswith("Changed: parallel_block=false, biases.qkv=true, layers=12.")
    assert override_model(base, {}) == base
    assert override_model(base, {"layers": 48, "biases.mlp": True}) == base
    assert load_model({"base": "ViT-22B", "biases": {"qkv": True}}).biases.attention_output
    assert load_model({"base": "vit-22b", "name": "mine"}).name == "mine"


def test_overrides_keep_defaults_tied() -> None:
    assert override_model(load_model("vit-22b"), {"image": 448}).sequence == 1024
    assert override_model(load_model("vit-b-16"), {"pooling": "mean"}).sequence == 196
    assert override_model(load_model("vit-22b"), {"image": 448, "sequence": 99}).sequence == 99
    assert override_model(load_model("vit-22b"), {"heads": 24}).kv_heads == 24
    assert override_model(load_model("palm-8b"), {"heads": 8}).kv_heads == 1


def test_overrides_are_checked() -> None:
    model = load_model("palm-8b")
    with pytest.raises(ModelError, match="did you mean 'kv_heads'"):
        override_model(model, {"kvheads": 4})
    with pytest.raises(ModelError, match="kv_heads: 16 heads cannot share 5"):
        override_model(model, {"kv_heads": 5})
    with pytest.raises(ModelError, match="expected a mapping"):
        override_model(model, [])  # type: ignore[arg-type]


def test_models_from_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: llama3-8b\nname: llama3-short\nlayers: 8\n")
    assert load_model_file(path).layers == 8
    path.write_text("palm-8b\n")
    assert load_model_file(path) == load_model("palm-8b")
    path.write_text("base: llama3-8b\nlayrs: 8\n")
    with pytest.raises(ModelError, match=r"mine\.yaml: model: unknown key 'layrs'"):
        load_model_file(path)
    with pytest.raises(FileError, match=r"other\.yaml"):
        load_model_file(tmp_path / "other.yaml")
