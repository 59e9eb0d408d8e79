"""Hugging Face's `config.json` as the options of a model. Nothing is run or fetched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsim.carried import BOTH, Keys, NotCarried
from shardsim.errors import FileError, nearest, shown
from shardsim.files import read_text
from shardsim.kinds import CONFIG, other_kind
from shardsim.model.hf.decoders import FAMILIES, REFUSED, TOKENS
from shardsim.model.hf.defaults import DEFAULTS, SAME_KEYS, VERSION
from shardsim.model.hf.encoders import ENCODERS, t5
from shardsim.model.hf.reasons import left_of
from shardsim.model.hf.towers import TOWERS

# Models of several parts: which part is read, and what it is where it does not say.
_PARTS: Mapping[str, tuple[str, str]] = {
    "siglip": ("vision_config", "siglip_vision_model"),
    "siglip2": ("vision_config", "siglip2_vision_model"),
    "clip": ("vision_config", "clip_vision_model"),
    "gemma3": ("text_config", "gemma3_text"),
    "gemma4": ("text_config", "gemma4_text"),
    "llama4": ("text_config", "llama4_text"),
    "paligemma": ("text_config", "gemma"),
    "mistral3": ("text_config", "mistral"),
    "llava": ("text_config", "llama"),
    "llava_next": ("text_config", "llama"),
}
# Heads that a decoder's architecture may end in: a language model's.
_LANGUAGE = re.compile(r"\w*(ForCausalLM|LMHeadModel|ForConditionalGeneration)")


@dataclass(frozen=True)
class Config:
    """A `config.json` as read: options of a model, and what of the file is not among them."""

    options: Mapping[str, Any]
    carried: tuple[str, ...]
    not_carried: tuple[NotCarried, ...]
    assumed: str  # sizes that the file leaves to transformers' defaults, in words; "": none


def config_path(name: str) -> Path | None:
    """Return the file that a name means, a `.json` or a folder's config.json, or nothing."""
    if name.endswith(".json"):
        return Path(name)
    inside = os.path.join(name, "config.json")
    return Path(inside) if name and os.path.isfile(inside) else None


# Keys that other files of a model's folder have, and what those are.
_OTHERS: Mapping[str, str] = {
    "peft_type": "this file is of an adapter",
    "weight_map": "this file lists where weights are",
    "added_tokens": "this file is of a tokenizer",
    "tokenizer_class": "this file is of a tokenizer",
    "eos_token_id": "this file is for generation",
}


def read_config(path: Path) -> Config:
    """Read a `config.json`; raise `FileError` for a file that is none, or cannot be said."""
    try:
        return _config(_parse(read_text(path)), path)
    except FileError as error:
        raise FileError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _parse(text: str) -> Mapping[str, Any]:
    if not text.strip():
        raise FileError("the file is empty; expected a Hugging Face config.json")
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=str)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except FileError:
        raise
    except json.JSONDecodeError as error:
        raise FileError(f"line {error.lineno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise FileError(f"not valid JSON: {str(error)[:80]}") from None
    if not isinstance(data, dict):
        raise FileError(f"expected Hugging Face's keys, found a {type(data).__name__}")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise FileError(f"key {shown(twice)} appears twice")
    return found


def _config(data: Mapping[str, Any], path: Path) -> Config:
    kind = data.get("model_type")
    if other := other_kind(data, CONFIG):
        raise FileError(other)
    for key, what in _OTHERS.items():
        if key in data and "model_type" not in data:
            raise FileError(f"{key}: {what}; give the config.json of the model")
    if not isinstance(kind, str):
        raise FileError(
            "model_type: no Hugging Face config without it; a plan or a model is a YAML file"
        )
    outer: list[NotCarried] = []
    inner, prefix = data, ""
    if kind in _PARTS or (kind not in DEFAULTS and kind not in REFUSED and "text_config" in data):
        part, usual = _PARTS.get(kind, ("text_config", ""))
        prefix = f"{part}."
        given = data.get(part) or {}
        if not isinstance(given, dict):
            raise FileError(f"{part}: expected keys, found {shown(given)}")
        inner = {**given, "model_type": given.get("model_type", usual)}
        shell = Keys({key: value for key, value in data.items() if key != part}, {})
        shell.read.update(("model_type", "architectures"))
        if "tie_word_embeddings" in shell.given and part == "text_config":
            inner["tie_word_embeddings"] = shell["tie_word_embeddings"]
        outer = left_of(shell, {}, kind, "")
        kind = inner["model_type"]
    if not isinstance(kind, str) or kind not in (*FAMILIES, *TOWERS, *ENCODERS):
        if isinstance(kind, str) and kind in REFUSED:
            raise FileError(f"model_type: {kind} is not modelled: {REFUSED[kind]}")
        every = (*FAMILIES, *TOWERS, *ENCODERS, *_PARTS)
        raise FileError(f"model_type: {shown(kind)} is not known{nearest(kind, every)}")
    return _part(inner, kind, prefix, outer, data.get("architectures"), path)


def _part(
    given: Mapping[str, Any],
    kind: str,
    prefix: str,
    outer: list[NotCarried],
    architectures: Any,
    path: Path,
) -> Config:
    same = SAME_KEYS.get(kind, {})
    for key, other in same.items():
        if key in given and other in given and given[key] != given[other]:
            raise FileError(f"{key}: {shown(given[key])}, but {other} is {shown(given[other])}")
    given = {same.get(key, key): value for key, value in given.items()}
    defaults = DEFAULTS[kind] if kind not in ENCODERS else ENCODERS[kind]
    keys = Keys(given, defaults)
    keys.read.update(("model_type", "architectures"))
    for key in ("is_encoder_decoder", "add_cross_attention", "pruned_heads"):
        if given.get(key) and not defaults.get(key):
            raise FileError(f"{key}: {shown(given[key])} is not modelled")
        keys.read.add(key)
    names = architectures or given.get("architectures") or [""]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else shown(names)
    left: list[NotCarried] = []
    try:
        if kind in ENCODERS:
            options = t5(keys)
        elif kind in TOWERS:
            options, left = TOWERS[kind](keys, name)
        else:
            options, left = FAMILIES[kind](keys), _head(name) + _reach(keys)
    except FileError as error:
        raise FileError(f"{prefix}{error}") from None
    source = f"{path.name} of model_type {kind}; where it says nothing, {VERSION}"
    options = {"name": _name(path), **options, "source": source}
    carried = tuple(prefix + key for key in given if key in keys.read)
    rest = left_of(keys, defaults, kind, prefix)
    sizes = (
        f"{prefix}{key} {shown(defaults[key])}"
        for key in defaults
        if key in keys.read
        and key not in given
        and type(defaults[key]) is int
        and defaults[key] > 1
    )
    listed = ", ".join(sizes)
    assumed = f"assumed, as {VERSION} does where a config says nothing: {listed}" if listed else ""
    return Config(options, carried, (*outer, *left, *rest), assumed)


def _head(architecture: str) -> list[NotCarried]:
    if not architecture or _LANGUAGE.fullmatch(architecture):
        return []
    why = "another head; taken with the language model's own"
    return [NotCarried("architectures", [architecture], why, BOTH)]


def _reach(keys: Keys) -> list[NotCarried]:
    """Return the longest sequence, where a plan without `--seq` has a shorter one."""
    key = "max_position_embeddings"
    if key not in keys or keys[key] <= TOKENS:
        return []
    why = f"rotary positions reach that far; a plan has {TOKENS} tokens unless it says another"
    return [NotCarried(key, keys[key], why, BOTH)]


def _name(path: Path) -> str:
    stem = path.stem if path.stem != "config" else path.absolute().parent.name
    name = re.sub(r"[^A-Za-z0-9._+-]", "-", stem)[:60].lstrip("._+-")
    return name or "hf"
