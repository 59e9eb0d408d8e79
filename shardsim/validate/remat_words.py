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

# Words for layers that are computed again whole.
_WHOLE_LAYERS = (
    r"true|yes|on|(activation |gradient |full |per_layer |whole_layer |layer )*(re)?"
    r"(checkpoint(ing)?|comput(e|ation|ing)|remat(erialization|erialisation)?)"
    r"( (of )?(all|every|each|full|whole|per) ?(layers?|blocks?)?\b.*| \(.*)?"
    r"|(all|every|each|whole) (layers?|blocks?)\b.*"
)


def remat_of(said: Any, library: Library | None, notes: list[str]) -> Any:
    """Return the policy as a plan file holds it; None if the row does not say."""
    if isinstance(said, bool):
        return "full" if said else "none"
    if isinstance(said, list) and all(isinstance(one, str) for one in said):
        said = f"custom: {', '.join(said)}"
    elif isinstance(said, Mapping) and "policy" in said:
        places = ", ".join(f"{key}={value}" for key, value in said.items() if key != "policy")
        said = f"{said['policy']}: {places}"
    elif isinstance(said, Mapping | list) and said:
        return said  # as in a plan file
    words = re.sub(r"\s+", " ", str(said or "").lower().replace("-", "_")).strip()
    if not words or words.startswith(UNSAID):
        return None
    tokens = re.findall(r"[a-z_0-9]+", words)
    placed = re.search(r"[a-z_0-9]+\s*=\s*(offload|device)\b", words)
    if tokens[:1] == ["custom"] or (tokens and tokens[0] in TENSORS) or placed:
        kept: dict[str, str] = {}
        for clause in re.split(r"[;.]|\band\b", words.replace("layer input", "layer_input")):
            place = "offload" if "offload" in clause else "device"
            for name, own in re.findall(r"([a-z_0-9]+)(?:\s*=\s*([a-z]+))?", clause):
                if name in TENSORS:
                    kept[name] = own or place
        for name in widened(kept):
            notes.append(f"remat: {name} taken as all of {TENSORS[name]}, which a plan keeps whole")
        if kept:
            return _remat_data("custom", kept)
        if "offload" in words and library and library.offloads:
            notes.append("remat: what is offloaded is not stated: layers' input and qkv")
            return library.offloads
    if (own_name := remat_by_its_name(words)) is not None:
        return own_name.lists()
    if (tokens and tokens[0] == "save") or "one activation" in words:
        return "full"
    if tokens and tokens[0] in ("no", "off", "false", "without"):
        return "none"
    if re.fullmatch(_WHOLE_LAYERS, words):
        return "full"
    named = [name for name in REMAT_POLICIES if name in tokens]
    if named:
        first = tokens[0] if tokens[0] in named else max(named, key=len)
        if "offload" in words and not REMAT_POLICIES[first].offload:
            raise FileError(f"remat: what of it is offloaded is not understood: {shown(said)}")
        return _remat_data(first, {})
    notes.append(f"remat: '{words[:60]}' is not known; taken as not stated")
    return None


def _remat_data(policy: str, tensors: Mapping[str, str]) -> Any:
    remat = remat_named(policy, tensors)
    assert remat is not None
    return remat.lists()
