"""Addition to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Apart, Array, Stream, linear
from shardsim.graph.build import Builder
from shardsim.ops.registry import runs

if TYPE_CHECKING:
    from shardsim.ops.whole import Params, Whole

# It reads the stream and the branch; its result was counted by the matmul.
ADD = Stream(passes=2.0, ops=1.0)


def add(
    build: Builder, x: Array, branches: Sequence[Array], out: Array, *, scale: float = 1.0
) -> Array:
    """Add what branches add to the residual stream, or to `scale` times it."""
    apart = Apart(passes=ADD.passes + len(branches))
    scaled: dict[str, Any] = {} if scale == 1.0 else {"scale": scale}
    more = float(len(scaled))
    added = replace(
        ADD,
        ops=ADD.ops + more,
        gradient_ops=ADD.gradient_ops + more,
        apart=apart,
        joined=float(len(branches)),
    )
    build.add(linear([x, *branches], out, stream=added))
    build.call("add", [x, *branches], out, **scaled)
    return out


@runs("add")
def run_add(way: Whole, params: Params, call: Any, x: Any, *branches: Any) -> Any:
    """Return x plus all branches, where the residual stream lies."""
    x = x * call["scale"] if "scale" in call else x
    return way.residual(sum(branches, x))
