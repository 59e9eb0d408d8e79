"""Bytes through HBM of fusions that take a part of a stack."""

from __future__ import annotations

import pytest

from shardsim.xla.hlo import read_hlo

SLICE = 2 * 256 * 128
TEXT = """HloModule m, is_scheduled=true

%tiled (p: bf16[48,256,128]) -> bf16[48,256,128] {
  %p = bf16[48,256,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %again = bf16[48,256,128]{2,1,0:T(8,128)(2,1)} OPERATION(%p)
}

%taken (q: bf16[48,256,128], i: s32[]) -> bf16[1,256,128] {
  %q = bf16[48,256,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %seen = bf16[48,256,128]{2,1,0:T(8,128)(2,1)} fusion(%q), kind=kLoop, ALIASINGcalls=%tiled
  %part = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%seen, %i, %zero, %zero), \
dynamic_slice_sizes={1,256,128}
  ROOT %out = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} tanh(%part)
}

ENTRY %main (x: bf16[48,256,128], k: s32[]) -> bf16[1,256,128] {
  %x = bf16[48,256,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  ROOT %y = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} fusion(%x, %k), kind=kLoop, calls=%taken
}
"""


@pytest.mark.parametrize(
    ("aliasing", "operation", "read_bytes"),
    [
        ("output_to_operand_aliasing={{}: (0, {})}, ", "copy", SLICE),
        ("", "copy", 48 * SLICE),  # a copy of its own
        ("output_to_operand_aliasing={{}: (0, {})}, ", "tanh", 48 * SLICE),  # all of it changes
    ],
)
def test_a_stack_tiled_anew_in_place_is_read_by_its_slice(
    aliasing: str, operation: str, read_bytes: int
) -> None:
    text = TEXT.replace("ALIASING", aliasing).replace("OPERATION", operation)
    (found,) = read_hlo(text, {}).operations
    assert found.hbm_bytes == read_bytes + SLICE
