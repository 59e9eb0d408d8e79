"""Whatever the topology and the plan: bytes arrive, no link is over its rate, nobody is stuck."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from alone import Alone, run_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardsim.machine import Machine, parse_machine
from shardsim.plan import load_plan
from shardsim.plan.layout import AxisLayout
from shardsim.simulate import simulate_plan
from shardsim.simulate.fluid import Links, Transfer
from shardsim.simulate.topology import Fault

V4 = parse_machine("v4:4x4x4").chip
V5E = parse_machine("v5e:4x4").chip
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Small slices, wrapped, open and twisted, one or several."""
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(2, 2, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)]))
        twisted = shape in ((4, 4, 8), (4, 8, 8)) and draw(st.booleans())
        slices = 1 if math.prod(shape) > 64 else draw(st.integers(1, 2))
        return Machine(chip=V4, shape=shape, twisted=twisted, slices=slices)
    shape = draw(st.sampled_from([(4, 4), (4, 8), (8, 16), (1, 4)]))
    return Machine(chip=V5E, shape=shape, slices=draw(st.integers(1, 2)))


@st.composite
def layouts(draw: st.DrawFn, machine: Machine) -> AxisLayout:
    """Any regular split of every axis."""
    factors, strides = [], []
    for axis in machine.axes:
        splits = [n for n in range(1, axis.length + 1) if axis.length % n == 0]
        factor = draw(st.sampled_from(splits))
        inner = [n for n in splits if (axis.length // factor) % n == 0]
        factors.append(factor)
        strides.append(draw(st.sampled_from(inner)) if factor > 1 else 1)
    slices = draw(st.sampled_from([1, machine.slices]))
    return AxisLayout(factors=tuple(factors), strides=tuple(strides), slices=slices)


def check(links: Links, elapsed_s: float) -> None:
    np.testing.assert_allclose(links.bytes_on, links.bytes_off)
    assert np.all(links.streams == 0)
    assert np.all(links.busy_s <= elapsed_s * (1 + 1e-9))


def on_the_wire(run: Alone) -> float:
    counts = run.folded.link_counts
    return float(np.sum(run.links.bytes_off * counts))


@quick
@given(st.data())
def test_bytes_are_conserved_and_no_link_is_over_its_rate(data: st.DataObject) -> None:
    machine = data.draw(machines())
    layout = data.draw(layouts(machine))
    kind = data.draw(st.sampled_from(KINDS))
    size = 2.0 ** data.draw(st.integers(8, 30))
    run = run_alone(machine, layout, kind, size)
    check(run.links, run.time_s)
    if kind == "all-gather":
        # What members receive crosses at least one link each.
        received = size * (layout.size - 1) / layout.size * machine.devices
        assert on_the_wire(run) >= received * (1 - 1e-9)


@quick
@given(st.data())
def test_folding_changes_nothing_even_with_a_broken_link(data: st.DataObject) -> None:
    machine = data.draw(machines())
    layout = data.draw(layouts(machine))
    kind = data.draw(st.sampled_from(KINDS))
    faults: tuple[Fault, ...] = ()
    if machine.shape not in ((1, 4), (2, 2, 4)):
        wanted = Fault(
            device=data.draw(st.integers(0, machine.chips_per_slice - 1)),
            port=0,
            factor=data.draw(st.sampled_from([0.0, 0.5])),
        )
        last = machine.shape[0] - 1
        open_end = not machine.axes[0].wrapped
        first = wanted.device // (machine.chips_per_slice // machine.shape[0])
        faults = () if open_end and first == last else (wanted,)
    folded = run_alone(machine, layout, kind, 2.0**22, faults=faults)
    whole = run_alone(machine, layout, kind, 2.0**22, faults=faults, unfold=True)
    check(folded.links, folded.time_s)
    check(whole.links, whole.time_s)
    assert folded.time_s == pytest.approx(whole.time_s, rel=1e-9)
    assert on_the_wire(folded) == pytest.approx(on_the_wire(whole), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(
        [
            "vit-22b-published-tp8",
            "vit-22b-published-tp2",
            "maxtext-32b-published-v5p-2x64",
            "maxtext-512b-published-v5p-1x512",
            "llama3-70b-published-tpu7x-1x64",
        ]
    ),
    matmul=st.sampled_from(["off", "unidirectional", "bidirectional"]),
    weights=st.booleans(),
    gradients=st.booleans(),
    dcn=st.booleans(),
    microbatches=st.sampled_from([1, 2]),
)
def test_whole_steps_end_and_conserve_bytes(
    name: str, matmul: str, weights: bool, gradients: bool, dcn: bool, microbatches: int
) -> None:
    plan = load_plan(name)
    overlap = dataclasses.replace(
        plan.overlap, matmul=matmul, weights=weights, gradients=gradients, dcn=dcn
    )
    plan = dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, layers=2),
        overlap=overlap,
        microbatches=microbatches,
    )
    found = simulate_plan(plan)
    assert found.events.engine is not None
    check(found.events.engine.links, found.step_time_s)
    assert found.step_time_s >= found.time["compute_s"]


def test_no_link_is_over_its_rate_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model axis and the weights share z, with a dead link on top."""
    settle = Links._settle
    moments = 0

    def checked(self: Links, changed: Transfer, gone: bool = False) -> None:
        nonlocal moments
        settle(self, changed, gone)
        running = {t.number: t for row in self.active.values() for t in row.values()}
        load = np.zeros(len(self.rates))
        for transfer in running.values():
            route = transfer.route
            load[route.links] += transfer.rate * transfer.unit_bytes * route.loads * route.streams
        assert np.all(load <= self.rates * (1 + 1e-9))
        moments += 1

    monkeypatch.setattr(Links, "_settle", checked)
    plan = load_plan("vit-22b-published-tp4")
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, layers=1))
    simulate_plan(plan, dead_link=(0, 4))
    assert moments > 100
