"""An exported Levanter config in Levanter itself: two steps of its own Llama on host devices.

A script of its own: `python -P levanter_worker.py REQUEST.json` prints a JSON object last.
"""

# mypy: ignore-errors
from __future__ import annotations

import json
import sys
from pathlib import Path

import draccus
import haliax as hax
import jax
import jax.random as jrandom
import numpy as np
from levanter.data.text import LmExample
from levanter.main.train_lm import TrainLmConfig, compute_next_token_loss
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer


def placed(tree, prefix):
    """Return axes and spec of every named array of a tree, by its path."""
    rows = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, hax.NamedArray)
    )
    for path, leaf in leaves:
        if not isinstance(leaf, hax.NamedArray):
            continue
        spec = [
            [one] if isinstance(one, str) else list(one or ()) for one in leaf.array.sharding.spec
        ]
        name = prefix + jax.tree_util.keystr(path)
        rows[name] = {
            "axes": [axis.name for axis in leaf.axes],
            "spec": spec + [[]] * (leaf.array.ndim - len(spec)),
        }
    return rows


def main(request):
    """Return what the config resolves to, where every array lies, and the losses."""
    sizes = [f"--model.{key}={value}" for key, value in request["model"].items()]
    switches = ("require_accelerator", "log_jaxprs", "log_xla_hlo", "ray.auto_start_cluster")
    quiet = [f"--trainer.{name}=false" for name in switches]
    config = draccus.parse(
        TrainLmConfig, config_path=request["plan"], args=["--model.type=llama", *sizes, *quiet]
    )
    config.trainer.tracker = NoopConfig()
    config.trainer.initialize()
    vocabulary = hax.Axis("vocab", request["vocab"])
    optimizer = config.optimizer.build(request["steps"])
    losses = []
    with Trainer(config.trainer, optimizer, compute_next_token_loss) as trainer:
        key = jrandom.PRNGKey(0)
        state = trainer.initial_state(
            key, model_init=lambda: config.model.build(vocabulary, key=key)
        )
        axes = (config.trainer.TrainBatch, config.model.Pos)
        tokens = np.random.default_rng(0).integers(0, vocabulary.size, [a.size for a in axes])
        for _ in range(request["steps"]):
            with hax.axis_mapping(trainer.compute_axis_mapping):
                ids = hax.shard(hax.named(tokens.astype(np.int32), axes))
                example = hax.vmap(LmExample.causal, config.trainer.TrainBatch)(ids)
            step = trainer.train_step(state, example)
            state = step.state
            losses.append(float(step.loss))
        return {
            "mesh": {name: int(size) for name, size in trainer.device_mesh.shape.items()},
            "compute": {k: v for k, v in trainer.compute_axis_mapping.items()},
            "parameter": {k: v for k, v in trainer.parameter_axis_mapping.items()},
            "microbatch": config.trainer.microbatch_size,
            "gradient_checkpointing": config.model.gradient_checkpointing,
            "arrays": placed(state.model, "model") | placed(state.opt_state, "moments"),
            "losses": losses,
        }


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print("\n" + json.dumps(answer))
