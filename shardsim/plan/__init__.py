"""Plans: mesh, rules, remat and overlap, read from and written to YAML."""

from shardsim.plan.io import (
    PlanOrPath,
    as_plan,
    dump_plan,
    load_plan,
    plan_from_data,
    plan_names,
    plan_to_data,
    save_plan,
)
from shardsim.plan.layout import Layout
from shardsim.plan.plan import MeshAxis, Overlap, Plan
from shardsim.plan.precision import Precision
from shardsim.plan.remat import Policy, Remat
from shardsim.plan.resolve import resolve

__all__ = [
    "Layout",
    "MeshAxis",
    "Overlap",
    "Plan",
    "PlanOrPath",
    "Policy",
    "Precision",
    "Remat",
    "as_plan",
    "dump_plan",
    "load_plan",
    "plan_from_data",
    "plan_names",
    "plan_to_data",
    "resolve",
    "save_plan",
]
