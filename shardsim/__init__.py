"""Predict the MFU of sharding plans on TPU slices, search for the best plan, and run it in JAX.

    import shardsim as ss

    result = ss.search("vit-22b", "v4:8x8x16", batch=65536)
    result.best.mfu, result.best.plan
    ss.predict(ss.load_plan("vit-22b-published-tp8")).time

Names are loaded when they are first used: `import shardsim` itself costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ShardsimError": "shardsim.errors",
    "Chip": "shardsim.machine",
    "Machine": "shardsim.machine",
    "load_chip": "shardsim.machine",
    "parse_machine": "shardsim.machine",
    "Model": "shardsim.model",
    "load_model": "shardsim.model",
    "model_names": "shardsim.model",
    "Plan": "shardsim.plan",
    "load_plan": "shardsim.plan",
    "plan_names": "shardsim.plan",
    "save_plan": "shardsim.plan",
    "Prediction": "shardsim.cost.predict",
    "predict": "shardsim.cost.predict",
    "search": "shardsim.planner.search",
    "ablate": "shardsim.planner.whatif",
    "changed": "shardsim.planner.changes",
    "sensitivity": "shardsim.cost.sensitivity",
    "sweep": "shardsim.planner.whatif",
    "simulate_plan": "shardsim.simulate",
    "twisted": "shardsim.simulate",
    "what_if": "shardsim.simulate",
    "validate_runs": "shardsim.validate.runs:validate",
    "write_report": "shardsim.report",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardsim' has no attribute '{name}'")
    home, _, own = _HOMES[name].partition(":")
    return getattr(import_module(home), own or name)


def __dir__() -> list[str]:
    return sorted(__all__)
