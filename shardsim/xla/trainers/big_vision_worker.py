"""big_vision with an exported plan, in big_vision's own environment; a script of its own.

`compile REQUEST.json` compiles the train step for a TPU slice, `train REQUEST.json` runs
`big_vision/train.py` on host devices. The last line printed is a JSON object. Imports nothing of
shardsim's: the environment may not have it.
"""

# mypy: ignore-errors
from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path


def load(path):
    """Return the exported file as a module."""
    spec = importlib.util.spec_from_file_location("exported_plan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base_config(plan, folder, steps):
    """Return a config with what the exported file leaves to its user."""
    import ml_collections

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.total_steps = steps
    config.loss = "softmax_xent" if plan.CLASSES else "sigmoid_xent"
    config.input = {}
    config.input.data = {"name": "bv:jsonl", "fname": f"{folder}/train.jsonl"}
    config.input.data.fopen_keys = ["image"]
    config.input.shuffle_buffer_size = 64
    width = plan.CLASSES or plan.MODEL["width"]
    config.input.pp = (
        f'decode|resize({plan.IMAGE})|value_range(-1, 1)|onehot({width}, key="label", '
        'key_result="labels")|keep("image", "labels")'
    )
    config.lr = 1e-3
    config.wd = 1e-4
    config.schedule = {"warmup_steps": 1, "decay_type": "cosine"}
    config.grad_clip_norm = 1.0
    config.log_training_steps = 1
    config.evals = {}
    config.pp_modules = ["ops_general", "ops_image"]
    return plan.apply(config)


def specs(shardings):
    """Return the spec of every array by its name, as lists of mesh axes."""
    import big_vision.utils as u

    named, _ = u.tree_flatten_with_names(shardings)
    return {
        name: [[axes] if isinstance(axes, str) else list(axes or ()) for axes in sharding.spec]
        for name, sharding in named
    }


def compile_step(request):
    """Compile the update step of train.py for a slice that is not there."""
    import big_vision.optax as bv_optax
    import big_vision.sharding as bv_sharding
    import big_vision.utils as u
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from big_vision.models import vit
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    plan = load(request["plan"])
    config = base_config(plan, ".", 100)
    names, sizes = zip(*plan.MESH, strict=True)
    wanted = request["topology"]
    devices = topologies.get_topology_desc(platform="tpu", **wanted).devices
    mesh = Mesh(
        mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=plan.SPLIT_PHYSICAL_AXES
        ),
        names,
    )
    model = vit.Model(num_classes=plan.CLASSES, **plan.MODEL)
    images = jax.ShapeDtypeStruct((plan.BATCH, plan.IMAGE, plan.IMAGE, 3), jnp.float32)
    one = jax.ShapeDtypeStruct((1, plan.IMAGE, plan.IMAGE, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    params = jax.eval_shape(lambda rng, image: model.init(rng, image)["params"], key, one)
    logits = jax.ShapeDtypeStruct((plan.BATCH, plan.CLASSES or plan.MODEL["width"]), jnp.float32)
    schedule = {"total_steps": 100, "batch_size": plan.BATCH, "data_size": 1}
    optimizer, _ = bv_optax.make(config, params, sched_kw=schedule)
    state = {"params": params, "opt": jax.eval_shape(optimizer.init, params)}
    with nn.logical_axis_rules(plan.SHARDING_RULES):
        shardings = bv_sharding.infer_sharding(state, strategy=plan.SHARDING_STRATEGY, mesh=mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    # The input pipeline spreads a batch over all devices; `batch_axes` says otherwise.
    spread = NamedSharding(mesh, PartitionSpec(tuple(request["batch_axes"])))

    def update(state, images, labels):
        def loss(params):
            out, _ = model.apply({"params": params}, images, train=True)
            return getattr(u, config.loss)(logits=out, labels=labels)

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    step = jax.jit(
        update,
        donate_argnums=(0,),
        in_shardings=(shardings, spread, spread),
        out_shardings=(shardings, whole),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(plan.SHARDING_RULES):
        compiled = step.lower(state, images, logits).compile(compiler_options=request["options"])
    memory = compiled.memory_analysis()
    Path(request["folder"], "hlo.txt").write_text(compiled.as_text(), encoding="utf-8")
    return {
        "specs": specs(shardings),
        "state_bytes": memory.alias_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "allocated_bytes": memory.temp_size_in_bytes,
        "losses": [],
    }


def data(folder, count, image, classes):
    """Write a few images of noise and the list of them."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        path = f"{folder}/{index}.png"
        Image.fromarray(rng.integers(0, 255, (image, image, 3), np.uint8)).save(path)
        rows.append(json.dumps({"image": path, "label": int(rng.integers(classes))}))
    Path(folder, "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def current_jax():
    """Let train.py run on a JAX that is newer than it."""
    import jax

    if not hasattr(jax.sharding, "PositionalSharding"):
        # Only in the last line of train.py, to wait for all hosts.
        jax.sharding.PositionalSharding = lambda devices: jax.sharding.NamedSharding(
            jax.sharding.Mesh(devices, ("all",)), jax.sharding.PartitionSpec("all")
        )
    # `with mesh:` alone leaves Flax's activation rules out.
    entered = {}

    def enter(mesh):
        entered.setdefault(id(mesh), []).append(context := jax.set_mesh(mesh))
        context.__enter__()
        return mesh

    def leave(mesh, *error):
        return entered[id(mesh)].pop().__exit__(*error)

    jax.sharding.Mesh.__enter__ = enter
    jax.sharding.Mesh.__exit__ = leave


def train(request):
    """Run train.py itself on host devices for a few steps."""
    folder = request["folder"]
    plan = load(request["plan"])
    data(folder, max(64, plan.BATCH), plan.IMAGE, plan.CLASSES or 16)
    current_jax()
    import big_vision.sharding as bv_sharding
    import big_vision.train as bv_train
    from absl import flags
    from ml_collections import config_dict

    seen = {}
    infer = bv_sharding.infer_sharding

    def recorded(*given, **named):
        shardings = infer(*given, **named)
        seen.update(specs(shardings))
        return shardings

    bv_sharding.infer_sharding = recorded
    losses = []

    class Watch(logging.Handler):
        def emit(self, record):
            match = re.search(r"training_loss.*?(-?\d+\.\d+)", record.getMessage())
            losses.extend([float(match[1])] if match else [])

    logging.getLogger("absl").addHandler(Watch())
    logging.getLogger("absl").setLevel(logging.INFO)
    config = config_dict.ConfigDict(base_config(plan, folder, request["steps"]))
    flags.FLAGS.__dict__["__wrapped"] = None
    flags.FLAGS(["train", f"--workdir={folder}/work"])
    flags.FLAGS["config"].value = config
    with contextlib.suppress(SystemExit):
        bv_train.main([])
    metrics = Path(folder, "work", "big_vision_metrics.txt")
    if metrics.is_file():
        rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
        by_step = {row["step"]: row["training_loss"] for row in rows if "training_loss" in row}
        losses = list(by_step.values())
    unmeasured = {"state_bytes": None, "peak_bytes": None, "allocated_bytes": None}
    return {"specs": seen, **unmeasured, "losses": losses}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = compile_step(asked) if sys.argv[1] == "compile" else train(asked)
    print("\n" + json.dumps(answer))
