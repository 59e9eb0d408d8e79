"""Grouped matmuls that are one kernel: megablox's, and the compiler's own."""

from __future__ import annotations

import pytest

from shardsim.xla.hlo import read_hlo

TEXT = """HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[1024,768], w: bf16[8,768,2048], g: bf16[1024,2048], s: s32[9]) -> WHAT {
  %x = bf16[1024,768]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[8,768,2048]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %s = s32[9]{0:T(128)} parameter(3)
  ROOT %k = WHAT{LAYOUT:T(8,128)(2,1)} custom-call(%s, ARRAYS), \
custom_call_target="tpu_custom_call", metadata={op_name="NAME"}
}
"""
FORWARD = ("bf16[1024,2048]", "1,0", "%x, %w", "jit(f)/jvp(jit(gmm))/pallas_call")
BACK = ("bf16[1024,768]", "1,0", "%g, %w", "jit(f)/transpose(jvp(jit(gmm)))/pallas_call")
OWN = ("bf16[1024,2048]", "1,0", "%x, %w", "jit(f)/ragged_dot_general/ragged-dot-none")
WEIGHTS = ("bf16[8,768,2048]", "2,1,0", "%x, %g", "jit(f)/transpose(jvp(jit(tgmm)))/pallas_call")


def text(what: str, layout: str, arrays: str, name: str) -> str:
    changes = {"WHAT": what, "LAYOUT": layout, "ARRAYS": arrays, "NAME": name}
    found = TEXT
    for old, new in changes.items():
        found = found.replace(old, new)
    return found


@pytest.mark.parametrize("kernel", [FORWARD, BACK, OWN, WEIGHTS])
def test_every_row_is_multiplied_by_one_matrix(kernel: tuple[str, str, str, str]) -> None:
    assert read_hlo(text(*kernel), {"a": 8}).flops == 2 * 1024 * 768 * 2048


@pytest.mark.parametrize(
    "kernel",
    [
        (*FORWARD[:3], "jit(f)/jit(gmmx)/pallas_call"),
        ("bf16[1024,2048]", "1,0", "%g, %w", FORWARD[3]),
        ("bf16[1024,2048]", "1,0", "%x, %g", FORWARD[3]),
    ],
)
def test_what_is_no_grouped_product_is_priced_by_its_bytes(kernel) -> None:
    assert read_hlo(text(*kernel), {"a": 8}).flops == 0
