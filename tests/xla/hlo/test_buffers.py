"""Buffer assignments as XLA dumps them, written by hand: what is in use, and what is reserved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.xla.hlo import HloError
from shardsim.xla.hlo.buffers import read_assignment

ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <1 inner @0> (size=512,offset=0): f32[8]{0:T(128)}
allocation 1: size 4096, page 0, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <2 param @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 1024, color 5, page 0, preallocated-temp:
 value: <3 kept @0> (size=1024,offset=0): bf16[512]{0:T(512)}
allocation 3: size 1024, color 1, page 0, preallocated-temp:
 value: <4 near @0> (size=1024,offset=0): bf16[512]{0:T(512)}
allocation 4: size 16, page 0, constant:
 value: <5 one @0> (size=16,offset=0): f32[4]{0:T(128)}
"""


def made(values: list[tuple[int, int, int, int]], reserved: int) -> tuple[str, str]:
    """Return the dumps of values: (size, offset, first, last)."""
    lines = [f"allocation 5: size {reserved}, page 0, preallocated-temp:"]
    spans = [
        "HloLiveRange (max 99):",
        "  InstructionSequence:",
        "    0:param",
        "  BufferLiveRange:",
    ]
    for number, (size, offset, first, last) in enumerate(values):
        phi = " (phi)" if number % 2 else ""
        name = f"fusion.{number}{{1}}{phi}"
        lines.append(f" value: <9 {name} @0> (size={size},offset={offset}): bf16[{size // 2}]{{0}}")
        spans.append(f"    fusion.{number}{{1}}:{first}-{last}")
    spans += ["  Live ranges at 1 (peak):", "    fusion.0{1}: 99 bytes (cumulative: 99 bytes)"]
    return ASSIGNMENT + "\n".join(lines) + "\n", "\n".join(spans) + "\n"


def test_each_memory_is_told_apart() -> None:
    held = read_assignment(*made([(512, 0, 3, 5)], 2048))
    assert (held.arguments_bytes, held.constants_bytes) == (4096, 16)
    assert (held.reserved_bytes, held.host_bytes) == (2048, 1024)
    assert held.allocated_bytes == 4096 + 16 + 2048  # gaps included
    assert held.peak_bytes == 4096 + 16 + 512
    assert [buffer.name for buffer in held.at(4)] == ["fusion.0"]
    assert held.at(6) == []


def test_a_value_in_the_place_of_another_counts_once() -> None:
    # A gather and the fusion that hands it on share bytes; a third begins inside them.
    values = [(1000, 0, 1, 9), (1000, 0, 2, 3), (1000, 500, 2, 3)]
    assert read_assignment(*made(values, 4000)).fullest == (2, 1500)


VALUES = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 200), st.integers(0, 20), st.integers(0, 10)).map(
        lambda v: (v[0], v[1], v[2], v[2] + v[3])
    ),
    min_size=1,
    max_size=12,
)


@given(VALUES)
def test_what_is_in_use_is_the_bytes_that_some_live_value_covers(
    values: list[tuple[int, int, int, int]],
) -> None:
    held = read_assignment(*made(values, 300))
    most = 0
    for place in range(32):
        covered = {
            byte
            for size, offset, first, last in values
            if first <= place <= last
            for byte in range(offset, offset + size)
        }
        assert sum(buffer.size_bytes for buffer in held.at(place)) == len(covered)
        most = max(most, len(covered))
    assert held.fullest[1] == most


@pytest.mark.parametrize("text", ["", "HloModule x", ASSIGNMENT])
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(HloError, match="buffer assignment"):
        read_assignment(text, "")
