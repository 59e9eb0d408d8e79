"""Plans whose layers lie on pipeline stages, alone on their links, in slices and over them."""

from __future__ import annotations

from math import prod
from typing import Any

from building import MODELS, build, is_legal
from hypothesis import assume
from hypothesis import strategies as st

from shardsim.plan import Overlap, Plan
from shardsim.plan.plan import PIPELINE_SCHEDULES, TICKS

STAGES: tuple[tuple[str, dict[str, dict[str, int]]], ...] = (
    ("v5e:4x4", {"pipeline": {"x": 2}, "fsdp": {"y": 4}, "data": {"x": 2}}),
    ("v5e:4x4", {"pipeline": {"x": 4}, "fsdp": {"y": 4}}),
    ("v4:2x2x4", {"pipeline": {"z": 4}, "tensor": {"x": 2, "y": 2}}),
    ("v4:2x2x4", {"pipeline": {"z": 4}, "data": {"x": 2, "y": 2}}),
    ("2*v4:2x2x4", {"pipeline": {"dcn": 2}, "fsdp": {"x": 2, "y": 2, "z": 4}}),
    ("4*v5e:4x4", {"pipeline": {"dcn": 4}, "fsdp": {"x": 4}, "tensor": {"y": 4}}),
    ("4*v5e:4x4", {"pipeline": {"dcn": 2}, "data": {"dcn": 2}, "tensor": {"x": 4, "y": 4}}),
    # Two stages to a slice: sends between them are faster.
    ("2*v4:2x2x4", {"pipeline": {"dcn": 2, "z": 2}, "data": {"z": 2}, "tensor": {"x": 2, "y": 2}}),
)


def layers_of(pipeline: dict[str, int], schedule: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the layers of stages, of eight in all: alike or not, an end on a stage of its own."""
    stages = prod(pipeline.values())
    uneven = {
        2: [(5, 3), (2, 6), (8, 0)],
        4: [(1, 3, 3, 1), (0, 4, 4, 0), (3, 2, 2, 1), (0, 0, 0, 8)],
    }
    return st.sampled_from([(), *([] if schedule in TICKS else uneven[stages])])


@st.composite
def staged(draw: st.DrawFn, **fixed: Any) -> Plan:
    """Draw a legal plan with stages."""
    model = draw(st.sampled_from(MODELS))
    machine, where = draw(st.sampled_from(STAGES))
    groups = 1
    for role in ("data", "fsdp"):
        for factor in where.get(role, {}).values():
            groups *= factor
    forward = draw(st.booleans())
    schedule = "1f1b" if forward else draw(st.sampled_from(PIPELINE_SCHEDULES))
    microbatches = draw(st.sampled_from([1, 2, 4, 6, 8] if forward else [2, 4, 6, 8, 12]))
    options: dict[str, Any] = {
        "forward_only": forward,
        "pipeline_schedule": schedule,
        "pipeline_interleave": draw(st.sampled_from([1, 1, 2])),
        "stage_layers": draw(layers_of(where["pipeline"], schedule)),
        "microbatches": microbatches,
        "residual": draw(st.sampled_from(["", "seq"])),
        "overlap": Overlap(weights=draw(st.booleans()), gradients=draw(st.booleans())),
    }
    batch = groups * microbatches * draw(st.sampled_from([4, 12]))
    plan = build(model, machine, batch, where, **(options | fixed))
    assume(is_legal(plan))
    return plan
