"""What stands before the layers of a model and after them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardsim.graph.arrays import Array
from shardsim.graph.build import Builder, stream
from shardsim.ops.conditions import conditions
from shardsim.ops.cross import hand_on, project_prompt
from shardsim.ops.embed import embed_patches, embed_shared, embed_tokens, put_in_front
from shardsim.ops.masked import fill_in
from shardsim.ops.modulate import modulated_norm, modulation
from shardsim.ops.norm import norm
from shardsim.ops.pooling import image_loss
from shardsim.ops.predict import PREDICTIONS, patch_loss
from shardsim.ops.relative import relative_bias
from shardsim.ops.towers import contrastive_loss, embedding
from shardsim.ops.vocabulary import token_loss

if TYPE_CHECKING:
    from shardsim.model.spec import Model


def start(build: Builder, model: Model) -> Array:
    """Add what makes the residual stream, and what all layers read besides; return the stream."""
    if model.modulation != "none":
        conditions(build, shared=model.modulation == "model", classes=model.labels > 0)
    if model.prompt:
        project_prompt(build)
    if model.vocab:
        if model.positions == "relative":
            relative_bias(build, causal=model.causal, buckets=model.buckets)
        return embedded(build, model)
    if model.images is not None:
        trained = not model.images.frozen
        return fill_in(build, positions=model.positions, class_token=_class(model), trained=trained)
    x = embed_patches(
        build,
        positions=model.positions,
        class_token=_class(model),
        registers=model.registers > 0,
        bias=model.patch_bias,
        kept=model.kept > 0,
        norms=(model.norm, model.biases.norm) if model.patch_norms else None,
        name="embedded" if model.input_norm else "x",
    )
    if model.input_norm:
        kind, bias = model.norm, model.biases.norm
        x = norm(build, "input_norm", x, stream("x"), kind=kind, bias=bias)
    return x


def _class(model: Model) -> bool:
    """Return whether a class token stands before the patches of a vit."""
    return model.pooling == "cls"


def embedded(build: Builder, model: Model) -> Array:
    """Add what makes the residual stream out of tokens."""
    if model.shared_embeddings:
        x = embed_shared(build, positions=model.positions)
    else:
        shared = model.encoder is not None and model.encoder.shared_embeddings
        x = embed_tokens(build, positions=model.positions, shared=shared)
    if model.images is None:
        return x
    build.made[-1] = replace(build.made[-1], out=replace(x, name="words"))
    build.calls[-1] = replace(build.calls[-1], outs=("words", *build.calls[-1].outs[1:]))
    return put_in_front(build, replace(x, name="words"), trained=not model.images.frozen)


def head(build: Builder, model: Model, x: Array) -> None:
    """Add final norm, head and loss."""
    if model.final_norm and model.modulation != "none":
        made = modulation(build, model.modulation, final=True)
        out = stream("final", purpose=PREDICTIONS)
        x = modulated_norm(build, x, out, made, kind=model.norm)
    elif model.final_norm:
        purpose = "vocabulary" if model.vocab and model.gives == "loss" else "pooling"
        handed = model.gives in ("memory", "tokens")
        purpose = PREDICTIONS if model.predicts else "memory" if handed else purpose
        out = stream("final", purpose=purpose)
        x = norm(build, "final_norm", x, out, kind=model.norm, bias=model.biases.norm)
    if model.gives == "memory":
        hand_on(build, x, "memory")
    elif model.gives == "features" or model.text:
        name = "image features" if model.text else "text features"
        made = embedding(
            build,
            x,
            name,
            pooling=model.pooling,
            projected=model.features > 0,
            bias=model.features_bias,
        )
        if model.text:
            contrastive_loss(build, made, kind=model.contrast, trained=not model.text.frozen)
    elif model.gives == "tokens":
        hand_on(build, x, "image tokens", whole=True)
    elif model.vocab:
        before = model.images.sequence if model.images else 0
        token_loss(build, x, tied=model.tied_embeddings, bias=model.head_bias, images=before)
    elif model.predicts:
        patch_loss(build, x, masked=model.images is not None, class_token=_class(model))
    else:
        image_loss(build, x, pooling=model.pooling, classes=bool(model.classes))
