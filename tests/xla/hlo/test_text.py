"""The text of a module: what is read, and that damage is an error with its line."""

from __future__ import annotations

import hlo_samples as samples
import pytest

from shardsim.xla.hlo import HloError, read_hlo
from shardsim.xla.hlo.sources import source_of
from shardsim.xla.hlo.text import parse_module

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=2

FileNames
1 "/src/model.py"

FunctionNames
1 "layer"
2 "run.<locals>.step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=46 end_line=46 column=15 end_column=15}
2 {file_name_id=1 function_name_id=2 line=7 end_line=7 column=1 end_column=1}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %m = f32[8,128]{1,0:T(8,128)} tanh(%p), metadata={op_name="jit(step)/tanh" \
stack_frame_id=2}
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %f = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"1090","text":"}\\"{"}}
  %c = f32[8,128]{1,0:T(8,128)} copy(%f), frontend_attributes={name="a, b={1}"}
  ROOT %r = f32[8,128]{1,0:T(8,128)} all-reduce(%c), replica_groups={{0,1}}, to_apply=%fused, \
metadata={op_name="jit(step)/psum" stack_frame_id=1}
}
"""


def test_what_stands_in_a_module_is_read() -> None:
    module = parse_module(TEXT)
    assert (module.name, module.is_scheduled, module.partitions) == ("jit_step", True, 2)
    entry = module.computations[module.entry]
    assert list(entry.instructions) == ["x", "f", "c", "r"]
    fusion = entry["f"]
    assert (fusion.opcode, fusion.operands, fusion.cycles) == ("fusion", ("x",), 1090)
    assert module.called(fusion).root == "m"
    assert entry["c"].attributes == {"frontend_attributes": '{name="a, b={1}"}'}
    assert entry["c"].cycles is None
    assert entry["r"].is_root
    assert entry["r"].attributes["replica_groups"] == "{{0,1}}"
    assert [user.name for user in entry.users["f"]] == ["c"]


def test_instructions_know_their_source() -> None:
    module = parse_module(TEXT)
    entry = module.computations[module.entry]
    frames = module.frames.stack(module.computations["fused"]["m"].stack_frame_id)
    assert [(frame.function, frame.line) for frame in frames] == [
        ("layer", 46),
        ("run.<locals>.step", 7),
    ]
    # The fusion and the copy have no name of their own: what is inside, and what is read, has.
    for name, place in (
        ("r", "model.py:7 run.<locals>.step"),
        ("f", "model.py:46 layer"),
        ("c", "model.py:46 layer"),
    ):
        assert source_of(module, entry[name]) == place


@pytest.mark.parametrize(
    ("old", "new", "line", "problem"),
    [
        ("HloModule", "Module", 1, "does not begin"),
        ("is_scheduled=true, ", "", 0, "not scheduled"),
        ("num_partitions=2", "num_partitions=4", 0, "compiled for 4 devices"),
        ('1 "layer"', '3 "layer"', 7, "row 1 of a table"),
        ("file_location_id=2 p", "file_location_id=3 p", 15, "without place"),
        ("parent_frame_id=2}", "parent_frame_id=3}", 16, "without place"),
        ("stack_frame_id=1}", "stack_frame_id=3}", 27, "no stack frame 3"),
        ("tanh(%p)", "tanhh(%p)", 20, "unknown operation 'tanhh'"),
        ("tanh(%p)", "tanh(%q)", 20, "%q is not defined"),
        ("tanh(%p)", "tanh(%p", 20, "operands"),
        ("ROOT %m", "%m", 21, "has no ROOT"),
        ("%c = ", "%f = ", 26, "defined twice"),
        ("%c = ", "%r = ", 26, "not defined|defined twice|ROOT"),
        ("calls=%fused,", "calls=%gone,", 25, "no computation %gone"),
        ("copy(%f)", "copy(%f), frontend_attributes={}", 26, "attribute"),
        ('"1090"', '1090"', 25, "not JSON"),
        ('b={1}"}', 'b={1}"', 26, "unbalanced braces"),
        ("{{0,1}}", "{{0,2}}", 27, "do not hold each"),
        ("{{0,1}}", "{{0,1},{1}}", 27, "different sizes"),
        ("ROOT %r = f32[8,128]", "ROOT %r = f32[8,127]", 28, "header says"),
        ("%c = f32[8,128]", "%c = f32[8,127]", 26, "does not fit its operands"),
        ("x: f32[8,128]", "x: f32[8,129]", 23, "not what the header"),
        ("%p = f32[8,128]", "%p = f32[8,12]", 18, "not what the header"),
        ("parameter(0)\n  ROOT", "parameter(1)\n  ROOT", 19, "not parameter 1"),
        ("ENTRY ", "", 28, "no ENTRY"),
        ("T(8,128)} copy", "T(8,128) copy", 26, "operation"),
    ],
)
def test_damage_is_an_error_with_its_line(old: str, new: str, line: int, problem: str) -> None:
    assert old in TEXT
    with pytest.raises(HloError, match=problem) as caught:
        read_hlo(TEXT.replace(old, new, 1), {"a": 2})
    assert caught.value.exit_code == 2
    assert abs(caught.value.line - line) <= 1 or problem.startswith("not defined|")


@pytest.mark.parametrize(
    "name", ["matmuls", *(pytest.param(n, marks=pytest.mark.slow) for n in samples.NAMES[:-1])]
)
def test_a_text_that_is_cut_off_is_an_error(name: str) -> None:
    lines = samples.text_of(name).rstrip().splitlines()
    for end in range(1, len(lines), max(len(lines) // 10, 1)):
        with pytest.raises(HloError):
            parse_module("\n".join(lines[:end]))


@pytest.mark.parametrize("text", ["", "\n", "{}", "HloModule m"])
def test_no_module_is_an_error(text: str) -> None:
    with pytest.raises(HloError):
        read_hlo(text, {"a": 1})


HOSTILE = [
    ("%p = f32[8,128]", "%p = f32[" + "9" * 5000 + "]"),
    ("parameter(0)\n  ROOT", "parameter(" + "0" * 5000 + ")\n  ROOT"),
    ('"window_config":{"estimated_cycles":"1090"', '"window_config":7, "x":{"y":"1090"'),
    ('"1090"', '["1090"]'),
    ('"1090"', '"' + "9" * 5000 + '"'),
    ("{{0,1}}", "[1000000000000,1]<=[1000000000000]"),
    ("{{0,1}}", "{{0,99999999999999999999}}"),
    ("{{0,1}}", "mesh['a'=2] {'a':(0)0}"),
    ("calls=%fused,", "calls=%main,"),
    ("to_apply=%fused", "to_apply=%main"),
    ("stack_frame_id=1}", "stack_frame_id=\u00b2}"),
    ("(%x)", "(" + "(" * 5000 + "%x)"),
    ("f32[8,128]{1,0:T(8,128)} copy", "(" * 3000 + "f32[8,128]{1,0:T(8,128)} copy"),
]


@pytest.mark.parametrize(("old", "new"), HOSTILE)
def test_hostile_text_is_read_or_refused_in_one_line(old: str, new: str) -> None:
    assert old in TEXT
    try:
        read_hlo(TEXT.replace(old, new, 1), {"a": 2})
    except HloError as error:
        assert len(str(error)) < 300  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


def test_a_loop_that_runs_too_often_is_refused() -> None:
    text = samples.text_of("matmuls")
    limit = "s32[]{:T(128)} constant(5)"
    assert limit in text
    with pytest.raises(HloError, match="too often"):
        read_hlo(text.replace(limit, limit.replace("5", "500000000")), samples.mesh_of("matmuls"))
