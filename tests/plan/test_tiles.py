"""Tiles of HBM: what arrays take in them, against layouts that the TPU compiler gave arguments."""

import re
from math import ceil, prod

import pytest
from building import build, decoder

from shardsim.plan import resolve
from shardsim.plan.tiles import filled, unfilled_elements, unfilled_rows

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


@pytest.mark.parametrize("members", [2, 16])
def test_sums_of_an_embeddings_gradients_fill_lanes_of_their_own(members: int) -> None:
    """Shards of 512 columns fill them, shards of 64 half of them; no other weight counts."""
    model = decoder(embed=1024, vocab=2048)
    torus = {"x": 2, "y": 2, "z": 4}
    where = {"fsdp": torus} if members == 16 else {"data": {"y": 2, "z": 4}, "fsdp": {"x": 2}}
    layout = resolve(build(model, "v4:2x2x4", 64, where, microbatches=2))
    found = float(unfilled_rows(model.tensors, layout))
    tables = [tensor for tensor in model.tensors if tensor.kind == "table"]
    assert float(unfilled_elements(tables, layout)) == 0.0
    assert found == (2048 * 64 if members == 16 else 0.0)
