"""AXLearn's keys that are in no plan: why, and whether they could change time or HBM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.carried import BOTH, TIME, Keys, NotCarried
from shardsim.validate.imports.axlearn_text import listed

EMBED = ["expert", "fsdp", "seq"]
_LAYOUTS: Mapping[str, Any] = {
    "model.decoder.emb.token_emb.param_partition_spec": ["model", EMBED],
    "model.decoder.lm_head.param_partition_spec": ["model", EMBED],
    "model.decoder.logits_partition_spec": [["data", "expert", "fsdp"], "seq", "model"],
}
LIES = "in the plan the vocabulary lies over model, and the width over fsdp and its like"
_FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"learner\.ema\.decay", "a second copy of the weights", BOTH),
    (r"learner\..*", "numbers of the optimizer and of schedules; no work worth counting", ()),
    (r"(evalers|checkpointer|summary_writer|watchdog\w*|recorder)[.\[].*",
     "for evaluation, logs and checkpoints", ()),
    (r"(input|batch_axis_names).*", "where examples come from", ()),
    (r"model\.decoder\.attention_mask\..*", "a bias of scores by distance is not modelled",
     (TIME,)),
    (r"model\..*\['prevent_cse'\]", "what is made again may be merged, or not", BOTH),
    (r"model\..*(num_groups|outer_batch)", "experts' capacity counts in sequences here", BOTH),
    (r"model\..*(param_init|init_by_param_name|\.eps|forward_dtype|klass|metrics|cache_dtype|"
     r"kv_cache|token_id|decoding|residual_weight|stochastic_depth|theta|rotary_value|loss_weight|input_dim|"
     r"eval_capacity_factor|mask_dtype|"
     r"interpret|query_scale|key_scale|pos_emb_layer|repeat\.drop_output|output_dim_to|mha_dim_to|"
     r"o_partition_spec|_dim_to_partition_spec|dim_to_mesh_axis_map|partition_spec|batch_axis_names"
     r"|vlog)\b.*", "numbers, starts of weights, and layouts that are AXLearn's usual ones", ()),
    (r"model\..*(tpu_block_size|gpu_block_size|tiling|backend_overrides).*",
     "tiles of a kernel", (TIME,)),
    (r"model\.\S*dropout(_rate|\.\w+)", "dropout is not modelled", (TIME,)),
    (r"model\..*", "an option of the model that is not read", BOTH),
    (r".*", "for the start of a run, its length and its logs", ()),
)  # fmt: skip


def left_of(values: Keys) -> list[NotCarried]:
    """Return what is not read: by itself where it could change a step, else by section."""
    sections: dict[tuple[str, str], list[str]] = {}
    left = []
    for key, usual in _LAYOUTS.items():
        own = [one for one in values.given if re.fullmatch(rf"{re.escape(key)}(\[\d\])*", one)]
        if own and (said := listed(values.given, key)) != usual:
            left.append(NotCarried(key, said, LIES, BOTH))
        values.read.update(own)
    for key in values.unread():
        pattern = next(one for one in _FAMILIES if re.fullmatch(one[0], key))
        value = values.given[key]
        if pattern[2] and value not in (None, 0, 0.0, False):
            left.append(NotCarried(key, value, pattern[1], pattern[2]))
        else:
            section = re.split(r"[.\[]", key)[0]
            sections.setdefault((section, pattern[1]), []).append(key)
    for (section, why), keys in sections.items():
        name, value = (keys[0], values.given[keys[0]]) if len(keys) == 1 else (f"{section}.*", keys)
        left.append(NotCarried(name, value, why))
    return left
