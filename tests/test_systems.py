"""Every system of the literature that docs/systems.md says has a plan that ships and predicts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from shardsim.cost.predict import predict
from shardsim.plan import load_plan
from shardsim.plan.io import plan_names

PAGE = (Path(__file__).parent.parent / "docs" / "systems.md").read_text(encoding="utf-8")
# What the page calls a system, and a plan of it.
SYSTEMS = {
    "ViT-22B": "vit-22b-published-tp1",
    "PaLM 540B": "palm-540b-published-two-pods",
    "PaLI-X": "pali-x-encoder-decoder",
    "ViT-e, ViT-G": "vit-e-data-parallel",
    "Colossal-AI": "colossal-ai-gpt",
    "Layered gradient accumulation": "layered-22b-v4-8x64",
    "modular pipelines": "stages-70b-v5p-2x64",
    "Zero-bubble": "zero-bubble-6b",
    "ZeRO stages 1, 2 and 3": "zero2-vit-22b-v4-1x128",
    "Ring attention": "ring-attention-32k",
    "DeepSpeed-Ulysses": "ulysses-32k",
    "DSP": "dsp-open-sora",
    "NaViT": "navit-packed",
    "ByteTransformer": "bytetransformer-bert",
    "ST-MoE-32B": "st-moe-32b",
    "Soft MoE": "soft-moe-l16",
    "n:m sparsity": "sparse-2-of-4",
    "LLM.int8": "llm-int8-forward",
    "BitNet": "bitnet-as-trained",
    "Unit scaling": "fp8-unit-scaled",
    "TorchScale, DeepNet": "deepnet-200",
    "ED-ViT": "ed-vit-by-heads",
}


@pytest.mark.parametrize(("system", "name"), SYSTEMS.items())
def test_a_system_has_a_plan_that_predicts(system: str, name: str) -> None:
    sections = re.split(r"\n(?=## )", PAGE)
    assert any(system in section and f"{name}" in section for section in sections)
    found = predict(load_plan(name))
    assert 0 < found.step_time_s < math.inf
    assert found.mfu is not None
    assert 0 < found.mfu < 1


def test_plans_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"^\$ shardsim (?:sweep|predict) ([a-z0-9-]+)", PAGE, re.MULTILINE))
    assert named
    assert named <= set(plan_names())
