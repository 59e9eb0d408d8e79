"""Programs compiled for host devices: the reader of TPU programs reads them too."""

from __future__ import annotations

import pytest

from shardsim.xla.hlo import HloError, read_hlo
from shardsim.xla.hlo.collect import CompiledCollective

MESH = {"data": 2, "model": 4}

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] STEP(%i, %one)
  %permuted = f32[8,4]{1,0} collective-permute(%v), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, \
metadata={op_name="jit(step)/while/body/tensor_input/ppermute"}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%next, %permuted)
}

%condition (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8,4], b: bf16[2,4], c: f32[16]) -> bf16[B,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[2,4]{1,0} parameter(1)
  %c = f32[16]{0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body ANNOTATION
  %both = (f32[8,4]{1,0}, /*index=1*/f32[16]{0}) all-reduce(%a, %c), channel_id=3, \
replica_groups={}, to_apply=%add
  %part = f32[2,4]{1,0} reduce-scatter(%a), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, to_apply=%add, control-predecessors={%loop, %both}
  ROOT %whole = bf16[B,4]{1,0} all-gather(%b), channel_id=2, GROUPS, dimensions={0}, \
metadata={op_name="jit(step)/transpose(jvp(gather_weights))/all_gather"}
}
"""

MODEL_GROUPS = [
    "replica_groups={{0,1,2,3},{4,5,6,7}}",
    "replica_groups=[2,4]<=[8]",
    "replica_groups=mesh['a'=2,'b'=4] {'b'}",
    "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}",
    "replica_groups=mesh['a'=8] {'a':(2)4}",
]
DATA_GROUPS = [
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
    "replica_groups=[4,2]<=[2,4]T(1,0)",
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
]


def entries(
    groups: str = MODEL_GROUPS[0], members: int = 4, annotation: str = "", step: str = "add"
) -> dict[str, CompiledCollective]:
    """Return the collectives of the program by kind."""
    text = PROGRAM.replace("STEP", step)
    text = text.replace("GROUPS", groups).replace("bf16[B,4]", f"bf16[{2 * members},4]")
    return {
        one.kind: one for one in read_hlo(text.replace(" ANNOTATION", annotation), MESH).collectives
    }


@pytest.mark.parametrize("groups", MODEL_GROUPS)
def test_groups_along_the_inner_axis(groups: str) -> None:
    found = entries(groups)["all-gather"]
    assert found.mesh_axes == ("model",)
    assert found.sent_bytes == 8 * 4 * 2 * 3 / 4
    assert found.count == 1


@pytest.mark.parametrize("groups", DATA_GROUPS)
def test_groups_along_the_outer_axis(groups: str) -> None:
    found = entries(groups, members=2)["all-gather"]
    assert found.mesh_axes == ("data",)
    assert found.sent_bytes == 4 * 4 * 2 / 2


def test_no_groups_are_all_devices_and_a_tuple_is_summed() -> None:
    found = entries()["all-reduce"]
    assert found.mesh_axes == ("data", "model")
    assert found.sent_bytes == (32 + 16) * 4 * 2 * 7 / 8


def test_a_reduce_scatter_starts_from_the_whole_array() -> None:
    assert entries()["reduce-scatter"].sent_bytes == 2 * 4 * 4 * 3


def test_a_loop_runs_as_often_as_it_counts_or_as_annotated() -> None:
    found = entries()["permute"]
    assert found.count == 3
    assert found.mesh_axes == ("model",)
    assert found.sent_bytes == 8 * 4 * 4
    annotated = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert entries(step="multiply", annotation=annotated)["permute"].count == 5
    with pytest.raises(HloError, match="counts 3 trips, but is annotated with 5"):
        entries(annotation=annotated)


def test_the_scope_says_what_a_collective_is_for() -> None:
    found = entries()
    assert found["all-gather"].purpose == "weights"
    assert found["permute"].purpose == "block"
    assert found["all-reduce"].purpose == "other"


NAMED = """HloModule m, is_scheduled=true, num_partitions=2

FileNames
1 "train.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %p = f32[4]{0} negate(%x), metadata={op_name="jit(step)/gather_weights/neg" stack_frame_id=1}
  %s = f32[4]{0} sine(%p), metadata={op_name="jit(step)/tensor_input/sin" stack_frame_id=1}
  ROOT %g = f32[8]{0} all-gather(%s), replica_groups={{0,1}}, dimensions={0} NAME
}
"""


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        (', metadata={op_name="jit(step)/update/add" stack_frame_id=1}', "updated parameters"),
        ("", "weights"),
    ],
)
def test_only_what_lost_its_name_takes_a_neighbours(name: str, purpose: str) -> None:
    """Of those one that gathers weights, though it is not the nearest."""
    (found,) = read_hlo(NAMED.replace(" NAME", name), {"data": 2}).collectives
    assert found.purpose == purpose
    assert found.source == "train.py:7 step"
