"""Permutes of compiled programs: every member sends to the one so many places further."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardsim.cost.meshlinks import stage_steps
from shardsim.simulate.load import Load, Table

if TYPE_CHECKING:
    from shardsim.simulate.groups import Groups


def permuted(groups: Groups, shift: int) -> Table:
    """Return one message from every member to the one `shift` further, around the end.

    Along an axis where some go a step further than others, all links are held up as by those, as
    in the closed form; half way around an axis all go in the direction of the shift. Groups that
    know no order of their axes count along their ring.
    """
    load = Load(groups.topology, groups.count)
    owners = np.repeat(np.arange(groups.count), groups.size)
    if not groups.order:
        sources = groups.in_ring
        targets = np.roll(sources, -shift, axis=1)
        load.messages(sources.reshape(-1), targets.reshape(-1), owners, 1.0)
        return load.table("permute", 1)
    way = 1 if shift > 0 else -1
    grid = groups.members.reshape(groups.count, *groups.factors)
    places = [axis + 1 for axis in groups.order]
    stages = stage_steps([groups.factors[place] for place in places], shift)
    hops = np.zeros(groups.count, dtype=np.int64)
    for place, cases in zip(places, stages, strict=True):
        steps, most_around, _ = max(cases, key=lambda case: case[1])
        if steps == 0:
            continue
        moved = sum(around * share for _, around, share in cases) / most_around
        targets = np.roll(grid, -steps * way, axis=place + 1)
        load.longest[:] = 0
        load.messages(grid.reshape(-1), targets.reshape(-1), owners, 1.0, moved, half_way=way)
        hops += load.longest
    load.longest = hops
    return load.table("permute", 1)
