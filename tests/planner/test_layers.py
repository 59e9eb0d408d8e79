"""HBM that plans leave free, given to layers that keep more: against every mix priced alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from building import decoder, vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.price import step_time_s
from shardsim.machine import Machine, override_chip, parse_machine
from shardsim.model import Model
from shardsim.plan import Plan, Remat, resolve
from shardsim.plan.layout import Kept
from shardsim.plan.remat import POLICIES, Policy
from shardsim.planner.found import SearchResult
from shardsim.planner.layers import WORTH, filled
from shardsim.planner.search import search
from shardsim.program.holds import HOLDS
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.shapes import Workload

CLOSE = 1e-9
SLICES = ("v5e:2x4", "v4:2x2x4", "2*v4:2x2x1", "v5p:2x2x2")
MODELS = (
    decoder(layers=6, kv_heads=4, vocab=512),
    decoder(layers=6, windows=(128, 0), vocab=512, gated_mlp=True),
    vit(layers=5),
)


def tight(slice_name: str, gigabytes: float) -> Machine:
    """Return a slice whose chips have little memory."""
    machine = parse_machine(slice_name)
    chip = override_chip(machine.chip, {"hbm_bytes": gigabytes * 1e9})
    return replace(machine, chip=replace(chip, pcie_bytes_per_s=None))  # nothing goes to the host


@dataclass(frozen=True)
class Mixes:
    """Every two groups of layers of a plan, with every two policies, prefetching or not."""

    plan: Plan
    step_s: np.ndarray[Any, Any]  # [prefetching, pairs of policies, layers of the second group]
    fits: np.ndarray[Any, Any]

    def at(self, place: tuple[int, int, int]) -> Plan:
        """Return one of them as a plan."""
        layers, each = self.plan.model.layers, self.plan.model.round_layers
        many = each * (place[2] + 1)
        less, more = PAIRS[place[1]]
        groups = Policy(save=less, layers=layers - many), Policy(save=more, layers=many)
        weights = replace(self.plan.overlap, weights=bool(place[0]))
        return replace(self.plan, remat=Remat(groups), overlap=weights)


PAIRS = [*permutations(POLICIES.values(), 2)]


def mixes(plan: Plan) -> Mixes:
    """Price all mixes of a plan at once."""
    work, machine, name = Workload.of(plan), plan.machine, USUAL[plan.op_costs]
    layers, each = plan.model.layers, plan.model.round_layers
    many = np.arange(each, layers, each)
    groups = [
        Kept(names=tuple(names), shape=(len(PAIRS), 1), layers=count)
        for names, count in zip(zip(*PAIRS, strict=True), (layers - many, many), strict=True)
    ]
    layout = resolve(plan).reshaped(
        kept=tuple(groups), weights_overlap=np.array([False, True]).reshape(2, 1, 1)
    )
    schedule = overlap(implemented(partition(work, layout), name, machine, layout), layout)
    step_s = step_time_s(machine, layout, schedule, costs_of(plan.op_costs, machine.chip))
    fits = hbm_use(machine, work, layout, HOLDS[name].least).fits
    shape = 2, len(PAIRS), len(many)
    return Mixes(plan, np.broadcast_to(step_s, shape), np.broadcast_to(fits, shape))


def role_sizes(item: Prediction) -> tuple[str, ...]:
    return (item.plan.machine.name, *(f"{axis.name}{axis.size}" for axis in item.plan.mesh))


@pytest.mark.slow
@given(
    st.sampled_from(MODELS),
    st.sampled_from(SLICES),
    st.sampled_from((0.2, 0.3, 0.5)),
    st.sampled_from((8, 32, 96)),
    st.sampled_from(("physical", "compiler")),
    st.sampled_from(("mfu", "step-time", "cost", "chips")),
)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_layers_that_keep_more_make_no_search_worse(
    model: Model, name: str, gigabytes: float, batch: int, costs: str, objective: str
) -> None:
    def found(by_layer: bool) -> SearchResult:
        return search(
            model,
            tight(name, gigabytes),
            batch,
            costs=costs,
            objective=objective,
            by_layer=by_layer,
        )

    before, after = found(False), found(True)
    assert (after.searched, after.fit) == (before.searched, before.fit)
    assert len(after.predictions) == len(before.predictions)
    assert all(item.fits for item in after.predictions)
    times = [item.step_time_s for item in after.predictions]
    assert times == sorted(times)
    was = {role_sizes(item): item for item in before.predictions}
    for item in after.predictions:
        old = was.get(role_sizes(item))
        if old is None:  # it overtook the last of them
            assert item.step_time_s <= before.predictions[-1].step_time_s
        elif item.plan != old.plan:
            assert item.step_time_s <= old.step_time_s * (1 - WORTH)
    if before.predictions:
        assert after.bound is not None
        assert before.bound is not None
        assert after.bound.step_time_s <= before.bound.step_time_s
        assert after.bound.step_time_s <= times[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "machine", "batch"),
    [
        (decoder(layers=6, kv_heads=4, vocab=512), tight("v5e:2x2", 0.7), 32),
        (vit(layers=5), tight("v4:2x2x1", 0.6), 32),
        (decoder(layers=6, windows=(128, 0), vocab=512), tight("v5p:2x2x1", 0.6), 32),
    ],
    ids=["decoder", "vit", "windows"],
)
def test_the_chosen_groups_are_the_fastest_of_all(
    model: Model, machine: Machine, batch: int
) -> None:
    found = search(model, machine, batch, top=8, costs="physical", by_layer=False)
    bound = search(model, machine, batch, top=1, costs="physical", by_layer=True).bound
    assert bound is not None
    rng = np.random.default_rng(22)
    changed = 0
    for old in found.predictions:
        new = filled(old)
        if int(resolve(old.plan).pipeline.size) > 1:
            assert new is old
            continue
        priced = mixes(old.plan)
        for place in map(tuple, rng.integers(priced.fits.shape, size=(2, 3)).tolist()):
            one = predict(priced.at(place))
            if not one.use.recomputed:
                assert one.step_time_s == pytest.approx(priced.step_s[place], rel=CLOSE)
            assert bool(one.fits and not one.use.recomputed) == priced.fits[place]
        best_s = float(np.min(priced.step_s, where=priced.fits, initial=np.inf))
        assert best_s >= bound.step_time_s
        if new is old:
            assert old.step_time_s * (1 - WORTH) <= best_s * (1 + CLOSE)
            continue
        changed += 1
        assert new.step_time_s == pytest.approx(best_s, rel=CLOSE)
        less, more = new.plan.remat.groups
        kept = [predict(replace(old.plan, remat=Remat.of(group.save))) for group in (less, more)]
        assert kept[0].hbm["activations_bytes"] < kept[1].hbm["activations_bytes"]
        # One more round of layers that keep as much does not fit, or is not there.
        each = model.round_layers
        if less.layers > each:
            further = (
                replace(less, layers=less.layers - each),
                replace(more, layers=more.layers + each),
            )
            one = predict(replace(new.plan, remat=Remat(further)))
            assert one.use.recomputed or not one.fits
    assert changed
