"""What a diffusion model is told of an example besides its patches: how far it is, and its class.

A time becomes waves, those a vector by a small MLP, and a class adds a row of a table (DiT, arXiv
2212.09748, section 3.2). The vector is handed to all layers, each of which projects it
(`modulate`); or it is projected once for all of them (Wan, arXiv 2503.20314, section 4.2).

Shapes: times, labels [batch]; the condition [batch, embed]; a projection [batch, 6, embed].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, einsum, linear, pointwise, weight
from shardsim.graph.build import Builder, vector
from shardsim.graph.place import CONTEXT, TENSOR
from shardsim.ops.lazy import jax, jnp
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

CONDITIONS = "conditions"  # the purpose of what an example has one of
FREQUENCIES = 256  # of a time: facebookresearch/DiT, models.py, and Wan-Video/Wan2.1, model.py
PARTS = 6  # shift, scale and gate, of attention and of the MLP
LONGEST = 10000.0  # waves' longest period, over 2 pi


def of_example(name: str, *dims: str, handed: bool = False) -> Array:
    """Return an array of which an example has one; layers read what is `handed`."""
    found = Array(name, ("batch", *dims), purpose=CONDITIONS)
    return replace(found, keep="", handed=True, owed=(*TENSOR, *CONTEXT)) if handed else found


def condition() -> Array:
    """Return the vector of an example, as layers read it."""
    return of_example("condition", "embed", handed=True)


def projected() -> Array:
    """Return its projection for all layers, where they share one."""
    return of_example("condition of layers", "modulation", "embed", handed=True)


def conditions(build: Builder, *, shared: bool, classes: bool) -> None:
    """Add the vector of an example, active where each layer projects it, and if they have a
    `shared` projection that too."""
    given = [Array("times", ("batch",), trained=False)]
    waves = replace(of_example("waves", "frequency"), trained=False)
    hidden = of_example("time hidden", "condition")
    into, back = (
        vector("time_in", "frequency", "condition"),
        weight("time_out", "condition", "embed", purpose="ends"),
    )
    build.add(einsum(waves, into, hidden, vector("time_in_bias", "condition")))
    active = build.add(pointwise([hidden], replace(hidden, name="time active")))
    x = of_example("time", "embed")
    build.add(einsum(active, back, x, vector("time_out_bias", "embed")))
    if classes:
        given.append(Array("labels", ("batch", "label"), trained=False))
        table = weight("label_embedding", "label", "embed", kind="table", purpose="ends")
        row = build.add(linear([given[-1], table], of_example("label", "embed")))
        x = build.add(linear([x, row], of_example("time and label", "embed")))
    if not shared:
        build.add(pointwise([x], condition()))
        build.call("conditions", given, condition(), shared=False)
        return
    build.add(linear([x], condition()))
    active = build.add(pointwise([x], of_example("active", "embed")))
    project_condition(build, "shared_modulation", active, projected(), "modulation", purpose="ends")
    build.call("conditions", given, condition(), projected(), shared=True)


def project_condition(
    build: Builder, name: str, x: Array, out: Array, parts: str, *, purpose: str = ""
) -> None:
    """Add a projection to several vectors, split over a tensor axis and then gathered."""
    matrix = weight(name, "embed", parts, "condition", purpose=purpose)
    columns = of_example(f"{name} columns", parts, "condition")
    build.add(einsum(x, matrix, columns, vector(f"{name}_bias", parts, "condition")))
    moved = linear([columns.view(condition="embed")], out)
    build.add(replace(moved, relay=True, eager=True))


@runs("conditions")
def run_conditions(way: Whole, params: Params, call: Any, times: Any, labels: Any = None) -> Any:
    """Return the condition [batch, 1, embed], and its projection for all layers."""
    with jax.named_scope("conditions"):
        flat = way.flat()
        half = FREQUENCIES // 2
        angle = times[:, None] * LONGEST ** (-jnp.arange(half) / half)
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(way.compute)
        hidden = waves @ params["time_in"].astype(way.compute)
        hidden = hidden + params["time_in_bias"].astype(way.compute)
        x = flat.project_out([jax.nn.silu(hidden)[:, None]], params, ["time_out"])
        x = flat.add_vectors(params, x, ["time_out_bias"])
        if labels is not None:
            x = x + flat.end_matrix(params, "label_embedding")[labels][:, None]
        if not call["shared"]:
            return jax.nn.silu(x)
        return [x, run_projection(way, params, "shared_modulation", jax.nn.silu(x))]


def run_projection(way: Whole, params: Params, name: str, x: Any) -> Any:
    """Return the projection [batch, 1, parts, embed] of a condition [batch, 1, embed]."""
    flat = way.flat()
    (y,) = flat.project_in(x, params, [name])
    y = flat.with_bias(y, params, f"{name}_bias")
    parts = params[name].shape[1]
    return flat.all_columns(y.reshape(*y.shape[:2], parts, -1))
