"""Synthetic batches that a model can learn: patterns under noise, and tokens that count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardsim.emit.runtime.config import Data


def synthetic_batch(plan: Data, model: Data, index: int) -> dict[str, Any]:
    """Return batch `index` as numpy arrays, the same on every host.

    Images [batch, height, width, channels] are a pattern for each class under noise, with their
    labels (or features [batch, embed], where the model has no classes); tokens [batch, sequence]
    count upwards in steps of three, and the targets are one step ahead.
    """
    random = np.random.default_rng(index)
    count = plan["batch"]
    if model["vocab"]:
        start = random.integers(0, model["vocab"], (count, 1))
        tokens = (start + 3 * np.arange(plan["sequence"] + 1)) % model["vocab"]
        made = {"tokens": tokens[:, :-1].astype("int32"), "targets": tokens[:, 1:].astype("int32")}
        return made | (held(plan) if "rows" in plan else {})
    classes: int = model.get("labels") or model["classes"]
    labels = random.integers(0, max(2, min(classes, 1000)), count).astype("int32")
    frames = [model["frames"]] if "frames" in model else []
    shape = (*frames, model["image"], model.get("width", model["image"]), model["channels"])
    images = np.stack([pattern(7, label, shape) for label in labels])
    images += 0.5 * random.normal(size=images.shape).astype("float32")
    if model.get("predicts"):
        return {"images": images, **conditions(plan, model, shape, labels)}
    if model["classes"]:
        return {"images": images, "labels": labels}
    features = np.stack([pattern(8, label, (model["embed"],)) for label in labels])
    return {"images": images, "features": features}


def conditions(plan: Data, model: Data, shape: tuple[int, ...], labels: Any) -> dict[str, Any]:
    """Return what a model that predicts pixels reads besides images: which patches it is shown, or
    times, classes and features of a text, and what it is to predict."""
    random, count = np.random.default_rng([9, *labels]), plan["batch"]
    if model.get("kept"):
        patches = math.prod(shape[:-1]) // model["patch"] ** 2
        order = np.stack([random.permutation(patches) for _ in range(count)])
        return {"kept": np.sort(order[:, : model["kept"]]).astype("int32")}
    wanted = np.stack([pattern(7, label, (*shape[:-1], model["predicts"])) for label in labels])
    made: dict[str, Any] = {
        "wanted": wanted,
        "times": np.asarray(1000 * random.random(count), "float32"),
    }
    if model.get("labels"):
        made["labels"] = labels
    if model.get("prompt"):
        prompt = random.normal(size=(count, model["prompt"], model["prompt_embed"]))
        made["prompt"] = prompt.astype("float32")
    return made


def held(plan: Data) -> dict[str, Any]:
    """Return for rows that hold several sequences, or padding, which one each token is of, from 1
    on, and what its loss counts: the mean over real tokens is that over all with these weights."""
    rows = [plan["rows"][row % len(plan["rows"])] for row in range(plan["batch"])]
    segments = np.zeros((plan["batch"], plan["sequence"]), "int32")
    for row, lengths in enumerate(rows):
        numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segments[row, : len(numbers)] = numbers
    real = segments > 0
    return {"segments": segments, "counts": (real / real.mean()).astype("float32")}


def whole_batch(plan: Data, model: Data, parts: Sequence[Data], index: int) -> dict[str, Any]:
    """Return batch `index` of a model and of the stacks that it reads, named after those.

    A decoder of masked images and its encoder read the same ones."""
    arrays = synthetic_batch(plan, model, index)
    for number, part in enumerate(parts if not model.get("kept") else (), 1):
        own = synthetic_batch({**plan, "sequence": part["sequence"]}, part["model"], index + number)
        read = {name for call in part["calls"]["before"] for name in call["ins"]}
        arrays |= {f"{part['name']}/{name}": own[name] for name in own if name in read}
    return arrays


def batch_shapes(
    plan: Data, model: Data, parts: Sequence[Data] = ()
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and format of each array of a batch, without making one."""
    arrays = whole_batch({**plan, "batch": 1}, model, parts, 0)
    return {
        name: ((plan["batch"], *value.shape[1:]), str(value.dtype))
        for name, value in arrays.items()
    }


def pattern(seed: int, label: int, shape: tuple[int, ...]) -> Any:
    """Return the random pattern of a class, always the same."""
    return np.random.default_rng([seed, int(label)]).normal(size=shape).astype("float32")
