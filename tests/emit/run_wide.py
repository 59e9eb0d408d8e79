"""Runs plans on host devices in float64, and shows their programs as those of float32.

What differs between a plan and the unsharded model then is no rounding. Started by test_plans.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    """Answer as the usual worker does, with numbers twice as wide."""
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64  # before what is emitted reads it
    from shardsim.xla import worker

    worker.np = SimpleNamespace(**{**vars(np), "float32": np.float64})

    def run(data: dict[str, Any], steps: int) -> dict[str, Any]:
        found = worker.run(data, steps)
        for kind in "fsu":
            found["program"] = found["program"].replace(f"{kind}64[", f"{kind}32[")
        return found

    worker.serve(run)


if __name__ == "__main__":
    main()
