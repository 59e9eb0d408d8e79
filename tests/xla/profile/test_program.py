"""Operations told apart by a program's HLO, as XLA writes it for GPUs."""

from __future__ import annotations

import pytest

from shardsim.errors import FileError
from shardsim.xla.hlo.text import parse_module
from shardsim.xla.profile.files import TraceFile, program_name
from shardsim.xla.profile.program import COLLECTIVE, Program, program_of
from shardsim.xla.profile.trace import Trace

TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

FileNames
1 "/here/norm.py"
2 "/here/model.py"

FunctionNames
1 "layers"
2 "run_norm"
3 "run_project_in"
4 "layers.<locals>.one_round"

FileLocations
1 {file_name_id=2 function_name_id=1 line=80 end_line=80 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=71 end_line=71 column=1 end_column=2}
3 {file_name_id=1 function_name_id=3 line=90 end_line=90 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%fused (a: bf16[64,32]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  ROOT %add = bf16[64,32]{1,0} add(%a, %a), metadata={op_name="jit(step)/jvp()/while/body/add" \
stack_frame_id=2}
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%graph (q: bf16[64,64]) -> bf16[64,64] {
  %q = bf16[64,64]{1,0} parameter(0)
  ROOT %dot.7 = bf16[64,64]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: bf16[64,32], w: bf16[32,128], g: f32[512], s: bf16[64,64]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,128]{1,0} parameter(1)
  %g = f32[512]{0} parameter(2)
  %s = bf16[64,64]{1,0} parameter(3)
  %command_buffer = bf16[64,64]{1,0} call(%s), to_apply=%graph
  %cublas-gemm.1 = (bf16[64,128]{1,0}, s8[4096]{0}) custom-call(%p, %w), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp()/while/body/\
dot_general" stack_frame_id=3}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %fmha = (bf16[64,32]{1,0}, u8[0]{0}) custom-call(%p, %p, %p), \
custom_call_target="__cudnn$fmhaSoftmax"
  %all-reduce-start = f32[512]{0} all-reduce-start(%g), channel_id=1, \
replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%sum
  %all-reduce-done = f32[512]{0} all-reduce-done(%all-reduce-start)
  %stack = bf16[64,32]{1,0} copy(%p), metadata={op_name="jit(step)/jvp()/while/body/\
dynamic_update_slice" stack_frame_id=1}
  %negate = bf16[64,32]{1,0} negate(%p), metadata={op_name="jit(step)/transpose(jvp())/while/\
body/dynamic_update_slice" stack_frame_id=1}
  ROOT %loop_add_fusion.3 = bf16[64,32]{1,0} fusion(%p), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/jvp()/while/body/add" stack_frame_id=2}
}
"""
MESH = {"data": 2, "model": 2}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(parse_module(TEXT), MESH)


def test_calls_of_libraries_are_what_they_compute(program):
    gemm = program.what("cublas-gemm.1", "nvjet_tst")
    (product,) = gemm.matmuls
    assert (gemm.kind, gemm.run) == ("matmul", "project_in")
    assert (product.m, product.k, product.n, product.batch) == (64, 32, 128, 1)
    assert program.what("fmha", "cudnn_generated").kind == "attention"


def test_functions_say_which_op_it_is_and_what_the_loop_does(program):
    fusion = program.what("loop_add_fusion.3")
    assert (fusion.kind, fusion.run) == ("elementwise", "norm")
    assert fusion.source == "norm.py:71 run_norm"
    # In a CUDA graph only the kernel's name is left; on a host device a call is what it calls.
    assert program.what("command_buffer", "loop_add_fusion_3") == fusion
    assert program.what("command_buffer", "MemcpyD2D").kind == "copy"
    assert program.what("command_buffer").kind == "matmul"
    assert (program.what("stack").stack, program.what("negate").stack) == ("kept", "gradients")


@pytest.mark.parametrize("name", ["all-reduce-start", "all-reduce-done"])
def test_collectives_have_mesh_axes(program, name):
    found = program.what(name)
    assert (found.kind, found.collective) == (COLLECTIVE, "all-reduce")
    assert found.mesh_axes == ("model",)


def test_what_the_program_does_not_have_goes_by_its_name(program):
    assert program.what("custom-call.9", "ncclDevKernel_AllGather_RING").collective == "all-gather"
    assert program.what("custom-call.9", "sm90_xmma_gemm").kind == "matmul"


def test_programs_of_other_meshes_and_damaged_text_are_refused():
    file = TraceFile(path="t.json", xplane=False, data=b"{}")
    trace = Trace(path="t.json", kind="gpu", spans=(), runs={}, file=file)
    assert program_of(trace, "jit_step", MESH, TEXT)[1] == ()
    with pytest.raises(FileError, match=r"t\.json: jit_step runs on 4 devices, .* has 8"):
        program_of(trace, "jit_step", {"data": 8}, TEXT)
    with pytest.raises(FileError, match="--hlo: "):
        program_of(trace, "jit_step", MESH, TEXT[:-20])
    assert "--hlo FILE" in program_of(trace, "jit_step", MESH)[1][0]


def test_programs_are_known_by_number():
    assert program_name("jit_step", 8) == program_name("jit_step(8)", 8) == "jit_step(8)"
