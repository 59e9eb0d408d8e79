"""Heads of layers without a window that are others than those with one (Gemma 4)."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.errors import ShardsimError
from shardsim.model import forward_matmul_flops_per_token, load_model
from shardsim.plan import plan_from_data
from shardsim.plan.layout import SEQUENCE_SHARDED
from shardsim.plan.resolve import rules_data

SMALL: dict[str, Any] = {
    "name": "small",
    "family": "decoder",
    "layers": 6,
    "embed": 1024,
    "mlp": 4096,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "vocab": 32000,
    "sequence": 2048,
    "causal": True,
    "gated_mlp": True,
    "norm": "rmsnorm",
    "qk_norm": True,
    "positions": "rotary",
    "windows": [512, 512, 0],
}
SAME = {"kv_heads": 8, "head_dim": 128}


def step(model: dict[str, Any], fsdp: int = 32, tensor: int = 2, **more: Any) -> Any:
    data = {
        "name": "step",
        "model": model,
        "machine": "v5p:4x4x4",
        "batch": 128,
        "mesh": {"fsdp": fsdp, "model": tensor},
        "rules": rules_data(["fsdp", "model"], residual=SEQUENCE_SHARDED),
    }
    return predict(plan_from_data({**data, **more}, "step"))


@pytest.mark.parametrize("remat", ["full", "dots", "save_qkv"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_other_heads_of_the_same_sizes_change_nothing(remat: str, attention: str) -> None:
    many = {**SMALL, "layers": 24}  # whose stacks, of 16 and 8 layers, are whole tiles of HBM
    usual = step(many, remat=remat, attention=attention)
    other = step({**many, "global_heads": SAME}, remat=remat, attention=attention)
    assert other.step_time_s == pytest.approx(usual.step_time_s, rel=1e-9)
    assert other.mfu == pytest.approx(usual.mfu, rel=1e-9)
    assert other.hbm == pytest.approx(usual.hbm, rel=1e-9)
    sent = [
        {(row.kind, row.mesh_axes): row.bytes_per_chip for row in one.collectives}
        for one in (usual, other)
    ]
    assert sent[0] == pytest.approx(sent[1], rel=1e-9)


def test_wider_heads_that_are_fewer_have_their_own_products() -> None:
    wide = load_model({**SMALL, "global_heads": {"kv_heads": 2, "head_dim": 256}})
    alike = load_model(
        {**SMALL, "global_heads": {"kv_heads": 2, "head_dim": 256, "values_are_keys": True}}
    )
    # Of two layers: queries and output twice as wide, half of the width of keys and of values.
    more = 2 * 1024 * (2 * 16 * (256 - 128) + 2 * (2 * 256 - 8 * 128)) + 2 * 2 * (256 - 128)
    assert wide.parameters_all - load_model(SMALL).parameters_all == more
    values = 2 * 1024 * 2 * 256
    assert wide.parameters_all - alike.parameters_all == values
    flops = [forward_matmul_flops_per_token(model) for model in (wide, alike)]
    assert flops[0] - flops[1] == 2 * values


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_heads": {"kv_heads": 3, "head_dim": 256}}, "cannot share 3 .* number is 2"),
        ({"global_heads": {"kv_heads": 2, "head_dim": 255}}, "even number; the nearest is 256"),
        ({"global_heads": {"kv_heads": 2, "head_dim": 256}, "windows": []}, "use windows, such as"),
        ({"global_heads": {"kv_heads": 2}}, "missing key 'head_dim', as in {kv_heads: 4"),
        ({"global_heads": {**SAME, "values_are_keys": 1}}, "expected true or false, found 1"),
        ({"experts": {"number": 8, "top_k": 2, "mlp": 64, "apart": True}}, "use beside: true"),
    ],
)
def test_what_does_not_go_together_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardsimError, match=words):
        load_model({**SMALL, **changes})


def test_a_tensor_axis_has_heads_of_both_kinds() -> None:
    with pytest.raises(
        ShardsimError, match=r"heads of layers without a window .*: 2 .* divide by 4"
    ):
        step({**SMALL, "global_heads": {"kv_heads": 2, "head_dim": 256}}, fsdp=16, tensor=4)
