"""What state alone rules out, and the least HBM that a plan needs where none fits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from building import decoder, vit
from test_search import tight, workload

from shardsim.cost.hbm import hbm_use, least_state_bytes
from shardsim.machine import parse_machine
from shardsim.model import Experts
from shardsim.planner.search import search
from shardsim.planner.space import legal_cells, parts
from shardsim.program.holds import held_by
from shardsim.program.passes import USUAL

MODELS = {
    "decoder": decoder(layers=4),
    "vit": vit(layers=4),
    "experts": decoder(layers=4, experts=Experts(number=8, top_k=2, mlp=512)),
}


@pytest.mark.parametrize("costs", ["physical", "calibrated"])
@pytest.mark.parametrize("host", [{}, {"offload_optimizer": True}, {"offload_parameters": True}])
@pytest.mark.parametrize("name", MODELS)
def test_no_plan_needs_less_than_its_state(name: str, host: dict[str, Any], costs: str) -> None:
    machine, model = parse_machine("v5e:2x2"), MODELS[name]
    work = replace(workload(model, 64), **host)
    holds = held_by(USUAL[costs], machine.chip).least
    compared = 0
    for part in parts(model, [machine], 64, model.sequence, attention=work.attention):
        layout = part.layout()
        use = hbm_use(machine, work, layout, holds)
        state = np.broadcast_to(least_state_bytes(machine, work, layout, holds), part.shape)
        legal, _ = legal_cells(part, layout, model, 64, model.sequence)
        assert (state <= np.broadcast_to(use.thrifty_bytes, part.shape) * (1 + 1e-12))[legal].all()
        compared += int(legal.sum())
    assert compared > 1000


def test_the_leanest_of_none_is_the_same_however_slices_are_searched() -> None:
    """As weights alone rule out most plans of one slice and none of another."""
    slices = [tight("v5e:2x2", 0.02), tight("v5e:2x4", 0.2), parse_machine("v5e:2x2")]
    model = decoder(layers=4)
    alone = [search(model, one, 64, top=1, max_axes=2).slices[0] for one in slices]
    with ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            found = search(model, slices, 64, top=1, max_axes=2, executor=executor)
            for one, of in zip(alone, found.slices, strict=True):
                # Alone, hosts were tried as well where none fits.
                assert of.smallest_peak_bytes >= one.smallest_peak_bytes
                assert np.isfinite(of.smallest_peak_bytes)
                assert (of.fit > 0) == (
                    of.smallest_peak_bytes <= of.machine.chip.hbm_usable_bytes_per_device
                )
    bare = search(model, slices[0], 64, top=1, max_axes=2, leanest=False)
    assert bare.smallest_peak_bytes > alone[0].smallest_peak_bytes
