"""What a trainer's own code makes of an exported config, without a step.

A script of its own, in the trainer's environment: `python -P reading_worker.py REQUEST.json` prints
a JSON object last.
"""

# mypy: ignore-errors
from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path


def load(path):
    """Return a file as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def maxtext(request):
    """Return the values of keys as MaxText's own types have them."""
    from maxtext.configs import pyconfig

    config = pyconfig.initialize(["read", *request["words"]])
    return {key: getattr(config, key) for key in request["keys"]}


def levanter(request):
    """Return the trainer's section as Levanter's own classes have it, and its mesh."""
    import draccus
    from levanter.main.train_lm import TrainLmConfig

    config = draccus.parse(TrainLmConfig, request["file"], args=[])
    trainer = config.trainer
    found = {key: getattr(trainer, key, None) for key in request["keys"]}
    return {**found, "gradient_checkpointing": config.model.gradient_checkpointing}


def big_vision(request):
    """Return weights and batch of a config with the exported file applied, laid out by rules."""
    import jax
    import jax.numpy as jnp
    from big_vision import sharding

    module = load(request["config"])
    takes = module.get_config.__code__.co_argcount
    config = module.get_config(*([request["arguments"]] if takes else []))
    load(request["file"]).apply(config)
    model = importlib.import_module(f"big_vision.models.{config.model_name}").Model(
        config.num_classes, **config.model
    )
    side = request["image"]
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    sizes = [size for _, size in config.mesh]
    mesh = jax.make_mesh(sizes, [name for name, _ in config.mesh])
    laid = sharding.infer_sharding(
        {"params": shapes}, [tuple(row) for row in config.sharding_strategy], mesh
    )
    split = [leaf for leaf in jax.tree.leaves(laid) if any(leaf.spec)]
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        "batch": config.input.batch_size,
        "mesh": {name: size for name, size in config.mesh},
        "split_weights": len(split),
    }


def axlearn(request):
    """Return the weights of an experiment with the exported file applied, and its mesh."""
    from axlearn.common.utils import flatten_items
    from axlearn.experiments.text.gpt import c4_trainer, pajama_trainer

    known = {**pajama_trainer.named_trainer_configs(), **c4_trainer.named_trainer_configs()}
    exported = load(request["file"])
    config = exported.apply(known[request["config"]]())
    model = config.model.set(name="model").instantiate(parent=None)
    weights = dict(flatten_items(model.create_parameter_specs_recursively()))
    otherwise = []
    for module, specs in exported.PARTITION_SPECS.items():
        wanted = specs.get("param_partition_spec")
        found = [spec for name, spec in weights.items() if _of(module, name)]
        lies = [tuple(spec.mesh_axes)[-len(wanted or ()) :] for spec in found if spec.mesh_axes]
        if wanted and not (found and all(one == tuple(wanted) for one in lies)):
            otherwise.append([module, str(wanted), sorted(map(str, lies))])
    sizes = zip(config.mesh_axis_names, config.mesh_shape, strict=True)
    return {
        "parameters": sum(math.prod(spec.shape) for spec in weights.values()),
        "mesh": {name: size for name, size in sizes if size > 1},
        "lie_otherwise": otherwise,
    }


# Modules of AXLearn's attention by the names of their configs.
_CHILDREN = {"input_linear": "i_proj", "output_linear": "o_proj"}


def _of(module, name):
    """Return whether a matrix is of a module of the config: its parts are in its name, in order."""
    words = module.removeprefix("model.").split(".")
    *parts, last = [_CHILDREN.get(word, word) for word in words if word != "layer"]
    left = iter(name.split("/"))
    inside = all(part in left for part in parts) and any(one.startswith(last) for one in left)
    return inside and name.endswith("/weight")


def main(request):
    readers = {
        "maxtext": maxtext,
        "levanter": levanter,
        "big_vision": big_vision,
        "axlearn": axlearn,
    }
    print(json.dumps(readers[request["trainer"]](request), default=str))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
