"""An exported AXLearn file in AXLearn itself: its own Llama laid out on host devices.

The exported file is applied to a trainer config with the model of `experiments/text/gpt/fuji.py`.
The model's own parameter specs are read, its weights made under them, and gradient steps taken.
A script of its own: `python -P axlearn_worker.py REQUEST.json` prints a JSON object last.
"""

# mypy: ignore-errors
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from axlearn.common import utils
from axlearn.common.attention import FusedGroupedQKVLinear, GroupedQueryAttention
from axlearn.common.decoder import LmHead
from axlearn.common.module import functional
from axlearn.common.trainer import SpmdTrainer
from axlearn.experiments.text.gpt import fuji
from jax.experimental.pjit import pjit
from jax.sharding import NamedSharding


def load(path):
    """Return the exported file as a module."""
    spec = importlib.util.spec_from_file_location("exported_plan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_config(request):
    """Return the trainer's own language model with the sizes of the plan's."""
    cfg = fuji.model_config(**request["model"])
    attention = cfg.decoder.transformer.layer.self_attention.attention
    if request["kv_heads"] != request["model"]["num_heads"]:
        grouped = FusedGroupedQKVLinear.default_config().set(num_kv_heads=request["kv_heads"])
        grouped.layer.bias = False
        # What is set of one attention holds for the other.
        other = GroupedQueryAttention.default_config()
        other.set(**{key: value for key, value in attention.items() if key != "klass"})
        other.input_linear.input_linear = grouped
        cfg.decoder.transformer.layer.self_attention.attention = attention = other
    attention.hidden_dim = request["model"]["num_heads"] * request["head_dim"]
    if not request["tied"]:
        cfg.decoder.lm_head = LmHead.default_config()
    return cfg


def spec(axes, rank):
    """Return a spec as lists of mesh axes."""
    found = [[one] if isinstance(one, str) else list(one or ()) for one in axes]
    return found + [[]] * (rank - len(found))


def main(request):
    """Return where the trainer's model puts every weight, and the losses of some steps."""
    trainer = SpmdTrainer.default_config().set(model=model_config(request))
    trainer = load(request["plan"]).apply(trainer)
    mesh = jax.sharding.Mesh(
        utils.create_device_mesh(mesh_shape=trainer.mesh_shape), trainer.mesh_axis_names
    )
    model = trainer.model.set(name="model").instantiate(parent=None)
    with mesh:
        specs = model.create_parameter_specs_recursively()
        shardings = jax.tree_util.tree_map(lambda one: NamedSharding(mesh, one.mesh_axes), specs)
        make = pjit(model.initialize_parameters_recursively, out_shardings=shardings)
        weights = make(jax.random.PRNGKey(0))
        ids = jax.random.randint(
            jax.random.PRNGKey(1), (request["batch"], request["sequence"]), 2, request["vocab"]
        )
        batch = {"input_ids": ids, "target_labels": jnp.roll(ids, -1, axis=1)}

        def loss(state):
            (value, _), _ = functional(
                model, prng_key=jax.random.PRNGKey(2), state=state, inputs=[batch], is_training=True
            )
            return value

        def step(state):
            value, gradients = jax.value_and_grad(loss)(state)
            return jax.tree_util.tree_map(lambda w, g: w - 0.1 * g, state, gradients), value

        step = pjit(step, in_shardings=(shardings,), out_shardings=(shardings, None))
        losses = []
        for _ in range(request["steps"]):
            weights, value = step(weights)
            losses.append(float(value))
    return {
        "mesh": dict(zip(mesh.axis_names, mesh.devices.shape, strict=True)),
        "specs": {
            name: spec(weight.sharding.spec, weight.ndim)
            for name, weight in utils.flatten_items(weights)
        },
        "losses": losses,
    }


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print("\n" + json.dumps(answer))
