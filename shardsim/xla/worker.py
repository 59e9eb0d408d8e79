"""Runs plans on host devices beside the unsharded model; started by `shardsim.xla.host`.

Reads one JSON object a line, {"data": what `shardsim.emit.specs.plan_data` gives, "steps": n},
and answers each with a line: relative errors and the compiled step's HLO text. Anything
that goes wrong is an answer too: {"error": text}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardsim.emit.runtime.config import build_mesh
from shardsim.emit.runtime.train import Trainer

# A gradient smaller than this share of all gradients together is compared with that share: one
# that is zero up to rounding (of a bias of keys) has no relative error worth the name.
FLOOR = 1e-3
NOISE = 1e-6  # a few roundings in float32

_references: dict[str, Any] = {}


def run(data: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run one plan and the same model unsharded from the same start; return the comparison."""
    mesh = build_mesh(data["plan"], jax.devices()[: _devices(data)])
    losses, gradients, params, compiled = _train(data, mesh, steps)
    remat = [{"layers": data["model"]["layers"], "save": [], "offload": []}]
    plain = {**data["plan"], "microbatches": 1, "remat": remat}
    chosen = [
        plain[name] for name in ("batch", "sequence", "optimizer", "attention", "stages", "chunks")
    ]
    key = json.dumps(
        [data["model"], data["calls"], data.get("parts"), chosen, plain.get("rows"), steps]
    )
    if key not in _references:
        _references[key] = _train({**data, "plan": plain}, None, steps)[:3]
    expected = _references[key]
    return {
        "loss_rel_error": max(
            abs(a - b) / abs(b) for a, b in zip(losses, expected[0], strict=True)
        ),
        "grad_rel_error": _worst(gradients, expected[1]),
        "update_rel_error": _worst(params, _felt(expected[2], expected[1])),
        "program": compiled.as_text(),
    }


def _devices(data: dict[str, Any]) -> int:
    return int(np.prod([axis["size"] for axis in data["plan"]["mesh"]]))


def _train(data: dict[str, Any], mesh: Any, steps: int) -> Any:
    """Return losses, first gradients, last parameters, and the compiled step."""
    trainer = Trainer(data, mesh, learning_rate=1e-3)
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        params, state = trainer.start_from(_first_parameters(trainer))
        step = trainer.compiled(trainer.full_step, params, state, trainer.batch(0))
        losses: list[float] = []
        first: dict[str, Any] = {}
        for index in range(steps):
            params, state, loss, gradients = step(params, state, trainer.batch(index))
            losses.append(float(loss))
            first = first or {name: np.asarray(g) for name, g in gradients.items()}
    return losses, first, {name: np.asarray(p) for name, p in params.items()}, step


def _first_parameters(trainer: Trainer) -> Any:
    """Return the same random parameters for every plan of a model, where the plan wants them."""
    places = trainer.places()
    params = {}
    for i, (name, entry) in enumerate(trainer.parameters.items()):
        noise = np.random.default_rng(i).normal(size=entry["shape"]).astype(np.float32)
        # Scales start near one here, not at it, and biases well away from zero, so that a wrong
        # one shows.
        value = max(entry["start"], 0.1) * noise if entry["start"] else 1 + 0.1 * noise
        params[name] = jax.device_put(value, places and places[name])
    return params


def _felt(params: Any, gradients: Any) -> Any:
    """Return the parameters whose gradients are not zero up to rounding.

    An optimizer that scales by the gradient's size turns rounding into updates.
    """
    sizes = {name: float(np.linalg.norm(g.ravel())) for name, g in gradients.items()}
    most = max(sizes.values())
    return {name: p for name, p in params.items() if sizes.get(name, most) > NOISE * most}


def _worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest relative error, by Euclidean norm, of any array."""
    whole = np.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in expected.values()))
    errors = [
        np.linalg.norm((found[name] - x).ravel().astype(np.float64))
        / max(np.linalg.norm(x.ravel().astype(np.float64)), FLOOR * whole)
        for name, x in expected.items()
    ]
    return float(np.max(errors))


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Give what stands in each line of standard input to `answer`; print what it returns."""
    jnp.zeros(())  # start the backend before anything is timed
    for line in sys.stdin:
        try:
            found = answer(**json.loads(line))
        except Exception as error:  # the parent reports it
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    serve(run)
