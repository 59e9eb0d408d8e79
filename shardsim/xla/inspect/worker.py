"""Compiles one lowered function for a TPU slice; started by `shardsim.xla.inspect.function`.

`python -m shardsim.xla.inspect.worker FOLDER` reads FOLDER/request.json (topology, options, mesh on
the torus) and FOLDER/train.py, which holds StableHLO, and leaves FOLDER/result.json and, if it
compiled, FOLDER/hlo.txt. It uses the parts of JAX behind `lowered.compile()`, as the function was
traced elsewhere, for devices of another kind. Checked with jax 0.10.2.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax.experimental import topologies
from jaxlib import _jax
from jaxlib.mlir import ir

from shardsim.emit.runtime.config import build_mesh
from shardsim.xla.tpu.worker import assignment_of, memory_of, serve

_SHARDINGS = ("sdy.sharding", "mhlo.sharding")
_NO_ROLES = {"roles": {"tensor": [], "tensor2": [], "context": []}, "keys": ""}


def compile_function(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Compile the function; return memory and seconds."""
    topology = topologies.get_topology_desc(platform="tpu", **request["topology"])
    plan = {**_NO_ROLES, "mesh": request["mesh"], "torus": request["torus"]}
    devices = build_mesh(plan, list(topology.devices)).devices.reshape(1, -1)
    begun = time.perf_counter()
    with mlir.make_ir_context():
        module = ir.Module.parse((folder / "train.py").read_text(encoding="utf-8"))
        client = devices[0, 0].client
        options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=devices.size,
            device_assignment=devices,
            env_options_overrides=request["options"],
            backend=client,
        )
        free = options.executable_build_options
        free.allow_spmd_sharding_propagation_to_parameters = _unsaid(module, "arg_attrs")
        free.allow_spmd_sharding_propagation_to_output = _unsaid(module, "res_attrs")
        made = client.compile(
            module, executable_devices=_jax.DeviceList(tuple(devices.flat)), compile_options=options
        )
    (folder / "hlo.txt").write_text(made.hlo_modules()[0].to_string(), encoding="utf-8")
    return {
        "memory": memory_of(
            made.get_compiled_memory_stats(), assignment_of(folder / "dump", "*after_optimizations")
        ),
        "lower_s": 0.0,
        "compile_s": time.perf_counter() - begun,
    }


def _unsaid(module: Any, what: str) -> list[bool]:
    """Return for each argument (or result) whether the partitioner may choose its sharding."""
    main = next(one for one in module.body.operations if one.operation.name == "func.func")
    kind = main.type.inputs if what == "arg_attrs" else main.type.results
    if what not in main.attributes:
        return [True] * len(kind)
    given = np.array([any(key in one for key in _SHARDINGS) for one in main.attributes[what]])
    return [not said for said in given]


if __name__ == "__main__":
    serve(compile_function)
