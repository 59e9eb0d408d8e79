"""Rows in the words of their sources: what is understood, filled in, or refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.errors import FileError
from shardsim.model import Accounting, load_model, model_flops_per_token
from shardsim.plan.remat import Remat
from shardsim.validate.measured import accounting_of, flops_per_token
from shardsim.validate.parallelism import parallelism_of
from shardsim.validate.remat_words import remat_of
from shardsim.validate.rows import read_run
from shardsim.validate.runs import validate_data
from shardsim.validate.to_plan import plans_of
from shardsim.validate.words import number, whole

LLAMA: dict[str, Any] = {
    "id": "row",
    "model": "llama2-7b",
    "chip": "v5p",
    "chips": 64,
    "parallelism": {"fsdp": 64},
    "global_batch": 256,
    "seq": 4096,
    "remat": "full",
}


def run_of(**changes: Any) -> Any:
    row = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    return read_run(row, "runs.yaml")


def sizes_of(**changes: Any) -> dict[str, int]:
    return {axis.name: axis.size for axis in plans_of(run_of(**changes))[0].mesh}


@pytest.mark.parametrize(
    ("value", "result"),
    [(48, 48), ("48", 48), ("1,024", 1024), ("256 chips", 256), ("8k", 8192), (6144.0, 6144),
     ("21.7B", 21_700_000_000 // 10**9 * 10**9)],
)  # fmt: skip
def test_numbers_as_people_write_them(value: Any, result: int) -> None:
    if value == "21.7B":
        assert number(value, "params") == 21.7e9
    else:
        assert whole(value, "key") == result


@pytest.mark.parametrize(
    "value",
    [None, True, "sixteen", "", "1 2", -1, 0, "-3", float("nan"), float("inf"), 1e30, [1], {}, 1.5],
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(FileError, match=r"^key: "):
        whole(value, "key")


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ("full", Remat()),
        ("nothing_saveable", Remat()),
        ("full activation recomputation", Remat()),
        ("full remat, every layer", Remat()),
        (True, Remat()),
        ("one activation kept per layer", Remat()),
        ("none", remat_of("none")[0]),
        (False, remat_of("none")[0]),
        ("no recompute", remat_of("none")[0]),
        ("minimal", Remat(save=frozenset({"qkv", "attention_output", "mlp_hidden", "mlp_output"}))),
        ("minimal_flash", remat_of("minimal_with_context")[0]),
        ("selective", remat_of("minimal_with_context")[0]),
        ("Selective activation checkpointing", remat_of("selective")[0]),
        ("save_dot_except_mlp", Remat(save=frozenset({"qkv", "attention_output"}))),
        ("save_qkv_proj", Remat(save=frozenset({"qkv"}))),
        ("qkv_proj_offloaded (host offload)", Remat(offload=frozenset({"qkv"}))),
        ("custom: context,mlpwi kept on device", Remat(save=frozenset({"context", "mlp_hidden"}))),
        (
            "custom: decoder_layer_input,out_proj,q,k,v offloaded",
            Remat(offload=frozenset({"layer_input", "attention_output", "qkv"})),
        ),
        (
            "custom: decoder_layer_input=offload, query_proj=device, out_proj=remat",
            Remat(save=frozenset({"qkv"}), offload=frozenset({"layer_input"})),
        ),
        (
            "custom: context on device; mlpwi offloaded",
            Remat(save=frozenset({"context"}), offload=frozenset({"mlp_hidden"})),
        ),
        (
            {"policy": "custom", "context": "device", "mlpwi": "offload"},
            Remat(save=frozenset({"context"}), offload=frozenset({"mlp_hidden"})),
        ),
        (["context", "mlpwi"], Remat(save=frozenset({"context", "mlp_hidden"}))),
        (None, None),
        ("unknown", None),
        ("not stated", None),
    ],
)
def test_remat_in_everyone_s_words(said: Any, policy: Remat | None) -> None:
    assert remat_of(said) == (policy, "")


def test_remat_that_is_not_understood_is_taken_as_not_stated() -> None:
    assert remat_of("sprinkles") == (
        None,
        "remat: 'sprinkles' is not known; taken as not stated",
    )
    (row,) = validate_data([LLAMA | {"remat": "sprinkles"}], "runs.yaml").rows
    assert "sprinkles" in row.notes[0]


@pytest.mark.parametrize(
    ("said", "inside", "outside"),
    [
        ({"tp": 4, "fsdp": 16}, {"tensor": 4, "fsdp": 16}, {}),
        ({"ici_fsdp_parallelism": 64, "dcn_data_parallelism": 2}, {"fsdp": 64}, {"data": 2}),
        ({"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
         {"tensor": 8, "pipeline": 4}, {}),
        ({"dp_replicate": 2, "dp_shard": 32}, {"data": 2, "fsdp": 32}, {}),
        ({"ici": {"fsdp": 64, "tensor": 4}, "dcn": {"data": 2}},
         {"fsdp": 64, "tensor": 4}, {"data": 2}),
        ({"fsdp": "64", "sp": True, "note": "2 devices", "expert": 1, "odd": 1}, {"fsdp": 64}, {}),
        ({"ici_context_parallelism": 4, "fsdp": 16}, {"context": 4, "fsdp": 16}, {}),
        ([["data", 16], ["model", 8]], {"data": 16, "tensor": 8}, {}),
        ([{"data": 16}, {"model": 8}], {"data": 16, "tensor": 8}, {}),
        (["fsdp 64", "tp 4"], {"fsdp": 64, "tensor": 4}, {}),
        ("fsdp 64, tp=4", {"fsdp": 64, "tensor": 4}, {}),
        ("TP8 x DP16", {"tensor": 8, "data": 16}, {}),
        ("TP8 PP64 DP6", {"tensor": 8, "pipeline": 64, "data": 6}, {}),
        ("8-way tensor, 16-way pipeline", {"tensor": 8, "pipeline": 16}, {}),
        ("FSDP", {}, {}),
        (None, {}, {}),
    ],
)  # fmt: skip
def test_parallelism_in_everyone_s_words(
    said: Any, inside: dict[str, int], outside: dict[str, int]
) -> None:
    found = parallelism_of(said)
    assert (found.inside, found.outside) == (inside, outside)
    assert not found.unknown_tensor


@pytest.mark.parametrize(
    "said",
    [
        {"scheme": "2-D logical [data, model]; sizes not published"},
        {"scheme": "tensor axis of unknown size; the rest fsdp"},
        "fully sharded, with tensor parallelism",
    ],
)
def test_a_tensor_axis_without_a_size_gives_several_plans(said: Any) -> None:
    assert parallelism_of(said).unknown_tensor
    sizes = [
        {axis.name: axis.size for axis in plan.mesh} for plan in plans_of(run_of(parallelism=said))
    ]
    assert [each.get("model", 1) for each in sizes] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("said", [{"fsdp": 8, "foo": 8}, {"ep": 8}, {"fsdp": "x", "tp": 0.5}])
def test_axes_that_are_not_known_are_refused(said: Any) -> None:
    with pytest.raises(FileError, match=r"^runs.yaml \('row'\): parallelism"):
        run_of(parallelism=said)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"parallelism": {"fsdp": -1, "tp": 4}}, {"fsdp": 16, "model": 4}),
        ({"parallelism": {"data": -1, "fsdp": 8}}, {"data": 8, "fsdp": 8}),
        ({"parallelism": {"fsdp": 8}}, {"data": 8, "fsdp": 8}),
        ({"parallelism": {"tp": 4}}, {"fsdp": 16, "model": 4}),
        ({"parallelism": "data parallel only"}, {"data": 64}),
        ({"parallelism": None}, {"fsdp": 64}),
        ({"parallelism": {"fsdp": 128}, "chips": 128, "slices": 2}, {"fsdp": 128}),
        ({"parallelism": {"fsdp": 64, "dcn_fsdp": 2}, "chips": 128}, {"fsdp": 128}),
        ({"chip": "tpu7x", "parallelism": {"fsdp": 64}}, {"fsdp": 128}),
        (
            {"chip": "a100", "parallelism": {"tp": 8, "pp": 4}},
            {"stage": 4, "data": 2, "model": 8},
        ),
        ({"chip": "h100", "parallelism": {"fsdp": 64}}, {"fsdp": 64}),
    ],
)
def test_what_is_left_over_is_filled_in(changes: dict[str, Any], sizes: dict[str, int]) -> None:
    assert sizes_of(**changes) == sizes


def test_gpu_jobs_keep_the_tensor_axis_inside_a_node() -> None:
    run = run_of(chip="a100", chips=3072, parallelism="TP8 PP64 DP6", global_batch=3072)
    torus = {axis.name: dict(axis.torus) for axis in plans_of(run)[0].mesh}
    assert torus == {"stage": {"dcn": 64}, "data": {"dcn": 6}, "model": {"node": 8}}


@pytest.mark.parametrize(
    ("changes", "machine"),
    [
        ({"chip": "TPU v5e", "chips": "256", "topology": "16x16 (both axes wrap)"}, "v5e:16x16"),
        ({"chip": "v5litepod", "chips": 512}, "2*v5e:16x16"),
        ({"chips": None, "topology": "v5p-1024"}, "v5p:8x8x8"),
        ({"chips": None, "topology": "2x v5p-1024"}, "2*v5p:8x8x8"),
        ({"chips": None, "topology": "4x4x8", "slices": 2}, "2*v5p:4x4x8"),
        ({"chip": None, "chips": None, "slice": "v4-1024"}, "v4:8x8x8"),
        ({"chip": "v5e-256", "chips": None}, "v5e:16x16"),
        ({"chip": "v3", "chips": 1024, "topology": "v3-1024"}, "v3:16x32"),
        ({"chip": "NVIDIA H100 SXM", "chips": 64}, "8*h100:8"),
        ({"chip": "A100 80GB", "chips": None, "num_gpus": 16}, "2*a100:8"),
        ({"chip": "tpu7x", "chips": None, "devices": 128}, "tpu7x:4x4x4"),
        ({"chips": 64, "topology": "4x4x8"}, "v5p:4x4x4"),
        ({"chips": "2 x 64", "slices": 2}, "2*v5p:4x4x4"),
    ],
)
def test_slices_in_everyone_s_words(changes: dict[str, Any], machine: str) -> None:
    run = run_of(**({"parallelism": None} | changes))
    assert run.machine is not None
    assert run.machine.name == machine


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({"global_batch": "2,048 sequences"}, 2048),
        ({"global_batch": "4M tokens"}, 1024),
        ({"global_batch": None, "batch_tokens": 4194304}, 1024),
        ({"global_batch": None, "per_device_batch": 0.5}, 32),
        ({"global_batch": None, "per_device_batch_size": 2}, 128),
        ({"global_batch": None, "per_device_batch": 1, "chip": "tpu7x"}, 128),
        ({"global_batch": None, "per_device_batch": 2, "gradient_accumulation_steps": 4}, 512),
        ({"global_batch": None}, None),
    ],
)
def test_batch_in_everyone_s_words(changes: dict[str, Any], batch: int | None) -> None:
    assert run_of(**changes).batch == batch


def test_microbatches() -> None:
    megatron = {"chip": "a100", "parallelism": {"tp": 8, "pp": 4, "mbs": 2}}
    assert plans_of(run_of(**megatron))[0].microbatches == 256 // (2 * 2)
    unstated = {"chip": "a100", "parallelism": {"tp": 8, "pp": 4}}
    assert plans_of(run_of(**unstated))[0].microbatches == 16
    assert plans_of(run_of(microbatches=4))[0].microbatches == 4
    assert plans_of(run_of(chip="a100", parallelism={"tp": 8, "pp": 4, "vpp": 2}))[
        0
    ].pipeline_interleave == 2  # fmt: skip


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
