"""What the host's memory is worth to a plan that uses it: what else it could do, and the link at
which that would be as fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError
from shardsim.plan import Plan
from shardsim.plan.remat import Policy

FARTHEST = 1e2  # times slower or faster than the link that there is
NEAR = 1e-2  # of a link's bytes/s


@dataclass(frozen=True, kw_only=True)
class Instead:
    """What a plan could do with what it keeps in the host's memory."""

    what: str  # "activations", "optimizer state" or "parameters of layers"
    how: str  # "recomputed", or "kept on the device"
    step_time_s: float
    hbm_peak_bytes: float
    fits: bool
    # The host's link at which both take as long; None where the host always is slower, 0 where it
    # never is.
    even_bytes_per_s: float | None

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "what": self.what,
            "how": self.how,
            "step_time_s": self.step_time_s,
            "hbm_peak_bytes": self.hbm_peak_bytes,
            "fits": self.fits,
            "even_bytes_per_s": self.even_bytes_per_s,
        }


def instead_of_host(item: Prediction) -> tuple[Instead, ...]:
    """Return what else the plan of a prediction could do with what lies in the host's memory."""
    return tuple(_instead(item, *one) for one in _others(item.plan))


def _others(plan: Plan) -> Iterator[tuple[str, str, Plan]]:
    if any(group.offload for group in plan.remat.groups):
        for how, kept in (("recomputed", False), ("kept on the device", True)):
            groups = tuple(_without(group, kept) for group in plan.remat.groups)
            try:
                yield "activations", how, replace(plan, remat=replace(plan.remat, groups=groups))
            except PlanError:  # what only the host's memory can be told to keep
                continue
    if plan.offload_optimizer:
        yield "optimizer state", "kept on the device", replace(plan, offload_optimizer=False)
    if plan.offload_parameters:
        yield "parameters of layers", "kept on the device", replace(plan, offload_parameters=False)


def _without(group: Policy, kept: bool) -> Policy:
    here = group.offload - {"layer_input"} if kept else frozenset()
    return replace(group, save=group.save | here, offload=frozenset())


def _instead(item: Prediction, what: str, how: str, other: Plan) -> Instead:
    found = _priced(item, other)
    return Instead(
        what=what,
        how=how,
        step_time_s=found.step_time_s,
        hbm_peak_bytes=found.hbm["peak_bytes"],
        fits=found.fits,
        even_bytes_per_s=_even(item, found.step_time_s),
    )


def _even(item: Prediction, step_s: float) -> float | None:
    """Return the bytes/s of the host's link with which the plan takes `step_s`."""
    there = item.plan.machine.chip.pcie_bytes_per_s
    if there is None:
        return None

    def longer(bytes_per_s: float) -> bool:
        machine = item.plan.machine
        machine = replace(machine, chip=replace(machine.chip, pcie_bytes_per_s=bytes_per_s))
        return _priced(item, replace(item.plan, machine=machine)).step_time_s > step_s

    slow, fast = there / FARTHEST, there * FARTHEST
    if longer(fast):
        return None
    if not longer(slow):
        return 0.0
    while fast / slow > 1 + NEAR:
        middle = sqrt(slow * fast)
        slow, fast = (middle, fast) if longer(middle) else (slow, middle)
    return fast


def _priced(item: Prediction, plan: Plan) -> Prediction:
    return predict(plan, costs=item.costs, implementation=item.implementation)
