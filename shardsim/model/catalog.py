"""Models by name, from files, and with some of their options changed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shardsim.carried import NotCarried
from shardsim.errors import ModelError, instead, nearest, shown
from shardsim.files import check_keys, flow_text, read_yaml
from shardsim.kinds import MODEL, other_kind
from shardsim.model.delta import Delta
from shardsim.model.experts import Experts
from shardsim.model.global_heads import GlobalHeads
from shardsim.model.hf import config_path, read_config
from shardsim.model.index import Index
from shardsim.model.latent import Latent
from shardsim.model.lora import Lora
from shardsim.model.parts import KEYS as _PARTS
from shardsim.model.spec import LARGEST, Biases, Model

_PRESETS = Path(__file__).resolve().parent / "presets"
_BIASES = tuple(field.name for field in fields(Biases))
_FIELDS = tuple(field.name for field in fields(Model))
# Groups of options that a model may have or not, each with what it needs.
_OWN: Mapping[str, tuple[Any, Mapping[str, int]]] = {
    "delta": (Delta, {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128}),
    "experts": (Experts, {"number": 8, "top_k": 2, "mlp": 14336}),
    "global_heads": (GlobalHeads, {"kv_heads": 4, "head_dim": 512}),
    "index": (Index, {"heads": 64, "head_dim": 128, "top": 2048}),
    "latent": (Latent, {"keys": 512, "rotary": 64, "values": 128}),
    "lora": (Lora, {"rank": 16}),
}
_KEYS = (
    *_FIELDS,
    *(f"biases.{name}" for name in _BIASES),
    *(f"{key}.{field.name}" for key, (kind, _) in _OWN.items() for field in fields(kind)),
)
_YAML = (".yaml", ".yml")
_OF_PRESET = ("aliases", "published")  # what a preset says besides the fields of `Model`
# What a model that another reads does not have of its reader.
_OF_READER = (
    *("source", *_OF_PRESET, "patch", "image", "channels", "patch_bias", "input_norm", "registers"),
    *("pooling", "contrast", "features", "features_bias", "experts", "lora", "global_heads"),
    *("width", "frames", "kept", "predicts", "modulation", "labels", "prompt", "prompt_embed"),
    *("attends", "delta", "output_gate", "branch", "index"),
)
_SIZES_AN_IMAGE = (
    *("image", "width", "frames", "patch"),
    *("pooling", "registers", "kept"),
)  # what a vit's default `sequence` follows from


def model_names() -> tuple[str, ...]:
    """Return the names of all presets, family by family, as their files list them."""
    return tuple(name for path in sorted(_PRESETS.glob("*.yaml")) for name in _read_family(path))


def model_aliases(name: str) -> tuple[str, ...]:
    """Return the other names under which the preset `name` is known."""
    return tuple(preset(name).get("aliases", ()))


def preset(name: str) -> Mapping[str, Any]:
    """Return what the file of a preset says of it, or nothing for a name that is no preset's."""
    found = _find(name)
    return _read_family(found[0])[found[1]] if found else {}


def load_model(model: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """Return the model that a name, a file or a mapping describes.

    A name is a preset's, or one of its aliases; case does not matter unless two presets differ
    in nothing else (ViT-g and ViT-G). A file is a Hugging Face `config.json`, or a folder that
    holds one, or YAML that holds a name or a mapping. A mapping gives the fields of `Model`; with
    `base:` it starts from that preset and may give as few as it likes:

    >>> load_model({"base": "vit-22b", "layers": 12}).layers
    12
    """
    if isinstance(model, os.PathLike) or (isinstance(model, str) and model.endswith(_YAML)):
        named = os.fspath(model)
        return load_hf(named).model if config_path(named) else load_model_file(model)
    return _named(model) if isinstance(model, str) else _mapped(model)


def _named(model: str, files: bool = True) -> Model:
    """Return the model of a preset's name, a Hugging Face config or, with `files`, a YAML file.

    Files name no files: they could go round for ever.
    """
    if config_path(model):
        return load_hf(model).model
    if (found := _find(model)) is None:
        if files and os.path.isfile(model):
            return load_model_file(model)
        if os.path.isdir(model):
            raise ModelError(f"{model}: a folder without a Hugging Face config.json")
        near = nearest(model, model_names(), listed="shardsim models")
        raise ModelError(f"unknown model {shown(model)}{near}")
    path, name = found
    entry = {k: v for k, v in _read_family(path)[name].items() if k not in _OF_PRESET}
    return _build({**entry, "name": name}, f"{path.name}: {name}")


def _mapped(model: Any) -> Model:
    if other := other_kind(model, MODEL):
        raise ModelError(f"model: {other}")
    if hint := "" if isinstance(model, Mapping) else instead(model, model_names()):
        raise ModelError(f"model: expected a mapping of keys or a name, found {shown(model)}{hint}")
    data = dict(check_keys(model, where="model", allowed=("base", *_KEYS), error=ModelError))
    if "base" not in data:
        return _build(data, "model")
    base = data.pop("base")
    if not isinstance(base, str):
        raise ModelError(f"model: base: expected the name of a preset, found {shown(base)}")
    return override_model(_named(base, files=False), data)


@dataclass(frozen=True)
class HfModel:
    """A model of a Hugging Face config, which of its keys are in it, and what is not."""

    model: Model
    carried: tuple[str, ...]
    not_carried: tuple[NotCarried, ...]
    assumed: str  # sizes that the file does not say, in words; "": it says all


def load_hf(name: str) -> HfModel:
    """Return the model of a Hugging Face `config.json`, or of the one that a folder holds.

    Raises `FileError` for what is no such file, and with the reason for a model that no options
    of `Model` can say.
    """
    if not name:
        raise ModelError("a config's name is empty; give a config.json, or a folder with one")
    path = config_path(name) or Path(name)
    if path.is_dir():
        raise ModelError(f"{name}: a folder without a Hugging Face config.json")
    found = read_config(path)
    try:
        model = _build(found.options, str(path))
    except ModelError as error:
        raise ModelError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return HfModel(model, found.carried, found.not_carried, found.assumed)


def load_model_file(path: str | os.PathLike[str]) -> Model:
    """Return the model that a YAML file describes; the file holds what `load_model` takes."""
    data = read_yaml(path)
    try:
        return _named(data, files=False) if isinstance(data, str) else _mapped(data)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def override_model(model: Model, changes: Mapping[str, Any]) -> Model:
    """Return `model` with some options changed; `biases.qkv` reaches into the biases.

    What was tied by default stays tied: a vit's `sequence` follows its image, a multi-head
    model's `kv_heads` its heads. The name stays, and the note says what was changed.

    >>> override_model(load_model("vit-22b"), {"biases.qkv": True}).biases.qkv
    True
    """
    where = f"model {model.name!r}"
    inside: Mapping[str, Any] = {}
    if isinstance(changes, Mapping):
        inside = {key: value for key, value in changes.items() if _part_of(key)}
        changes = {key: value for key, value in changes.items() if key not in inside}
    changes = check_keys(changes, where=where, allowed=_KEYS, error=ModelError)
    data = {**model.to_mapping(), **_changed_parts(model, inside, where)}
    if (
        model.family == "vit"
        and model.sequence == model.image_tokens
        and any(key in changes for key in _SIZES_AN_IMAGE)
    ):
        del data["sequence"]
    if model.kv_heads == model.heads and "heads" in changes:
        del data["kv_heads"]
    nested = ("biases", *_OWN)
    data.update(
        (key, value) for key, value in changes.items() if key.partition(".")[0] not in nested
    )
    data["biases"] = _merge_biases(model.biases, changes, where)
    data |= {key: _merge_own(key, getattr(model, key), changes, where) for key in _OWN}
    changed = _build(data, where)
    changes = {**changes, **inside}
    silent = ("name", "note", "source")
    made = [
        f"{key}={_show(value)}"
        for key, value in changes.items()
        if key not in silent and not _agrees(model, key, value)
    ]
    if not made or "note" in changes:
        return changed
    note = f"{model.note} " if model.note else ""
    return _build({**changed.to_mapping(), "note": f"{note}Changed: {', '.join(made)}."}, where)


def _part_of(key: str) -> str:
    """Return the part of a model that a key reaches into, or nothing."""
    part, dot, _ = str(key).partition(".")
    return part if dot and part in _PARTS else ""


def _changed_parts(model: Model, changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parts of a model that `changes` reach into, with them."""
    found: dict[str, Any] = {}
    for part in dict.fromkeys(map(_part_of, changes)):
        own = getattr(model, part)
        if own is None:
            raise ModelError(f"{where}: {part}: {model.name} has none")
        inner = {
            key.removeprefix(f"{part}."): value
            for key, value in changes.items()
            if _part_of(key) == part
        }
        found[part] = override_model(own, inner)
    return found


def _agrees(model: Model, key: str, value: Any) -> bool:
    whole, _, name = key.partition(".")
    if whole in _PARTS:
        own = getattr(model, whole)
        return bool(own is not None and name and _agrees(own, name, value))
    if whole in _OWN:
        own = getattr(model, whole)
        if name:
            return own is not None and bool(getattr(own, name) == value)
        return bool(_merge_own(key, None, {key: value}, "model") == own)
    if key.startswith("biases"):
        return _merge_biases(model.biases, {key: value}, "model") == model.biases
    return bool(getattr(model, key) == value)


def _show(value: Any) -> str:
    if isinstance(value, Model):
        value = value.to_mapping()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return flow_text(value)


def _merge_biases(base: Biases, data: Mapping[str, Any], where: str) -> Biases:
    """Return `base` with the entries `biases` (one flag for all, or a mapping) and `biases.*`."""
    flags = {name: getattr(base, name) for name in _BIASES}
    given = data.get("biases", {})
    if isinstance(given, Biases):
        given = {name: getattr(given, name) for name in _BIASES}
    if isinstance(given, bool):
        given = dict.fromkeys(_BIASES, given)
    here, example = f"{where}: biases", "{qkv: true}"
    flags |= check_keys(given, where=here, allowed=_BIASES, error=ModelError, example=example)
    for key, value in data.items():
        if key.startswith("biases."):
            flags[key.removeprefix("biases.")] = value
    try:
        return Biases(**flags)
    except ModelError as error:
        raise ModelError(f"{where}: {str(error).removeprefix('model: ')}") from None


def _words(example: Mapping[str, int]) -> str:
    return f"{{{', '.join(f'{key}: {value}' for key, value in example.items())}}}"


def _merge_own(key: str, base: Any, data: Mapping[str, Any], where: str) -> Any:
    """Return one of `_OWN`, or nothing: `base` with the entries `key` (a mapping, or nothing for
    none) and `key.*`."""
    kind, example = _OWN[key]
    names = [field.name for field in fields(kind)]
    known: dict[str, Any] = {}
    given = data.get(key, base)
    if isinstance(given, kind):
        known = {name: getattr(given, name) for name in names}
    elif given is not None:
        known |= check_keys(
            given, where=f"{where}: {key}", allowed=names, error=ModelError, example=_words(example)
        )
    single = {name: value for name, value in data.items() if name.startswith(f"{key}.")}
    known |= {name.removeprefix(f"{key}."): value for name, value in single.items()}
    if given is None and not single:
        return None
    for name in example:
        if name not in known:
            raise ModelError(f"{where}: {key}: missing key '{name}', as in {_words(example)}")
    try:
        return kind(**known)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def _build(data: Mapping[str, Any], where: str) -> Model:
    """Make a model of the fields in `data`, deriving those that follow from others.

    head_dim: embed / heads; kv_heads: heads; mlp: an expert's, or 4 * embed; a vit's sequence: its
    image's tokens.
    """
    given = {key: value for key, value in data.items() if key in _FIELDS}
    given["biases"] = _merge_biases(Biases(), data, where)
    given |= {key: _merge_own(key, None, data, where) for key in _OWN}
    experts = given["experts"]
    given |= {key: _read(data, key, where) for key in _PARTS if data.get(key) is not None}
    for key in ("name", "family", "layers", "embed", "heads"):
        if key not in given:
            name = data.get("name")
            known = isinstance(name, str) and name in model_names()
            preset = name if known else "vit-22b"
            raise ModelError(
                f"{where}: missing key '{key}'; or start from a preset: 'base: {preset}'"
            )
    embed, heads = _whole(given["embed"]), _whole(given["heads"])
    if "head_dim" not in given and embed and heads and embed % heads:
        raise ModelError(
            f"{where}: missing key 'head_dim': embed {embed} does not divide by {heads} heads"
        )
    given.setdefault("head_dim", embed // heads if embed and heads else 1)
    given.setdefault("kv_heads", given["heads"])
    given.setdefault("mlp", experts.mlp if experts else 4 * embed)
    if "sequence" not in given and given.get("family") == "vit":
        sides = [_whole(given.get(key)) for key in ("image", "width")]
        patch, frames = _whole(given.get("patch")), _whole(given.get("frames", 1))
        tokens = frames * (sides[0] // patch) * ((sides[1] or sides[0]) // patch) if patch else 0
        tokens = _whole(given.get("kept")) or tokens
        more = (given.get("pooling") == "cls") + _whole(given.get("registers", 0))
        given["sequence"] = max(1, tokens + more)
    if "sequence" not in given:
        raise ModelError(f"{where}: missing key 'sequence', the tokens per sequence")
    return Model(**given)


def _read(data: Mapping[str, Any], key: str, where: str) -> Model:
    """Return a model that another reads: of a preset, of its own, or an encoder as its reader but
    for what it says. Its tokens see all others, unless it says."""
    own = data[key]
    if isinstance(own, Model):
        return own
    if isinstance(own, str):
        own = {"base": own}
    keys = ("base", *_KEYS)
    own = dict(check_keys(own, where=f"{where}: {key}", allowed=keys, error=ModelError))
    try:
        if "base" in own or "family" in own:
            own.setdefault("name", f"{data.get('name')}.{key}"[:80])
            return load_model(own)
        same = {name: value for name, value in data.items() if name not in (*_PARTS, *_OF_READER)}
        same |= {"family": "encoder", "causal": False, "tied_embeddings": True, "note": ""}
        return _build({**same, **own, "name": f"{data.get('name')}.{key}"[:80]}, where)
    except ModelError as error:
        raise ModelError(f"{where}: {key}: {error}") from None


def _whole(value: Any) -> int:
    """Return `value` if defaults can be derived from it, else 0: the model will refuse it."""
    return value if isinstance(value, int) and 0 < value <= LARGEST else 0


def _family_word(name: str) -> str:
    """Return the letters that a name begins with: they say in which file to look."""
    match = re.match(r"[a-z]*", name.lower())
    return match.group() if match else ""


def _find(name: str) -> tuple[Path, str] | None:
    """Return the file and the preset's name for a name or alias; read no other family's file."""
    word = _family_word(name)
    for path in sorted(_PRESETS.glob("*.yaml")):
        if _family_word(path.stem) != word:
            continue
        family = _read_family(path)
        names = [(known, preset) for preset in family for known in _known_as(family, preset)]
        exact = {preset for known, preset in names if known == name}
        alike = exact or {preset for known, preset in names if known.lower() == name.lower()}
        if len(alike) > 1:
            raise ModelError(f"model {name!r}: could be any of {', '.join(sorted(alike))}")
        if alike:
            return path, alike.pop()
    return None


def _known_as(family: Mapping[str, Mapping[str, Any]], preset: str) -> tuple[str, ...]:
    return (preset, *family[preset].get("aliases", ()))


@cache
def _read_family(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the presets of one file: each one's fields over the file's `defaults`."""
    where = path.name
    data = check_keys(
        read_yaml(path), where=where, allowed=("defaults", "models"), required=("models",)
    )
    defaults = check_keys(data.get("defaults", {}), where=f"{where}: defaults", allowed=_KEYS)
    models = {}
    for name, entry in data["models"].items():
        check_keys(entry, where=f"{where}: {name}", allowed=(*_OF_PRESET, *_KEYS), error=ModelError)
        models[name] = MappingProxyType({**defaults, **entry})
    return MappingProxyType(models)
