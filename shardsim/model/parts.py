"""Models of several stacks: which models a model reads, and what they must have for it.

A stack with its ends is a `Model`. One that reads others names them: the `encoder` that all of its
layers attend to, the `images` whose tokens stand in front of its own, or, of a decoder of masked
images, where their patches do, the tower of `text` whose
embeddings its own are compared with. They run before it, and each has widths, heads, layers and a
sequence of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shardsim.errors import ModelError

if TYPE_CHECKING:
    from shardsim.model.spec import Model

# What a model may read: its key, the families of who reads and of what is read, what that gives.
READS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("images", ("encoder", "decoder", "vit"), ("vit",), "tokens"),
    ("encoder", ("decoder",), ("encoder", "vit"), "memory"),
    ("text", ("vit",), ("encoder",), "features"),
)
KEYS = tuple(key for key, *_ in READS)


@dataclass(frozen=True)
class Part:
    """One stack of a model, and the name before those of its weights; the last one has none."""

    name: str
    model: Model


def parts_of(model: Model) -> tuple[Part, ...]:
    """Return a model's parts in the order in which they run.

    >>> from shardsim.model import load_model
    >>> [part.name for part in load_model("t5-xxl").parts]
    ['encoder', '']
    """
    found: list[Part] = []
    for key in KEYS:
        read = getattr(model, key)
        if read is not None:
            found += [
                Part(f"{key}/{part.name}".removesuffix("/"), part.model) for part in parts_of(read)
            ]
    return (*found, Part("", model))


def check_parts(model: Model, where: str) -> None:
    """Raise `ModelError` for parts that a model cannot read; say of the others what they give."""
    for key, readers, families, gives in READS:
        read: Any = getattr(model, key)
        if read is None:
            continue
        if not isinstance(read, type(model)):
            raise ModelError(f"{where}: {key}: expected a model, found {read!r:.40}")
        if model.family not in readers:
            one = " or ".join(readers)
            raise ModelError(f"{where}: {key}: only a model of family {one} reads it; leave it out")
        if read.family not in families:
            raise ModelError(
                f"{where}: {key}: must be of family {' or '.join(families)}, not {read.family}"
            )
        if read.classes or read.predicts:
            raise ModelError(f"{where}: {key}: has no loss of its own; use classes: 0, predicts: 0")
        if model.frozen and not read.frozen:
            raise ModelError(
                f"{where}: {key}: what a frozen model reads is frozen too; use frozen: true"
            )
        object.__setattr__(model, key, replace(read, gives=gives))
    _check_block(model, where)
    _check_shared(model, where)


def _check_block(model: Model, where: str) -> None:
    if model.encoder and model.parallel_block:
        raise ModelError(
            f"{where}: encoder: a parallel block attends to none; use parallel_block: false"
        )
    text = model.text
    if text and text.feature_width != model.feature_width:
        raise ModelError(
            f"{where}: text.features: embeddings of {text.feature_width} are not as wide as the "
            f"images', {model.feature_width}"
        )
    if text and (model.classes or "none" in (model.pooling, text.pooling)):
        raise ModelError(f"{where}: text: towers need pooling, and no classes; use pooling: map")
    if model.images and model.images.sequence >= model.sequence:
        raise ModelError(
            f"{where}: sequence: {model.sequence} tokens, of which the images' are "
            f"{model.images.sequence}; use more"
        )
    if model.positions == "relative" and (model.latent or model.sinks or any(model.windows)):
        raise ModelError(f"{where}: positions: relative ones need plain attention; use rotary")


def _check_shared(model: Model, where: str) -> None:
    encoder = model.encoder
    if model.shared_embeddings and model.family != "encoder":
        raise ModelError(f"{where}: shared_embeddings: only an encoder has them; use false")
    if not encoder or not encoder.shared_embeddings:
        return
    if (encoder.vocab, encoder.embed) != (model.vocab, model.embed):
        raise ModelError(
            f"{where}: encoder.shared_embeddings: needs the same vocab and embed; use false"
        )
