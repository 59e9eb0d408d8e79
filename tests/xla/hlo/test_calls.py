"""Calls that the SparseCore runs beside the compute stream."""

from __future__ import annotations

import hlo_samples as samples
import pytest

from shardsim.program.schedule import Await, Copy, Move, Start
from shardsim.xla.compare import Comparison
from shardsim.xla.hlo import CompiledProgram, HloError, read_hlo

MESH = {"a": 4, "b": 2}
TEXT = """HloModule m, is_scheduled=true, num_partitions=8

%gather_call (p: bf16[64,128], t: token[]) -> bf16[256,128] {
  %t = token[] parameter(1)
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p), \
replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}, execution_thread="sparsecore"

%copy_call (q: bf16[60,128]) -> bf16[60,128] {
  %q = bf16[60,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copied = bf16[60,128]{0,1:T(8,128)(2,1)} copy(%q)
}, execution_thread="sparsecore"

%copy_outside (r: bf16[60,128], u: token[]) -> bf16[60,128] {
  %u = token[] parameter(1)
  %r = bf16[60,128]{1,0:T(8,128)(2,1)} parameter(0)
  %inner = ((bf16[60,128]{1,0:T(8,128)(2,1)}), bf16[60,128]{0,1:T(8,128)(2,1)}, u32[]{:S(8)}) \
call-start(%r), async_execution_thread="sparsecore", to_apply=%copy_call
  ROOT %ended = bf16[60,128]{0,1:T(8,128)(2,1)} call-done(%inner)
}, execution_thread="sparsecore"

%look_up (table: bf16[1000,128], rows: s32[16]) -> bf16[16,128] {
  %table = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %rows = s32[16]{0:T(1024)} parameter(1)
  %sure = s32[16]{0:T(1024)} custom-call(%rows), \
custom_call_target="AssumeGatherIndicesInBound"
  ROOT %rest = bf16[16,128]{1,0:T(8,128)(2,1)} gather(%table, %sure), offset_dims={1}, \
collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,128}
}

%look_up_call (s: bf16[1000,128], i: s32[16]) -> bf16[16,128] {
  %s = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[16]{0:T(1024)} parameter(1)
  ROOT %found = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%s, %i), kind=kCustom, calls=%look_up
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[64,128], y: bf16[60,128], z: bf16[1000,128], j: s32[16]) -> bf16[256,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[60,128]{1,0:T(8,128)(2,1)} parameter(1)
  %z = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(2)
  %j = s32[16]{0:T(1024)} parameter(3)
  %begun = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %token = token[] custom-call(%begun), custom_call_target="PrepareAsyncCallDone"
  %g = ((bf16[64,128]{1,0:T(8,128)(2,1)}, token[]), bf16[256,128]{1,0:T(8,128)(2,1)}) \
call-start(%x, %token), async_execution_thread="sparsecore", to_apply=%gather_call
  %c = ((bf16[60,128]{1,0:T(8,128)(2,1)}, token[]), bf16[60,128]{0,1:T(8,128)(2,1)}) \
call-start(%y, %token), async_execution_thread="sparsecore", to_apply=%copy_outside
  %l = ((bf16[1000,128]{1,0:T(8,128)(2,1)}, s32[16]{0:T(1024)}), \
bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(8)}) call-start(%z, %j), \
async_execution_thread="sparsecore", to_apply=%look_up_call
  %l.done = bf16[16,128]{1,0:T(8,128)(2,1)} call-done(%l)
  %c.done = bf16[60,128]{0,1:T(8,128)(2,1)} call-done(%c)
  ROOT %g.done = bf16[256,128]{1,0:T(8,128)(2,1)} call-done(%g)
}
"""


def read(*changes: tuple[str, str]) -> CompiledProgram:
    """Read the program with parts of its text changed, each of which stands there once."""
    text = TEXT
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return read_hlo(text, MESH)


def test_a_call_is_what_it_wraps_from_its_start_to_its_end() -> None:
    (block,) = read().schedule.blocks
    kinds = [
        (type(task.task if isinstance(task, Start) else task), task.name) for task in block.tasks
    ]
    assert kinds == [
        (Move, "g"),
        (Copy, "c"),
        (Copy, "l"),
        (Await, "l"),
        (Await, "c"),
        (Await, "g"),
    ]


def test_a_wrapped_collective_has_its_axes_and_bytes() -> None:
    (gather,) = read().collectives
    assert (gather.kind, gather.mesh_axes, gather.count) == ("all-gather", ("a",), 1)
    assert gather.asynchronous
    assert gather.array_bytes == 2 * 256 * 128
    assert gather.sent_bytes == 2 * 256 * 128 * 3 / 4


def test_what_a_call_moves_through_hbm_is_padded_and_read_by_rows() -> None:
    (block,) = read().schedule.blocks
    copies = [task.task for task in block.tasks if isinstance(task, Start)]
    moved = {task.name: task.hbm_bytes for task in copies if isinstance(task, Copy)}
    # 60 rows fill 64 in tiles of 8 rows, and 128 lanes where they are the minor dimension.
    assert moved["c"] == 2 * (64 * 128 + 128 * 128)
    assert moved["l"] == 2 * (2 * 16 * 128) + 4 * 1024  # rows read and written; indices, one tile


def test_a_copy_on_the_chip_moves_only_its_other_end() -> None:
    near = "bf16[60,128]{0,1:T(8,128)(2,1)S(1)}"
    (block,) = read(
        ("ROOT %copied = bf16[60,128]{0,1:T(8,128)(2,1)}", f"ROOT %copied = {near}")
    ).schedule.blocks
    (copy,) = (t.task for t in block.tasks if isinstance(t, Start) and t.name == "c")
    assert isinstance(copy, Copy)
    assert copy.hbm_bytes == 2 * 64 * 128


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("= bf16[60,128]{0,1:T(8,128)(2,1)} copy(%q)", "= bf16[60,128] tanh(%q)", "a call of tanh"),
        ("to_apply=%copy_outside", "to_apply=%copy_call", "does not fit its operands"),
        (", s32[16]{0:T(1024)}), bf16", ", s32[8]{0:T(1024)}), bf16", "does not fit"),
        ("u32[]{:S(8)}) call-start(%z, %j)", "s32[]) call-start(%z, %j)", "does not fit"),
        ("call-start(%x, %token)", "call-start(%x, %begun)", "does not fit"),
        ("call-start(%x, %token)", "call-start(%x)", "does not fit"),
        ("call-start(%z, %j)", "call-start(%j, %z)", "does not fit"),
        ("calls=%look_up\n", "calls=%look_up_call\n", "no computation %look_up_call before"),
        ("%g.done = bf16[256,128]", "%g.done = bf16[252,128]", "header says"),
        ("call-done(%l)", "call-done(%z)", "does not fit"),
        ("call-done(%l)", "async-done(%l)", "async-done of nothing that was started"),
        ("call-done(%inner)", "async-done(%inner)", "is not one operation"),
        (" copy(%q)", " copy(%q), sharding={replicated}\n  %more = bf16[] constant(0)", "one op"),
    ],
)
def test_what_does_not_fit_is_an_error_with_its_line(old: str, new: str, problem: str) -> None:
    with pytest.raises(HloError, match=r"HLO line [0-9]+: ") as error:
        read((old, new))
    assert problem in str(error.value)


def test_another_core_is_not_understood() -> None:
    changed = TEXT.replace('async_execution_thread="sparsecore"', 'async_execution_thread="host"')
    with pytest.raises(HloError, match='a call on "host" is not understood'):
        read_hlo(changed, MESH)
    with pytest.raises(HloError, match="without async_execution_thread"):
        read_hlo(TEXT.replace('async_execution_thread="sparsecore", ', ""), MESH)


def test_two_calls_of_one_computation_are_refused() -> None:
    again = """  %g2 = ((bf16[64,128]{1,0:T(8,128)(2,1)}, token[]), \
bf16[256,128]{1,0:T(8,128)(2,1)}) call-start(%x, %token), \
async_execution_thread="sparsecore", to_apply=%gather_call
  %g2.done = bf16[256,128]{1,0:T(8,128)(2,1)} call-done(%g2)
  %l.done"""
    with pytest.raises(HloError, match="%g2: %g starts %gather_call too"):
        read(("  %l.done", again))


def test_a_start_without_its_end_and_an_end_without_its_start() -> None:
    done = "  %l.done = bf16[16,128]{1,0:T(8,128)(2,1)} call-done(%l)\n"
    with pytest.raises(HloError, match="%l is started but never awaited"):
        read((done, ""))
    with pytest.raises(HloError, match="call-done of nothing that was started"):
        read((done, done + done.replace("%l.done", "%l.again")))


def test_the_collectives_of_a_train_step_are_the_plans() -> None:
    name = "llama-sparsecore"
    plan, text = samples.plan_of(name), samples.text_of(name)
    found = samples.compiled(name)
    accounts = {one.key: one for one in Comparison(plan, found).accounts}
    for kind in ("all-gather", "reduce-scatter"):
        for purpose in ("weights", "tables"):
            one = accounts[kind, ("fsdp",), purpose]
            assert one.same
            assert one.compiled_count == one.planned_count > 0
    # Each written in one called computation, and read once.
    calls = text.count(" call-start(")
    assert calls == text.count(" call-done(") == 46
    started = [entry for entry in found.collectives if entry.asynchronous]
    assert len({entry.name for entry in started}) == len(started) == calls
    assert sum(text.count(f" {kind}(") for kind in ("all-gather", "reduce-scatter")) == calls


SCATTER = """HloModule m, is_scheduled=true, num_partitions=8

%copy_call (q: f32[4096]) -> f32[4096] {
  %q = f32[4096]{0:T(1024)} parameter(0)
  ROOT %copied = f32[4096]{0:T(1024)} copy(%q)
}, execution_thread="sparsecore"

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}, execution_thread="sparsecore"

%scatter_call (p: f32[4096], i: s32[1024], u: f32[1024]) -> f32[4096] {
  %p = f32[4096]{0:T(1024)} parameter(0)
  %i = s32[1024]{0:T(1024)} parameter(1)
  %u = f32[1024]{0:T(1024)} parameter(2)
  ROOT %put = f32[4096]{0:T(1024)} scatter(%p, %i, %u), update_window_dims={}, \
inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%sum
}, execution_thread="sparsecore"

%outside (r: f32[4096], j: s32[1024], v: f32[1024]) -> f32[4096] {
  %r = f32[4096]{0:T(1024)} parameter(0)
  %j = s32[1024]{0:T(1024)} parameter(1)
  %v = f32[1024]{0:T(1024)} parameter(2)
  %c = ((f32[4096]{0:T(1024)}), f32[4096]{0:T(1024)}, u32[]{:S(8)}) call-start(%r), \
async_execution_thread="sparsecore", to_apply=%copy_call
  %c.done = f32[4096]{0:T(1024)} call-done(%c)
  %s = ((f32[4096]{0:T(1024)}, s32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}), \
f32[4096]{0:T(1024)}, u32[]{:S(8)}) call-start(%c.done, %j, %v), \
async_execution_thread="sparsecore", to_apply=%scatter_call
  ROOT %s.done = f32[4096]{0:T(1024)} call-done(%s)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4096], y: s32[1024], z: f32[1024]) -> f32[4096] {
  %x = f32[4096]{0:T(1024)} parameter(0)
  %y = s32[1024]{0:T(1024)} parameter(1)
  %z = f32[1024]{0:T(1024)} parameter(2)
  %o = ((f32[4096]{0:T(1024)}, s32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}), \
f32[4096]{0:T(1024)}) call-start(%x, %y, %z), async_execution_thread="sparsecore", \
to_apply=%outside
  ROOT %o.done = f32[4096]{0:T(1024)} call-done(%o)
}
"""


def test_a_scatter_and_the_copy_that_it_adds_to_are_one_transfer() -> None:
    (block,) = read_hlo(SCATTER, {"a": 8}).schedule.blocks
    (copy,) = (task.task for task in block.tasks if isinstance(task, Start))
    assert isinstance(copy, Copy)
    # Read and written twice: copied, and added to; then indices and what is added.
    assert copy.hbm_bytes == 4 * (4 * 4096 + 2 * 1024)
    with pytest.raises(HloError, match="is not one operation"):
        read_hlo(
            SCATTER.replace(
                "ROOT %copied = f32[4096]{0:T(1024)} copy(%q)",
                "ROOT %copied = f32[4096]{0:T(1024)} tanh(%q)",
            ),
            {"a": 8},
        )
