"""The plans that the emitted code is run with, and the models they train: all tiny."""

from __future__ import annotations

from typing import Any

from shardsim.plan import Plan, plan_from_data

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
        "name": "vit",
        "parallel_block": True,
        "qk_norm": True,
        "pooling": "map",
        "classes": 16,
        "biases": {"attention_output": True, "mlp": True},
    },
    "vit-deep": {
        **_VIT,
        "name": "vit-deep",
        "layers": 7,
        "parallel_block": True,
        "pooling": "mean",
        "classes": 16,
        "biases": {"attention_output": True, "mlp": True},
    },
    "vit-features": {
        **_VIT,
        "name": "vit-features",
        "parallel_block": True,
        "qk_norm": True,
        "pooling": "map",
        "biases": {"attention_output": True, "mlp": True},
    },
    "vit-serial": {
        **_VIT,
        "name": "vit-serial",
        "pooling": "mean",
        "classes": 16,
        "biases": _ALL_BIASES,
    },
    # Seven by seven patches and a class token; no classes, so features are its target.
    "vit-cls": {**_VIT, "name": "vit-cls", "image": 28, "sequence": 50, "pooling": "cls"}
    | {"biases": _ALL_BIASES},
    # As Llama: grouped-query attention, gated MLP, rotary positions, RMS norm.
    "llama": {
        **_DECODER,
        "name": "llama",
        "kv_heads": 4,
        "gated_mlp": True,
        "activation": "silu",
        "norm": "rmsnorm",
        "positions": "rotary",
    },
    # As PaLM: parallel layers, one key-value head, tied embeddings.
    "palm": {
        **_DECODER,
        "name": "palm",
        "kv_heads": 1,
        "parallel_block": True,
        "gated_mlp": True,
        "activation": "silu",
        "tied_embeddings": True,
        "positions": "rotary",
    },
    # As Gemma: norms after attention and MLP too.
    "gemma": {**_DECODER, "name": "gemma", "gated_mlp": True, "norm": "rmsnorm", "kv_heads": 2}
    | {"post_norms": True, "tied_embeddings": True, "positions": "rotary"},
    # As Mixtral: two of eight experts a token, none dropped.
    "mixtral": {**_DECODER, "name": "mixtral", **_MIXED, "experts": _EIGHT},
    # As Llama 4: every other layer has experts, beside a shared one.
    "llama4": {
        **_DECODER,
        "name": "llama4",
        **_MIXED,
        "layers": 4,
        "experts": {**_EIGHT, "top_k": 1, "shared": 1, "every": 2, "router": "sigmoid"},
    },
    # As DeepSeek-V3: latents, of queries too; experts beside a shared one.
    "deepseek": {
        **_DECODER,
        **_LATENTS,
        "name": "deepseek",
        "latent": {"queries": 32, "keys": 16, "rotary": 4, "values": 6},
        "experts": {**_EIGHT, "shared": 1, "router": "sigmoid", "router_bias": True},
    },
    # As DeepSeek-V2-Lite, without experts: queries come straight from tokens.
    "deepseek-lite": {
        **_DECODER,
        **_LATENTS,
        "name": "deepseek-lite",
        "latent": {"keys": 16, "rotary": 4, "values": 10},
    },
    # The same side by side with the MLP.
    "latents-parallel": {
        **_DECODER,
        **_LATENTS,
        "name": "latents-parallel",
        "parallel_block": True,
        "latent": {"keys": 16, "rotary": 4, "values": 10},
    },
    # As gpt-oss: biases everywhere; a capacity in sequences.
    "switch": {
        **_DECODER,
        "name": "switch",
        "biases": {"mlp": True},
        "experts": {**_EIGHT, "capacity": 1.25, "router_bias": True, "beside": True},
    },
    # As gpt-oss: a learned logit of each head that no value goes with, windows, biases.
    "gpt-oss": {
        **_DECODER,
        **_MIXED,
        "name": "gpt-oss",
        "layers": 4,
        "kv_heads": 4,
        "windows": [5, 0],
        "sinks": True,
        "biases": {"qkv": True, "attention_output": True, "mlp": True},
        "experts": {**_EIGHT, "router_bias": True},
    },
    # As DeepNet: norms behind additions, of a scaled stream.
    "deepnet": {**_DECODER, "name": "deepnet", "deepnorm": 1.7, "biases": _ALL_BIASES},
    # As Magneto, with norms within branches; of images, with Dual PatchNorm.
    "magneto": {**_DECODER, "name": "magneto", "sub_norms": True, "kv_heads": 2}
    | {"norm": "rmsnorm", "positions": "rotary"},
    "vit-norms": {
        **_VIT,
        "name": "vit-norms",
        "pooling": "cls",
        "sequence": 17,
        "classes": 16,
        "patch_norms": True,
        "sub_norms": True,
        "biases": _ALL_BIASES,
    },
    # A capacity in groups of a sequence.
    "gshard": {**_DECODER, "name": "gshard", "experts": {**_EIGHT, "capacity": 1.0, "group": 8}},
    # As Gemma 2: every other layer sees a window of the last tokens.
    "gemma2": {
        **_DECODER,
        "name": "gemma2",
        "layers": 4,
        "gated_mlp": True,
        "norm": "rmsnorm",
        "kv_heads": 4,
    }
    | {"post_norms": True, "tied_embeddings": True, "positions": "rotary", "windows": [6, 0]},
    # As Gemma 3: several local layers for each that sees all.
    "gemma3": {**_DECODER, "name": "gemma3", "qk_norm": True, "norm": "rmsnorm", "layers": 6}
    | {"positions": "rotary", "windows": [5, 5, 0]},
    "gemma3-deep": {**_DECODER, "name": "gemma3-deep", "norm": "rmsnorm", "layers": 12}
    | {"positions": "rotary", "windows": [5, 5, 0]},
    # As DeepSeek-V3 begins and Gemma 3 ends: dense layers in front of those with experts, and local
    # ones after the last whole round.
    "mixed-ends": {
        **_DECODER,
        **_MIXED,
        "name": "mixed-ends",
        "layers": 10,
        "windows": [0, 0, 5, 5, 0, 5, 5, 0, 5, 5],
        "experts": {**_EIGHT, "dense_layers": 2},
    },
    # The same side by side, with biases.
    "gemma-parallel": {
        **_DECODER,
        "name": "gemma-parallel",
        "parallel_block": True,
        "post_norms": True,
        "norm": "rmsnorm",
        "kv_heads": 2,
        "biases": {"qkv": True, "attention_output": True, "mlp": True},
    },
    # Its vocabulary has to be padded.
    "gpt-61": {**_DECODER, "name": "gpt-61", "vocab": 61, "positions": "fixed"},
    # Eight devices do not divide its width.
    "gpt-60-wide": {**_DECODER, "name": "gpt-60-wide", "embed": 60, "positions": "fixed"},
    "gpt": {**_DECODER, "name": "gpt", "biases": _ALL_BIASES, "activation": "relu"},
    "gpt-deep": {**_DECODER, "name": "gpt-deep", "biases": _ALL_BIASES, "layers": 4},
    "llama-deep": {**_DECODER, **_MIXED, "name": "llama-deep", "kv_heads": 4, "layers": 8},
}

_INSIDE = {axis: ["model"] for axis in ("heads", "mlp", "vocab")}
_FSDP_TENSOR = {"embed": ["fsdp"], **_INSIDE}
_TWO_D = {"embed": ["fsdp", "model2"], **_INSIDE}
_BOTH = {axis: ["row", "column"] for axis in ("heads", "mlp", "vocab")}
_PART = {"execution": "partitioned"}


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
        "model": MODELS[model],
        "machine": "v5e:2x4",
        "batch": 16,
        "mesh": mesh,
        "rules": rules,
        "precision": {"compute": "f32", "reduce": "f32"},
    }
    return plan_from_data({**data, **more}, "test plan")


def _overlap(matmul: str) -> dict[str, Any]:
    return {"overlap": {"matmul": matmul}}


_D, _F = {"data": 8}, {"fsdp": 8}
_FM, _FM2 = {"fsdp": 2, "model": 4}, {"fsdp": 4, "model": 2}
_DFM = {"data": 2, "fsdp": 2, "model": 2}
_F2M = {"fsdp": 2, "model2": 2, "model": 2}
_FCM = {"fsdp": 2, "context": 2, "model": 2}
_B, _DB = {"batch": ["fsdp"]}, {"batch": ["data", "fsdp"]}
_SEQ, _EMB = {"seq": ["model"]}, {"embed": ["model"]}
_FE, _DE = {"fsdp": 2, "expert": 4}, {"data": 2, "expert": 4}
_FEM = {"fsdp": 2, "expert": 2, "model": 2}
_E = {"expert": ["expert"]}
_ON_FE, _ON_DE = {"batch": ["fsdp", "expert"], **_E}, {"batch": ["data", "expert"], **_E}
_FE_WHOLE, _FE_SPLIT = {"embed": ["fsdp"], **_E}, {"embed": ["fsdp", "expert"], **_E}
_RING, _ROOM = {"experts": {"exchange": "ring", "padding": 4}}, {"experts": {"padding": 4}}
_ZERO = {"optimizer_rules": {"embed": ["data"]}}
_CUSTOM = {"save": ["context", "mlp_output"]}
_GROUPS = [
    {"layers": 2, "save": []},
    {"layers": 3, "save": ["qkv", "mlp_hidden", "statistics"]},
    {"layers": 2, "save": ["statistics"], "offload": ["context", "qkv"]},
]

PLANS: dict[str, Plan] = {
    "data": make("vit", _D, {}, {"batch": ["data"]}),
    "data, sharded optimizer": make("llama", _D, {}, {"batch": ["data"]}, **_ZERO),
    "data, optimizer that it does not divide": make(
        "gpt-60-wide", _D, {}, {"batch": ["data"]}, **_ZERO, microbatches=2
    ),
    "fsdp": make("vit", _F, {"embed": ["fsdp"]}, _B, remat="none"),
    "fsdp, serial, microbatches": make(
        "vit-serial", _F, {"embed": ["fsdp"]}, _B, microbatches=2, remat="dots"
    ),
    "data and fsdp": make(
        "gpt", {"data": 2, "fsdp": 4}, {"embed": ["fsdp"]}, _DB, optimizer="momentum"
    ),
    "tensor of 8, sequence": make("gpt", {"model": 8}, _INSIDE, {"batch": [], **_SEQ}),
    "tensor, sequence, two directions": make("vit", _FM, _FSDP_TENSOR, _B | _SEQ),
    "tensor, sequence, one direction": make(
        "vit-serial", _FM, _FSDP_TENSOR, _B | _SEQ, **_overlap("unidirectional")
    ),
    "tensor, sequence, no overlap": make(
        "llama", _FM, _FSDP_TENSOR, _B | _SEQ, **_overlap("off"), remat="save_attention"
    ),
    "tensor, embed, two directions, fused": make(
        "vit", _FM, _FSDP_TENSOR, _B | _EMB, fused_projections=True
    ),
    "tensor, embed, one direction": make(
        "llama", _FM, _FSDP_TENSOR, _B | _EMB, **_overlap("unidirectional")
    ),
    "tensor, embed, no overlap": make(
        "vit-serial", _FM2, _FSDP_TENSOR, _B | _EMB, **_overlap("off"), remat="dots"
    ),
    "tensor, replicated residual": make("vit", _FM, _FSDP_TENSOR, _B),
    "tensor, replicated residual, decoder": make("gpt", _FM, _FSDP_TENSOR, _B, remat="none"),
    "tensor, one key-value head": make("palm", _FM, _FSDP_TENSOR, _B | _SEQ),
    "tensor, norms after": make("gemma", _DFM, _FSDP_TENSOR, _DB | _SEQ),
    "windows, fsdp": make("gemma3", _F, {"embed": ["fsdp"]}, _B, remat="dots"),
    "groups of layers, fsdp, microbatches": make(
        "vit-deep", _F, {"embed": ["fsdp"]}, _B, microbatches=2, remat=_GROUPS
    ),
    "groups of layers, windows, tensor": make(
        "gemma3-deep",
        _FM,
        _FSDP_TENSOR,
        _B | _SEQ,
        remat=[{"layers": 6, "save": ["mlp_hidden"]}, {"layers": 6, "save": []}],
    ),
    "partitioned groups of layers": make(
        "vit-deep", _FM, _FSDP_TENSOR, _B | _SEQ, **_PART, remat=_GROUPS
    ),
    "windows, tensor, unfused": make(
        "gemma2", _DFM, _FSDP_TENSOR, _DB | _SEQ, attention="unfused", microbatches=2
    ),
    "windows, context": make(
        "gemma2",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
    ),
    "partitioned windows": make("gemma2", _FM, _FSDP_TENSOR, _B | _SEQ, **_PART),
    "tensor on two mesh axes": make(
        "gpt-61",
        {"data": 2, "row": 2, "column": 2},
        _BOTH,
        {"batch": ["data"]} | {"seq": ["row", "column"]},
    ),
    "2-D tensor, embed": make("vit", _F2M, _TWO_D, _B | {"embed": ["model2", "model"]}),
    "2-D tensor, sequence": make("llama", _F2M, _TWO_D, _B | _SEQ | {"embed": ["model2"]}),
    "2-D tensor, replicated": make(
        "vit-serial",
        {"model2": 2, "model": 4},
        {"embed": ["model2"], **_INSIDE},
        {"embed": ["model2"]},
    ),
    "context and fsdp": make(
        "llama",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        attention="unfused",
    ),
    "context and data": make(
        "vit-serial", {"data": 2, "context": 4}, {}, {"batch": ["data"], "seq": ["context"]}
    ),
    "context and attention pooling": make(
        "vit", _FCM, _FSDP_TENSOR, _B | {"seq": ["context"], **_EMB}, remat="save_context"
    ),
    "class token": make(
        "vit-cls", {"fsdp": 4, "context": 2}, {"embed": ["fsdp"]}, _B | {"seq": ["context"]}
    ),
    "all, microbatches": make("gpt", _DFM, _FSDP_TENSOR, _DB | _SEQ, microbatches=2, remat=_CUSTOM),
    "fewer key-value heads than members": make(
        "llama", {"model": 8}, _INSIDE, _SEQ | {"batch": []}, remat={"save": ["rest"]}
    ),
    "2-D tensor, one key-value head": make(
        "palm", _F2M, _TWO_D, _B | {"embed": ["model2", "model"]}
    ),
    "2-D tensor, values again": make(
        "llama", _F2M, _TWO_D, _B | _SEQ | {"embed": ["model2"]}, remat={"save": ["rest"]}
    ),
    "2-D tensor, context": make(
        "palm",
        {"context": 2, "model2": 2, "model": 2},
        {"embed": ["model2"], **_INSIDE},
        {"embed": ["model2"], "seq": ["context", "model"]},
        attention="unfused",
        remat="dots",
    ),
    "2-D tensor, features": make(
        "vit-features", _F2M, _TWO_D, _B | {"embed": ["model2", "model"]}, microbatches=2
    ),
    "tensor, norms after side by side": make(
        "gemma-parallel", _DFM, _FSDP_TENSOR, _DB, fused_projections=True, remat="save_mlp"
    ),
    "sharded optimizer and context": make(
        "palm",
        {"data": 2, "context": 2, "model": 2},
        _INSIDE,
        {"batch": ["data"], "seq": ["context"]},
        microbatches=2,
        **_ZERO,
    ),
    "partitioned data": make("vit", _D, {}, {"batch": ["data"]}, **_PART),
    "partitioned fsdp": make("vit", _F, {"embed": ["fsdp"]}, _B, **_PART, remat="none"),
    "partitioned fsdp, microbatches": make(
        "vit-serial", _F, {"embed": ["fsdp"]}, _B, **_PART, microbatches=2
    ),
    "partitioned tensor, sequence": make("llama", _FM, _FSDP_TENSOR, _B | _SEQ, **_PART),
    "partitioned tensor, embed": make(
        "vit", _FM, _FSDP_TENSOR, _B | _EMB, **_PART, **_overlap("off"), remat="dots"
    ),
    "partitioned 2-D tensor": make(
        "llama", _F2M, _TWO_D, _B | {"embed": ["model2", "model"]}, **_PART
    ),
    "partitioned context": make(
        "gpt", _FCM, _FSDP_TENSOR, _B | {"seq": ["context", "model"]}, **_PART
    ),
}

# Of models with experts or latents, which other trainers' exports refuse.
EXPERTS: dict[str, Plan] = {
    "experts, fsdp": make("mixtral", _F, {"embed": ["fsdp"]}, _B, remat="none"),
    "experts, fsdp by expert": make("mixtral", _F, {"embed": ["fsdp"], "expert": ["fsdp"]}, _B),
    "experts, ring": make("mixtral", _FE, _FE_SPLIT, _ON_FE, **_RING),
    "experts, ring, everything kept": make(
        "mixtral", _DE, _E, _ON_DE, **_RING, **_ZERO, remat="none"
    ),
    "experts, exchanged": make("mixtral", _FE, _FE_SPLIT, _ON_FE, **_ROOM),
    "experts, exchanged, replicas": make("llama4", _DE, _E, _ON_DE, **_ROOM, microbatches=2),
    "experts, tensor, replicated": make("mixtral", _FM, _FSDP_TENSOR, _B),
    "experts, tensor, sequence": make("llama4", _FM2, _FSDP_TENSOR, _B | _SEQ, remat="dots"),
    "experts, tensor, embed": make("mixtral", _FM2, _FSDP_TENSOR, _B | _EMB, remat="none"),
    "norms behind additions": make("deepnet", _FM, _FSDP_TENSOR, _B | _SEQ, remat="dots"),
    "norms within branches": make("magneto", _FM, _FSDP_TENSOR, _B | _EMB),
    "norms of patches": make("vit-norms", _FM2, _FSDP_TENSOR, _B | _EMB, remat="none"),
    "experts, sinks, tensor": make("gpt-oss", _FM, _FSDP_TENSOR, _B | _SEQ, remat="dots"),
    "experts, sinks, context": make(
        "gpt-oss",
        {"fsdp": 4, "context": 2},
        {"embed": ["fsdp", "context"]},
        _B | {"seq": ["context"]},
        attention="unfused",
    ),
    "experts, ring and tensor": make(
        "mixtral", _FEM, _FE_SPLIT | _INSIDE, _ON_FE | _SEQ, **_RING, remat="save_mlp"
    ),
    "experts, exchanged and tensor": make(
        "llama4", _FEM, _FE_WHOLE | _INSIDE, _ON_FE | _SEQ, **_ROOM
    ),
    "experts, context": make(
        "mixtral",
        {"fsdp": 2, "expert": 2, "context": 2},
        {"embed": ["fsdp", "context"], **_E},
        _ON_FE | {"seq": ["context"]},
        **_RING,
    ),
    "capacity, fsdp": make("switch", _F, {"embed": ["fsdp"]}, _B, remat="none"),
    "capacity, exchanged": make("switch", _FE, _FE_SPLIT, _ON_FE),
    "capacity, exchanged, sharded optimizer": make("gshard", _DE, _E, _ON_DE, **_ZERO),
    "capacity, exchanged and tensor": make(
        "switch", _FEM, _FE_SPLIT | _INSIDE, _ON_FE | _EMB, remat="dots", microbatches=2
    ),
    "capacity, ring": make("gshard", _FE, _FE_WHOLE, _ON_FE, **_RING),
    "capacity in groups, context": make(
        "gshard",
        {"fsdp": 2, "expert": 2, "context": 2},
        {"embed": ["fsdp"], **_E},
        _ON_FE | {"seq": ["context"]},
    ),
    "latents, fsdp, experts": make("deepseek", _F, {"embed": ["fsdp"]}, _B, remat="save_qkv"),
    "latents, tensor, sequence": make("deepseek", _FM, _FSDP_TENSOR, _B | _SEQ, microbatches=2),
    "latents, data, tensor, embed": make(
        "deepseek-lite", _DFM, _FSDP_TENSOR, _DB | _EMB, **_ZERO, remat="none"
    ),
    "latents, context, unfused": make(
        "latents-parallel",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context"]},
        attention="unfused",
        fused_projections=True,
    ),
}

_TEXT = {"vocab": 64, "sequence": 8, "pooling": "last"}
_T5 = {**_DECODER, "positions": "relative", "norm": "rmsnorm", "gated_mlp": True}
_SMALL = {**_VIT, "embed": 32, "mlp": 64, "heads": 4, "kv_heads": 4, "biases": _ALL_BIASES}
MODELS |= {
    # As T5: a decoder that attends to an encoder, which has more tokens; one table.
    "t5": {**_T5, "name": "t5", "encoder": {"sequence": 32, "shared_embeddings": True}},
    # As PaLI: tokens of a frozen tower in front of the encoder's.
    "pali": {
        **_T5,
        "name": "pali",
        "encoder": {"sequence": 32, "images": {**_SMALL, "frozen": True}},
    },
    # A decoder of captions: it attends to the narrower tower of an image.
    "captions": {
        **_DECODER,
        "name": "captions",
        "biases": _ALL_BIASES,
        "head_bias": True,
        "encoder": _SMALL,
    },
    # As PaliGemma: a trained tower in front of a decoder's tokens.
    "pictures": {**MODELS["palm"], "name": "pictures", "sequence": 32, "images": _SMALL},
    "siglip": {
        **_VIT,
        "name": "siglip",
        "pooling": "map",
        "biases": _ALL_BIASES,
        "contrast": "sigmoid",
        "text": {**_TEXT, "features": 64, "features_bias": True},
    },
    # Fifty tokens of an image, sixteen of a text, and embeddings narrower than either.
    "clip": {
        **_VIT,
        "name": "clip",
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
    "lora": {**MODELS["llama"], "name": "lora", "lora": {"rank": 4}},
    "lora-gpt": {**MODELS["gpt"], "name": "lora-gpt"}
    | {"lora": {"rank": 4, "on": ["query", "mlp_out"]}},
}
_UNFUSED = {"attention": "unfused"}
MODELS["soft"] = {
    **_VIT,
    "name": "soft",
    "pooling": "mean",
    "classes": 16,
    "biases": _ALL_BIASES,
    "experts": {"number": 8, "top_k": 1, "mlp": 64, "soft_slots": 2},
}

# Of models of several stacks, with adapters or soft experts, which other exports refuse.
STACKS: dict[str, Plan] = {
    "encoder, fsdp": make("t5", _F, {"embed": ["fsdp"]}, _B, **_UNFUSED, remat="none"),
    "encoder, tensor, sequence": make("t5", _FM, _FSDP_TENSOR, _B | _SEQ, **_UNFUSED),
    "encoder, tensor, embed": make(
        "t5", _FM2, _FSDP_TENSOR, _B | _EMB, **_UNFUSED, **_overlap("off"), remat="dots"
    ),
    "encoder, tensor, replicated": make("t5", _FM, _FSDP_TENSOR, _B, **_UNFUSED),
    "encoder, sharded optimizer, microbatches": make(
        "t5", _DFM, _FSDP_TENSOR, _DB | _SEQ, **_UNFUSED, **_ZERO, microbatches=2
    ),
    "encoder, context": make(
        "t5",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        **_UNFUSED,
    ),
    "encoder of images, striped context": make(
        "captions", _FCM, _FSDP_TENSOR, _B | {"seq": ["context"]}, context={"order": "striped"}
    ),
    "frozen images, fsdp": make("pali", _F, {"embed": ["fsdp"]}, _B, **_UNFUSED, remat="none"),
    "frozen images, tensor": make(
        "pali", _DFM, _FSDP_TENSOR, _DB | _SEQ, **_UNFUSED, microbatches=2
    ),
    "images of a decoder, fsdp": make("pictures", _F, {"embed": ["fsdp"]}, _B, remat="dots"),
    "images of a decoder, tensor, context": make(
        "pictures",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        context={"order": "striped"},
    ),
    "towers, sigmoid, fsdp": make("siglip", _F, {"embed": ["fsdp"]}, _B, remat="none"),
    "towers, sigmoid, tensor": make("siglip", _DFM, _FSDP_TENSOR, _DB | _SEQ, **_UNFUSED),
    "towers, softmax": make("clip", _DFM, _FSDP_TENSOR, _DB | _SEQ, remat="dots"),
    "soft experts, fsdp": make("soft", _F, {"embed": ["fsdp"]}, _B, remat="none"),
    "soft experts, exchanged": make("soft", _FE, _FE_SPLIT, _ON_FE),
    "soft experts, exchanged and tensor": make(
        "soft", _FEM, _FE_WHOLE | _INSIDE, _ON_FE | _SEQ, microbatches=2
    ),
    "adapters, fsdp": make("lora", _F, {"embed": ["fsdp"]}, _B, remat="dots"),
    "adapters, tensor, sequence": make("lora", _FM2, _FSDP_TENSOR, _B | _SEQ, microbatches=2),
    "adapters, tensor, embed": make(
        "lora-gpt", _FM, _FSDP_TENSOR, _B | _EMB, **_overlap("off"), remat="none"
    ),
}

MODELS |= {
    # As DiT: each layer projects a time and a class to what shifts, scales and gates it.
    "dit": {**_VIT, "name": "dit", "biases": _ALL_BIASES, "positions": "fixed", "channels": 4}
    | {"predicts": 8, "modulation": "layer", "labels": 11},
    # As Wan: a video, one projection for all layers, a text that they attend to.
    "wan": {
        **_VIT,
        "name": "wan",
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
        "name": "mae",
        "positions": "fixed",
        "predicts": 3,
        "images": {**_VIT, "sequence": 8, "kept": 8, "biases": _ALL_BIASES, "positions": "fixed"},
    },
    # As DINOv2 with registers: scales of branches' channels; a class token, and tokens of no patch.
    "dinov2": {
        **_VIT,
        "name": "dinov2",
        "image": 28,
        "sequence": 56,
        "pooling": "cls",
        "classes": 16,
        "registers": 6,
        "layer_scale": True,
        "biases": _ALL_BIASES,
    },
    # As OLMo 2: norms of all heads of a token at once.
    "olmo": {**MODELS["llama"], "name": "olmo", "qk_norm": True, "qk_norm_over": "heads"},
}

# Of models that a condition modulates, that predict pixels, or with norms over all heads.
CONDITIONED: dict[str, Plan] = {
    "masked, fsdp": make("mae", _F, {"embed": ["fsdp"]}, _B, remat="dots"),
    "modulated, fsdp": make("dit", _F, {"embed": ["fsdp"]}, _B, remat="dots"),
    "modulated, tensor, sequence": make("dit", _DFM, _FSDP_TENSOR, _DB | _SEQ, microbatches=2),
    "modulated, tensor, embed": make("dit", _FM, _FSDP_TENSOR, _B | _EMB, remat="none"),
    "modulated, tensor, replicated": make("dit", _FM2, _FSDP_TENSOR, _B, **_overlap("off")),
    "modulated, context": make(
        "dit",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        attention="unfused",
    ),
    "text and video, fsdp": make("wan", _F, {"embed": ["fsdp"]}, _B, remat="none"),
    "text and video, tensor, sequence": make("wan", _DFM, _FSDP_TENSOR, _DB | _SEQ, **_ZERO),
    "text and video, context": make(
        "wan",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        remat="dots",
    ),
    "masked, tensor, embed": make("mae", _DFM, _FSDP_TENSOR, _DB | _EMB, microbatches=2),
    "masked, tensor, context": make(
        "mae",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        attention="unfused",
    ),
    "registers, scaled branches, tensor, context": make(
        "dinov2",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
    ),
    "registers, scaled branches, tensor, embed": make(
        "dinov2", _DFM, _FSDP_TENSOR, _DB | _EMB, microbatches=2
    ),
    "norms over all heads, tensor": make("olmo", _DFM, _FSDP_TENSOR, _DB | _SEQ, remat="dots"),
}

_C4, _ON_C4 = {"data": 2, "context": 4}, {"batch": ["data"], "seq": ["context"]}
_FCM_SPLIT = {"embed": ["fsdp", "context"], **_INSIDE}


def _context(**choices: Any) -> dict[str, Any]:
    return {"context": choices}


# With other ways to attend over a context axis, which other trainers' exports refuse.
_LENGTHS = {"histogram": [[3, 2], [5, 1], [9, 1]]}


def _held(held: str) -> dict[str, Any]:
    return {"lengths": {**_LENGTHS, "as": held}}


# Rows of several sequences, or padded.
LENGTHS: dict[str, Plan] = {
    "packed, fsdp, tensor, sequence": make(
        "llama", _FM, _FSDP_TENSOR, _B | _SEQ, **_held("packed"), microbatches=2
    ),
    "padded, data": make("palm", _D, {}, {"batch": ["data"]}, **_held("padded")),
    "packed, unfused, windows": make(
        "gemma2", _F, {"embed": ["fsdp"]}, _B, **_held("packed_masked"), attention="unfused"
    ),
}

CONTEXTS: dict[str, Plan] = {
    "ring, striped, tensor": make(
        "llama",
        _FCM,
        _FCM_SPLIT,
        _B | {"seq": ["context", "model"]},
        **_context(keys="ring", order="striped"),
    ),
    "ring, striped, windows": make(
        "gemma2", _C4, {}, _ON_C4, **_context(keys="ring", order="striped"), remat="save_context"
    ),
    "ring, contiguous, no overlap": make(
        "gpt", _C4, {}, _ON_C4, **_context(keys="ring", overlap=False), remat="dots"
    ),
    "ring, not causal": make(
        "vit-serial", _C4, {}, _ON_C4, **_context(keys="ring", order="striped"), microbatches=2
    ),
    "striped, unfused": make(
        "llama",
        _FCM,
        _FCM_SPLIT,
        _B | {"seq": ["context", "model"]},
        **_context(order="striped"),
        attention="unfused",
    ),
    "striped, windows": make("gemma2", _C4, {}, _ON_C4, **_context(order="striped")),
    "latents, striped": make("latents-parallel", _C4, {}, _ON_C4, **_context(order="striped")),
    "ulysses, weights over context": make(
        "gemma", _C4, {"embed": ["context"]}, _ON_C4, **_context(keys="ulysses"), remat="none"
    ),
    "ulysses, one key-value head": make(
        "palm",
        {"context": 4, "model": 2},
        _INSIDE,
        {"seq": ["context"]},
        **_context(keys="ulysses"),
        remat="save_context",
    ),
    "ulysses, 2-D tensor": make(
        "llama",
        {"context": 2, "model2": 2, "model": 2},
        {"embed": ["model2"], **_INSIDE},
        {"embed": ["model2"], "seq": ["context", "model"]},
        **_context(keys="ulysses"),
        remat="dots",
    ),
    "ulysses and attention pooling": make(
        "vit", _FCM, _FSDP_TENSOR, _B | {"seq": ["context"], **_EMB}, **_context(keys="ulysses")
    ),
}

_STAGES = {"layers": ["stage"]}
_GPIPE = {"pipeline_schedule": "gpipe"}
_SFM = {"stage": 2, "fsdp": 2, "model": 2}
_PART_KEPT = [{"layers": 3, "save": []}, {"layers": 4, "save": ["mlp_hidden"]}]


def _in_turns(schedule: str, microbatches: int, **more: Any) -> Plan:
    """Return four stages of two devices that share the weights."""
    return make(
        "llama-deep",
        {"stage": 4, "fsdp": 2},
        {**_STAGES, "embed": ["fsdp"]},
        _B,
        microbatches=microbatches,
        pipeline_schedule=schedule,
        **more,
    )


def _in_turns_over_tensor(schedule: str, **more: Any) -> Plan:
    """Return two stages with a tensor axis, part of what layers make kept."""
    return make(
        "gpt-deep",
        _SFM,
        {**_STAGES, **_FSDP_TENSOR},
        _B | _SEQ,
        microbatches=4,
        remat="save_mlp",
        pipeline_schedule=schedule,
        **more,
    )


def _in_groups(accumulation: str, **more: Any) -> Plan:
    """Return a plan of two microbatches whose groups of layers keep different things."""
    return make(
        "vit-deep",
        _DFM,
        _FSDP_TENSOR,
        _DB | _SEQ,
        microbatches=2,
        accumulation=accumulation,
        remat=_PART_KEPT,
        **more,
    )


# Steps that do not run one microbatch after another, which other trainers' exports refuse.
PHASES: dict[str, Plan] = {
    "stages, data": make(
        "llama-deep",
        {"stage": 4, "data": 2},
        _STAGES,
        {"batch": ["data"]},
        microbatches=4,
        **_GPIPE,
    ),
    "stages dealt round, fsdp": make(
        "llama-deep",
        {"stage": 2, "fsdp": 4},
        {**_STAGES, "embed": ["fsdp"]},
        _B,
        microbatches=4,
        pipeline_interleave=2,
        **_GPIPE,
    ),
    "stages, gathered once, tensor": make(
        "gpt-deep",
        _SFM,
        {**_STAGES, **_FSDP_TENSOR},
        _B | _SEQ,
        microbatches=4,
        accumulation="gathered",
        **_GPIPE,
    ),
    "stages in turns, fsdp": _in_turns("1f1b-ticks", 4),
    "stages in turns, gathered once, tensor": _in_turns_over_tensor(
        "1f1b-ticks", accumulation="gathered"
    ),
    "zero-bubble stages, fsdp": _in_turns("zb-h1-ticks", 6, batch=24),
    "zero-bubble stages, tensor": _in_turns_over_tensor("zb-h1-ticks"),
    "stages, images, tensor": make(
        "vit",
        _SFM,
        {**_STAGES, **_FSDP_TENSOR},
        _B | _EMB,
        microbatches=2,
        remat="save_mlp",
        **_GPIPE,
    ),
    "stages dealt round, ring": make(
        "gpt-deep",
        {"stage": 2, "fsdp": 2, "context": 2},
        {**_STAGES, "embed": ["fsdp", "context"]},
        _B | {"seq": ["context"]},
        batch=24,
        microbatches=6,
        pipeline_interleave=2,
        **_context(keys="ring"),
        **_GPIPE,
    ),
    "stages over slices, tied, sharded optimizer": make(
        "gemma2",
        {
            "stage": {"size": 2, "torus": {"dcn": 2}},
            "data": {"size": 2, "torus": {"x": 2}},
            "model": {"size": 2, "torus": {"y": 2}},
        },
        {**_STAGES, **_INSIDE},
        {"batch": ["data"], **_SEQ},
        machine="2*v5e:2x2",
        microbatches=2,
        **_ZERO,
        **_GPIPE,
    ),
    "stages, experts": make(
        "llama4",
        {"stage": 2, "expert": 4},
        {**_STAGES, **_E},
        {"batch": ["expert"], **_E},
        microbatches=2,
        **_ROOM,
        **_GPIPE,
    ),
    "gathered": make("llama", _F, {"embed": ["fsdp"]}, _B, microbatches=2, accumulation="gathered"),
    "gathered, experts": make(
        "mixtral", _FE, _FE_SPLIT, _ON_FE, **_RING, microbatches=2, accumulation="gathered"
    ),
    "scattered": make(
        "llama", _F, {"embed": ["fsdp"]}, _B, microbatches=2, accumulation="scattered"
    ),
    "scattered, replicas, groups of layers": _in_groups("scattered"),
    "layered": make("llama", _F, {"embed": ["fsdp"]}, _B, microbatches=2, accumulation="layered"),
    "layered, replicas, groups of layers": _in_groups("layered"),
    "layered, windows, sharded optimizer": make(
        "gemma2",
        _DFM,
        _FSDP_TENSOR,
        _DB | _EMB,
        microbatches=2,
        accumulation="layered",
        **_ZERO,
    ),
}

_AWAY = {"offload_parameters": True}

# With matrices of layers, or optimizer state, in the host's memory.
HOSTED: dict[str, Plan] = {
    "weights and state on the host, tensor": make(
        "vit", _DFM, _FSDP_TENSOR, _DB | _EMB, **_AWAY, **_ZERO, offload_optimizer=True
    ),
    "weights on the host, windows, microbatches": make(
        "gemma2", _F, {"embed": ["fsdp"]}, _B, **_AWAY, microbatches=2, optimizer="sgd"
    ),
    "weights on the host, layered, groups of layers": _in_groups("layered", **_AWAY),
    "weights on the host, experts": make("mixtral", _FE, _FE_SPLIT, _ON_FE, **_ROOM, **_AWAY),
    "weights on the host, adapters": make(
        "lora", _FM2, _FSDP_TENSOR, _B | _SEQ, **_AWAY, remat="dots"
    ),
    "state on the host, factored": make(
        "llama", _F, {"embed": ["fsdp"]}, _B, offload_optimizer=True, optimizer="adafactor"
    ),
}

# Of layers in several stacks, which share arrays of weights.
ENDS = {
    "layers in three stacks, scattered": make(
        "mixed-ends", _F, {"embed": ["fsdp"]}, _B, microbatches=2, accumulation="scattered"
    ),
    "layers in three stacks, layered": make(
        "mixed-ends", _F, {"embed": ["fsdp"]}, _B, microbatches=2, accumulation="layered"
    ),
    "layers in three stacks, experts exchanged": make(
        "mixed-ends", _FE, _FE_SPLIT, _ON_FE, **_ROOM, remat="dots"
    ),
}

# As Latte and Open-Sora: layers attend in turn within frames and through time.
MODELS["latte"] = {
    **MODELS["dit"],
    "name": "latte",
    "frames": 4,
    "layers": 4,
    "attends": ["space", "time"],
}
MODELS["latte-parallel"] = {
    **MODELS["vit"],
    "name": "latte-parallel",
    "frames": 8,
    "layers": 4,
    "attends": ["time", "all"],
    "pooling": "mean",
}
# One picture of 4 rows of 8 patches: along rows, then along columns.
MODELS["axial"] = {**MODELS["latte"], "name": "axial", "image": 4, "width": 32}
for _name in ("latte", "latte-parallel", "axial"):
    MODELS[_name] = {k: v for k, v in MODELS[_name].items() if k != "sequence"}
_FC, _ON_FC = {"fsdp": 2, "context": 4}, _B | {"seq": ["context"]}

# Of layers along space and time, over a context axis.
VIDEOS: dict[str, Plan] = {
    "frames and locations switched": make(
        "latte", _FC, {"embed": ["fsdp", "context"]}, _ON_FC, **_context(keys="dsp"), remat="dots"
    ),
    "frames and locations switched, unfused, parallel layers": make(
        "latte-parallel", _C4, {}, _ON_C4, **_context(keys="dsp"), **_UNFUSED, microbatches=2
    ),
    "frames and locations switched, tensor, sequence": make(
        "latte",
        _FCM,
        _FCM_SPLIT,
        _B | {"seq": ["context", "model"]},
        **_context(keys="dsp"),
        remat="save_context",
    ),
    "frames and locations switched, tensor, embed": make(
        "latte", _FCM, _FSDP_TENSOR, _B | {"seq": ["context"], **_EMB}, **_context(keys="dsp")
    ),
    "through time, keys gathered": make("latte", _C4, {}, _ON_C4, remat="dots"),
    "through time, ulysses, tensor": make(
        "latte", _FCM, _FCM_SPLIT, _B | {"seq": ["context", "model"]}, **_context(keys="ulysses")
    ),
    "through time, ring": make(
        "latte", _C4, {"embed": ["context"]}, _ON_C4, **_context(keys="ring"), microbatches=2
    ),
    "rows and columns switched": make("axial", _C4, {}, _ON_C4, **_context(keys="dsp")),
    "through time, fsdp": make("latte", _F, {"embed": ["fsdp"]}, _B, remat="none"),
}

# As Gemma 4: layers without a window have fewer and wider heads, whose values are their keys.
MODELS["gemma4"] = {
    **MODELS["gemma3"],
    **_MIXED,
    "name": "gemma4",
    "kv_heads": 8,
    "post_norms": True,
    "value_norm": True,
    "residual_scale": True,
    "global_heads": {"kv_heads": 4, "head_dim": 16, "values_are_keys": True},
}
# And experts, their router and an MLP beside them between norms of their own.
MODELS["gemma4-experts"] = {
    **MODELS["gemma4"],
    "name": "gemma4-experts",
    "experts": {**_EIGHT, "beside": True, "apart": True, "scales": True},
}


def _wide(*given: Any, **more: Any) -> Plan:
    """Return a plan with momentum: the number of a layer may have a gradient near zero, whose
    rounding Adam would turn into an update."""
    return make(*given, optimizer="momentum", **more)


GLOBALS: dict[str, Plan] = {
    "global heads, tensor, sequence": _wide("gemma4", _FM, _FSDP_TENSOR, _B | _SEQ),
    "global heads, fsdp": _wide("gemma4", _F, {"embed": ["fsdp"]}, _B, microbatches=2),
    "global heads, fsdp, unfused": _wide(
        "gemma4", _F, {"embed": ["fsdp"]}, _B, remat="none", **_UNFUSED
    ),
    "global heads, experts, tensor": _wide(
        "gemma4-experts", _FM2, _FSDP_TENSOR, _B | _SEQ, remat="dots"
    ),
    "global heads, tensor, embed": _wide("gemma4", _FM2, _FSDP_TENSOR, _B | _EMB, remat="dots"),
    "global heads, two tensor axes": _wide(
        "gemma4", _F2M, _TWO_D, _B | {"embed": ["model2", "model"]}
    ),
    "global heads, experts exchanged": _wide("gemma4-experts", _FE, _FE_SPLIT, _ON_FE, **_ROOM),
    "global heads, context by heads": _wide(
        "gemma4",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        **_context(keys="ulysses"),
    ),
    "global heads, ring of keys": _wide(
        "gemma4",
        _FCM,
        {"embed": ["fsdp", "context"], **_INSIDE},
        _B | {"seq": ["context", "model"]},
        **_context(keys="ring", order="striped"),
    ),
    "global heads, partitioned": _wide("gemma4", _FM, _FSDP_TENSOR, _B | _SEQ, **_PART),
}

# As Qwen3-Next: three layers with linear attention to one with softmax, whose result has a gate.
MODELS["next"] = {
    **MODELS["gemma3"],
    "name": "next",
    "layers": 8,
    "windows": [],
    "output_gate": True,
    "delta": {"key_heads": 4, "value_heads": 8, "key_dim": 8, "value_dim": 16, "chunk": 8},
}
MODELS["next-experts"] = {
    **MODELS["next"],
    "name": "next-experts",
    "experts": {**_EIGHT, "shared": 1, "shared_gate": True},
}
STATES: dict[str, Plan] = {
    "linear attention, tensor, sequence": _wide("next", _FM, _FSDP_TENSOR, _B | _SEQ),
    "linear attention, experts, tensor, embed": _wide(
        "next-experts", _FM2, _FSDP_TENSOR, _B | _EMB, remat="dots"
    ),
    "linear attention, fsdp, all kept": _wide(
        "next", _F, {"embed": ["fsdp"]}, _B, microbatches=2, remat="none"
    ),
    "linear attention, experts exchanged": _wide("next-experts", _FE, _FE_SPLIT, _ON_FE, **_ROOM),
}
