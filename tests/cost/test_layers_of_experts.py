"""Layers of experts that NVIDIA timed alone on eight H100, beside what is predicted of them.

tests/functional_tests/test_cases/common/moe_perf/baseline.json of NVIDIA/Megatron-LM at d98e8a64:
4,096 tokens a GPU, eight GPUs side by side, tokens exchanged by all-to-alls; products in bf16, and
in fp8 with scales by block. A layer alone runs at a higher clock than a step, at its cap of power.
"""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import plan_from_data

LAYERS = 4
OF_EXPERTS = ("expert", "copies", "slots", "made", "sum of experts", "router", "chances", "names")
MIXTRAL = {"embed": 4096, "mlp": 14336, "experts": {"number": 8, "top_k": 2, "mlp": 14336}}
DEEPSEEK = {"embed": 7168, "mlp": 2048, "experts": {"number": 32, "top_k": 8, "mlp": 2048}}
MEASURED_MS = [  # forward, backward
    (MIXTRAL, "bf16", 4.327, 7.684),
    (DEEPSEEK, "bf16", 7.119, 10.483),
    (MIXTRAL, "fp8", 3.788, 6.618),
    (DEEPSEEK, "fp8", 7.609, 10.126),
]


def predicted(sizes: dict[str, Any], compute: str, nodes: int = 1) -> Prediction:
    model = {"layers": LAYERS, "heads": 8, "sequence": 4096, "vocab": 32000, "gated_mlp": True}
    devices = 8 * nodes
    data = {
        "name": "layers of experts",
        "model": {"name": "alone", "family": "decoder", "causal": True, **model, **sizes},
        "machine": f"{nodes}*h100:8",
        "batch": devices,
        "mesh": {"expert": devices},
        "rules": {
            "parameters": {"expert": ["expert"]},
            "activations": {"batch": ["expert"], "expert": ["expert"]},
        },
        "remat": "none",
        "precision": {"compute": compute, "parameters": "bf16", "reduce": "bf16"},
        "attention": "flash",
    }
    return predict(plan_from_data(data, "test"), implementation="trainer")


def of_experts_ms(prediction: Prediction, phase: str) -> float:
    """Return what a layer's experts take in one phase, with what brings tokens to them."""
    taken = [*prediction.price.computes, *prediction.price.collectives]
    seconds = [
        float(each.time_s)
        for each in taken
        if each.block.startswith(f"layer {phase}")
        and any(word in each.task.name for word in OF_EXPERTS)
        and "reduction" not in each.task.name
    ]
    return 1000.0 * sum(seconds) / LAYERS


@pytest.mark.parametrize(("sizes", "compute", "forward", "backward"), MEASURED_MS)
def test_layers_alone(sizes: dict[str, Any], compute: str, forward: float, backward: float) -> None:
    prediction = predicted(sizes, compute)
    assert of_experts_ms(prediction, "forward") == pytest.approx(forward, rel=0.15)
    assert of_experts_ms(prediction, "backward") == pytest.approx(backward, rel=0.22)


def pads(prediction: Prediction) -> list[float]:
    return [
        float(each.task.hbm_bytes * each.count)
        for each in prediction.price.computes
        if "pad for turn" in each.task.name and "names" not in each.task.name
    ]


def test_rows_of_experts_are_padded_for_products_of_8_bits() -> None:
    """The plain all-to-all is followed by a copy each way; with the timings above that is what
    8 bits cost it more than the dispatcher that pads on its way (0.7 ms each way of the second)."""
    copies = 2.0 * DEEPSEEK["experts"]["top_k"] * 4096 * DEEPSEEK["embed"]  # bytes of bf16
    padded = pads(predicted(DEEPSEEK, "fp8"))
    assert padded == pytest.approx([2.0 * copies * LAYERS] * 4)
    assert not pads(predicted(DEEPSEEK, "bf16"))
    assert not pads(predicted(DEEPSEEK, "fp8", nodes=2))
