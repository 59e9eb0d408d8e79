"""What options of a model go together: each check raises a `ModelError` that names the field."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shardsim.errors import ModelError
from shardsim.model.delta import Delta
from shardsim.model.experts import Experts
from shardsim.model.global_heads import GlobalHeads
from shardsim.model.index import Index
from shardsim.model.latent import Latent
from shardsim.model.lora import ATTENTION, CROSS, EXPERTS, MLP, SHARED, Lora

if TYPE_CHECKING:
    from shardsim.model.spec import Model

LARGEST_FACTOR = 1e3  # of the residual stream; far above any model's
ATTENDS = ("all", "space", "time")  # what of a video's tokens a query sees

_A = {"decoder": "a decoder", "encoder": "an encoder"}


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` closest to `wanted` (the smaller one of two equally close)."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return min([*small, *(number // i for i in small)], key=lambda i: (abs(i - wanted), i))


def check_latent(model: Model, where: str) -> None:
    """Check what latent attention goes with."""
    latent = model.latent
    if (index := model.index) is not None:
        if not isinstance(index, Index):
            raise ModelError(f"{where}: index: expected Index, found {index!r:.40}")
        if not (latent and isinstance(latent, Latent) and latent.queries and model.causal):
            raise ModelError(f"{where}: index: needs latent.queries, which it reads, and causal")
        if any(model.windows):
            raise ModelError(f"{where}: index: not with windows; leave one of them out")
        if index.head_dim < latent.rotary:
            raise ModelError(
                f"{where}: index.head_dim: {latent.rotary} of it turn by position (latent.rotary), "
                f"and it has {index.head_dim}; the nearest is {latent.rotary}"
            )
    if latent is None:
        return
    if not isinstance(latent, Latent):
        raise ModelError(f"{where}: latent: expected Latent, found {latent!r:.40}")
    if model.kv_heads != model.heads or model.qk_norm or model.positions != "rotary":
        raise ModelError(
            f"{where}: latent: needs as many key-value heads as heads, rotary positions and no "
            "qk_norm"
        )
    if latent.rotary >= model.head_dim:
        raise ModelError(
            f"{where}: latent.rotary: a part of a head's {model.head_dim}, not {latent.rotary}"
        )
    if model.norm != "rmsnorm" or model.biases.qkv:
        raise ModelError(f"{where}: latent: needs norm: rmsnorm, and no biases.qkv")
    if latent.values > model.head_dim:
        raise ModelError(
            f"{where}: latent.values: {latent.values} is more than the {model.head_dim} of keys "
            f"(head_dim), to which kernels pad values; the nearest is {model.head_dim}"
        )


def check_delta(model: Model, where: str) -> None:
    """Check what linear attention, and a gate of attention's result, go with."""
    delta = model.delta
    if model.output_gate and (model.latent or model.lora):
        raise ModelError(f"{where}: output_gate: not with latent and lora; leave one of them out")
    if delta is None:
        return
    if not isinstance(delta, Delta):
        raise ModelError(f"{where}: delta: expected Delta, found {delta!r:.40}")
    if model.family != "decoder" or not model.causal:
        raise ModelError(f"{where}: delta: a state passes forward; needs a decoder, causal: true")
    for key in ("latent", "lora", "global_heads", "attends", "encoder"):
        if getattr(model, key):
            raise ModelError(f"{where}: delta: not with {key}; leave one of them out")


def check_branch(model: Model, where: str) -> None:
    """Check what a branch of another width goes with."""
    if not model.branch:
        return
    if not model.experts or model.experts.every > 1 or model.experts.dense_layers:
        raise ModelError(f"{where}: branch: needs experts in all layers, which read it")
    for key in ("post_norms", "modulation", "experts.beside", "experts.shared", "delta", "lora"):
        first, _, inner = key.partition(".")
        value = getattr(model, first)
        if getattr(value, inner) if inner else value not in (None, False, "none"):
            raise ModelError(f"{where}: branch: not with {key}; leave one of them out")


def check_global_heads(model: Model, where: str) -> None:
    """Check what other heads of layers without a window go with."""
    heads = model.global_heads
    if heads is None:
        return
    if not isinstance(heads, GlobalHeads):
        raise ModelError(f"{where}: global_heads: expected GlobalHeads, found {heads!r:.40}")
    if not any(model.windows) or all(model.windows):
        raise ModelError(
            f"{where}: global_heads: are those of layers without a window beside others with one; "
            "use windows, such as [1024, 1024, 0], or head_dim and kv_heads"
        )
    if model.heads % heads.kv_heads:
        close = nearest_divisor(model.heads, heads.kv_heads)
        raise ModelError(
            f"{where}: global_heads.kv_heads: {model.heads} heads cannot share {heads.kv_heads} "
            f"key-value heads evenly; the nearest valid number is {close}"
        )
    if model.kv_heads % heads.kv_heads:
        close = nearest_divisor(model.kv_heads, heads.kv_heads)
        raise ModelError(
            f"{where}: global_heads.kv_heads: {heads.kv_heads} do not divide the {model.kv_heads} "
            f"of other layers; the nearest that do: {close}"
        )
    if model.positions == "rotary" and heads.head_dim % 2:
        raise ModelError(
            f"{where}: global_heads.head_dim: rotary positions need an even number; the nearest is "
            f"{heads.head_dim + 1}"
        )
    for key, usual in (
        ("latent", None),
        ("lora", None),
        ("sinks", False),
        ("parallel_block", False),
        ("qk_norm_over", "head"),
    ):
        if getattr(model, key) != usual:
            raise ModelError(f"{where}: global_heads: not with {key}; leave one of them out")


def check_experts(model: Model, where: str) -> None:
    """Check what experts go with."""
    experts = model.experts
    if experts is None:
        return
    if not isinstance(experts, Experts):
        raise ModelError(f"{where}: experts: expected Experts, found {experts!r:.40}")
    if model.parallel_block:
        raise ModelError(f"{where}: experts: a parallel block has none; use parallel_block: false")
    if not any(map(experts.has, range(model.layers))):
        raise ModelError(
            f"{where}: experts: no layer of {model.layers} has any; use fewer dense_layers than"
            f" {model.layers}, and every of at most {model.layers}"
        )


def adaptable(model: Model) -> list[str]:
    """Return the projections of `lora` that a model has."""
    experts = model.experts
    dense = experts is None or experts.beside or not all(map(experts.has, range(model.layers)))
    there = [*ATTENTION, *(MLP if dense else ()), *(CROSS if model.encoder else ())]
    there += [*(SHARED if experts and experts.shared else ()), *(EXPERTS if experts else ())]
    return [name for name in there if model.gated_mlp or not name.endswith("_gate")]


def check_lora(model: Model, where: str) -> None:
    """Check what adapters go with."""
    if model.lora is None:
        return
    if not isinstance(model.lora, Lora):
        raise ModelError(f"{where}: lora: expected Lora, found {model.lora!r:.40}")
    if model.latent or model.patch or (model.experts and model.experts.soft_slots):
        raise ModelError(f"{where}: lora: of soft experts, latents and images is not modelled")
    usual = set(Lora.on) if set(Lora.on) <= set(model.lora.on) else set()
    for name in model.lora.on:
        if name not in adaptable(model) and name not in usual:
            raise ModelError(f"{where}: lora.on: the model has no {name}; leave it out")
    if model.frozen:
        raise ModelError(f"{where}: lora: a frozen model trains none; leave one of them out")


def check_block(model: Model, where: str) -> None:
    """Check heads, norms and branches of a block."""
    if model.kv_heads > model.heads or model.heads % model.kv_heads:
        close = nearest_divisor(model.heads, model.kv_heads)
        raise ModelError(
            f"{where}: kv_heads: {model.heads} heads cannot share {model.kv_heads} key-value heads"
            f" evenly; the nearest valid number is {close}"
        )
    if model.norm == "rmsnorm" and model.biases.norm:
        raise ModelError(f"{where}: biases.norm: rmsnorm has no bias; use norm: layernorm or false")
    if not model.pre_norms and (model.parallel_block or not model.post_norms):
        raise ModelError(
            f"{where}: pre_norms: serial layers may leave them out, for post_norms: true; use true"
        )
    if model.parallel_norms and not model.parallel_block:
        raise ModelError(
            f"{where}: parallel_norms: serial layers have two norms anyway; leave it out"
        )
    _check_norm_places(model, where)
    if model.mlp_post_norm and (model.parallel_block or model.post_norms):
        raise ModelError(
            f"{where}: mlp_post_norm: serial layers without post_norms have it; leave it out"
        )
    for key in ("layer_scale", "residual_scale"):
        if getattr(model, key) and model.parallel_block:
            raise ModelError(f"{where}: {key}: a parallel block has none; use false")
    if model.value_norm and model.latent:
        raise ModelError(f"{where}: value_norm: latent attention has none; use false")
    for key, usual in (("qk_norm_over", "head"), ("qk_norm_kind", "")):
        if getattr(model, key) != usual and not model.qk_norm:
            raise ModelError(f"{where}: {key}: needs qk_norm: true")
    if model.positions == "rotary" and model.head_dim % 2:
        raise ModelError(
            f"{where}: head_dim: rotary positions need an even number, found {model.head_dim};"
            f" the nearest is {model.head_dim + 1}"
        )


def _check_norm_places(model: Model, where: str) -> None:
    """Check norms behind additions, and those within branches."""
    factor: Any = model.deepnorm
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not number or not 0 <= factor <= LARGEST_FACTOR:
        raise ModelError(
            f"{where}: deepnorm: expected a factor of the residual stream, or 0 for norms in front "
            f"of branches (at most {LARGEST_FACTOR:g}), found {factor!r:.40}"
        )
    usual: dict[str, Any] = {"parallel_block": False, "pre_norms": True, "post_norms": False}
    usual |= {"mlp_post_norm": False, "layer_scale": False, "residual_scale": False}
    if model.deepnorm:
        usual |= {"modulation": "none", "experts": None, "sub_norms": False}
        for key, value in usual.items():
            if getattr(model, key) != value:
                raise ModelError(f"{where}: deepnorm: not with {key}; leave one of them out")
    if model.sub_norms:
        absent: dict[str, Any] = {"parallel_block": False, "experts": None, "latent": None}
        absent |= {"attends": (), "global_heads": None, "lora": None}
        for key, value in absent.items():
            if getattr(model, key) != value:
                raise ModelError(f"{where}: sub_norms: not with {key}; leave one of them out")


def check_modulation(model: Model, where: str) -> None:
    """Check what shifts, scales and gates layers, and the text that they attend to."""
    if model.modulation != "none":
        for key, usual in (
            ("parallel_block", False),
            ("post_norms", False),
            ("pre_norms", True),
            ("layer_scale", False),
            ("residual_scale", False),
            ("experts", None),
            ("lora", None),
            ("frozen", False),
        ):
            if getattr(model, key) != usual:
                raise ModelError(f"{where}: modulation: not with {key}; leave one of them out")
        if not model.predicts:
            raise ModelError(f"{where}: modulation: needs predicts, the channels of a pixel")
    elif model.labels:
        raise ModelError(f"{where}: labels: go with a time; use modulation: layer")
    if bool(model.prompt) != bool(model.prompt_embed):
        raise ModelError(f"{where}: prompt: needs prompt_embed, the width of a text's features")
    if model.prompt and (model.encoder or model.parallel_block):
        raise ModelError(f"{where}: prompt: an encoder, or a parallel block, has none; use 0")


def check_attends(model: Model, where: str) -> tuple[str, ...]:
    """Return what of a video layers of a round attend to, as words; check what it goes with."""
    given: Any = model.attends
    if not isinstance(given, list | tuple) or not all(one in ATTENDS for one in given):
        raise ModelError(
            f"{where}: attends: expected a list of {', '.join(ATTENDS)}, as [space, time], found "
            f"{given!r:.60}"
        )
    if all(one == "all" for one in given):
        return ()
    for key, fits, usual in (
        ("family", model.family == "vit", "vit"),
        ("frames", model.frames > 1, "2 or more"),
        ("causal", not model.causal, "false"),
        ("positions", model.positions in ("learned", "fixed", "none"), "fixed, learned or none"),
        ("pooling", model.pooling != "cls", "one without a class token"),
        ("registers", not model.registers, "0"),
        ("kept", not (model.kept or model.images), "0, and no images"),
        ("experts", model.experts is None, "none"),
        ("latent", model.latent is None, "none"),
    ):
        if not fits:
            raise ModelError(f"{where}: attends: along space or time needs {key}: {usual}")
    if model.layers % len(given):
        close = max(1, round(model.layers / len(given))) * len(given)
        raise ModelError(
            f"{where}: attends: {model.layers} layers are not whole rounds of {len(given)}; the "
            f"nearest number of layers is {close}"
        )
    return tuple(given)


def check_vit(model: Model, where: str) -> None:
    """Check an image, and what is made of it."""
    for key in ("patch", "image"):
        if not getattr(model, key):
            raise ModelError(f"{where}: {key}: a vit needs it, in pixels (patch: 14, image: 224)")
    for key in ("image", "width"):
        pixels = getattr(model, key)
        if pixels % model.patch:
            close = max(1, round(pixels / model.patch)) * model.patch
            raise ModelError(
                f"{where}: {key}: {pixels} pixels do not divide into patches of {model.patch};"
                f" the nearest valid {key} is {close}"
            )
    if model.kept >= model.patches or (model.kept and model.registers):
        raise ModelError(
            f"{where}: kept: {model.kept} of {model.patches} patches, without registers; use fewer"
        )
    if model.predicts and (model.classes or model.pooling not in ("none", "cls")):
        raise ModelError(f"{where}: predicts: pixels need no classes and no pooling but cls")
    if model.images and not (model.images.kept and model.predicts):
        raise ModelError(
            f"{where}: images: a vit reads those of an encoder of masked images, and predicts "
            "pixels; use images.kept and predicts"
        )
    if model.vocab:
        raise ModelError(f"{where}: vocab: a vit has none; use classes for its head, or 0")
    if model.head_bias:
        raise ModelError(f"{where}: head_bias: a vit has no vocabulary; use false")
    if model.tied_embeddings:
        raise ModelError(
            f"{where}: tied_embeddings: a vit has no token embedding to tie; use false"
        )
    if model.classes and model.pooling == "none":
        raise ModelError(
            f"{where}: pooling: a head of {model.classes} classes needs one vector per image;"
            " choose from: cls, map, mean"
        )


def check_tokens(model: Model, where: str) -> None:
    """Check a vocabulary, and what models of tokens do not have."""
    if not model.vocab:
        raise ModelError(f"{where}: vocab: {_A[model.family]} needs a vocabulary (vocab: 32000)")
    absences: dict[str, Any] = {"patch": 0, "image": 0, "classes": 0, "registers": 0}
    absences |= {"width": 0, "frames": 1, "kept": 0, "predicts": 0, "prompt": 0}
    absences |= {"patch_bias": True, "input_norm": False, "patch_norms": False}
    if model.family == "decoder":
        absences |= {"pooling": "none", "features": 0}
    for key, absent in absences.items():
        if getattr(model, key) != absent:
            raise ModelError(f"{where}: {key}: only a vit has it; use {absent}, or family: vit")
