"""How often loops run."""

from __future__ import annotations

import hlo_samples as samples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.xla.hlo import HloError, read_hlo
from shardsim.xla.hlo.loops import trips_of
from shardsim.xla.hlo.stacks import stack_sizes
from shardsim.xla.hlo.text import parse_module

TEXT = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %p = (s32[], f32[4]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[4]{0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %c = s32[] constant(STEP)
  %j = s32[] OPERATION(%i, %c)
  ROOT %t = (s32[], f32[4]{0}, s32[]) tuple(%j, %v, %n)
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=DIRECTION
}

%condition (q: (s32[], f32[4], s32[])) -> pred[] {
  %q = (s32[], f32[4]{0}, s32[]) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %limit = s32[] LIMIT
  ROOT %r = pred[] fusion(%k, %limit), kind=kLoop, calls=%compared
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(START)
  %moved = s32[] copy(%zero)
  %most = s32[] constant(END)
  %start = (s32[], f32[4]{0}, s32[]) tuple(%moved, %x, %most)
  %loop = (s32[], f32[4]{0}, s32[]) while(%start), condition=%condition, body=%body ANNOTATION
  ROOT %y = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def trips(
    start: int = 0,
    end: int = 48,
    step: int = 1,
    direction: str = "LT",
    operation: str = "add",
    constant: bool = True,
    annotation: str = "",
) -> int:
    """Return the trip count of one loop."""
    limit = f"constant({end})" if constant else "get-tuple-element(%q), index=2"
    text = TEXT.replace("LIMIT", limit).replace("START", str(start)).replace("END", str(end))
    text = text.replace("STEP", str(step)).replace("DIRECTION", direction)
    text = text.replace("OPERATION", operation).replace(" ANNOTATION", annotation)
    module = parse_module(text)
    entry = module.computations[module.entry]
    return trips_of(module, entry, entry["loop"]).count


def walked(start: int, end: int, step: int, direction: str) -> int | None:
    """Return the trips of the loop by running it; None if it does not end."""
    number, count = start, 0
    test = {
        "LT": int.__lt__,
        "LE": int.__le__,
        "GT": int.__gt__,
        "GE": int.__ge__,
        "NE": int.__ne__,
    }[direction]
    while test(number, end):
        number += step
        count += 1
        if count > 1000:
            return None
    return count


@given(
    start=st.integers(-9, 9),
    end=st.integers(-30, 30),
    step=st.sampled_from([-3, -2, -1, 1, 2, 3]),
    direction=st.sampled_from(["LT", "LE", "GT", "GE", "NE"]),
    constant=st.booleans(),
    subtract=st.booleans(),
)
def test_trips_are_those_of_running_the_loop(
    start: int, end: int, step: int, direction: str, constant: bool, subtract: bool
) -> None:
    operation, written = ("subtract", -step) if subtract else ("add", step)
    expected = walked(start, end, step, direction)
    if expected is not None:
        assert trips(start, end, written, direction, operation, constant) == expected
    else:
        with pytest.raises(HloError, match="no trip count"):
            trips(start, end, written, direction, operation, constant)


def test_an_annotation_must_agree() -> None:
    known = ', backend_config={"known_trip_count":{"n":"COUNT"}}'
    assert trips(annotation=known.replace("COUNT", "48")) == 48
    with pytest.raises(HloError, match="counts 48 trips, but is annotated with 47"):
        trips(annotation=known.replace("COUNT", "47"))
    assert trips(operation="multiply", annotation=known.replace("COUNT", "5")) == 5
    with pytest.raises(HloError, match="no trip count"):
        trips(operation="multiply")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit-explicit", [1, 3, 1, 3, 1]),
        ("llama-partitioned", [1, 3, 1, 3, 1]),
        ("llama-microbatches", [1, 2, 6, 2, 6, 2, 1]),
        ("matmuls", [1, 5, 1]),
    ],
)
def test_blocks_run_as_often_as_the_loops_around_them(name: str, expected: list[int]) -> None:
    program = samples.compiled(name).schedule
    assert [block.trips for block in program.blocks] == expected
    for number, block in enumerate(program.blocks):
        assert program.order.count(number) == block.trips


def test_a_loop_in_a_loop_runs_inside_it() -> None:
    order = samples.compiled("llama-microbatches").schedule.order
    assert order == (0, *(1, 2, 2, 2, 3, 4, 4, 4, 5) * 2, 6)


@pytest.mark.parametrize("name", ["vit-explicit", "llama-microbatches", "llama-partitioned"])
def test_the_stacks_of_a_loop_are_as_long_as_it_runs(name: str) -> None:
    module = samples.compiled(name).module
    seen = 0
    for computation in module.computations.values():
        for item in computation.instructions.values():
            if item.opcode == "while":
                trips = trips_of(module, computation, item)
                body = module.computations[item.attribute("body").removeprefix("%")]
                assert stack_sizes(module, body, trips.counter) == {trips.count}
                seen += 1
    assert seen >= 2


def test_a_loop_that_contradicts_its_stacks_is_said() -> None:
    text, mesh = samples.text_of("llama-partitioned"), samples.mesh_of("llama-partitioned")
    limit = "%constant.344.clone.4 = s32[]{:T(128)} constant(3)"
    assert text.count(limit) == 1
    with pytest.raises(HloError, match="runs 4 times, but walks through arrays of 3"):
        read_hlo(text.replace(limit, limit.replace("3)", "4)")), mesh)
    (warning,) = read_hlo(text.replace(limit, limit.replace("3)", "2)")), mesh).schedule.warnings
    assert "runs 2 times, but walks through arrays of 3" in warning
