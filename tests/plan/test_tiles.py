"""Tiles of HBM: what arrays take in them, against layouts that the TPU compiler gave arguments."""

import re
from math import ceil, prod

import pytest

from shardsim.plan.tiles import filled

# As the compiler laid out arguments of vit-h-14, gpt-neox-20b, vit-bigg and llama2-13b.
ARGUMENTS = (
    "f32[32,160,16,80]{3,2,1,0}",
    "f32[44,96,64,96]{3,2,1,0}",
    "f32[44,24576,96]{1,2,0}",
    "f32[48,26,8192]{2,0,1}",
    "f32[48,104,4,104]{3,2,1,0}",
    "f32[40,320,10,128]{3,1,2,0}",
    "f32[40,10,128,320]{2,3,1,0}",
    "f32[588,160]{0,1}",
    "f32[64,224,224,3]{2,1,3,0}",
    "f32[256,224,224,3]{0,2,3,1}",
)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_array_takes_what_its_layout_takes(argument: str) -> None:
    found = re.fullmatch(r"f32\[([\d,]+)\]\{([\d,]+)\}", argument)
    assert found is not None
    lengths, order = ([int(one) for one in part.split(",")] for part in found.groups())
    dense, then = lengths[order[0]], lengths[order[1]]
    rows = ceil(then / 8) * 8 if then > 4 else 2 ** ceil(then - 1).bit_length()
    taken = prod(lengths) // (dense * then) * ceil(dense / 128) * 128 * rows
    assert float(filled(lengths)) == pytest.approx(taken / prod(lengths))
