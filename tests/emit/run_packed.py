"""Rows of several sequences beside each sequence by itself: plan data on standard input, a list.

Answers with the relative errors of the loss and of its gradients, of the mean over real tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardsim.emit.runtime.data import synthetic_batch
from shardsim.emit.runtime.train import Trainer


def alone(data: dict[str, Any], batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return the mean loss of all sequences, each in a row of its own, and its gradients."""
    alike: dict[int, list[Any]] = {}  # sequences of one length are one batch
    for row in range(len(batch["segments"])):
        for number in range(1, batch["segments"][row].max() + 1):
            (at,) = np.nonzero(batch["segments"][row] == number)
            alike.setdefault(len(at), []).append((row, at))
    parts = []
    for many, places in alike.items():
        plan = {**data["plan"], "batch": len(places), "sequence": many, "microbatches": 1}
        plan.pop("rows")
        one = Trainer({**data, "plan": plan})
        tokens = {
            name: jnp.stack([batch[name][row, at] for row, at in places])
            for name in ("tokens", "targets")
        }
        params = one.initial_parameters(jax.random.key(0))
        found = jax.jit(one.loss_and_gradients)(params, tokens)
        parts.append((many * len(places), found))
    total = sum(tokens for tokens, _ in parts)
    loss, gradients = jax.tree.map(
        lambda *xs: sum(x * (tokens / total) for x, (tokens, _) in zip(xs, parts, strict=True)),
        *(found for _, found in parts),
    )
    return float(loss), gradients


def compared(data: dict[str, Any]) -> dict[str, float]:
    """Return how far packed rows are from their sequences."""
    batch = synthetic_batch(data["plan"], data["model"], 0)
    trainer = Trainer(data)
    params = trainer.initial_parameters(jax.random.key(0))
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    loss, gradients = jax.jit(trainer.loss_and_gradients)(params, arrays)
    expected, wanted = alone(data, batch)
    errors = [
        float(jnp.linalg.norm(gradients[name] - value) / jnp.linalg.norm(value))
        for name, value in wanted.items()
    ]
    return {
        "loss": abs(float(loss) - expected) / expected,
        "gradients": max(errors),
        "sequences": int(batch["segments"].max(1).sum()),
    }


if __name__ == "__main__":
    json.dump([compared(data) for data in json.load(sys.stdin)], sys.stdout)
