"""An exported Flax file in Flax itself: every weight and activation made under its rules.

A script of its own: `python -P flax_worker.py REQUEST.json` prints a JSON object last.
"""

# mypy: ignore-errors
from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


def load(path):
    """Return the exported file as a dict of names."""
    names = {"__name__": "exported_plan"}
    sys.modules["exported_plan"] = type(sys)("exported_plan")
    exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
    return names


def spec(array):
    """Return where an array lies, as lists of mesh axes."""
    found = [[axes] if isinstance(axes, str) else list(axes or ()) for axes in array.sharding.spec]
    return found + [[]] * (array.ndim - len(found))


def main(request):
    """Return the spec of every weight, by NNX and by linen, and of every activation."""
    plan = load(request["plan"])
    rules, parameters = plan["RULES"], plan["PARAMETERS"]
    mesh = plan["build_mesh"](plan["PLAN"])

    class Weights(nnx.Module):
        def __init__(self):
            for name, names in parameters.items():
                setattr(self, name, nnx.Param(jnp.ones(request["shapes"][name]), sharding=names))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self):
            for name, names in parameters.items():
                init = nn.with_logical_partitioning(nn.initializers.ones, names)
                self.param(name, init, request["shapes"][name])

    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules), nn.logical_axis_rules(rules):
        weights = Weights()
        by_nnx = {name: spec(getattr(weights, name)[...]) for name in parameters}
        shapes = jax.eval_shape(Linen().init, jax.random.key(0))
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, rules)
        variables = jax.jit(Linen().init, out_shardings=shardings)(jax.random.key(0))
        by_linen = {name: spec(nn.unbox(variables)["params"][name]) for name in parameters}
        activations = {
            kind: spec(
                jax.jit(lambda x, names=names: nn.with_logical_constraint(x * 2, names))(
                    jnp.ones(request["activations"][kind])
                )
            )
            for kind, names in plan["ACTIVATIONS"].items()
        }
    return {"nnx": by_nnx, "linen": by_linen, "activations": activations}


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print("\n" + json.dumps(answer))
