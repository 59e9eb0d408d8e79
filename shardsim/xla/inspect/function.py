"""Anyone's jitted function compiled for a slice, without a TPU, and inspected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from shardsim.errors import PlanError, ShardsimError
from shardsim.machine import Machine, parse_machine
from shardsim.xla.inspect.inspected import Inspected, inspect_hlo
from shardsim.xla.inspect.mesh import placed
from shardsim.xla.tpu.cache import Cache
from shardsim.xla.tpu.service import (
    MEMORY_BYTES,
    TIMEOUT_S,
    check_libtpu,
    compile_once,
    peak_bytes,
    problem_of,
)
from shardsim.xla.tpu.topology import topology_options

_WORKER = "shardsim.xla.inspect.worker"
_PARTITIONS = re.compile(r"mhlo\.num_partitions = (\d{1,9}) ")
_MESH = re.compile(r"sdy\.mesh @\w+ = <\[([^\]]*)\]>")
_AXIS = re.compile(r'"((?:[^"\\]|\\.)*)"=(\d{1,9})')


def inspect(
    function: Callable[..., Any],
    *shapes: Any,
    on: str | Machine,
    mesh: Mapping[str, int] | None = None,
    options: Mapping[str, str] | None = None,
    causal: bool | None = None,
    cache: bool = True,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: float = MEMORY_BYTES,
) -> Inspected:
    """Compile a jitted `function` of `shapes` for the slice `on`, and say what its step does.

    `shapes` are arrays or `jax.ShapeDtypeStruct`s, with their shardings, in whatever trees the
    function takes. The mesh of the shardings may be an `AbstractMesh`, so no device is needed:

        mesh = jax.sharding.AbstractMesh((16, 4), ("data", "model"))
        x = jax.ShapeDtypeStruct((256, 8192), "bfloat16", sharding=NamedSharding(mesh, P("data")))
        found = shardsim.inspect(jax.jit(step), x, on="v5p:4x4x4")
        found.step_time_s, found.unexpected[0].source

    The mesh lies on the torus as JAX's `create_device_mesh` lays it; `mesh` gives names and sizes
    of its axes, major first, where the function names none. `options` are the TPU compiler's;
    `causal` says whether fused attention is, as programs leave masks out. It is compiled in a
    process of its own, and kept, unless `cache` is false.

    Raises `PlanError` for a function of other than the slice's devices, `ShardsimError` where it
    does not compile, also for want of HBM; what the function itself raises while it is traced is
    not caught.
    """
    machine = parse_machine(on) if isinstance(on, str) else on
    topology = topology_options(machine)
    if find_spec("jax") is None:
        raise ShardsimError("inspect needs JAX: pip install 'shardsim[tpu]'")
    check_libtpu()
    import jax

    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    traced = jitted.trace(*shapes)
    try:
        text = traced.lower(lowering_platforms=("tpu",)).as_text(debug_info=True)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ShardsimError(
            f"inspect: the function cannot be lowered for a TPU from here (callbacks, such as "
            f"jax.debug.print, cannot): {why}"
        ) from error
    axes = placed(dict(mesh) if mesh else _mesh(text, machine), machine)
    request = {
        "worker": _WORKER,
        "topology": topology,
        "options": dict(options or {}),
        "mesh": [{"name": a.name, "size": a.size, "torus": dict(a.torus)} for a in axes],
        "torus": {axis.name: axis.length for axis in machine.axes},
    }
    folder = str(Cache().folder) if cache else None
    result, hlo = compile_once(request, text, timeout_s, memory_bytes, folder)
    if hlo is None:
        raise ShardsimError(f"inspect: {machine.name}: {problem_of(result)}")
    used = peak_bytes(result["memory"])
    return inspect_hlo(hlo, machine, axes=axes, peak_bytes=used, causal=causal)


def _mesh(text: str, machine: Machine) -> dict[str, int]:
    """Return the mesh that a lowered function names; one axis of all devices if it names none."""
    match = _PARTITIONS.search(text)
    devices = int(match[1]) if match else 1
    if devices != machine.devices:
        raise PlanError(
            f"inspect: the function is for {devices} devices, {machine.name} has "
            f"{machine.devices}; give its shapes shardings on a mesh of that many: "
            "jax.sharding.AbstractMesh(sizes, names) needs no devices"
        )
    named = _MESH.search(text)
    found = {name: int(size) for name, size in _AXIS.findall(named[1])} if named else {}
    return found or {"devices": devices}
