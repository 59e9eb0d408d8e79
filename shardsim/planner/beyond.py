"""Plans whose weights, optimizer state and gradients alone exceed HBM: ruled out before what layers
hold is counted, which takes most of a search. The leanest is found only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shardsim.planner.meshes import Array
from shardsim.planner.space import Part


@dataclass(frozen=True)
class Beyond:
    """Parts of the space of one slice in which nothing fits.

    `peaks` returns the least HBM of each pair of a part, of its legal plans: [pairs], in bytes.
    """

    peaks: Callable[[Part], Array]
    parts: list[tuple[Part, Array]] = field(default_factory=list)

    def add(self, part: Part, state: Array) -> None:
        """Note a part, with the least state of each pair: [pairs], in bytes."""
        if part.pairs:
            self.parts.append((part, state))

    def smallest(self, known: float) -> float:
        """Return the least HBM that one of the plans needs, or what is `known` if that is less."""
        for part, state in sorted(self.parts, key=lambda one: float(one[1].min())):
            leaner = np.flatnonzero(state < known)
            if len(leaner):
                known = min(known, float(self.peaks(part.take(leaner)).min()))
        return known
