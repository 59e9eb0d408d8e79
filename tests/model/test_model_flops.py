"""FLOPs per token, in each published accounting, against what was published with it."""

import pytest

from shardsim.errors import ModelError
from shardsim.model import (
    Accounting,
    accounting_named,
    attention_flops_per_token,
    forward_matmul_flops_per_token,
    load_model,
    mfu,
    model_flops_per_token,
    override_model,
    tokens_per_s_at_mfu,
)

V4_PEAK_FLOPS = 275e12

# (model, sequence, tokens/s/chip, TFLOP/s/chip), both as printed by the run's own log.
# AI-Hypercomputer/tpu-recipes@c8cfe2f, training/trillium/* and training/ironwood/README.md.
LOGGED = [
    ("llama2-70b", 4096, 905.021, 402.274, Accounting.MAXTEXT_2024),
    ("llama3-70b", 8192, 876.736, 422.091, Accounting.MAXTEXT_2024),
    ("llama3-8b", 8192, 7243.378, 419.485, Accounting.MAXTEXT_2024),
    ("llama3-70b", 8192, 2686.98, 1207.05, Accounting.MAXTEXT_2025),
    ("llama3-70b", 8192, 4127.56, 1854.19, Accounting.MAXTEXT_2025),
    ("gemma3-12b", 32768, 4477.768, 349.442, Accounting.MAXTEXT_MIXED),
]

# (model, batch per chip, sequence, step time in s, TFLOP/s/chip): the throughput of these was
# derived from the printed TFLOP/s, so they pin N and the formula, not the printed figure.
# AI-Hypercomputer/maxtext: README.md @281e04bf3, @246f0f969, @e286533d8 (v4); @ebb226da8
# configs/v5e; @76bd53b0f configs/v5p.
TABLES = [
    ("maxtext-22b", 16, 1024, 13.8285, 156.0, Accounting.SIX_N),
    ("maxtext-22b", 16, 1024, 13.0742, 165.0, Accounting.SIX_N),
    ("maxtext-52b", 10, 1024, 20.7229, 154.0, Accounting.SIX_N),
    ("maxtext-16b", 6, 2048, 10.6256, 120.37, Accounting.PALM),
    ("maxtext-64b", 2, 2048, 13.9349, 118.0, Accounting.PALM),
    ("maxtext-32b", 8, 2048, 9.9142, 328.05, Accounting.PALM_CAUSAL),
    ("maxtext-128b", 2, 2048, 10.2386, 315.24, Accounting.PALM_CAUSAL),
    ("maxtext-512b", 2, 2048, 43.541, 293.71, Accounting.PALM_CAUSAL),
    ("maxtext-1024b", 2, 2048, 100.6075, 254.06, Accounting.PALM_CAUSAL),
]


@pytest.mark.parametrize(("name", "sequence", "rate", "tflops", "accounting"), LOGGED)
def test_logged_runs_are_reproduced(
    name: str, sequence: int, rate: float, tflops: float, accounting: Accounting
) -> None:
    model = load_model(name)
    flops = model_flops_per_token(model, sequence, accounting) * rate
    assert flops / 1e12 == pytest.approx(tflops, rel=1e-4)
    back = tokens_per_s_at_mfu(model, 1.0, tflops * 1e12, sequence, accounting)
    assert back == pytest.approx(rate, rel=1e-4)


def test_a_logged_video_is_reproduced() -> None:
    """A video on four v5p chips in 36.008 s, 135.9 TFLOP/s each: AI-Hypercomputer/maxdiffusion
    @7cfb8801, README.md, which counts parameters times tokens, and attention in full."""
    model = load_model("wan2.1-14b")
    for accounting in (Accounting.PALM, Accounting.MAXTEXT_2024):
        flops = model.sequence * model_flops_per_token(model, accounting=accounting)
        assert flops / 4 / 36.008 == pytest.approx(135.9e12, rel=2e-4)


@pytest.mark.parametrize(("name", "batch", "sequence", "step_s", "tflops", "accounting"), TABLES)
def test_tables_are_reproduced(
    name: str, batch: int, sequence: int, step_s: float, tflops: float, accounting: Accounting
) -> None:
    rate = batch * sequence / step_s
    flops = model_flops_per_token(load_model(name), sequence, accounting) * rate
    assert flops / 1e12 == pytest.approx(tflops, rel=3e-3)


def test_vit_22b_reaches_its_published_mfu() -> None:
    # arXiv 2302.05442: 1.15k tokens/s per chip, 54.9 %.
    identity = 1150 * (6 * 21.743e9 + 12 * 48 * 48 * 128 * 256) / V4_PEAK_FLOPS
    assert mfu(load_model("vit-22b"), 1150, V4_PEAK_FLOPS) == pytest.approx(identity, rel=1e-4)
    assert identity == pytest.approx(0.549, abs=5e-4)


def test_palm_540b_reaches_its_published_mfu() -> None:
    # arXiv 2204.02311: 238.3K tokens/s on 6144 chips; 46.2 %, and 45.7 % without attention.
    palm, rate = load_model("palm-540b"), 238.3e3 / 6144
    assert mfu(palm, rate, V4_PEAK_FLOPS) == pytest.approx(0.462, abs=5e-4)
    six_n = mfu(palm, rate, V4_PEAK_FLOPS, accounting=Accounting.SIX_N)
    assert six_n == pytest.approx(0.457, abs=5e-4)


def test_closed_forms() -> None:
    model = load_model("llama3-8b")
    heads_and_tokens = 32 * 32 * 128 * 1000
    weights = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)
    logits = 128256 * 4096
    assert attention_flops_per_token(model, 1000) == 4 * heads_and_tokens
    assert attention_flops_per_token(model, 1000, halved=True) == 2 * heads_and_tokens
    forward = 2 * (weights + logits) + 4 * heads_and_tokens
    assert forward_matmul_flops_per_token(model, 1000) == forward
    expected = {
        Accounting.SIX_N: 6 * 8_030_261_248,
        Accounting.PALM: 6 * 8_030_261_248 + 12 * heads_and_tokens,
        Accounting.PALM_CAUSAL: 6 * 8_030_261_248 + 6 * heads_and_tokens,
        Accounting.MAXTEXT_2024: 3 * forward,
        Accounting.MAXTEXT_2025: 3 * (forward - 2 * heads_and_tokens),
        Accounting.MAXTEXT_MIXED: 3 * (forward - 2 * heads_and_tokens),
        Accounting.MEGATRON: 3 * forward,  # 128,256 are 1,002 times 128
    }
    for accounting, flops in expected.items():
        assert model_flops_per_token(model, 1000, accounting) == flops


def test_megatron_counts_as_its_paper_does_on_a_padded_vocabulary() -> None:
    """arXiv 2104.04473, appendix: 96 B s l h^2 (1 + s/6h + V/16lh), of which a fourth is recomputed
    (but for the logits: with 72 in place of 96, V/12lh)."""
    model = override_model(load_model("gpt3-175b"), {"vocab": 50257})
    tokens, layers, width, padded = 2048, model.layers, model.embed, 50304
    per_token = 72 * layers * width**2 * (1 + tokens / (6 * width) + padded / (12 * layers * width))
    counted = model_flops_per_token(model, tokens, Accounting.MEGATRON)
    assert counted == pytest.approx(per_token, rel=1e-9)


def test_a_pooling_head_works_once_per_image() -> None:
    head = load_model("vit-e")
    bare = override_model(head, {"pooling": "none", "classes": 0})
    width, mlp, tokens = 1792, 15360, 256
    every_token = 2 * 2 * width**2  # keys and values
    once = 2 * (2 * width**2 + 2 * width * mlp + width * 29593)  # query, output, MLP, classes
    scores = 4 * width
    added = forward_matmul_flops_per_token(head) - forward_matmul_flops_per_token(bare)
    assert added == pytest.approx(every_token + once / tokens + scores)


@pytest.mark.parametrize("accounting", Accounting)
def test_more_tokens_never_cost_less(accounting: Accounting) -> None:
    model = load_model("gemma-2b")
    costs = [model_flops_per_token(model, tokens, accounting) for tokens in (1, 128, 8192, 131072)]
    assert costs == sorted(costs)


def test_accountings_have_names() -> None:
    assert accounting_named("palm") is Accounting.PALM
    with pytest.raises(ModelError, match="did you mean 'maxtext_2025'"):
        accounting_named("maxtext-2025")


@pytest.mark.parametrize("rate", [-1.0, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    model = load_model("vit-22b")
    with pytest.raises(ModelError, match="0 or more"):
        mfu(model, rate, V4_PEAK_FLOPS)
    with pytest.raises(ModelError, match="above 0"):
        mfu(model, 1.0, 0.0)
    with pytest.raises(ModelError, match="sequence"):
        model_flops_per_token(model, 0)
