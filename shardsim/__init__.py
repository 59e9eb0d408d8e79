"""Predict the MFU of sharding plans on TPU slices, search for the best plan, and run it in JAX.

    import shardsim as ss

    result = ss.search("vit-22b", "v4:8x8x16", batch=65536)
    result.best.mfu, result.best.plan
    ss.predict("vit-22b-published-tp8").time
    ss.explain("plan.yaml", measured_step_s=14.25).trials

A plan is given as a `Plan`, a file, or the name of a shipped one. Names are loaded when they are
first used: `import shardsim` itself costs nothing.
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it: `typing` would be a third of the import's time
if TYPE_CHECKING:
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
    "as_plan": "shardsim.plan",
    "predict": "shardsim.cost.predict",
    "explain": "shardsim.answers.explain",
    "utilisations": "shardsim.cost.mfus",
    "search": "shardsim.planner.search",
    "ablate": "shardsim.planner.whatif",
    "changed": "shardsim.planner.changes",
    "sensitivity": "shardsim.cost.sensitivity",
    "sweep": "shardsim.planner.whatif",
    "simulate_plan": "shardsim.simulate",
    "twisted": "shardsim.simulate",
    "compare": "shardsim.planner.compare",
    "export_plan": "shardsim.emit",
    "import_config": "shardsim.validate.imports",
    "inspect": "shardsim.xla.inspect",
    "verify_host": "shardsim.xla",
    "what_if": "shardsim.simulate",
    "validate_runs": "shardsim.validate.runs:validate",
    "write_report": "shardsim.report",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> "Any":
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardsim' has no attribute '{name}'")
    home, _, own = _HOMES[name].partition(":")
    return getattr(import_module(home), own or name)


def __dir__() -> list[str]:
    return sorted(__all__)
