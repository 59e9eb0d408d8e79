"""The same programs as XLA dumps them, and what only programs of others have."""

from __future__ import annotations

import re

import hlo_samples as samples
import pytest
from test_damage import totals, transfers

from shardsim.program.schedule import Copy, Move, Start, Work
from shardsim.xla.hlo import CompiledProgram, HloError, read_hlo
from shardsim.xla.hlo.text import parse_module
from shardsim.xla.replay import replay

_ELEMENT = re.compile(
    r"  (%[\w.\-]+) = \S.* get-tuple-element\((%[\w.\-]+)\), index=(\d+)", re.MULTILINE
)
_CALL = re.compile(r"%([\w.\-]+) \((.*)\) -> (.*) \{$")


def with_short_elements(text: str) -> str:
    """Return a text in which elements of tuples are written where they are read."""
    parts = []
    for part in re.split(r"(?<=\n)(?=\}|ENTRY |%)", text):
        short = {name: f"{source}#{place}" for name, source, place in _ELEMENT.findall(part)}
        lines = [line for line in part.splitlines(True) if not _ELEMENT.match(line)]
        words = re.split(r"(%[\w.\-]+(?=[,)]))", "".join(lines))
        parts.append("".join(short.get(word, word) for word in words))
    return "".join(parts)


def with_async_calls(text: str) -> str:
    """Return a text in which calls on the SparseCore are an async-start of one call each."""
    called = {
        match[1]
        for line in text.splitlines()
        if " call-start(" in line and (match := re.search(r"(?:to_apply|calls)=%([\w.\-]+)", line))
    }
    lines = []
    header = ""
    for line in text.splitlines():
        line = line.replace(" call-done(", " async-done(")
        if " call-start(" in line:
            line = line.replace(" call-start(", " async-start(")
            line = re.sub(r"(?:to_apply|calls)=%([\w.\-]+)", r"calls=%\1.async", line)
        lines.append(line)
        header = line if _CALL.match(line) else header
        found = _CALL.match(header)
        if line.startswith("}") and found and found[1] in called:
            given = re.findall(r"([\w.\-]+): ((?:[^,\[(]|\[[^\]]*\]|\([^)]*\))+)", found[2])
            lines += ["", f"%{found[1]}.async ({found[2]}) -> {found[3]} {{"]
            for number, (name, shape) in enumerate(given):
                lines.append(f"  %{name} = {shape} parameter({number})")
            names = ", ".join(f"%{name}" for name, _ in given)
            lines.append(
                f"  ROOT %{found[1]}.call = {found[3]} call({names}), to_apply=%{found[1]}"
            )
            lines.append('}, execution_thread="sparsecore"')
            header = ""
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["llama-microbatches", "llama-partitioned", "matmuls"])
def test_elements_of_tuples_may_stand_where_they_are_read(name: str) -> None:
    text = with_short_elements(samples.text_of(name))
    assert text.count("#") > 10 or name == "matmuls"
    assert totals(read_hlo(text, samples.mesh_of(name))) == totals(samples.compiled(name))


def test_calls_may_be_started_as_computations_of_one_call() -> None:
    name = "llama-sparsecore"
    text = with_async_calls(samples.text_of(name))
    assert " call-start(" not in text
    assert text.count(" async-start(") == samples.text_of(name).count(" call-start(")
    found, before = read_hlo(text, samples.mesh_of(name)), samples.compiled(name)
    assert totals(found) == totals(before)
    assert transfers(found) == transfers(before)


def test_an_element_that_a_tuple_lacks_is_an_error_with_its_line() -> None:
    text = with_short_elements(samples.text_of("llama-microbatches"))
    place = text.index("#")
    end = place + len(re.match(r"#\d+", text[place:])[0])  # type: ignore[index]
    with pytest.raises(HloError, match=r"line [0-9]+: .*has no element 99"):
        read_hlo(f"{text[:place]}#99{text[end:]}", samples.mesh_of("llama-microbatches"))


CHAIN = """HloModule steps, is_scheduled=true, num_partitions=4

%start (p: bf16[8,128], x: bf16[256,256], y: bf16[256,256]) -> (bf16[256,256], bf16[32,128]) {
  %p = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %x = bf16[256,256]{1,0:T(8,128)} parameter(1)
  %y = bf16[256,256]{1,0:T(8,128)} parameter(2)
  %gather = bf16[32,128]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  %begun = (bf16[8,128]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)}) custom-call(%gather), \
custom_call_target="AsyncCollectiveStart"
  %made = bf16[32,128]{1,0:T(8,128)} get-tuple-element(%begun), index=1
  %dot = bf16[256,256]{1,0:T(8,128)} dot(%x, %y), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  ROOT %both = (bf16[256,256]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)}) tuple(%dot, %made)
}

%step (p: bf16[8,128], x: bf16[256,256]) -> bf16[256,256] {
  %p = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %x = bf16[256,256]{1,0:T(8,128)} parameter(1)
  %gather = bf16[32,128]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %dot = bf16[256,256]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%end (p: bf16[8,128], o: bf16[32,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %o = bf16[32,128]{1,0:T(8,128)} parameter(1)
  %gather = bf16[32,128]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %ended = bf16[32,128]{1,0:T(8,128)} custom-call(%gather, %o, %o), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[8,128], x: bf16[256,256]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %x = bf16[256,256]{1,0:T(8,128)} parameter(1)
  %begin = (bf16[256,256]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)}) fusion(%p, %x, %x), \
kind=kOutput, calls=%start, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %z = bf16[256,256]{1,0:T(8,128)} get-tuple-element(%begin), index=0
  %o = bf16[32,128]{1,0:T(8,128)} get-tuple-element(%begin), index=1
  %on = bf16[256,256]{1,0:T(8,128)} fusion(%p, %z), kind=kOutput, calls=%step, \
backend_config={"window_config":{"estimated_cycles":"3000"}}
  ROOT %done = bf16[32,128]{1,0:T(8,128)} fusion(%p, %o), kind=kOutput, calls=%end
}
"""


def test_a_fusion_may_begin_a_chain_and_multiply_too() -> None:
    found = read_hlo(CHAIN, {"a": 4})
    (gather,) = found.collectives
    assert (gather.kind, gather.count, gather.array_bytes) == ("all-gather", 1, 32 * 128 * 2)
    assert found.flops == 2 * 2.0 * 256**3
    (block,) = found.schedule.blocks
    kinds = [type(task).__name__ for task in block.tasks]
    assert kinds == ["Start", "Work", "Work", "Await"]


def test_a_chain_whose_start_is_gone_is_an_error() -> None:
    with pytest.raises(HloError, match="chain 7 was not started"):
        read_hlo(CHAIN.replace("AsyncCollectiveStart", "AssumeGatherIndicesInBound"), {"a": 4})


BRANCHES = """HloModule branches, is_scheduled=true

%short (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%p), backend_config={"window_config":\
{"estimated_cycles":"10"}}
}

%long (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %e = f32[8,128]{1,0:T(8,128)} exponential(%q), backend_config={"window_config":\
{"estimated_cycles":"700"}}
}

ENTRY %main (c: pred[], x: f32[8,128]) -> f32[8,128] {
  %c = pred[] parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %r = f32[8,128]{1,0:T(8,128)} conditional(%c, %x, %x), true_computation=%short, \
false_computation=%long
}
"""


def test_of_branches_the_longest_counts() -> None:
    found = read_hlo(BRANCHES, {"a": 1})
    assert found.cycles == 700
    assert found.schedule.warnings == ("%r: counted as the longest of its 2 branches",)


def test_places_of_older_texts() -> None:
    old = BRANCHES.replace(
        "negate(%p)",
        'negate(%p), metadata={op_name="jit(f)/neg" source_file="/home/me/model.py" source_line=7}',
    )
    module = parse_module(old)
    (item,) = (one for one in module.homes if one.opcode == "negate")
    (frame,) = module.frames.stack(item.stack_frame_id)
    assert (frame.file, frame.line) == ("/home/me/model.py", 7)


def test_transfers_with_the_host_are_read_and_named() -> None:
    text = BRANCHES.replace(
        "  ROOT %r =",
        "  %t = token[] after-all()\n"
        "  %s = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%x, %t), is_host_transfer=true\n"
        "  %d = token[] send-done(%s), is_host_transfer=true\n"
        "  ROOT %r =",
    )
    warnings = read_hlo(text, {"a": 1}).schedule.warnings
    assert "%s: send, a transfer to or from the host, has no price" in warnings


def moves(compiled: CompiledProgram) -> int:
    """Return how many moves a schedule has, started ones too."""
    tasks = [task for block in compiled.schedule.blocks for task in block.tasks]
    moved = [task.task if isinstance(task, Start) else task for task in tasks]
    assert any(isinstance(task, Work) for task in tasks)
    return sum(isinstance(task, Move) for task in moved)


def test_each_collective_is_one_move_and_has_one_price() -> None:
    name = "llama-sparsecore"
    plan, found = samples.plan_of(name), samples.compiled(name)
    assert moves(found) == len(found.collectives)
    assert len(replay(plan.machine, plan, found).collective_costs) == len(found.collectives)


OFFLOAD = """HloModule offload, is_scheduled=true

ENTRY %main (h: bf16[4,64,128], p: bf16[1,64,128], i: s32[]) -> bf16[1,64,128] {
  %h = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %p = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %out = ((bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,64,128]{2,1,0:T(8,128)(2,1)}, s32[], \
s32[], s32[]), bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]) \
dynamic-update-slice-start(%h, %p, %i, %i, %i)
  %kept = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%out)
  %in = ((bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[], s32[], s32[]), \
bf16[1,64,128]{2,1,0:T(8,128)(2,1)}, u32[]) dynamic-slice-start(%kept, %i, %i, %i), \
dynamic_slice_sizes={1,64,128}
  ROOT %back = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%in)
}
"""


# As libtpu 0.0.52 writes it.
OFFLOAD_IN_FULL = """HloModule offload, is_scheduled=true

%put (a: bf16[4,64,128], b: bf16[1,64,128], c: s32[]) -> bf16[4,64,128] {
  %a = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %b = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = s32[]{:T(128)} parameter(2)
  ROOT %d = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice(%a, %b, %c, %c, %c)
}

%get (e: bf16[4,64,128], f: s32[]) -> bf16[1,64,128] {
  %e = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %f = s32[]{:T(128)} parameter(1)
  ROOT %g = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%e, %f, %f, %f), \
dynamic_slice_sizes={1,64,128}
}

ENTRY %main (h: bf16[4,64,128], p: bf16[1,64,128], i: s32[]) -> bf16[1,64,128] {
  %h = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %p = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %out = ((bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,64,128]{2,1,0:T(8,128)(2,1)}, \
s32[]), bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]) async-start(%h, %p, %i), calls=%put
  %kept = bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)} async-done(%out)
  %in = ((bf16[4,64,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[]), \
bf16[1,64,128]{2,1,0:T(8,128)(2,1)}, u32[]) async-start(%kept, %i), calls=%get
  ROOT %back = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} async-done(%in)
}
"""


@pytest.mark.parametrize("text", [OFFLOAD, OFFLOAD_IN_FULL], ids=["short", "in full"])
def test_pieces_go_to_the_host_and_come_back(text: str) -> None:
    tasks = read_hlo(text, {"a": 1}).schedule.blocks[0].tasks
    started = [task.task for task in tasks if isinstance(task, Start)]
    assert [type(task).__name__ for task in tasks] == ["Start", "Await"] * 2
    assert [task.host_bytes for task in started if isinstance(task, Copy)] == [64 * 128 * 2] * 2


@pytest.mark.parametrize("size", ["bf16[9,64,128]", "bf16[1,64,256]"])
def test_a_piece_that_does_not_fit_is_an_error(size: str) -> None:
    with pytest.raises(HloError, match="does not fit its operands"):
        read_hlo(OFFLOAD.replace("bf16[1,64,128]", size), {"a": 1})
