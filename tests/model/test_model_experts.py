"""Experts in a model: its layers, its weights, and the FLOPs that are counted of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import decoder
from hypothesis import given
from hypothesis import strategies as st

from shardsim.errors import ModelError
from shardsim.model import Accounting, Experts, Model, load_model, model_flops_per_token
from shardsim.model.blocks import graph_of

MIXTURES = st.builds(
    Experts,
    number=st.sampled_from([4, 8, 16]),
    top_k=st.integers(1, 4),
    mlp=st.sampled_from([512, 1024]),
    shared=st.integers(0, 2),
    shared_mlp=st.sampled_from([0, 256]),
    beside=st.booleans(),
    router_bias=st.booleans(),
    capacity=st.sampled_from([0.0, 1.0, 1.25]),
)
LAYERS = st.tuples(st.integers(0, 3), st.integers(1, 3))  # dense ones in front, every


# Total as the checkpoint's metadata, active as its card prints it: billions and the last digit.
@pytest.mark.parametrize(
    ("name", "active", "printed", "last"),
    [
        ("mixtral-8x7b", 12_879_925_248, 12.9, 0.1),  # arXiv 2401.04088 table 2: 13 B
        ("mixtral-8x22b", 39_152_031_744, 39, 1),  # mistral.ai/news/mixtral-8x22b
        ("qwen3-30b-a3b", 3_353_032_704, 3.3, 0.1),  # arXiv 2505.09388 table 2
        ("qwen3-235b-a22b", 22_190_763_520, 22, 1),
        ("llama4-scout", 17_172_894_720, 17, 1),  # ai.meta.com/blog/llama-4
        ("llama4-maverick", 17_184_691_200, 17, 1),
    ],
)
def test_active_parameters_are_what_a_token_meets(
    name: str, active: int, printed: float, last: float
) -> None:
    assert load_model(name).active_parameters == active
    assert abs(active / 1e9 - printed) < last


@pytest.mark.parametrize(("name", "printed"), [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)])
def test_gpt_oss_prints_active_parameters_without_its_embedding(name: str, printed: float) -> None:
    model = load_model(name)
    active = model.active_parameters - model.vocab * model.embed
    assert round(active / 1e9, 2) == printed  # arXiv 2508.10925 table 1


# Printed TFLOP/s over printed tokens/s, GFLOP a token: AI-Hypercomputer/tpu-recipes, MaxText of
# then counted attention in full.
@pytest.mark.parametrize(
    ("name", "printed"),
    [("mixtral-8x7b", 302.311e3 / 3645.203), ("llama4-scout", 251.760e3 / 2080.892)],
)
def test_flops_are_those_that_maxtext_printed(name: str, printed: float) -> None:
    counted = model_flops_per_token(load_model(name), None, Accounting.MAXTEXT_2024)
    assert counted / 1e9 == pytest.approx(printed, rel=2e-4)


@given(MIXTURES, LAYERS, st.booleans())
def test_weights_and_flops_by_hand(experts: Experts, where: tuple[int, int], gated: bool) -> None:
    front, every = where
    experts = replace(experts, dense_layers=front, every=every)
    model = decoder(layers=6, gated_mlp=gated, experts=experts)
    plain = replace(model, experts=None)
    matrices = 3 if gated else 2
    d, f = model.embed, experts.mlp
    mixed = sum(layer >= front and layer % every == every - 1 for layer in range(6))
    dense = matrices * d * model.mlp
    shared = matrices * d * experts.shared * (experts.shared_mlp or f)
    router = d * experts.number
    bias = experts.number * experts.router_bias
    of_layer = shared + router + dense * experts.beside - dense
    one = matrices * d * f
    gained = mixed * (of_layer + bias + experts.number * one)
    assert model.parameters_all - plain.parameters_all == gained
    active = mixed * (of_layer + bias + experts.top_k * one)
    assert model.active_parameters - plain.parameters_all == active
    flops = [model_flops_per_token(one, None, Accounting.MAXTEXT_2024) for one in (model, plain)]
    assert flops[0] - flops[1] == pytest.approx(6 * (active - mixed * bias), rel=1e-9)


@given(MIXTURES, LAYERS, st.lists(st.sampled_from([0, 256]), max_size=3))
def test_layers_are_those_that_were_asked_for(
    experts: Experts, where: tuple[int, int], windows: list[int]
) -> None:
    front, every = where
    experts = replace(experts, dense_layers=front, every=every)
    layers = 6 * len(windows) or 6
    model = decoder(layers=layers, experts=experts, windows=windows)
    graph = graph_of(model)
    found = []
    for stack in graph.stacks:
        round_ = [layer.part for layer in stack.layers for _ in range(layer.times)]
        found += round_ * stack.rounds
    assert len(found) == layers
    for number, part in enumerate(found):
        mask = next(op.kernel.mask for op in part.ops if op.kernel)
        assert mask == mask.__class__(True, windows[number % len(windows)] if windows else 0)
        assert any("router" in op.name for op in part.ops) == experts.has(number)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"number": 1}, "experts.number: expected a whole number, 2 or more, found 1"),
    ({"top_k": 9}, "a token cannot go to 9 of 8 experts; the nearest is 8"),
    ({"capacity": -1}, "experts.capacity: expected 0 (no token is dropped) or more, found -1"),
    ({"router": "softmix"}, "experts.router: unknown choice 'softmix', did you mean 'softmax'?"),
    ({"group": 64}, "experts.group: only a capacity counts in groups; leave it out"),
    ({"dense_layers": 8}, "experts: no layer of 8 has any; use fewer dense_layers than 8"),
    ({"shared_gate": True}, "experts.shared_gate: there are no shared experts; leave it out"),
    ({"topk": 2}, "experts: unknown key 'topk'"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_bad_experts_are_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    base = {"number": 8, "top_k": 2, "mlp": 1024} | changes
    data = {k: v for k, v in decoder().to_mapping().items() if k != "experts"}
    with pytest.raises(ModelError) as caught:
        load_model({**data, "experts": base})
    assert words.split(", did")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_and_single_keys_say_the_same() -> None:
    model = load_model({"base": "mixtral-8x7b", "experts.capacity": 1.25, "experts.top_k": 1})
    assert model.experts == Experts(number=8, top_k=1, mlp=14336, capacity=1.25)
    assert load_model(model.to_mapping()) == model
    both = load_model({"base": "mixtral-8x7b", "experts.capacity": 1.0, "experts.group": 512})
    assert both.experts == Experts(number=8, top_k=2, mlp=14336, capacity=1.0, group=512)
    plain = load_model({"base": "mixtral-8x7b", "experts": None})
    assert plain.experts is None
    assert isinstance(plain, Model)
    with pytest.raises(ModelError, match="missing key 'number'"):
        load_model({"base": "llama2-7b", "experts.capacity": 1.25})
