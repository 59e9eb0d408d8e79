"""Compiled train steps, simulated event by event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compiled_events
import hlo_samples as samples
import pytest

from shardsim.simulate.compiled import simulate_compiled
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.topology import Fault

HALF = Perturbation(faults=(Fault(device=0, port=0, factor=0.5),))
SLOW = Perturbation(slowdowns=((3, 1.2),))


@pytest.mark.parametrize("name", samples.DATA)
def test_real_programs_agree_with_the_closed_form(name: str) -> None:
    plan, made = samples.plan_of(name), samples.compiled(name)
    found = simulate_compiled(plan.machine, plan, made.schedule)
    price, closed = found.replayed.price, found.closed.price
    # The gathers and scatters of SparseCore run beside each other and share links.
    near = 0.02 if name == "llama-sparsecore" else 0.01
    assert found.step_time_s == pytest.approx(float(closed.step_time_s), rel=near)
    for part in ("compute_s", "overhead_s"):
        assert getattr(price, part) == pytest.approx(getattr(closed, part))
    assert price.hbm_bound_s == pytest.approx(closed.hbm_bound_s, rel=near)
    assert sum(block.time_s for block in found.replayed.blocks) == pytest.approx(found.step_time_s)
    if not found.events.contention:
        assert found.step_time_s == pytest.approx(float(closed.step_time_s), rel=1e-3)


def test_real_programs_folded_and_unfolded() -> None:
    plan, made = samples.plan_of("vit-explicit"), samples.compiled("vit-explicit")
    options: dict[str, Any]
    for options in ({}, {"perturbation": SLOW}, {"perturbation": HALF}):
        folded = simulate_compiled(plan.machine, plan, made.schedule, **options)
        whole = simulate_compiled(plan.machine, plan, made.schedule, unfold=True, **options)
        assert folded.step_time_s == pytest.approx(whole.step_time_s, rel=1e-9)
        assert folded.events.events < whole.events.events


@pytest.mark.slow
def test_the_page_has_what_is_played_today() -> None:
    """Where this fails: python tests/xla/hlo/compiled_events.py, and put it on the page."""
    page = Path(__file__).parents[3] / "docs" / "events.md"
    assert compiled_events.table() in page.read_text(encoding="utf-8")
