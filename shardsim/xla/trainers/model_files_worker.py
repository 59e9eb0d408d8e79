"""How many weights MaxText's own code gives its models, without making them.

A script of its own, in MaxText's environment: `python -P model_files_worker.py REQUEST.json` prints
a JSON object last.
"""

# mypy: ignore-errors
from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import maxtext
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils

BASE = Path(maxtext.__file__).parent / "configs" / "base.yml"
# What a job says of itself, a short sequence, and no encoder of images or sound.
WORDS = (
    "run_name=count",
    "hardware=cpu",
    "skip_jax_distributed_system=true",
    "per_device_batch_size=1",
    "max_target_length=128",
    "attention=dot_product",
    "dataset_type=synthetic",
    "override_model_config=true",  # of what is said here; a model's file says its sizes
)
# Models whose layers MaxText has in no loop.
UNROLLED = ("gemma4-e", "qwen3-vl", "qwen3-omni", "weaver")


def count(name):
    """Return the weights of a model, or the first line of the error that MaxText raises."""
    more = ["scan_layers=false"] if name.startswith(UNROLLED) else []
    try:
        said = ["count", str(BASE), f"model_name={name}", *WORDS, *more]
        config = pyconfig.initialize(said, use_multimodal=False, use_audio=False)
        mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
        model = model_creation_utils.from_config(config, mesh=mesh)
        shapes = maxtext_utils.get_abstract_param(model, config)["params"]
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    except Exception as error:  # the parent reports it
        lines = " ".join(str(error).split()[:40])
        return f"{type(error).__name__}: {lines}"[:160]


def main(request):
    print("\n" + json.dumps({name: count(name) for name in request["names"]}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
