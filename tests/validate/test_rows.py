"""Rows in the words of their sources: dims, FLOPs, rates, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from run_rows import LLAMA, run_of

from shardsim.model import Accounting, load_model, model_flops_per_token
from shardsim.validate.measured import accounting_of, flops_per_token
from shardsim.validate.runs import validate_data
from shardsim.validate.to_plan import plans_of


@pytest.mark.parametrize(
    "dims",
    [
        {"num_layers": 32, "hidden": 4096, "ffn": 11008, "n_heads": 32, "vocab_size": "32,000",
         "glu": True},
        {"num_hidden_layers": "32", "hidden_size": 4096.0, "intermediate_size": 11008,
         "num_attention_heads": 32, "head_dim": 128, "vocab_size": 32000, "swiglu": "yes"},
        {"L": 32, "d": 4096, "dff": 11008, "H": 32, "V": 32000, "activation": "SwiGLU"},
        {"base_num_decoder_layers": 32, "base_emb_dim": 4096, "base_mlp_dim": 11008,
         "base_num_query_heads": 32, "base_num_kv_heads": 32, "vocab": 32000, "params": "6.74B"},
    ],
)  # fmt: skip
def test_dims_in_everyone_s_words(dims: dict[str, Any]) -> None:
    model = run_of(model="mine", dims=dims).model
    assert model.parameters_all == load_model("llama2-7b").parameters_all


def test_dims_that_disagree_with_a_preset_make_a_model_of_their_own() -> None:
    dims = {"layers": 16, "d_model": 4096, "d_ff": 11008, "heads": 32}
    model = run_of(dims=dims).model
    assert (model.layers, model.gated_mlp, model.norm) == (16, True, "rmsnorm")
    assert run_of(dims={"layers": 32}).model == load_model("llama2-7b")


@pytest.mark.parametrize(
    ("dims", "seq", "tokens"),
    [
        ({"image": 224, "patch": 14}, None, 256),
        ({"image": 224, "patch_size": 16}, None, 196),
        ({"image": 224, "patch_size": 16}, 197, 197),
        ({"image": 224}, 196, 196),
        ({"image": 256, "patch": 14}, None, 18 * 18),
        ({"tokens": 1024}, None, 1024),
    ],
)
def test_images(dims: dict[str, Any], seq: int | None, tokens: int) -> None:
    dims = {"depth": 24, "width": 1024, "mlp_dim": 4096, "num_heads": 16} | dims
    run = run_of(model="vit-mine", dims=dims, seq=seq)
    assert run.model.family == "vit"
    assert not run.model.causal
    assert (run.sequence, run.model.sequence) == (tokens, tokens)


@pytest.mark.parametrize(
    ("formula", "accounting", "hardware"),
    [
        ("6*N_total*tokens only (commit before 2023-06-06)", Accounting.SIX_N, False),
        ("6N", Accounting.SIX_N, False),
        ("6N + 12*L*H*d_head*T (full attention)", Accounting.PALM, False),
        ("6N+12*L*H*Q*T per token, 275e12 peak", Accounting.PALM, False),
        ("PaLM-style MFU", Accounting.PALM, False),
        ("6N + 6*L*H*d_head*T (causal halved, from 2023-11-29)", Accounting.PALM_CAUSAL, False),
        ("MaxText, explicit matmuls, full attention", Accounting.MAXTEXT_2024, False),
        ("MaxText (2024-08-01)", Accounting.MAXTEXT_2024, False),
        ("MaxText (2023-07-01)", Accounting.PALM, False),
        ("MaxText until 2023-06-05", Accounting.SIX_N, False),
        ("MaxText, causal attention halved (after 2025-07-22)", Accounting.MAXTEXT_2025, False),
        ("HFU, four passes", Accounting.MAXTEXT_2024, True),
        ("", Accounting.PALM, False),
        ("who knows", Accounting.PALM, False),
    ],
)
def test_how_flops_are_counted(formula: str, accounting: Accounting, hardware: bool) -> None:
    assert accounting_of({"mfu_formula": formula}) == (accounting, hardware)


def test_a_stated_accounting_and_a_maxtext_source() -> None:
    assert accounting_of({"accounting": "palm_causal"})[0] is Accounting.PALM_CAUSAL
    assert accounting_of({"accounting": "6N"})[0] is Accounting.SIX_N
    source = "AI-Hypercomputer/maxtext README (2025-08-01)"
    assert accounting_of({"source": source})[0] is Accounting.MAXTEXT_2025


def test_hardware_flops_have_a_fourth_pass_over_the_layers() -> None:
    """Megatron's 96 B s l h^2 (1 + s/6h + V/16lh), arXiv 2104.04473, equation 3, per token."""
    dims = {"layers": 96, "hidden": 12288, "heads": 96, "vocab": 51200, "tied": True}
    model = run_of(model="gpt", dims=dims, seq=2048).model
    s, layers, h, vocab = 2048, 96, 12288, 51200
    printed = 96 * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    found = flops_per_token({"mfu_formula": "HFU, 96Bslh^2(1+s/6h+V/16lh)"}, model, s)
    assert found == pytest.approx(printed, rel=1e-9)


FLOPS = model_flops_per_token(load_model("llama2-7b"), 4096, Accounting.PALM)


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ({"tokens_s_chip": 5000}, 5000),
        ({"tokens_per_sec_per_chip": "5,000"}, 5000),
        ({"tokens_s_total": 320000}, 5000),
        ({"step_s": 4.0}, 256 * 4096 / 4.0 / 64),
        ({"step_time_ms": 4000}, 256 * 4096 / 4.0 / 64),
        ({"sequences_per_s": 64}, 4096),
        ({"tflops_chip": 250}, 250e12 / FLOPS),
        ({"pflops_total": 16}, 250e12 / FLOPS),
        ({"mfu_pct": 50}, 0.5 * 459e12 / FLOPS),
        ({"mfu": 0.5}, 0.5 * 459e12 / FLOPS),
        ({"step_s": 4.0, "tflops_chip": 1, "mfu_pct": 1}, 256 * 4096 / 4.0 / 64),
        ({"hfu_pct": 50}, None),
        (None, None),
    ],
)
def test_rates_are_derived(measured: dict[str, Any] | None, rate: float | None) -> None:
    found = run_of(measured=measured).measured
    assert found == (None if rate is None else pytest.approx(rate))


def test_rates_of_devices_count_all_of_a_chip() -> None:
    run = run_of(chip="tpu7x", parallelism=None, measured={"tokens_s_device": 1000})
    assert run.measured == 2000


@pytest.mark.parametrize(
    "row",
    [
        {"model": "llama3-405b", "chip": "v5p", "chips": 4096, "slices": 2, "seq": 8192,
         "parallelism": {"fsdp": 64, "tp": 32, "dcn_fsdp": 2}, "per_device_batch": 0.5},
        {"model": "Llama3.1-70B", "chip": "v6e", "chips": 256, "seq": 8192, "per_device_batch": 2,
         "parallelism": {"fsdp": 256}, "remat": "custom: decoder_layer_input,qkv_proj offloaded"},
        {"model": "llama3-8b", "chip": "v6e", "chips": 256, "seq": 131072, "per_device_batch": 0.25,
         "parallelism": {"fsdp": 64, "context": 4}, "remat": "qkv_proj_offloaded"},
        {"model": "llama3-405b", "chip": "ironwood", "topology": "8x16x16", "seq": 8192,
         "per_device_batch": 0.25, "parallelism": {"fsdp": -1, "tp": 4}, "remat": "save_qkv_proj"},
        {"model": "llama3-70b", "chip": "tpu7x", "chips": 64, "seq": 8192, "per_device_batch": 2,
         "precision": "fp8", "remat": "minimal_flash"},
        {"model": "llama3-70b", "chip": "H100 SXM", "chips": 256, "seq": 8192, "precision": "fp8",
         "parallelism": {"dp_shard": 64, "tp": 4}, "per_gpu_batch": 1, "remat": "selective op"},
        {"model": "gpt3-175b", "chip": "A100", "chips": 64, "seq": 2048, "global_batch": 64,
         "parallelism": {"tp": 8, "pp": 8, "mbs": 1, "vpp": 3}, "remat": "selective"},
        {"model": "gpt-76b", "dims": {"layers": 60, "hidden": 10240, "heads": 80, "vocab": 51200},
         "chip": "a100", "chips": 1024, "seq": 2048, "global_batch": 1792, "mbs": 2,
         "parallelism": "tp 8, pp 8, dp 16", "remat": "full recompute"},
        {"model": "fuji-7b", "dims": {"num_layers": 32, "hidden_dim": 4096, "ffn_dim": 11008,
         "num_heads": 32}, "slice": "v4-1024", "batch_tokens": "4M", "seq": 4096,
         "parallelism": {"data": -1, "fsdp": 16}, "remat": "save qkv, o_proj"},
        {"model": "t5", "dims": {"layers": 24, "d_model": 4096, "d_ff": 10240, "heads": 64,
         "d_head": 64, "vocab": 32128, "glu": True}, "chip": "v3", "topology": "v3-1024",
         "parallelism": {"data": 64, "model": 16}, "global_batch": 2048, "seq": 512},
        {"model": "bert-large", "dims": {"layers": 24, "d_model": 1024, "heads": 16,
         "vocab": 30522}, "chip": "v2", "topology": "v2-512", "parallelism": {"dp": 512},
         "global_batch": 32768, "seq": 128},
        {"model": "vit-g-14", "chip": "v4", "chips": 512, "parallelism": "data parallel only",
         "global_batch": 32768},
    ],
)  # fmt: skip
def test_invented_rows_are_predicted_sensibly(row: dict[str, Any]) -> None:
    result = validate_data({"runs": [row]}, "runs.yaml")
    assert result.failed == ()
    share = result.rows[0].predicted_mfu
    assert share is not None
    assert 0.02 < share < 0.9


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chip": "v9"}, "unknown chip 'v9'"),
        ({"chip": None}, "missing key 'chip'"),
        ({"model": "mine"}, "missing key 'dims', and 'model' is no preset's name"),
        ({"dims": [], "model": "mine"}, "dims: expected a mapping of keys, found []"),
        ({"dims": {"layers": 4}, "model": "mine"}, "dims: missing key 'd_model'"),
        ({"dims": {"num_experts": 8}}, "dims.experts: mixtures of experts are not modelled"),
        ({"chips": "sixteen"}, "chips: expected a positive number, found 'sixteen'"),
        ({"chips": 100, "slices": 3}, "chips: 100 do not divide into 3 slices"),
        ({"measured": 5}, "measured: expected a mapping of keys, found 5"),
        ({"measured": {"step_s": -1}}, "measured.step_s: must be positive and below 10^18, not -1"),
        ({"global_batch": None}, "global_batch: missing, and no per_device_batch either"),
        ({"parallelism": {"fsdp": 48}}, "parallelism: sizes multiply to 48, which does not divide "
                                        "the 64 devices of a slice of v5p:4x4x4"),
    ],
)  # fmt: skip
def test_reasons_why_a_row_is_not_predicted(changes: dict[str, Any], why: str) -> None:
    row = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    result = validate_data([LLAMA | {"id": "good"}, row], "runs.yaml")
    assert [each.id for each in result.rows] == ["good"]
    ((name, reason),) = result.failed
    assert name == "row"
    assert why in reason
    assert "\n" not in reason


def test_keys_that_say_nothing_about_the_plan_are_tolerated() -> None:
    more = {"notes": "n", "source": "s", "confidence": "c", "step_s_derived": 4, "anything": [1]}
    plain, other = validate_data([LLAMA, LLAMA | more], "runs.yaml").rows
    assert plain == other


def test_shards_of_context_axes() -> None:
    plan = plans_of(run_of(parallelism={"fsdp": 16, "cp": 4}))[0]
    assert plan.parameters["embed"] == ("fsdp", "context")
    assert plan.activations["seq"] == ("context",)
