"""MaxText's adapters: the group `lora` of its post-training configs, or keys of that name.

Source: AI-Hypercomputer/maxtext@e591f30cb, src/maxtext/configs/types.py (class LoRA) and
configs/post_train/lora_module_path.yml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.carried import Keys
from shardsim.errors import FileError, shown
from shardsim.model import Model, override_model
from shardsim.model.checks import adaptable
from shardsim.validate.words import whole

# MaxText's modules, and the projections that they are.
_MODULES: Mapping[str, str] = {
    "query": "query",
    "key": "key",
    "value": "value",
    "out": "attention_output",
    "wi_0": "mlp_in",
    "wi_1": "mlp_gate",
    "wo": "mlp_out",
}
# What stands between, of layers that have experts.
_MIXTURE: Mapping[str, str] = {"MoeBlock_0": "expert", "shared_experts": "shared"}
_KEYS = ("enable_lora", "lora_rank", "lora_module_path", "lora_weight_qtype")
_FREE = ("lora_alpha", "lora_restore_path", "lora_tile_size")  # change no step


def adapted(keys: Keys, model: Model) -> Model:
    """Return the model with the adapters that a config says, or as it is.

    A path of modules is a pattern; of its words those that name modules count, without any all do
    but experts.
    """
    group = keys.get("lora", None)
    if group is not None and not isinstance(group, Mapping):
        raise FileError(f"lora: expected MaxText's keys, found {shown(group)}")
    said: dict[str, Any] = dict(group or {})
    for key in said:
        if key not in (*_KEYS, *_FREE):
            raise FileError(f"lora: {shown(key)} is none of MaxText's keys")
    if group is None:
        said = {key: keys.get(key, None) for key in (*_KEYS, *_FREE) if key in keys.given}
    if not said.get("lora_rank") or said.get("enable_lora") is False:
        return model
    if said.get("lora_weight_qtype"):
        raise FileError("lora_weight_qtype: weights of fewer bits are not modelled; leave it out")
    path = str(said.get("lora_module_path") or "").replace("mlp/MoeBlock_0", "MoeBlock_0")
    words = set(re.findall(r"[A-Za-z0-9_]+", path.replace("mlp/shared_experts", "shared_experts")))
    named = [ours for theirs, ours in _MODULES.items() if theirs in words]
    on = named or [*_MODULES.values()]
    there = {"expert": model.experts, "shared": model.experts and model.experts.shared}
    mixed = [ours for theirs, ours in _MIXTURE.items() if theirs in words and there[ours]]
    of_mlp = [name.removeprefix("mlp") for name in on if name.startswith("mlp_")]
    if mixed and "mlp" not in words:
        on = [name for name in on if not name.startswith("mlp_")]
    on += [stem + name for stem in mixed for name in of_mlp]
    adapters: dict[str, Any] = {"rank": whole(said["lora_rank"], "lora_rank")}
    if named or mixed:
        adapters["on"] = [name for name in on if name in adaptable(model)]
        if not adapters["on"]:
            raise FileError(f"lora_module_path: {shown(path)} names no projection of {model.name}")
    return override_model(model, {"lora": adapters})
