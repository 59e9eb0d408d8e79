"""Shapes of HLO: sizes, padding to tiles, memory spaces."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.xla.hlo import HloError
from shardsim.xla.hlo.shapes import parse_shape


@pytest.mark.parametrize(
    ("text", "count", "size", "padded", "space"),
    [
        ("f32[]", 1, 4, 4, 0),
        ("f32[]{:T(128)}", 1, 4, 512, 0),
        ("bf16[512,256,768]{2,1,0:T(8,128)(2,1)}", 512 * 256 * 768, 201326592, 201326592, 0),
        ("bf16[48,100]{1,0:T(8,128)(2,1)S(1)}", 4800, 9600, 48 * 128 * 2, 1),
        ("f32[512,256,6]{1,2,0:T(8,128)}", 512 * 256 * 6, 3145728, 512 * 8 * 256 * 4, 0),
        ("f32[512,256,6]{2,1,0:T(8,128)}", 512 * 256 * 6, 3145728, 512 * 256 * 128 * 4, 0),
        ("bf16[768]{0:T(1024)(128)(2,1)S(3)}", 768, 1536, 2048, 3),
        ("pred[3,5]{1,0:T(8,128)(4,1)}", 15, 15, 1024, 0),
        ("s4[10]{0:T(512)E(4)}", 10, 5, 256, 0),
        ("f32[8,2048]{1,0:T(8,128)S(1)SC(1:1024)}", 16384, 65536, 65536, 1),
        ("f32[8,512]{1,0:T(8,128)SC(0:2,4)(1:256)}", 4096, 16384, 16384, 0),
        ("f32[0,8]{1,0:T(8,128)}", 0, 0, 0, 0),
    ],
)
def test_an_array(text: str, count: int, size: float, padded: float, space: int) -> None:
    shape = parse_shape(text)
    assert (shape.count, shape.bytes, shape.padded_bytes) == (count, size, padded)
    assert shape.memory_space == space
    assert shape.hbm_bytes == (padded if space == 0 else 0)


def test_a_tuple_is_the_sum_of_its_arrays() -> None:
    shape = parse_shape("((f32[2,3]{1,0}), /*index=1*/bf16[4]{0:S(1)}, (), s32[])")
    assert shape.is_tuple
    assert [array.form for array in shape.arrays] == ["f32[2,3]", "bf16[4]", "s32[]"]
    assert shape.bytes == 24 + 8 + 4
    assert shape.hbm_bytes == 24 + 4
    assert shape.form == "((f32[2,3]), bf16[4], (), s32[])"


@given(
    dims=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    tile=st.sampled_from([(8, 128), (16, 128), (128,), (2, 4, 64)]),
    data=st.data(),
)
def test_padding_fills_whole_tiles_and_no_more(
    dims: list[int], tile: tuple[int, ...], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(dims))))
    layout = ",".join(map(str, order))
    text = f"f32[{','.join(map(str, dims))}]{{{layout}:T({','.join(map(str, tile))})}}"
    shape = parse_shape(text)
    assert shape.padded_bytes % (4 * math.prod(tile)) == 0
    grown = math.prod(
        -(-size // length) * length
        for size, length in zip(
            [dims[dim] for dim in order], [*reversed(tile), *[1] * len(dims)], strict=False
        )
    )
    missing = math.prod([*reversed(tile)][len(dims) :])
    assert shape.padded_bytes == 4 * grown * missing
    assert shape.bytes == 4 * math.prod(dims)


@pytest.mark.parametrize(
    "text",
    [
        "f33[2]",
        "f32[2",
        "f32[2,]",
        "f32[2]{1}",
        "f32[2,3]{0,0}",
        "f32[2]{0:T(0)}",
        "f32[2]{0:Q(1)}",
        "f32[2]{0:T(2)SC(1)}",
        "f32[2]{0:T(2)(0:1)}",
        "f32[2]{0:T(2)S(1)(2)}",
        "f32[2]{0:T(8,*)}",
        "(f32[2]",
        "(f32[2] f32[3])",
        "f32[2]]",
        "",
        "(" * 5000 + "f32[]" + ")" * 5000,
    ],
)
def test_what_is_no_shape_is_an_error(text: str) -> None:
    with pytest.raises(HloError):
        parse_shape(text)
