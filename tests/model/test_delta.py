"""Linear attention: weights, FLOPs, and what it goes with."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.errors import ShardsimError
from shardsim.model import Accounting, attention_flops_per_token, load_model, model_flops_per_token
from shardsim.plan import plan_from_data
from shardsim.plan.resolve import resolve, rules_data

# What MaxText's own code makes of its files (docs/maxtext_models.yaml).
WEIGHTS = {
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3.5-397b-a17b": 396_346_350_336,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_that_maxtext_makes(name: str) -> None:
    assert load_model(name).parameters_all == WEIGHTS[name]


def test_flops_are_those_that_maxtext_counts() -> None:
    """Its `calculate_gated_delta_net_flops_per_device`: projections, taps, four products a state;
    beside it attention halved, experts and the head, three times over."""
    model, tokens = load_model("qwen3-next-80b-a3b"), 4096
    keys, values, heads = 16 * 128, 32 * 128, 32
    mixed = 2 * 2048 * (2 * keys + 2 * values + 2 * heads) + 2 * 2048 * values
    mixed += 2 * 4 * (2 * keys + values)
    state = 8 * heads * 128 * 128
    # MaxText leaves out the gate of attention's result, as large as its queries.
    softmax = 2 * 2048 * (3 * 16 + 2 * 2) * 256
    pairs = 2 * 16 * 256 * tokens
    # And the gate of the shared expert, of one number a token.
    experts = 2 * 2048 * (512 + 1 + 3 * 512 * (10 + 1))
    total = 36 * (mixed + state) + 12 * (softmax + pairs) + 48 * experts + 2 * 2048 * 151936
    counted = model_flops_per_token(model, tokens, Accounting.MAXTEXT_2025)
    assert counted == pytest.approx(3 * total, rel=1e-12)
    attention = attention_flops_per_token(model, tokens, halved=True)
    assert attention == 36 * state + 12 * pairs


def step(chunk: int = 64, sequence: int = 4096, **more: Any) -> Any:
    model = {"base": "qwen3-next-80b-a3b", "name": "few", "layers": 8, "delta.chunk": chunk}
    data = {
        "name": "step",
        "model": model,
        "machine": "v5p:4x4x4",
        "batch": 64,
        "sequence": sequence,
        "mesh": {"fsdp": 64},
        "rules": {"parameters": {"embed": ["fsdp"]}, "activations": {"batch": ["fsdp"]}},
    }
    return plan_from_data({**data, **more}, "step")


def test_the_state_is_counted_in_chunks() -> None:
    """Longer sequences take as much longer, as nothing grows with their square; longer chunks hold
    fewer states, and multiply more inside."""
    plan = step()
    sizes = {"layers": 3, "windows": (64,)}
    alone = {
        tokens: predict(
            step(
                sequence=tokens,
                batch=64 * 8192 // tokens,
                model={"base": "qwen3-next-80b-a3b", "name": "few", **sizes},
            )
        )
        for tokens in (2048, 8192)
    }
    assert alone[8192].step_time_s == pytest.approx(alone[2048].step_time_s, rel=0.01)
    assert predict(plan).step_time_s < predict(step(chunk=256)).step_time_s
    assert [rounds * many for rounds, many in plan.model.stacks] == [8]
    assert int(resolve(plan).fsdp.size) == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta.value_heads": 24}, "cannot share 16 key heads evenly; the nearest that can: 32"),
        ({"delta.chunk": 48}, "a power of two, not 48; the nearest is 32"),
        ({"delta.every": 1}, r"delta.every: expected a whole number, 2 or more"),
        ({"causal": False}, "a state passes forward"),
        ({"lora.rank": 8}, "output_gate: not with latent and lora"),
    ],
)
def test_what_does_not_go_together_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardsimError, match=words):
        load_model({"base": "qwen3-next-80b-a3b", **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequence": 4100}, "tokens in chunks of linear attention: 4100 does not divide by 64"),
        (
            {"mesh": {"fsdp": 16, "context": 4}, "rules": rules_data(["fsdp", "context"])},
            "the state of linear attention over a context axis",
        ),
    ],
)
def test_a_state_has_whole_sequences(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardsimError, match=words):
        step(**changes)
