"""What a row in the words of its source says of remat, as a plan file holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import FileError
from shardsim.validate.libraries import Library
from shardsim.validate.words import (
    REMAT_POLICIES,
    TENSORS,
    UNSAID,
    remat_by_its_name,
    remat_named,
    shown,
    widened,
)

_SWITCH = r"(activation|act|gradient)_?(ckpt|checkpoint(ing)?)"
# Words for layers of which nothing but their input is kept, and for nothing that is computed again.
_WHOLE_LAYERS = (
    rf"true|yes|on|{_SWITCH}[ :=]*(true|yes|on)"
    r"|(scan with )?(activation |gradient |full |per_layer |whole_layer |layer )*(re)?"
    r"(checkpoint(ing)?|comput(e|ation|ing)|remat(erialization|erialisation)?)"
    r"( (of )?(all|every|each|full|whole|per) ?(layers?|blocks?)?\b.*| \(.*)?"
    r"|(all|every|each|whole) (layers?|blocks?)\b.*"
    r"|.*\bone activation\b.*|(saves?|keeps?) nothing\b.*"
    r"|((saves?|keeps?|only) )+(layer|block)_? ?inputs?( only)?( (is|are) (kept|saved))?"
)
_NOTHING = (
    rf"(no|off|false|without|disabled)\b.*|not (used|enabled)|{_SWITCH}[ :=]*(false|no|off|none)"
    r"|(saves?|keeps?) (everything|all( activations)?)"
)
# Words that begin a policy for all of a layer, and words for some of one, or of some layers.
_ALL_OR_NOTHING = (
    r"(no|none|off|false|without|disabled|not|full|whole|yes|on|true|recompute|checkpoint)\w*\b"
    rf"|{_SWITCH}"
)
_SOME = (
    r"\b(mlps?|ffn|feed_forward|(?<!flash_)(?<!splash_)(attention|attn)|norms?|qkv|half)\b"
    r"|\b(but|except)\b"
)
# Words that sources use for arrays beside the names of trainers.
_ARRAYS = (
    (r"\b(layer|block)_? inputs?\b|\bhidden[_ ]states?\b|\b(carry|carries)\b", "layer_input"),
    (r"\battention(?=[ _](results?|outputs?)\b)|(?<=/)attention\b", "context"),
    (r"\bqkvo\b", "qkv, out_proj"),
)
_PLACES = ("device", "offload", "host", "remat")
_ON_HOST = r"offload|\bhost\b"


def remat_of(said: Any, library: Library | None, notes: list[str]) -> Any:
    """Return the policy as a plan file holds it; None if the row does not say."""
    if isinstance(said, bool):
        return "full" if said else "none"
    if isinstance(said, list) and all(isinstance(one, str) for one in said):
        said = f"custom: {', '.join(said)}"
    elif isinstance(said, Mapping) and {"policy", *TENSORS} & {*map(str, said)}:
        for key in TENSORS.keys() & said.keys():
            if said[key] not in _PLACES:
                raise FileError(
                    f"remat.{key}: expected {', '.join(_PLACES)}, found {shown(said[key])}"
                )
        places = ", ".join(f"{key}={value}" for key, value in said.items() if key != "policy")
        said = f"{said.get('policy', 'custom')}: {places}"
    elif isinstance(said, Mapping | list) and said:
        return said  # as in a plan file
    words = re.sub(r"\s+", " ", str(said or "").lower().replace("-", "_")).strip()
    if not words or words.startswith(UNSAID):
        return None
    if (own_name := remat_by_its_name(words)) is not None:
        return own_name.lists()
    joined = re.sub(r"\b(flash|splash) attention", r"\1_attention", words)
    if re.match(_ALL_OR_NOTHING, words) and (some := re.search(_SOME, joined)):
        raise FileError(
            f"remat: '{some[0]}': of some parts only: name what is kept, as save_mlp or "
            f"{{save: [mlp_hidden]}}, not {shown(said)}"
        )
    if re.fullmatch(_NOTHING, words):
        return "none"
    if re.fullmatch(_WHOLE_LAYERS, words):
        return "full"
    if (some := re.search(r"\b(\d+) layers\b", words)) and int(some[1]) > 1:
        raise FileError(
            f"remat: of {some[1]} layers at a time, or of some layers only: give groups of layers "
            "with what each saves, as a plan file does"
        )
    tokens = re.findall(r"[a-z_0-9]+", words)
    custom = tokens[:1] in (["custom"], ["save"], ["saves"], ["keep"], ["keeps"])
    placed = re.search(r"[a-z_0-9]+\s*=\s*(offload|device)\b", words)
    carried = re.search(r"\b(carry|carries|(layer|block)_? inputs?)\b", words)
    if custom or placed or carried or (tokens and tokens[0] in TENSORS):
        if kept := _kept(words):
            if re.search(r"\b(all|everything|dots?) (but|except)\b", words):
                raise FileError(f"remat: name what is kept, not what is not: {shown(said)}")
            for name in widened(kept):
                notes.append(
                    f"remat: {name} taken as all of {TENSORS[name]}, which a plan keeps whole"
                )
            return _remat_data("custom", kept)
        if "offload" in words and library and library.offloads:
            notes.append("remat: what is offloaded is not stated: layers' input and qkv")
            return library.offloads
    named = [name for name in REMAT_POLICIES if name in tokens]
    named += ["dots"] if custom and "dots" in tokens else []
    if named:
        first = tokens[0] if tokens[0] in named else max(named, key=len)
        if "offload" in words and not REMAT_POLICIES[first].offload:
            raise FileError(f"remat: what of it is offloaded is not understood: {shown(said)}")
        return _remat_data(first, {})
    notes.append(f"remat: '{words[:60]}' is not known; taken as not stated")
    return None


def _kept(words: str) -> dict[str, str]:
    """Return the place of each array that is named; one in the host's memory is offloaded."""
    for pattern, name in _ARRAYS:
        words = re.sub(pattern, name, words)
    kept: dict[str, str] = {}
    for clause in re.split(r"[;.]|\band\b(?=[^;.]*[:=])", words):
        place = "offload" if re.search(_ON_HOST, clause) else "device"
        for name, own in re.findall(r"([a-z_0-9]+)(?:\s*[:=]\s*(offload|device|remat))?", clause):
            if name in TENSORS:
                kept[name] = own or place
    return {name: place for name, place in kept.items() if place != "remat"}


def _remat_data(policy: str, tensors: Mapping[str, str]) -> Any:
    remat = remat_named(policy, tensors)
    assert remat is not None
    return remat.lists()
