"""Values of many remat policies at once are those of each alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import axis_layout
from hypothesis import given
from hypothesis import strategies as st

from shardsim.plan.layout import ROLES, Layout
from shardsim.plan.remat import TENSORS
from shardsim.program.blocks import over_policies

SHAPES = [(), (1,), (3,), (2, 1), (1, 3), (2, 3), (2, 1, 3)]


@given(
    st.lists(st.sampled_from(SHAPES), min_size=len(TENSORS), max_size=len(TENSORS)),
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
)
def test_over_policies_is_each_policy_alone(
    shapes: list[tuple[int, ...]], sizes: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    flags = {
        name: rng.integers(2, size=shape) > 0 for name, shape in zip(TENSORS, shapes, strict=True)
    }
    kept: dict[str, Any] = {f"keep_{name}": flag for name, flag in flags.items()}
    layout = Layout(**{role: axis_layout(1) for role in ROLES}, **kept)

    def value(names: frozenset[str]) -> Any:
        """Return something else for each policy and each of `sizes`."""
        number = sum(10.0**place for place, name in enumerate(TENSORS) if name in names)
        return number + np.arange(np.prod(sizes, dtype=int)).reshape(sizes) / 16

    whole = np.broadcast_shapes(sizes, *shapes)
    found = np.broadcast_to(over_policies(layout, value), whole)
    for place in np.ndindex(whole):
        names = frozenset(
            name for name, flag in flags.items() if np.broadcast_to(flag, whole)[place]
        )
        assert found[place] == np.broadcast_to(value(names), whole)[place]
