"""`export --to specs`: mesh, specs by path, constraints and remat of a plan, for a trainer of one's
own. What stands before the line of dashes is a plan's, and written by the export."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardsim.emit.runtime.config import cycle

Spec = list[list[str]]

AXES: list[tuple[str, int, list[tuple[str, int, int]]]] = []
RINGS: list[str] = []
TORUS: list[str] = []
LAYERS: list[int] = []
WEIGHTS: list[tuple[str, list[int], Spec, Spec, list[str]]] = []
NAMES: dict[str, tuple[str, str]] = {}
ACTIVATIONS: dict[str, Spec] = {}
REMAT: list[dict[str, Any]] = []

# ------------------------------------------------------------------------------


def build_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Return the plan's mesh: on a TPU each axis on its torus axes, elsewhere devices in order."""
    devices = list(jax.devices() if devices is None else devices)
    names, sizes = [axis[0] for axis in AXES], [axis[1] for axis in AXES]
    if len(devices) != math.prod(sizes):
        raise ValueError(f"the mesh has {math.prod(sizes)} devices, but there are {len(devices)}")
    if all(device.platform == "tpu" for device in devices):
        at = {_place(device): device for device in devices}
        steps = itertools.product(*(_walk(name, parts) for name, _, parts in AXES))
        devices = [at[tuple(map(sum, zip(*step, strict=True)))] for step in steps]
    types = (AxisType.Auto,) * len(names)
    return Mesh(np.array(devices).reshape(sizes), tuple(names), axis_types=types)


def _place(device: Any) -> tuple[int, ...]:
    """Return where a TPU device stands: its slice, then its place on each torus axis."""
    place = dict(zip("xyz", device.coords, strict=False), core=getattr(device, "core_on_chip", 0))
    return (getattr(device, "slice_index", None) or 0, *(place[name] for name in TORUS))


def _walk(name: str, parts: list[tuple[str, int, int]]) -> list[tuple[int, ...]]:
    """Return what each step along a mesh axis adds to the place: row by row, or round a ring."""
    factors = tuple(factor for _, factor, _ in parts)
    walk = []
    for cell in cycle(factors) if name in RINGS else itertools.product(*map(range, factors)):
        place = dict.fromkeys(("dcn", *TORUS), 0)
        for (torus, _, stride), digit in zip(parts, cell, strict=True):
            place[torus] = digit * stride
        walk.append(tuple(place.values()))
    return walk


def specs(tree: Any, *, state: bool = False) -> Any:
    """Return the PartitionSpec of every array of a tree, by its path; of optimizer state too.

    What no rule and no weight's shape names is replicated.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        return _planned(_name(path), np.shape(leaf), state) or PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, mesh: Mesh | None = None, *, state: bool = False) -> Any:
    """Return the NamedSharding of every array of a tree: for jax.device_put or jax.jit."""
    mesh = mesh or build_mesh()
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(tree, state=state),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def check(params: Any, mesh: Mesh | None = None, *, state: bool = False) -> list[str]:
    """Return a line for each array that does not lie as planned, or that nothing names."""
    mesh = mesh or build_mesh()
    least = min((math.prod(weight[1]) for weight in WEIGHTS if len(weight[1]) > 1), default=1)
    wrong = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, shape = _name(path), np.shape(leaf)
        spec = _planned(name, shape, state)
        if spec is None:
            if math.prod(shape) >= least:
                wrong.append(f"{name} {list(shape)}: no rule and no shape of the plan names it")
            continue
        found = getattr(leaf, "sharding", None)
        if found is None or not found.is_equivalent_to(NamedSharding(mesh, spec), len(shape)):
            there = getattr(found, "spec", found)
            wrong.append(f"{name} {list(shape)}: lies as {there}, planned is {spec}")
    return wrong


def constrain(x: Any, kind: str) -> Any:
    """Keep an activation split as planned; `kind` is one of ACTIVATIONS."""
    spec = _partition(ACTIVATIONS[kind][: np.ndim(x)])
    return jax.lax.with_sharding_constraint(x, spec)


def remat_policy(group: int = 0) -> Any:
    """Return the policy of jax.checkpoint for a group of layers.

    It tells arrays by the names that jax.ad_checkpoint.checkpoint_name(x, "qkv") gives them.
    """
    save, offload = REMAT[group]["save"], REMAT[group]["offload"]
    policies = jax.checkpoint_policies
    if "rest" in save and not offload:
        return policies.everything_saveable
    if offload:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=save,
            names_which_can_be_offloaded=offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.save_only_these_names(*save)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _partition(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*(tuple(axes) or None for axes in spec))


def _planned(name: str, shape: tuple[int, ...], state: bool) -> PartitionSpec | None:
    """Return the spec of an array: of the first weight that its path and shape fit.

    Where no path does, its shape decides, if all weights that it fits lie alike.
    """
    fits = [(one[0], spec) for one in WEIGHTS if (spec := _laid(shape, one, state)) is not None]
    for weight, spec in fits:
        if f"/{name}/".find(f"/{weight}/") >= 0:
            return _partition(spec)
    for weight, spec in fits:
        if _is_called(name, *NAMES.get(weight.rpartition("/")[2], ("", "$."))):
            return _partition(spec)
    return _partition(fits[0][1]) if fits and all(s == fits[0][1] for _, s in fits) else None


def _is_called(name: str, before: str, words: str) -> bool:
    """Return whether a path ends with one of `words`, somewhere after one of `before`."""
    within = rf"({before})\w*/(.*/)?" if before else "(^|/)"
    return bool(re.search(rf"{within}({words})(/(kernel|weight|w|value|embedding))*$", name))


def _laid(shape: tuple[int, ...], weight: Any, state: bool) -> Spec | None:
    """Return where the dimensions of a weight stand in a shape: in any order, some as one, layers
    anywhere; None where they do not."""
    _, whole, *ways, of_layers = weight
    for sizes, spec in _forms(whole, ways[state]):
        for order in itertools.permutations(range(len(sizes))):
            left, laid, layers = list(order), [], 0
            for size in shape:
                if left and size == sizes[left[0]]:
                    laid.append(spec[left.pop(0)])
                elif size in LAYERS:
                    laid.append(of_layers)
                    layers += 1
            if not left and layers < 2 and len(laid) == len(shape):
                return laid
    return None


def _forms(sizes: list[int], spec: Spec) -> Iterator[tuple[list[int], Spec]]:
    """Yield a weight's dimensions, and the same with some that follow each other as one."""
    yield sizes, spec
    for at in range(len(sizes) - 1):
        if not spec[at + 1]:  # the split one is major, so its part is whole
            one = [*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :]]
            yield from _forms(one, [*spec[: at + 1], *spec[at + 2 :]])
