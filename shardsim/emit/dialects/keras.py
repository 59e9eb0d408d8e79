"""`export --to keras`: a Python file with a DeviceMesh and a LayoutMap for Keras 3 on JAX.

Keras matches regular expressions in full against the path of each variable; two that match are
an error, none means replicated, and a dimension takes one mesh axis at most. A path that ends in
`/output` lays out what that layer returns (keras 3.15, `layers/layer.py`). The names are those of
keras.layers and of KerasHub's Transformer layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from shardsim.emit.dialects.python_file import mesh_module
from shardsim.emit.dialects.rules import Array, compare, spec_text
from shardsim.emit.jax_code import header
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan

TRAINER = "keras"
LayoutMap = Mapping[str, tuple[str | None, ...]]

# Weight -> the end of its variable's path.
PATHS: Mapping[str, str] = {
    "token_embedding": "token_embedding/embeddings",
    "position_embedding": "position_embedding/embeddings",
    "patch_embedding": "patch_embedding/kernel",
    "query": "query/kernel",
    "key": "key/kernel",
    "value": "value/kernel",
    "query_bias": "query/bias",
    "key_bias": "key/bias",
    "value_bias": "value/bias",
    "attention_output": "attention_output/kernel",
    "mlp_in": "feedforward_intermediate_dense/kernel",
    "mlp_in_bias": "feedforward_intermediate_dense/bias",
    "mlp_gate": "feedforward_gate_dense/kernel",
    "mlp_gate_bias": "feedforward_gate_dense/bias",
    "mlp_out": "feedforward_output_dense/kernel",
    "classifier": "classifier/kernel",
    "output_head": "output_head/kernel",
}
_KERNEL_DIMENSIONS = 2  # of a convolution's kernel, before the channels: the patch embedding
POOLING = "pooling"  # the layer above the weights of attention pooling
# Kind of activation -> the layer that returns it, and how many dimensions follow its width.
OUTPUTS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "residual": (("transformer_layer_[0-9]+", 0),),
    "wide": (("feedforward_(intermediate|gate)_dense", 0), ("query", 1)),
    "keys": (("(key|value)", 1),),
    "logits": (("output_head", 0),),
}

_CODE = '''def layout_map(devices=None):
    """Return the LayoutMap of the plan over `devices`, or over all there are."""
    mesh = build_mesh(PLAN, devices)
    own = keras.distribution.DeviceMesh(
        mesh.devices.shape, list(mesh.axis_names), mesh.devices.flatten()
    )
    found = keras.distribution.LayoutMap(own)
    for path, axes in LAYOUT.items():
        found[path] = axes
    return found


def distribution(devices=None):
    """Return the distribution to set before the model is made."""
    return keras.distribution.ModelParallel(
        layout_map=layout_map(devices), batch_dim_name=BATCH_AXIS
    )'''


def keras_code(plan: Plan) -> str:
    """Return the Python file that lays out a Keras model as `plan` does."""
    layout, batch_axis = keras_layout(plan)
    comment = (
        f"{header(plan)}\n#\n"
        "#   keras.distribution.set_distribution(distribution())   # before the model is made\n"
        "# Variables are known by the ends of their paths; print(variable.path) shows yours.\n"
        "# Keras has no remat policy of its own that holds the plan's: see keras.RematScope."
    )
    values = {"LAYOUT": layout, "BATCH_AXIS": batch_axis, "PLAN": plan_data(plan)["plan"]}
    return mesh_module(comment, ("import jax", "import keras", "import numpy as np"), values, _CODE)


def keras_layout(plan: Plan) -> tuple[dict[str, tuple[str | None, ...]], str]:
    """Return the layout of every path that is split, and the axis that splits the batch.

    Raises `PlanError` where Keras cannot hold a sharding of the plan's.
    """
    data = plan_data(plan)
    layout: dict[str, tuple[str | None, ...]] = {}
    arrays = []
    for name, entry in data["parameters"].items():
        spec = entry["spec"][1:] if entry["part"] == "block" else entry["spec"]
        spec = [[]] * _KERNEL_DIMENSIONS + spec if name == "patch_embedding" else spec
        arrays.append((name, variable_path(name), spec))
        short = name.removeprefix("pooling_")
        if any(spec) and short in PATHS:
            where = f"(.*/)?{POOLING}/(.*/)?" if short != name else f"(?!.*{POOLING}/)(.*/)?"
            layout[where + PATHS[short]] = _axes(name, spec)
    outputs = []
    for kind, layers in OUTPUTS.items():
        for pattern, more in layers:
            spec = data["activations"][kind] + [[]] * more
            if any(spec):
                layout[f"(?!.*{POOLING}/)(.*/)?{pattern}/output"] = _axes(kind, spec)
            outputs.append((kind, f"model/{_example(pattern)}/output", spec))
    for rows, activation in ((arrays, False), (outputs, True)):
        for name, path, spec in rows:
            found = resolve_layout(path, len(spec), layout)
            array = Array.of(name, (None,) * len(spec), spec, activation=activation)
            compare(array, found, TRAINER)
    return layout, _batch_axis(data["activations"]["residual"][0], plan)


def variable_path(name: str) -> str:
    """Return a path such as a variable of that weight may have.

    >>> variable_path("pooling_query")
    'model/pooling/query/kernel'
    """
    short = name.removeprefix("pooling_")
    inside = f"{POOLING}/" if short != name else ""
    return f"model/{inside}{PATHS.get(short, f'{short}/value')}"


def _example(pattern: str) -> str:
    """Return a layer that a pattern of `OUTPUTS` matches."""
    return re.sub(r"\((\w+)\|\w+\)", r"\1", pattern).replace("[0-9]+", "0")


def resolve_layout(path: str, rank: int, layout: LayoutMap) -> Spec:
    """Return the spec that Keras gives to what is at `path`.

    >>> resolve_layout("model/query/kernel", 2, {"(.*/)?kernel": ("data", None)})
    [['data'], []]
    """
    matching = [path] if path in layout else [key for key in layout if re.fullmatch(key, path)]
    if len(matching) > 1:
        raise PlanError(f"export to {TRAINER}: {path} matches {' and '.join(matching)}")
    axes: Iterable[str | None] = layout[matching[0]] if matching else ()
    spec = [[axis] if axis else [] for axis in axes]
    return spec + [[] for _ in range(rank - len(spec))]


def _axes(what: str, spec: Sequence[Sequence[str]]) -> tuple[str | None, ...]:
    """Return a spec as Keras takes it: one mesh axis a dimension."""
    if any(len(axes) > 1 for axes in spec):
        raise PlanError(
            f"export to {TRAINER}: {what} lies as {spec_text(spec)}, but a dimension takes one "
            "mesh axis there; join the axes into one in the plan, or export to flax"
        )
    return tuple(axes[0] if axes else None for axes in spec)


def _batch_axis(axes: Sequence[str], plan: Plan) -> str:
    """Return the mesh axis that splits the batch."""
    if len(axes) == 1:
        return axes[0]
    if axes:
        _axes("batch", [axes])
    whole = [axis.name for axis in plan.mesh if axis.size == 1]
    if not whole:
        raise PlanError(
            f"export to {TRAINER}: it splits the batch over some mesh axis, and the plan's splits "
            "it over none; add one of size 1 to the mesh"
        )
    return whole[0]
