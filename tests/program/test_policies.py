"""Values of many remat policies at once are those of each alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardsim.plan.layout import Kept
from shardsim.plan.remat import TENSORS
from shardsim.program.blocks import over_policies

SHAPES = [(), (1,), (3,), (2, 1), (1, 3), (2, 3), (2, 1, 3)]


@given(
    st.lists(st.frozensets(st.sampled_from(TENSORS)), min_size=6, max_size=6),
    st.sampled_from(SHAPES),
    st.sampled_from(SHAPES),
)
def test_over_policies_is_each_policy_alone(
    policies: list[frozenset[str]], shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    kept = Kept(names=tuple(policies[: np.prod(shape, dtype=int)]), shape=shape)

    def value(names: frozenset[str]) -> Any:
        """Return something else for each policy and each of `sizes`."""
        number = sum(10.0**place for place, name in enumerate(TENSORS) if name in names)
        return number + np.arange(np.prod(sizes, dtype=int)).reshape(sizes) / 16

    whole = np.broadcast_shapes(sizes, shape)
    found = np.broadcast_to(over_policies(kept, value), whole)
    numbers = np.broadcast_to(np.arange(len(kept.names)).reshape(shape), whole)
    for place in np.ndindex(whole):
        assert found[place] == np.broadcast_to(value(kept.names[numbers[place]]), whole)[place]
