"""Reports and pictures: what the planner knows, made visible. Needs matplotlib and pandas.

    from shardsim.report import write_report
    write_report("vit-22b-published-tp8", "report.html")

Pictures are functions that return matplotlib figures; tables are pandas frames.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from shardsim.errors import ShardsimError

_HOMES = {
    "write_report": "shardsim.report.write",
    "step_breakdown": "shardsim.report.plots_plan",
    "hbm_over_step": "shardsim.report.plots_plan",
    "roofline": "shardsim.report.plots_roofline",
    "mesh_on_torus": "shardsim.report.plots_torus",
    "layer_timeline": "shardsim.report.plots_timeline",
    "link_loads": "shardsim.report.plots_events",
    "what_if_bars": "shardsim.report.plots_events",
    "pareto_front": "shardsim.report.plots_search",
    "cost_front": "shardsim.report.plots_search",
    "sweep_curves": "shardsim.report.plots_search",
    "sensitivity_bars": "shardsim.report.plots_evidence",
    "ablation_bars": "shardsim.report.plots_evidence",
    "predicted_against_published": "shardsim.report.plots_evidence",
    "published_scatter": "shardsim.report.plots_evidence",
    "predicted_against_compiled": "shardsim.report.plots_evidence",
    "ablation_frame": "shardsim.report.frames",
    "collectives_frame": "shardsim.report.frames",
    "compiled_frame": "shardsim.report.frames",
    "computes_frame": "shardsim.report.frames",
    "matmuls_frame": "shardsim.report.frames",
    "plans_frame": "shardsim.report.frames",
    "sensitivity_frame": "shardsim.report.frames",
    "sweep_frame": "shardsim.report.frames",
    "timeline_frame": "shardsim.report.frames",
    "validation_frame": "shardsim.report.frames",
}

__all__ = [*_HOMES]


def require() -> None:
    """Raise `ShardsimError` that says what to install if matplotlib or pandas is missing."""
    missing = [name for name in ("matplotlib", "pandas") if find_spec(name) is None]
    if missing:
        raise ShardsimError(f"reports need {' and '.join(missing)}: pip install 'shardsim[report]'")


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardsim.report' has no attribute '{name}'")
    require()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
