"""An exported Keras file in Keras itself: a model of Keras's own layers under its layout.

A script of its own: `python -P keras_worker.py REQUEST.json` prints a JSON object last.
"""

# mypy: ignore-errors
from __future__ import annotations

import json
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers


def load(path):
    """Return the exported file as a dict of names."""
    names = {"__name__": "exported_plan"}
    sys.modules["exported_plan"] = type(sys)("exported_plan")
    exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
    return names


def attention(model):
    """Return the attention layer of a block."""
    if model["kv_heads"] == model["heads"]:
        return layers.MultiHeadAttention(
            model["heads"], model["head_dim"], use_bias=model["bias"], name="self_attention"
        )
    return layers.GroupQueryAttention(
        model["head_dim"],
        model["heads"],
        model["kv_heads"],
        use_bias=model["bias"],
        name="self_attention",
    )


class Block(layers.Layer):
    """A serial block."""

    def __init__(self, model, **more):
        super().__init__(**more)
        bias = model["bias"]
        self.attention = attention(model)
        self.into = layers.Dense(model["mlp"], use_bias=bias, name="feedforward_intermediate_dense")
        self.gate = (
            layers.Dense(model["mlp"], use_bias=bias, name="feedforward_gate_dense")
            if model["gated"]
            else None
        )
        self.out = layers.Dense(model["embed"], use_bias=bias, name="feedforward_output_dense")

    def call(self, x):
        x = x + self.attention(x, x)
        hidden = self.into(x)
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return x + self.out(hidden)


def build(model):
    """Return a model with the plan's weights in Keras's own layers."""
    tokens = keras.Input((model["sequence"],), dtype="int32")
    if model["patch"]:
        tokens = keras.Input((model["image"], model["image"], model["channels"]))
        x = layers.Conv2D(
            model["embed"], model["patch"], strides=model["patch"], name="patch_embedding"
        )(tokens)
        x = layers.Reshape((-1, model["embed"]))(x)
    else:
        x = layers.Embedding(model["vocab"], model["embed"], name="token_embedding")(tokens)
    for index in range(model["layers"]):
        x = Block(model, name=f"transformer_layer_{index}")(x)
    if model["classes"]:
        x = layers.Dense(model["classes"], name="classifier")(layers.GlobalAveragePooling1D()(x))
    elif not model["patch"]:
        x = layers.Dense(model["vocab"], use_bias=False, name="output_head")(x)
    return keras.Model(tokens, x)


def main(request):
    """Return the spec of every variable, and the loss of two steps."""
    plan = load(request["plan"])
    model = request["model"]
    keras.distribution.set_distribution(plan["distribution"]())
    made = build(model)
    found = {}
    for variable in made.trainable_variables:
        axes = list(variable.value.sharding.spec)
        rows = [[axis] if isinstance(axis, str) else list(axis or ()) for axis in axes]
        found[variable.path] = rows + [[]] * (len(variable.shape) - len(rows))
    made.compile("adam", "mse")
    shape = [request["batch"], *made.inputs[0].shape[1:]]
    x = np.ones(shape, "float32") if model["patch"] else np.ones(shape, "int32")
    y = np.zeros([request["batch"], *made.outputs[0].shape[1:]], "float32")
    losses = [float(made.train_on_batch(x, y)) for _ in range(2)]
    return {"specs": found, "losses": losses}


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print("\n" + json.dumps(answer))
