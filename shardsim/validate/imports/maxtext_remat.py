"""MaxText's custom remat policy: the arrays that it names one by one, as the tensors of a plan.

A tensor of a plan is one or several of MaxText's arrays; where only some of them are kept, all are
in the plan, and each is listed. Names: `checkpoint_name` in MaxText's layers (attentions.py,
attention_mla.py, linears.py, moe.py), places: `RematLocation` in its configs/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardsim.carried import BOTH, Keys, NotCarried
from shardsim.errors import FileError, nearest, shown
from shardsim.model import Model
from shardsim.plan.remat import Policy

PLACES = ("remat", "device", "offload")
NAMES = (
    *("decoder_layer_input", "context", "attention_out", "out_proj"),
    *("query_proj", "key_proj", "value_proj", "kv_proj", "qkv_proj"),
    *("query_wa_proj", "kv_wa_proj", "mla_q", "mla_kv"),
    *("mlpwi", "mlpwi_0", "mlpwi_1", "mlpwo", "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo"),
    *("engram", "indexer_cutoff_threshold"),
)
Member = frozenset[str]  # the names of one array


def custom_policy(keys: Keys, model: Model, flash: bool) -> tuple[Policy, list[NotCarried]]:
    """Return what a custom policy keeps, and which of its names are in the plan in part only."""
    places = {name: str(keys[name]) for name in NAMES if name in keys}
    for name, place in places.items():
        if place not in PLACES:
            raise FileError(
                f"{name}: {shown(place)} is no place of an array{nearest(place, PLACES)}"
            )
    kept = {name: place for name, place in places.items() if place != "remat"}
    save, offload, left = set[str](), set[str](), list[NotCarried]()
    if kept.pop("decoder_layer_input", "device") == "offload":
        offload.add("layer_input")  # on the device it is anyway
    for tensor, members in _arrays(keys, model, flash):
        found = [{kept[name] for name in member if name in kept} for member in members]
        own = [name for name in kept if any(name in member for member in members)]
        if own:
            (offload if any("offload" in one for one in found) else save).add(tensor)
        if own and any(one != found[0] for one in found):
            every = ", ".join(min(member, key=NAMES.index) for member in members)
            where = "offloaded" if tensor in offload else "kept"
            why = f"in the plan {tensor} is {where} as a whole ({every})"
            left += [NotCarried(name, kept[name], why, BOTH) for name in own]
        for name in own:
            del kept[name]
    why = "no array of this model's layers in MaxText has that name"
    left += [NotCarried(name, place, why) for name, place in kept.items()]
    return Policy(save=frozenset(save), offload=frozenset(offload)), left


def _arrays(keys: Keys, model: Model, flash: bool) -> Iterator[tuple[str, list[Member]]]:
    """Yield each tensor of a plan with MaxText's arrays that it stands for."""
    fused = keys.given.get("fused_qkv") is True
    qkv = [Member({name}) for name in ("query_proj", "key_proj", "value_proj")]
    if fused:
        qkv = [member | {"qkv_proj"} for member in qkv]
    if model.latent:
        qkv += [Member({"query_wa_proj", "mla_q"})] if model.latent.queries else []
        qkv.append(Member({"kv_wa_proj", "mla_kv"}))
    yield "qkv", qkv
    # What names the kernel's result behind it names no sums of the softmax: they are made again.
    yield "context", [Member({"context" if flash else "attention_out"})]
    yield "attention_output", [Member({"out_proj"})]
    dense = model.experts is None or bool(model.experts.dense_layers or model.experts.shared)
    inputs = ("mlpwi_0", "mlpwi_1") if model.gated_mlp else ("mlpwi",)
    inputs = ("mlpwi",) if keys.given.get("fused_mlp") is True else inputs
    hidden = [Member({name}) for name in inputs] if dense else []
    output = [Member({"mlpwo"})] if dense else []
    if model.experts:
        hidden += [Member({"moe_mlpwi_0", "mlpwi_0"})]
        hidden += [Member({"moe_mlpwi_1", "mlpwi_1"})] if model.gated_mlp else []
        output += [Member({"moe_mlpwo", "mlpwo"})]
    yield "mlp_hidden", hidden
    yield "mlp_output", output
