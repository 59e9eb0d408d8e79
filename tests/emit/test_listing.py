"""Reading the collectives of compiled programs."""

from __future__ import annotations

import pytest

from shardsim.xla.compare import Key, Traffic, compiled_purpose, differences, table
from shardsim.xla.entries import Compiled, sent_bytes
from shardsim.xla.listing import list_collectives

MESH = {"data": 2, "model": 4}

PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %permuted = f32[8,4]{1,0} collective-permute(%v), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, \
metadata={op_name="jit(step)/while/body/tensor_input/ppermute"}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %permuted)
}

%condition (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8,4], b: bf16[2,4]) -> f32[] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[2,4]{1,0} parameter(1)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body ANNOTATION
  %whole = bf16[8,4]{1,0} all-gather(%b), channel_id=2, GROUPS, dimensions={0}, \
metadata={op_name="jit(step)/transpose(jvp(gather_weights))/all_gather"}
  %both = (f32[8,4]{1,0}, /*index=1*/f32[16]{0}) all-reduce(%a, %c), channel_id=3, \
replica_groups={}, to_apply=%add
  %part = f32[2,4]{1,0} reduce-scatter(%a), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, to_apply=%add
  ROOT %r = f32[] constant(0)
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


def entries(groups: str = MODEL_GROUPS[0], annotation: str = "") -> dict[str, Compiled]:
    text = PROGRAM.replace("GROUPS", groups).replace(" ANNOTATION", annotation)
    return {entry.kind: entry for entry in list_collectives(text, MESH)}


@pytest.mark.parametrize("groups", MODEL_GROUPS)
def test_groups_along_the_inner_axis(groups: str) -> None:
    found = entries(groups)["all-gather"]
    assert found.mesh_axes == ("model",)
    assert found.sent_bytes == 8 * 4 * 2 * 3 / 4
    assert found.count == 1


@pytest.mark.parametrize("groups", DATA_GROUPS)
def test_groups_along_the_outer_axis(groups: str) -> None:
    found = entries(groups)["all-gather"]
    assert found.mesh_axes == ("data",)
    assert found.sent_bytes == 8 * 4 * 2 / 2


def test_no_groups_are_all_devices_and_a_tuple_is_summed() -> None:
    found = entries()["all-reduce"]
    assert found.mesh_axes == ("data", "model")
    assert found.sent_bytes == (32 + 16) * 4 * 2 * 7 / 8


def test_a_reduce_scatter_starts_from_the_whole_array() -> None:
    assert entries()["reduce-scatter"].sent_bytes == 2 * 4 * 4 * 3


def test_a_loop_runs_as_often_as_annotated_or_as_it_counts() -> None:
    assert entries()["permute"].count == 3
    annotated = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert entries(annotation=annotated)["permute"].count == 5
    assert entries()["permute"].mesh_axes == ("model",)
    assert entries()["permute"].sent_bytes == 8 * 4 * 4


def test_the_scope_says_what_a_collective_is_for() -> None:
    assert compiled_purpose(entries()["all-gather"].op_name) == "weights"
    assert compiled_purpose(entries()["permute"].op_name) == "block"
    assert compiled_purpose("jit(step)/add") == "other"


def test_sent_bytes() -> None:
    assert sent_bytes("all-gather", 80, 4) == 60
    assert sent_bytes("reduce-scatter", 80, 4) == 60
    assert sent_bytes("all-reduce", 80, 4) == 120
    assert sent_bytes("permute", 80, 2) == 80


def test_the_table_joins_both_sides() -> None:
    key, small = Key("all-gather", ("model",), "block"), Key("all-reduce", ("model",), "loss")
    plan = {key: Traffic(100.0, 2)}
    found = {key: Traffic(120.0, 3), small: Traffic(1.0, 1)}
    (row,) = table(plan, found)
    assert (row["planned_bytes"], row["compiled_bytes"]) == (100.0, 120.0)
    assert (row["planned_count"], row["compiled_count"]) == (2, 3)
    assert differences(plan, found)[key] == (100.0, 120.0)
    assert not differences(plan, {key: Traffic(100.00005, 2)})
