"""Parts of the exported step that only GPUs take, as far as other devices can show them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardsim.emit.runtime.config import build_mesh
from shardsim.emit.runtime.model import cudnn_results, remat_policy
from shardsim.ops.whole import logits_linear


def gradients(platform: str) -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 8, 16), jnp.bfloat16)
    w = jax.random.normal(keys[1], (16, 32), jnp.bfloat16)
    weights = jax.random.normal(keys[2], (2, 8, 32))

    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(weights * logits_linear(x, w, platform))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    wide = sum("f32" in line.split("->")[0].split(":")[-1] for line in products)
    return loss(x, w), jax.grad(loss, (0, 1))(x, w), wide


def main() -> None:
    loss, found, wide = gradients("gpu")
    usual, expected, usual_wide = gradients("cpu")
    errors = [
        float(np.linalg.norm(np.float32(a) - np.float32(b)) / np.linalg.norm(np.float32(b)))
        for a, b in zip(found, expected, strict=True)
    ]
    group = {"layers": 1, "save": ["context"], "offload": []}
    attention = SimpleNamespace(name="dot_product_attention_fwd_wrapper")
    keeps = {
        platform: remat_policy({"platform": platform}, group)(attention)
        for platform in ("gpu", "cpu")
    }
    # Devices of a GPU have coordinates too, which say nothing of a torus.
    devices = [SimpleNamespace(platform="gpu", coords=(0, 0, 0), id=n) for n in range(2)]
    plan = {"mesh": [{"name": "data", "size": 2, "torus": {"node": 2}}], "torus": {"node": 2}}
    plan["roles"] = {"tensor": [], "tensor2": []}
    try:
        build_mesh(plan, devices)
        mesh = "taken in order"
    except KeyError as error:
        mesh = f"KeyError {error}"
    except Exception:  # these are no devices: JAX may refuse them later
        mesh = "taken in order"
    print(
        json.dumps(
            {
                "loss": [float(loss), float(usual)],
                "errors": errors,
                "wide": [wide, usual_wide],
                "keeps": keeps,
                "other": bool(cudnn_results(SimpleNamespace(name="dot_general"))),
                "mesh": mesh,
            }
        )
    )


if __name__ == "__main__":
    main()
