"""The plans that the emitted code is run with, and the models they train: all tiny."""

from __future__ import annotations

from typing import Any

from shardsim.plan import Plan, plan_from_data
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data

_SIZES = {"layers": 2, "embed": 64, "mlp": 128, "heads": 8, "head_dim": 8}
_ALL_BIASES = {"qkv": True, "attention_output": True, "mlp": True, "norm": True}
_VIT = {**_SIZES, "family": "vit", "kv_heads": 8, "sequence": 16, "patch": 4, "image": 16}
_DECODER = {**_SIZES, "family": "decoder", "kv_heads": 8, "sequence": 16, "vocab": 64} | {
    "causal": True
}

_EIGHT = {"number": 8, "top_k": 2, "mlp": 64}
_MIXED = {"gated_mlp": True, "activation": "silu", "norm": "rmsnorm", "positions": "rotary"}
_LATENTS = {**_MIXED, "head_dim": 12}

MODELS: dict[str, dict[str, Any]] = {
    # As ViT-22B: parallel layers, QK-norm, attention pooling.
    "vit": {
        **_VIT,
        "parallel_block": True,
        "qk_norm": True,
        "pooling": "map",
        "classes": 16,
        "biases": {"attention_output": True, "mlp": True},
    },
    "vit-deep": {
        **_VIT,
        "layers": 7,
        "parallel_block": True,
        "pooling": "mean",
        "classes": 16,
        "biases": {"attention_output": True, "mlp": True},
    },
    "vit-features": {
        **_VIT,
        "parallel_block": True,
        "qk_norm": True,
        "pooling": "map",
        "biases": {"attention_output": True, "mlp": True},
    },
    "vit-serial": {**_VIT, "pooling": "mean", "classes": 16, "biases": _ALL_BIASES},
    # Seven by seven patches and a class token; no classes, so features are its target.
    "vit-cls": {**_VIT, "image": 28, "sequence": 50, "pooling": "cls"} | {"biases": _ALL_BIASES},
    # As Llama: grouped-query attention, gated MLP, rotary positions, RMS norm.
    "llama": {
        **_DECODER,
        "kv_heads": 4,
        "gated_mlp": True,
        "activation": "silu",
        "norm": "rmsnorm",
        "positions": "rotary",
    },
    # As PaLM: parallel layers, one key-value head, tied embeddings.
    "palm": {
        **_DECODER,
        "kv_heads": 1,
        "parallel_block": True,
        "gated_mlp": True,
        "activation": "silu",
        "tied_embeddings": True,
        "positions": "rotary",
    },
    # As Gemma: norms after attention and MLP too.
    "gemma": {**_DECODER, "gated_mlp": True, "norm": "rmsnorm", "kv_heads": 2}
    | {"post_norms": True, "tied_embeddings": True, "positions": "rotary"},
    # As Mixtral: two of eight experts a token, none dropped.
    "mixtral": {**_DECODER, **_MIXED, "experts": _EIGHT},
    # As Llama 4: every other layer has experts, beside a shared one.
    "llama4": {
        **_DECODER,
        **_MIXED,
        "layers": 4,
        "experts": {**_EIGHT, "top_k": 1, "shared": 1, "every": 2, "router": "sigmoid"},
    },
    # As DeepSeek-V3: latents, of queries too; experts beside a shared one.
    "deepseek": {
        **_DECODER,
        **_LATENTS,
        "latent": {"queries": 32, "keys": 16, "rotary": 4, "values": 6},
        "experts": {**_EIGHT, "shared": 1, "router": "sigmoid", "router_bias": True},
    },
    # As DeepSeek V3.2: an index chooses the tokens that a query sees.
    "deepseek-index": {
        **_DECODER,
        **_LATENTS,
        "latent": {"queries": 32, "keys": 16, "rotary": 4, "values": 6},
        "index": {"heads": 4, "head_dim": 8, "top": 5},
        "experts": {**_EIGHT, "shared": 1, "router": "sigmoid", "router_bias": True},
    },
    # The same without experts; and of sequences that are seen whole.
    "index": {
        **_DECODER,
        **_LATENTS,
        "latent": {"queries": 32, "keys": 16, "rotary": 4, "values": 10},
        "index": {"heads": 8, "head_dim": 4, "top": 3},
    },
    "index-whole": {
        **_DECODER,
        **_LATENTS,
        "latent": {"queries": 32, "keys": 16, "rotary": 4, "values": 10},
        "index": {"heads": 8, "head_dim": 4, "top": 16},
    },
    # As DeepSeek-V2-Lite, without experts: queries come straight from tokens.
    "deepseek-lite": {**_DECODER, **_LATENTS, "latent": {"keys": 16, "rotary": 4, "values": 10}},
    # The same side by side with the MLP.
    "latents-parallel": {
        **_DECODER,
        **_LATENTS,
        "parallel_block": True,
        "latent": {"keys": 16, "rotary": 4, "values": 10},
    },
    # As gpt-oss: biases everywhere; a capacity in sequences.
    "switch": {
        **_DECODER,
        "biases": {"mlp": True},
        "experts": {**_EIGHT, "capacity": 1.25, "router_bias": True, "beside": True},
    },
    # As gpt-oss: a learned logit of each head that no value goes with, windows, biases.
    "gpt-oss": {
        **_DECODER,
        **_MIXED,
        "layers": 4,
        "kv_heads": 4,
        "windows": [5, 0],
        "sinks": True,
        "biases": {"qkv": True, "attention_output": True, "mlp": True},
        "experts": {**_EIGHT, "router_bias": True},
    },
    # As DeepNet: norms behind additions, of a scaled stream.
    "deepnet": {**_DECODER, "deepnorm": 1.7, "biases": _ALL_BIASES},
    # As Magneto, with norms within branches; of images, with Dual PatchNorm.
    "magneto": {**_DECODER, "sub_norms": True, "kv_heads": 2}
    | {"norm": "rmsnorm", "positions": "rotary"},
    "vit-norms": {
        **_VIT,
        "pooling": "cls",
        "sequence": 17,
        "classes": 16,
        "patch_norms": True,
        "sub_norms": True,
        "biases": _ALL_BIASES,
    },
    # As OLMo 3: norms behind branches alone, windows.
    "olmo3": {**_DECODER, **_MIXED, "layers": 4, "windows": [6, 0], "qk_norm": True}
    | {"pre_norms": False, "post_norms": True, "qk_norm_over": "heads"},
    # As GPT-NeoX: attention and MLP side by side, each with a norm of its own.
    "neox": {**_DECODER, "parallel_block": True, "parallel_norms": True}
    | {"norm": "layernorm", "positions": "rotary", "biases": _ALL_BIASES},
    # As AXLearn's Envy: a norm behind the MLP too.
    "envy": {**_DECODER, **_MIXED, "mlp_post_norm": True, "qk_norm": True},
    # A capacity in groups of a sequence.
    "gshard": {**_DECODER, "experts": {**_EIGHT, "capacity": 1.0, "group": 8}},
    # As Gemma 2: every other layer sees a window of the last tokens.
    "gemma2": {**_DECODER, "layers": 4, "gated_mlp": True, "norm": "rmsnorm", "kv_heads": 4}
    | {"post_norms": True, "tied_embeddings": True, "positions": "rotary", "windows": [6, 0]},
    # As Llama 4's attention: chunks of a sequence, and every third layer sees all.
    "chunks": {**_DECODER, **_MIXED, "layers": 6, "windows": [6, 6, 0], "chunked": True},
    # As Gemma 3: several local layers for each that sees all.
    "gemma3": {**_DECODER, "qk_norm": True, "norm": "rmsnorm", "layers": 6}
    | {"positions": "rotary", "windows": [5, 5, 0]},
    "gemma3-deep": {**_DECODER, "norm": "rmsnorm", "layers": 12}
    | {"positions": "rotary", "windows": [5, 5, 0]},
    # As DeepSeek-V3 begins and Gemma 3 ends: dense layers in front of those with experts, and local
    # ones after the last whole round.
    "mixed-ends": {
        **_DECODER,
        **_MIXED,
        "layers": 10,
        "windows": [0, 0, 5, 5, 0, 5, 5, 0, 5, 5],
        "experts": {**_EIGHT, "dense_layers": 2},
    },
    # The same side by side, with biases.
    "gemma-parallel": {
        **_DECODER,
        "parallel_block": True,
        "post_norms": True,
        "norm": "rmsnorm",
        "kv_heads": 2,
        "biases": {"qkv": True, "attention_output": True, "mlp": True},
    },
    # Its vocabulary has to be padded.
    "gpt-61": {**_DECODER, "vocab": 61, "positions": "fixed"},
    # Eight devices do not divide its width.
    "gpt-60-wide": {**_DECODER, "embed": 60, "positions": "fixed"},
    "gpt": {**_DECODER, "biases": _ALL_BIASES, "activation": "relu"},
    "gpt-deep": {**_DECODER, "biases": _ALL_BIASES, "layers": 4},
    "llama-deep": {**_DECODER, **_MIXED, "kv_heads": 4, "layers": 8},
}


def make(
    model: str,
    mesh: dict[str, int],
    parameters: dict[str, list[str]],
    activations: dict[str, list[str]],
    **more: Any,
) -> Plan:
    """Return a float32 plan on eight devices."""
    rules = {
        "parameters": parameters,
        "activations": activations,
        "optimizer": more.pop("optimizer_rules", None),
    }
    data = {
        "name": "test",
        "model": {"name": model, **MODELS[model]},
        "machine": "v5e:2x4",
        "batch": 16,
        "mesh": mesh,
        "rules": rules,
        "precision": {"compute": "f32", "reduce": "f32"},
    }
    return plan_from_data({**data, **more}, "test plan")


def spread(
    model: str, mesh: dict[str, Any], residual: str = "", *, over: str = "", **more: Any
) -> Plan:
    """Return a plan whose mesh axes split what their names say; a tensor axis splits the residual
    stream along `residual`, and those that `over` names embed of parameters too.
    """
    kept = {"": REPLICATED, "seq": SEQUENCE_SHARDED, "embed": EMBED_SHARDED}[residual]
    shards = {f"{role}_shards_parameters": role in over for role in ("context", "expert")}
    rules = rules_data(mesh, residual=kept, **shards)
    return make(model, mesh, rules["parameters"], rules["activations"], **more)


def _overlap(matmul: str) -> dict[str, Any]:
    return {"overlap": {"matmul": matmul}}


_D, _F = {"data": 8}, {"fsdp": 8}
_FM, _FM2 = {"fsdp": 2, "model": 4}, {"fsdp": 4, "model": 2}
_DFM = {"data": 2, "fsdp": 2, "model": 2}
_F2M = {"fsdp": 2, "model2": 2, "model": 2}
_FCM = {"fsdp": 2, "context": 2, "model": 2}
_FE, _DE = {"fsdp": 2, "expert": 4}, {"data": 2, "expert": 4}
_FEM = {"fsdp": 2, "expert": 2, "model": 2}
_RING, _ROOM = {"experts": {"exchange": "ring", "padding": 4}}, {"experts": {"padding": 4}}
_SPLIT = {"over": "context, expert"}
_PART, _UNFUSED = {"execution": "partitioned"}, {"attention": "unfused"}
_ZERO = {"optimizer_rules": {"embed": ["data"]}}
_COLUMNS = {"machine": "tpu7x:2x2x1"}  # where products of heads run over columns
_CUSTOM = {"save": ["context", "mlp_output"]}
_GROUPS = [
    {"layers": 2, "save": []},
    {"layers": 3, "save": ["qkv", "mlp_hidden", "statistics"]},
    {"layers": 2, "save": ["statistics"], "offload": ["context", "qkv"]},
]

PLANS: dict[str, Plan] = {
    "data": spread("vit", _D),
    "data, sharded optimizer": spread("llama", _D, **_ZERO),
    "data, optimizer that it does not divide": spread("gpt-60-wide", _D, **_ZERO, microbatches=2),
    "fsdp": spread("vit", _F, remat="none"),
    "fsdp, serial, microbatches": spread("vit-serial", _F, microbatches=2, remat="dots"),
    "data and fsdp": spread("gpt", {"data": 2, "fsdp": 4}, optimizer="momentum"),
    "tensor of 8, sequence": spread("gpt", {"model": 8}, "seq"),
    "shards of no whole tiles": spread("gpt-60-wide", {"data": 2, "fsdp": 4}),
    "columns, fsdp": spread("llama", _F, **_COLUMNS, remat="dots"),
    "columns, context": spread("gpt", {"fsdp": 4, "context": 2}, **_COLUMNS),
    "columns, partitioned": spread("llama", _F, **_COLUMNS, **_PART),
    "tensor, sequence, two directions": spread("vit", _FM, "seq"),
    "tensor, sequence, one direction": spread(
        "vit-serial", _FM, "seq", **_overlap("unidirectional")
    ),
    "tensor, sequence, no overlap": spread(
        "llama", _FM, "seq", **_overlap("off"), remat="save_attention"
    ),
    "tensor, embed, two directions, fused": spread("vit", _FM, "embed", fused_projections=True),
    "tensor, embed, one direction": spread("llama", _FM, "embed", **_overlap("unidirectional")),
    "tensor, embed, no overlap": spread(
        "vit-serial", _FM2, "embed", **_overlap("off"), remat="dots"
    ),
    "tensor, replicated residual": spread("vit", _FM),
    "tensor, replicated residual, decoder": spread("gpt", _FM, remat="none"),
    "tensor, one key-value head": spread("palm", _FM, "seq"),
    "tensor, norms after": spread("gemma", _DFM, "seq"),
    "windows, fsdp": spread("gemma3", _F, remat="dots"),
    "groups of layers, fsdp, microbatches": spread("vit-deep", _F, microbatches=2, remat=_GROUPS),
    "groups of layers, windows, tensor": spread(
        "gemma3-deep",
        _FM,
        "seq",
        remat=[{"layers": 6, "save": ["mlp_hidden"]}, {"layers": 6, "save": []}],
    ),
    "partitioned groups of layers": spread("vit-deep", _FM, "seq", **_PART, remat=_GROUPS),
    "windows, tensor, unfused": spread("gemma2", _DFM, "seq", **_UNFUSED, microbatches=2),
    "windows, context": spread("gemma2", _FCM, "seq", **_SPLIT, context={"order": "contiguous"}),
    "partitioned windows": spread("gemma2", _FM, "seq", **_PART),
    "tensor on two mesh axes": make(
        "gpt-61",
        {"data": 2, "row": 2, "column": 2},
        {axis: ["row", "column"] for axis in ("heads", "mlp", "vocab")},
        {"batch": ["data"], "seq": ["row", "column"]},
    ),
    "2-D tensor, embed": spread("vit", _F2M, "embed"),
    "2-D tensor, sequence": spread("llama", _F2M, "seq"),
    "2-D tensor, replicated": spread("vit-serial", {"model2": 2, "model": 4}),
    "context and fsdp": spread(
        "llama", _FCM, "seq", **_SPLIT, **_UNFUSED, context={"order": "contiguous"}
    ),
    "context and data": spread("vit-serial", {"data": 2, "context": 4}),
    "context and attention pooling": spread("vit", _FCM, "embed", remat="save_context"),
    "class token": spread("vit-cls", {"fsdp": 4, "context": 2}),
    "all, microbatches": spread("gpt", _DFM, "seq", microbatches=2, remat=_CUSTOM),
    "fewer key-value heads than members": spread(
        "llama", {"model": 8}, "seq", remat={"save": ["rest"]}
    ),
    "2-D tensor, one key-value head": spread("palm", _F2M, "embed"),
    "2-D tensor, values again": spread("llama", _F2M, "seq", remat={"save": ["rest"]}),
    "2-D tensor, context": spread(
        "palm",
        {"context": 2, "model2": 2, "model": 2},
        "seq",
        **_UNFUSED,
        remat="dots",
        context={"order": "contiguous"},
    ),
    "2-D tensor, features": spread("vit-features", _F2M, "embed", microbatches=2),
    "tensor, norms after side by side": spread(
        "gemma-parallel", _DFM, fused_projections=True, remat="save_mlp"
    ),
    "sharded optimizer and context": spread(
        "palm", {"data": 2, "context": 2, "model": 2}, microbatches=2, **_ZERO
    ),
    "partitioned data": spread("vit", _D, **_PART),
    "partitioned fsdp": spread("vit", _F, **_PART, remat="none"),
    "partitioned fsdp, microbatches": spread("vit-serial", _F, **_PART, microbatches=2),
    "partitioned tensor, sequence": spread("llama", _FM, "seq", **_PART),
    "partitioned tensor, embed": spread(
        "vit", _FM, "embed", **_PART, **_overlap("off"), remat="dots"
    ),
    "partitioned 2-D tensor": spread("llama", _F2M, "embed", **_PART),
    "partitioned context": spread("gpt", _FCM, "seq", **_PART),
}

# Of models with experts, latents or chunks, which other trainers' exports refuse.
EXPERTS: dict[str, Plan] = {
    "experts, fsdp": spread("mixtral", _F, remat="none"),
    "experts, fsdp by expert": make(
        "mixtral", _F, {"embed": ["fsdp"], "expert": ["fsdp"]}, {"batch": ["fsdp"]}
    ),
    "experts, ring": spread("mixtral", _FE, **_SPLIT, **_RING),
    "experts, ring, everything kept": spread("mixtral", _DE, **_RING, **_ZERO, remat="none"),
    "experts, exchanged": spread("mixtral", _FE, **_SPLIT, **_ROOM),
    "experts, exchanged, everything kept": spread("mixtral", _FE, **_ROOM, remat="none"),
    "experts, exchanged, replicas": spread("llama4", _DE, **_ROOM, microbatches=2),
    "experts, tensor, replicated": spread("mixtral", _FM),
    "experts, tensor, sequence": spread("llama4", _FM2, "seq", remat="dots"),
    "experts, tensor, embed": spread("mixtral", _FM2, "embed", remat="none"),
    "norms behind additions": spread("deepnet", _FM, "seq", remat="dots"),
    "norms within branches": spread("magneto", _FM, "embed"),
    "norms behind branches alone": spread("olmo3", _FM2, "embed", microbatches=2),
    "a norm for each of two branches": spread("neox", _FCM, remat="save_mlp"),
    "a norm behind the MLP too": spread("envy", _FM2, "embed", remat="dots"),
    "norms of patches": spread("vit-norms", _FM2, "embed", remat="none"),
    "experts, sinks, tensor": spread("gpt-oss", _FM, "seq", remat="dots"),
    "experts, sinks, context": spread("gpt-oss", {"fsdp": 4, "context": 2}, **_SPLIT, **_UNFUSED),
    "experts, ring and tensor": spread("mixtral", _FEM, "seq", **_SPLIT, **_RING, remat="save_mlp"),
    "experts, exchanged and tensor": spread("llama4", _FEM, "seq", **_ROOM),
    "experts, context": spread(
        "mixtral", {"fsdp": 2, "expert": 2, "context": 2}, over="context", **_RING
    ),
    "capacity, fsdp": spread("switch", _F, remat="none"),
    "capacity, exchanged": spread("switch", _FE, **_SPLIT),
    "capacity, exchanged, sharded optimizer": spread("gshard", _DE, **_ZERO),
    "capacity, exchanged and tensor": spread(
        "switch", _FEM, "embed", **_SPLIT, remat="dots", microbatches=2
    ),
    "capacity, ring": spread("gshard", _FE, **_RING),
    "capacity in groups, context": spread("gshard", {"fsdp": 2, "expert": 2, "context": 2}),
    "latents, fsdp, experts": spread("deepseek", _F, remat="save_qkv"),
    "latents, tensor, sequence": spread("deepseek", _FM, "seq", microbatches=2),
    "latents, data, tensor, embed": spread("deepseek-lite", _DFM, "embed", **_ZERO, remat="none"),
    "chunks, fsdp": spread("chunks", _F),
    "chunks, tensor, unfused": spread("chunks", _DFM, "seq", **_UNFUSED, microbatches=2),
    "partitioned chunks": spread("chunks", _FM, "seq", **_PART),
    "index, data": spread("deepseek-index", _D, **_UNFUSED),
    "index, fsdp, experts": spread("deepseek-index", _F, remat="save_qkv"),
    "index, fsdp, exchanged": spread("deepseek-index", _FE, **_SPLIT, **_ROOM, microbatches=2),
    "index, tensor, sequence": spread("deepseek-index", _FM, "seq", **_UNFUSED),
    "index, tensor, replicated": spread("index", _FM2, **_overlap("off"), remat="none"),
    "index that sees all, fsdp, tensor": spread("index-whole", _DFM, "seq", **_UNFUSED),
    "index, data, tensor, embed": spread("deepseek-index", _DFM, "embed", **_ZERO, remat="dots"),
    "latents, context, unfused": spread(
        "latents-parallel", _FCM, **_SPLIT, **_UNFUSED, fused_projections=True
    ),
}

_OF_EXPERTS = ("expert_in", "expert_gate", "expert_out")
_TEXT = {"vocab": 64, "sequence": 8, "pooling": "last"}
_T5 = {**_DECODER, "positions": "relative", "norm": "rmsnorm", "gated_mlp": True}
_SMALL = {**_VIT, "embed": 32, "mlp": 64, "heads": 4, "kv_heads": 4, "biases": _ALL_BIASES}
MODELS |= {
    # As T5: a decoder that attends to an encoder, which has more tokens; one table.
    "t5": {**_T5, "encoder": {"sequence": 32, "shared_embeddings": True}},
    # As PaLI: tokens of a frozen tower in front of the encoder's.
    "pali": {**_T5, "encoder": {"sequence": 32, "images": {**_SMALL, "frozen": True}}},
    # A decoder of captions: it attends to the narrower tower of an image.
    "captions": {**_DECODER, "biases": _ALL_BIASES, "head_bias": True, "encoder": _SMALL},
    # As PaliGemma: a trained tower in front of a decoder's tokens.
    "pictures": {**MODELS["palm"], "sequence": 32, "images": _SMALL},
    "siglip": {
        **_VIT,
        "pooling": "map",
        "biases": _ALL_BIASES,
        "contrast": "sigmoid",
        "text": {**_TEXT, "features": 64, "features_bias": True},
    },
    # Fifty tokens of an image, sixteen of a text, and embeddings narrower than either.
    "clip": {
        **_VIT,
        "image": 28,
        "sequence": 50,
        "pooling": "cls",
        "biases": _ALL_BIASES | {"qkv": False},  # of keys' only rounding is left here
        "features": 32,
        "patch_bias": False,
        "input_norm": True,
        "text": {**_TEXT, "embed": 32, "mlp": 64, "heads": 4, "kv_heads": 4, "causal": True}
        | {"features": 32, "sequence": 16},
    },
    "lora": {**MODELS["llama"], "lora": {"rank": 4}},
    "lora-gpt": {**MODELS["gpt"]} | {"lora": {"rank": 4, "on": ["query", "mlp_out"]}},
    "lora-mixtral": {**MODELS["mixtral"], "lora": {"rank": 4, "on": ["query", *_OF_EXPERTS]}},
    "lora-llama4": {
        **MODELS["llama4"],
        "lora": {"rank": 4, "on": ["value", "shared_in", "shared_out", *_OF_EXPERTS]},
    },
    "lora-gshard": {**MODELS["gshard"], "lora": {"rank": 4, "on": ["expert_in", "expert_out"]}},
    # Experts, and what routes to them, that no adapter is beside.
    "lora-apart": {**MODELS["mixtral"], "lora": {"rank": 4}},
}
MODELS["soft"] = {
    **_VIT,
    "pooling": "mean",
    "classes": 16,
    "biases": _ALL_BIASES,
    "experts": {"number": 8, "top_k": 1, "mlp": 64, "soft_slots": 2},
}

# Of models of several stacks, with adapters or soft experts, which other exports refuse.
STACKS: dict[str, Plan] = {
    "encoder, fsdp": spread("t5", _F, **_UNFUSED, remat="none"),
    "encoder, tensor, sequence": spread("t5", _FM, "seq", **_UNFUSED),
    "encoder, tensor, embed": spread(
        "t5", _FM2, "embed", **_UNFUSED, **_overlap("off"), remat="dots"
    ),
    "encoder, tensor, replicated": spread("t5", _FM, **_UNFUSED),
    "encoder, sharded optimizer, microbatches": spread(
        "t5", _DFM, "seq", **_UNFUSED, **_ZERO, microbatches=2
    ),
    "encoder, context": spread("t5", _FCM, "seq", **_SPLIT, **_UNFUSED),
    "encoder of images, striped context": spread("captions", _FCM, context={"order": "striped"}),
    "frozen images, fsdp": spread("pali", _F, **_UNFUSED, remat="none"),
    "frozen images, tensor": spread("pali", _DFM, "seq", **_UNFUSED, microbatches=2),
    "images of a decoder, fsdp": spread("pictures", _F, remat="dots"),
    "images of a decoder, tensor, context": spread(
        "pictures", _FCM, "seq", **_SPLIT, context={"order": "striped"}
    ),
    "towers, sigmoid, fsdp": spread("siglip", _F, remat="none"),
    "towers, sigmoid, tensor": spread("siglip", _DFM, "seq", **_UNFUSED),
    "towers, softmax": spread("clip", _DFM, "seq", remat="dots"),
    "soft experts, fsdp": spread("soft", _F, remat="none"),
    "soft experts, exchanged": spread("soft", _FE, **_SPLIT),
    "soft experts, exchanged and tensor": spread("soft", _FEM, "seq", microbatches=2),
    "adapters, fsdp": spread("lora", _F, remat="dots"),
    "adapters, tensor, sequence": spread("lora", _FM2, "seq", microbatches=2),
    "adapters, tensor, embed": spread("lora-gpt", _FM, "embed", **_overlap("off"), remat="none"),
    "adapters of experts, tensor, sequence": spread("lora-llama4", _FM2, "seq", remat="dots"),
    "adapters of experts, exchanged and tensor": spread("lora-llama4", _FEM, "seq", **_ROOM),
    "adapters of experts, ring": spread("lora-mixtral", _FE, **_SPLIT, **_RING, remat="save_mlp"),
    "adapters of experts, fsdp by expert": make(
        "lora-mixtral", _F, {"embed": ["fsdp"], "expert": ["fsdp"]}, {"batch": ["fsdp"]}
    ),
    "adapters of experts, capacity": spread("lora-gshard", _FEM, "seq", **_SPLIT),
    "adapters beside experts, tensor, embed": spread("lora-apart", _FM2, "embed", remat="none"),
}

MODELS |= {
    # As DiT: each layer projects a time and a class to what shifts, scales and gates it.
    "dit": {**_VIT, "biases": _ALL_BIASES, "positions": "fixed", "channels": 4}
    | {"predicts": 8, "modulation": "layer", "labels": 11},
    # As Wan: a video, one projection for all layers, a text that they attend to.
    "wan": {
        **_VIT,
        "image": 8,
        "width": 16,
        "frames": 2,
        "biases": _ALL_BIASES,
        "positions": "rotary",
        **{"qk_norm": True, "qk_norm_over": "heads", "qk_norm_kind": "rmsnorm"},
        **{"predicts": 3, "modulation": "model", "prompt": 8, "prompt_embed": 32},
    },
    # As MAE: an encoder of half of the patches, a narrower decoder of all of them.
    "mae": {
        **_SMALL,
        "positions": "fixed",
        "predicts": 3,
        "images": {**_VIT, "sequence": 8, "kept": 8, "biases": _ALL_BIASES, "positions": "fixed"},
    },
    # As DINOv2 with registers: scales of branches' channels; a class token, and tokens of no patch.
    "dinov2": {
        **_VIT,
        "image": 28,
        "sequence": 56,
        "pooling": "cls",
        "classes": 16,
        "registers": 6,
        "layer_scale": True,
        "biases": _ALL_BIASES,
    },
    # As OLMo 2: norms of all heads of a token at once.
    "olmo": {**MODELS["llama"], "qk_norm": True, "qk_norm_over": "heads"},
}

# Of models that a condition modulates, that predict pixels, or with norms over all heads.
CONDITIONED: dict[str, Plan] = {
    "masked, fsdp": spread("mae", _F, remat="dots"),
    "modulated, fsdp": spread("dit", _F, remat="dots"),
    "modulated, tensor, sequence": spread("dit", _DFM, "seq", microbatches=2),
    "modulated, tensor, embed": spread("dit", _FM, "embed", remat="none"),
    "modulated, tensor, replicated": spread("dit", _FM2, **_overlap("off")),
    "modulated, context": spread("dit", _FCM, "seq", **_SPLIT, **_UNFUSED),
    "text and video, fsdp": spread("wan", _F, remat="none"),
    "text and video, tensor, sequence": spread("wan", _DFM, "seq", **_ZERO),
    "text and video, context": spread("wan", _FCM, "seq", **_SPLIT, remat="dots"),
    "masked, tensor, embed": spread("mae", _DFM, "embed", microbatches=2),
    "masked, tensor, context": spread("mae", _FCM, "seq", **_SPLIT, **_UNFUSED),
    "registers, scaled branches, tensor, context": spread("dinov2", _FCM, "seq", **_SPLIT),
    "registers, scaled branches, tensor, embed": spread("dinov2", _DFM, "embed", microbatches=2),
    "norms over all heads, tensor": spread("olmo", _DFM, "seq", remat="dots"),
}

_C4 = {"data": 2, "context": 4}


def _context(**choices: Any) -> dict[str, Any]:
    return {"context": choices}


# With other ways to attend over a context axis, which other trainers' exports refuse.
_LENGTHS = {"histogram": [[3, 2], [5, 1], [9, 1]]}


def _held(held: str) -> dict[str, Any]:
    return {"lengths": {**_LENGTHS, "as": held}}


# Rows of several sequences, or padded.
LENGTHS: dict[str, Plan] = {
    "packed, fsdp, tensor, sequence": spread(
        "llama", _FM, "seq", **_held("packed"), microbatches=2
    ),
    "padded, data": spread("palm", _D, **_held("padded")),
    "packed, unfused, latents": spread("deepseek-lite", _F, **_held("packed_masked"), **_UNFUSED),
    "packed, unfused, windows": spread("gemma2", _F, **_held("packed_masked"), **_UNFUSED),
}

CONTEXTS: dict[str, Plan] = {
    "ring, striped, tensor": spread(
        "llama", _FCM, "seq", **_SPLIT, **_context(keys="ring", order="striped")
    ),
    "ring, striped, windows": spread(
        "gemma2", _C4, **_context(keys="ring", order="striped"), remat="save_context"
    ),
    "ring, contiguous, no overlap": spread(
        "gpt", _C4, **_context(keys="ring", order="contiguous", overlap=False), remat="dots"
    ),
    "ring, not causal": spread(
        "vit-serial", _C4, **_context(keys="ring", order="striped"), microbatches=2
    ),
    "striped, unfused": spread(
        "llama", _FCM, "seq", **_SPLIT, **_context(order="striped"), **_UNFUSED
    ),
    "striped, windows": spread("gemma2", _C4, **_context(order="striped")),
    "latents, striped": spread("latents-parallel", _C4, **_context(order="striped")),
    "ulysses, weights over context": spread(
        "gemma", _C4, over="context", **_context(keys="ulysses"), remat="none"
    ),
    "ulysses, one key-value head": spread(
        "palm", {"context": 4, "model": 2}, **_context(keys="ulysses"), remat="save_context"
    ),
    "ulysses, 2-D tensor": spread(
        "llama",
        {"context": 2, "model2": 2, "model": 2},
        "seq",
        **_context(keys="ulysses"),
        remat="dots",
    ),
    "ulysses and attention pooling": spread("vit", _FCM, "embed", **_context(keys="ulysses")),
}

_GPIPE = {"pipeline_schedule": "gpipe"}
_SFM = {"stage": 2, "fsdp": 2, "model": 2}
_PART_KEPT = [{"layers": 3, "save": []}, {"layers": 4, "save": ["mlp_hidden"]}]


def _in_turns(schedule: str, microbatches: int, **more: Any) -> Plan:
    """Return four stages of two devices that share the weights."""
    return spread(
        "llama-deep",
        {"stage": 4, "fsdp": 2},
        microbatches=microbatches,
        pipeline_schedule=schedule,
        **more,
    )


def _in_turns_over_tensor(schedule: str, **more: Any) -> Plan:
    """Return two stages with a tensor axis, part of what layers make kept."""
    return spread(
        "gpt-deep",
        _SFM,
        "seq",
        microbatches=4,
        remat="save_mlp",
        pipeline_schedule=schedule,
        **more,
    )


def _in_groups(accumulation: str, **more: Any) -> Plan:
    """Return a plan of two microbatches whose groups of layers keep different things."""
    return spread(
        "vit-deep", _DFM, "seq", microbatches=2, accumulation=accumulation, remat=_PART_KEPT, **more
    )


# Steps that do not run one microbatch after another, which other trainers' exports refuse.
PHASES: dict[str, Plan] = {
    "stages, data": spread("llama-deep", {"stage": 4, "data": 2}, microbatches=4, **_GPIPE),
    "stages dealt round, fsdp": spread(
        "llama-deep", {"stage": 2, "fsdp": 4}, microbatches=4, pipeline_interleave=2, **_GPIPE
    ),
    "stages, gathered once, tensor": spread(
        "gpt-deep", _SFM, "seq", microbatches=4, accumulation="gathered", **_GPIPE
    ),
    "stages in turns, fsdp": _in_turns("1f1b-ticks", 4),
    "stages in turns, gathered once, tensor": _in_turns_over_tensor(
        "1f1b-ticks", accumulation="gathered"
    ),
    "zero-bubble stages, fsdp": _in_turns("zb-h1-ticks", 6, batch=24),
    "zero-bubble stages, tensor": _in_turns_over_tensor("zb-h1-ticks"),
    "stages, images, tensor": spread(
        "vit", _SFM, "embed", microbatches=2, remat="save_mlp", **_GPIPE
    ),
    "stages dealt round, ring": spread(
        "gpt-deep",
        {"stage": 2, "fsdp": 2, "context": 2},
        **_SPLIT,
        batch=24,
        microbatches=6,
        pipeline_interleave=2,
        **_context(keys="ring"),
        **_GPIPE,
    ),
    "stages over slices, tied, sharded optimizer": spread(
        "gemma2",
        {
            "stage": {"size": 2, "torus": {"dcn": 2}},
            "data": {"size": 2, "torus": {"x": 2}},
            "model": {"size": 2, "torus": {"y": 2}},
        },
        "seq",
        machine="2*v5e:2x2",
        microbatches=2,
        **_ZERO,
        **_GPIPE,
    ),
    "stages, experts": spread(
        "llama4", {"stage": 2, "expert": 4}, microbatches=2, **_ROOM, **_GPIPE
    ),
    "gathered": spread("llama", _F, microbatches=2, accumulation="gathered"),
    "gathered, experts": spread(
        "mixtral", _FE, **_SPLIT, **_RING, microbatches=2, accumulation="gathered"
    ),
    "scattered": spread("llama", _F, microbatches=2, accumulation="scattered"),
    "scattered, replicas, groups of layers": _in_groups("scattered"),
    "layered": spread("llama", _F, microbatches=2, accumulation="layered"),
    "layered, replicas, groups of layers": _in_groups("layered"),
    "layered, windows, sharded optimizer": spread(
        "gemma2", _DFM, "embed", microbatches=2, accumulation="layered", **_ZERO
    ),
}

_AWAY = {"offload_parameters": True}

# With matrices of layers, or optimizer state, in the host's memory.
HOSTED: dict[str, Plan] = {
    "weights and state on the host, tensor": spread(
        "vit", _DFM, "embed", **_AWAY, **_ZERO, offload_optimizer=True
    ),
    "weights on the host, windows, microbatches": spread(
        "gemma2", _F, **_AWAY, microbatches=2, optimizer="sgd"
    ),
    "weights on the host, layered, groups of layers": _in_groups("layered", **_AWAY),
    "weights on the host, experts": spread("mixtral", _FE, **_SPLIT, **_ROOM, **_AWAY),
    "weights on the host, adapters": spread("lora", _FM2, "seq", **_AWAY, remat="dots"),
    "state on the host, factored": spread(
        "llama", _F, offload_optimizer=True, optimizer="adafactor"
    ),
}

# Of layers in several stacks, which share arrays of weights.
ENDS = {
    "layers in three stacks, scattered": spread(
        "mixed-ends", _F, microbatches=2, accumulation="scattered"
    ),
    "layers in three stacks, layered": spread(
        "mixed-ends", _F, microbatches=2, accumulation="layered"
    ),
    "layers in three stacks, experts exchanged": spread(
        "mixed-ends", _FE, **_SPLIT, **_ROOM, remat="dots"
    ),
}

# As Latte and Open-Sora: layers attend in turn within frames and through time.
MODELS["latte"] = {**MODELS["dit"], "frames": 4, "layers": 4, "attends": ["space", "time"]}
MODELS["latte-parallel"] = {
    **MODELS["vit"],
    "frames": 8,
    "layers": 4,
    "attends": ["time", "all"],
    "pooling": "mean",
}
# One picture of 4 rows of 8 patches: along rows, then along columns.
MODELS["axial"] = {**MODELS["latte"], "image": 4, "width": 32}
for _name in ("latte", "latte-parallel", "axial"):
    MODELS[_name] = {k: v for k, v in MODELS[_name].items() if k != "sequence"}
_FC = {"fsdp": 2, "context": 4}

# Of layers along space and time, over a context axis.
VIDEOS: dict[str, Plan] = {
    "frames and locations switched": spread(
        "latte", _FC, **_SPLIT, **_context(keys="dsp"), remat="dots"
    ),
    "frames and locations switched, unfused, parallel layers": spread(
        "latte-parallel", _C4, **_context(keys="dsp"), **_UNFUSED, microbatches=2
    ),
    "frames and locations switched, tensor, sequence": spread(
        "latte", _FCM, "seq", **_SPLIT, **_context(keys="dsp"), remat="save_context"
    ),
    "frames and locations switched, tensor, embed": spread(
        "latte", _FCM, "embed", **_context(keys="dsp")
    ),
    "through time, keys gathered": spread("latte", _C4, remat="dots"),
    "through time, ulysses, tensor": spread(
        "latte", _FCM, "seq", **_SPLIT, **_context(keys="ulysses")
    ),
    "through time, ring": spread(
        "latte", _C4, over="context", **_context(keys="ring"), microbatches=2
    ),
    "rows and columns switched": spread("axial", _C4, **_context(keys="dsp")),
    "through time, fsdp": spread("latte", _F, remat="none"),
    # A text's keys are gathered beside all of these.
    "text and video, ulysses": spread("wan", _C4, **_context(keys="ulysses")),
    "text and video, ring": spread(
        "wan", _C4, over="context", **_context(keys="ring"), remat="save_context"
    ),
}

# As Gemma 4: layers without a window have fewer and wider heads, whose values are their keys.
MODELS["gemma4"] = {
    **MODELS["gemma3"],
    **_MIXED,
    "kv_heads": 8,
    "post_norms": True,
    "value_norm": True,
    "residual_scale": True,
    "global_heads": {"kv_heads": 4, "head_dim": 16, "values_are_keys": True},
}
# And experts, their router and an MLP beside them between norms of their own.
MODELS["gemma4-experts"] = {
    **MODELS["gemma4"],
    "experts": {**_EIGHT, "beside": True, "apart": True, "scales": True},
}


def _wide(*given: Any, **more: Any) -> Plan:
    """Return a plan with momentum: the number of a layer may have a gradient near zero, whose
    rounding Adam would turn into an update."""
    return spread(*given, optimizer="momentum", **more)


GLOBALS: dict[str, Plan] = {
    "global heads, tensor, sequence": _wide("gemma4", _FM, "seq"),
    "global heads, fsdp": _wide("gemma4", _F, microbatches=2),
    "global heads, fsdp, unfused": _wide("gemma4", _F, remat="none", **_UNFUSED),
    "global heads, experts, tensor": _wide("gemma4-experts", _FM2, "seq", remat="dots"),
    "global heads, tensor, embed": _wide("gemma4", _FM2, "embed", remat="dots"),
    "global heads, two tensor axes": _wide("gemma4", _F2M, "embed"),
    "global heads, experts exchanged": _wide("gemma4-experts", _FE, **_SPLIT, **_ROOM),
    "global heads, context by heads": _wide(
        "gemma4", _FCM, "seq", **_SPLIT, **_context(keys="ulysses")
    ),
    "global heads, ring of keys": _wide(
        "gemma4", _FCM, "seq", **_SPLIT, **_context(keys="ring", order="striped")
    ),
    "global heads, partitioned": _wide("gemma4", _FM, "seq", **_PART),
}

# As Qwen3-Next: three layers with linear attention to one with softmax, whose result has a gate.
MODELS["next"] = {
    **MODELS["gemma3"],
    "layers": 8,
    "windows": [],
    "output_gate": True,
    "delta": {"key_heads": 4, "value_heads": 8, "key_dim": 8, "value_dim": 16, "chunk": 8},
}
MODELS["next-experts"] = {**MODELS["next"], "experts": {**_EIGHT, "shared": 1, "shared_gate": True}}
STATES: dict[str, Plan] = {
    "linear attention, tensor, sequence": _wide("next", _FM, "seq"),
    "linear attention, experts, tensor, embed": _wide("next-experts", _FM2, "embed", remat="dots"),
    "linear attention, fsdp, all kept": _wide("next", _F, microbatches=2, remat="none"),
    "linear attention, experts exchanged": _wide("next-experts", _FE, **_SPLIT, **_ROOM),
}
