"""Remat by layer: what HBM leaves free goes to layers that keep more.

Of a plan with one policy for all layers, a policy that fits is mixed with one that does not but is
faster, in every share of the layers that fits. A mix of more policies is no better but for what
whole layers leave: its seconds and its bytes are sums over layers, so that the fastest mix of given
bytes lies on a line between two of them. Each mix is priced as any plan is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import step_time_s
from shardsim.plan.layout import Layout
from shardsim.plan.plan import Plan
from shardsim.plan.remat import Remat
from shardsim.plan.resolve import resolve
from shardsim.planner.meshes import Array
from shardsim.planner.space import kept_by, policies
from shardsim.program.holds import held_by
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.shapes import Workload

# A second loop over layers is worth as much of a step.
WORTH = 1e-3


def filled(found: Prediction) -> Prediction:
    """Return the fastest that fits of a plan with two groups of layers, the second of which keeps
    more; or what was `found`, if that is about as fast.

    The groups replace what the plan keeps. Weights are prefetched if there is room.
    """
    plan = found.plan
    layout, offered = resolve(plan), policies(plan.model, plan.machine)
    rounds = plan.model.layers // plan.model.round_layers
    if rounds < 2 or len(plan.model.stacks) > 1 or int(layout.pipeline.size) > 1:
        return found
    gathers = int(layout.gather.size) > 1
    prefetch = np.array([False, True] if gathers else [plan.overlap.weights])
    layout = layout.reshaped(weights_overlap=prefetch[:, None, None])
    one = kept_by(offered, (len(offered), 1))
    step_s, fits = _step_s(plan, layout.reshaped(kept=(one,)), (len(prefetch), len(offered), 1))
    fastest_s, every = step_s.min(axis=(0, 2)), fits.all(axis=(0, 2))
    # The first group may keep what does not fit in all layers: it runs back when others let go.
    pairs = [
        (less, more)
        for less in range(len(offered))
        for more in np.flatnonzero(~every & (fastest_s < fastest_s[less])).tolist()
    ]
    if not pairs:
        return found
    layers = plan.model.round_layers * np.arange(1, rounds)
    kept = [
        kept_by([offered[policy] for policy in group], (len(pairs), 1), many)
        for group, many in zip(
            zip(*pairs, strict=True), (plan.model.layers - layers, layers), strict=True
        )
    ]
    shape = (len(prefetch), len(pairs), len(layers))
    step_s, fits = _step_s(plan, layout.reshaped(kept=tuple(kept)), shape)
    step_s = np.where(fits, step_s, np.inf)
    ahead, pair, share = np.unravel_index(step_s.argmin(), shape)
    if step_s[ahead, pair, share] > found.step_time_s * (1.0 - WORTH):
        return found
    less, more = (offered[policy] for policy in pairs[pair])
    many = int(layers[share])
    groups = replace(less, layers=plan.model.layers - many), replace(more, layers=many)
    overlapped = replace(plan.overlap, weights=bool(prefetch[ahead]))
    return predict(replace(plan, remat=Remat(groups), overlap=overlapped))


def _step_s(plan: Plan, layout: Layout, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the step time of plans with `layout`, and whether they fit: arrays of `shape`.

    They fit if the compiler need not save memory by itself (`Passes.share` of HBM): near the limit
    it runs again what layers keep.
    """
    work, machine, name = Workload.of(plan), plan.machine, USUAL[plan.op_costs]
    program = implemented(partition(work, layout), name, machine, layout)
    costs = costs_of(plan.op_costs, machine.chip)
    step_s = step_time_s(machine, layout, overlap(program, layout), costs)
    holds = held_by(name, machine.chip)
    use = hbm_use(machine, work, layout, holds.least)
    fits = np.less_equal(use.peak_bytes, holds.share * use.capacity_bytes) & use.host_fits
    return np.broadcast_to(step_s, shape), np.broadcast_to(fits, shape)
