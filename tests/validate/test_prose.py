"""Rows in the words of their sources: what is understood, filled in, or refused with a reason."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.predict import hbm_of
from shardsim.errors import FileError, ShardsimError
from shardsim.model import Accounting, load_model
from shardsim.plan import Plan
from shardsim.plan.remat import Policy, Remat, parse_remat
from shardsim.validate.figures import accounting_of
from shardsim.validate.prose import from_prose, is_prose, strict_row
from shardsim.validate.rows import Run, read_run
from shardsim.validate.runs import validate_data
from shardsim.validate.words import number, remat_named, whole

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


def run_of(**changes: Any) -> Run:
    """Return the run of the row above with some keys changed; None removes one."""
    row = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    return from_prose(row, "runs.yaml: runs[0]")


def sizes_of(**changes: Any) -> dict[str, int]:
    """Return the mesh that such a row is planned with."""
    return {axis.name: axis.size for axis in run_of(**changes).plans[0].mesh}


def test_prose_and_exact_fields_give_the_same_plan() -> None:
    exact = {
        "id": "row",
        "model": "llama2-7b",
        "machine": "v5p:4x4x4",
        "batch": 256,
        "sequence": 4096,
        "mesh": {"fsdp": 64},
        "remat": "full",
        "overlap": {"gradients": False},
        "measured": {},
        "source": "",
    }
    assert is_prose(LLAMA)
    assert not is_prose(exact)
    assert run_of().plans == read_run(exact, "runs.yaml").plans
    assert "words of its source" in run_of().filled["id"]


@pytest.mark.parametrize(
    ("value", "result"),
    [(48, 48), ("48", 48), ("1,024", 1024), ("256 chips", 256), (6144.0, 6144), ("2B", 2 * 10**9)],
)
def test_numbers_as_people_write_them(value: Any, result: int) -> None:
    assert number(value, "key") == result


@pytest.mark.parametrize(
    "value",
    [None, True, "sixteen", "", "1 2", -1, 0, "-3", float("nan"), float("inf"), 1e30, [1], {}, 1.5],
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(FileError, match=r"^key: "):
        whole(value, "key")


MINIMAL = remat_named("minimal", {})


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ("full", Policy()),
        ({"save": ["qkv"]}, Policy(save=frozenset({"qkv"}))),
        ("FULL", Policy()),
        (True, Policy()),
        ("save one activation per layer, rematerialise rest", Policy()),
        ("none", remat_named("none", {})),
        (False, remat_named("none", {})),
        ("no recompute", remat_named("none", {})),
        ("minimal", MINIMAL),
        ("selective", remat_named("minimal_with_context", {})),
        ("Selective activation checkpointing", remat_named("selective", {})),
        ("dots_saveable with flash", remat_named("dots_saveable", {})),
        ("save_dot_except_mlp", Policy(save=frozenset({"qkv", "attention_output"}))),
        ("qkv_proj_offloaded (host offload)", Policy(offload=frozenset({"qkv"}))),
        (
            "custom: context,mlpwi kept on device",
            Policy(save=frozenset({"context", "mlp_hidden"})),
        ),
        ("custom: layer input, context, q/k/v", Policy(save=frozenset({"context", "qkv"}))),
        (
            "custom: decoder_layer_input,out_proj,q,k,v offloaded",
            Policy(offload=frozenset({"layer_input", "attention_output", "qkv"})),
        ),
        (
            "custom: decoder_layer_input=offload, qkv_proj=device, out_proj=remat",
            Policy(save=frozenset({"qkv"}), offload=frozenset({"layer_input"})),
        ),
        (
            "custom: context on device; mlpwi offloaded",
            Policy(save=frozenset({"context"}), offload=frozenset({"mlp_hidden"})),
        ),
    ],
)  # fmt: skip
def test_remat_in_words(said: Any, policy: Policy) -> None:
    run = run_of(remat=said)
    assert run.plans[0].remat == Remat((policy,))
    assert run.notes == ()


def test_a_part_of_a_tensor_is_said_to_be_taken_whole() -> None:
    run = run_of(remat="custom: mlpwi_0 on device, query_proj on device")
    assert run.plans[0].remat == Remat.of(save=frozenset({"qkv", "mlp_hidden"}))
    told = "remat: {} taken as all of {}, which a plan keeps whole"
    assert run.notes == (told.format("mlpwi_0", "mlp_hidden"), told.format("query_proj", "qkv"))
    assert run_of(remat="custom: q, k, v on device").notes == ()


def test_what_a_library_offloads_where_a_row_only_says_that_it_does() -> None:
    run = run_of(remat="custom with offload", source="AI-Hypercomputer/maxtext: docs")
    assert run.plans[0].remat == Remat.of(offload=frozenset({"layer_input", "qkv"}))
    assert run.notes == ("remat: what is offloaded is not stated: layers' input and qkv",)


@pytest.mark.parametrize("said", [None, "unknown", "not stated", "sprinkles", "custom offload"])
def test_remat_that_is_not_understood_is_taken_as_not_stated(said: str | None) -> None:
    run = run_of(remat=said, global_batch=64)
    assert run.plans[0].remat.name == "none"  # which fits
    known = said in (None, "unknown", "not stated")
    assert run.notes == (() if known else (f"remat: '{said}' is not known; taken as not stated",))


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ({"tp": 4, "fsdp": "16"}, {"fsdp": 16, "model": 4}),
        ({"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "dp": 2},
         {"stage": 4, "data": 2, "model": 8}),
        ({"fsdp": 64, "sp": True, "note": "2 devices", "expert": 1, "odd": 1}, {"fsdp": 64}),
        ({"ici_context_parallelism": 4, "fsdp": 16}, {"fsdp": 16, "context": 4}),
        ("fsdp 64", {"fsdp": 64}),
        ("FSDP 16 x TP=4", {"fsdp": 16, "model": 4}),
        ("TP8 x DP8", {"data": 8, "model": 8}),
        ("context 16 x fsdp 4, context parallel strategy allgather", {"fsdp": 4, "context": 16}),
        ("fsdp 16 x fsdp_transpose 4", {"fsdp": 64}),
        ("FSDP", {"fsdp": 64}),
        ("data only (pure DP)", {"data": 64}),
        ("data parallel", {"data": 64}),
        ("DDP", {"data": 64}),
        ("fully sharded data parallel", {"fsdp": 64}),
        ("data", {"data": 64}),
        ({"scheme": "data parallel only"}, {"data": 64}),
        ({"fsdp": -1, "tp": 4}, {"fsdp": 16, "model": 4}),
        ({"data": -1, "fsdp": 8}, {"data": 8, "fsdp": 8}),
        ({"fsdp": 8}, {"data": 8, "fsdp": 8}),
        ({"tp": 4}, {"fsdp": 16, "model": 4}),
        (None, {"fsdp": 64}),
    ],
)  # fmt: skip
def test_sharding_in_words(said: Any, sizes: dict[str, int]) -> None:
    assert sizes_of(parallelism=said) == sizes


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"parallelism": {"fsdp": 128}, "chips": 128, "slices": 2}, {"fsdp": 128}),
        ({"parallelism": {"fsdp": 64, "dcn_fsdp": 2}, "chips": 128}, {"fsdp": 128}),
        ({"parallelism": {"fsdp": 64, "dcn_dp": 2}, "chips": 128}, {"data": 2, "fsdp": 64}),
        ({"chip": "tpu7x", "parallelism": {"fsdp": 64}}, {"fsdp": 128}),
        ({"chip": "a100", "parallelism": {"tp": 8, "pp": 4}}, {"stage": 4, "data": 2, "model": 8}),
        ({"chip": "h100", "parallelism": {"fsdp": 64}}, {"fsdp": 64}),
    ],
)
def test_what_is_left_over_is_filled_in(changes: dict[str, Any], sizes: dict[str, int]) -> None:
    assert sizes_of(**changes) == sizes


@pytest.mark.parametrize(
    "said",
    [
        {"scheme": "2-D logical [data, model]; sizes not published"},
        {"scheme": "tensor axis of unknown size; the rest fsdp"},
        "fully sharded, with tensor parallelism",
    ],
)
def test_a_tensor_axis_without_a_size_gives_several_plans(said: Any) -> None:
    plans = run_of(parallelism=said).plans
    sizes = [{axis.name: axis.size for axis in plan.mesh} for plan in plans]
    assert [each.get("model", 1) for each in sizes] == [1, 2, 4, 8, 16]


CONTEXT = "context 16 x fsdp 4"


@pytest.mark.parametrize(
    ("changes", "keys", "order"),
    [
        ({"parallelism": f"{CONTEXT}, context parallel strategy ulysses"}, "ulysses", None),
        ({"parallelism": {"cp": 16, "note": "all-to-all over heads"}}, "ulysses", None),
        ({"parallelism": CONTEXT, "tricks": ["Ulysses"]}, "ulysses", None),
        ({"parallelism": CONTEXT, "attention": "ulysses"}, "ulysses", None),
        ({"parallelism": f"{CONTEXT}, context parallel strategy ring"}, "ring", "striped"),
        ({"parallelism": CONTEXT, "tricks": ["RingAttention"]}, "ring", "contiguous"),
        ({"parallelism": CONTEXT, "attention": {"kernel": "ring_attention"}}, "ring", "contiguous"),
        ({"parallelism": CONTEXT, "tricks": ["striped attention"]}, "ring", "striped"),
        ({"parallelism": CONTEXT, "tricks": ["ring attention, load-balanced"]}, "ring", "striped"),
        ({"parallelism": CONTEXT, "tricks": ["Ring", "load-balancing loss"]}, "ring", "contiguous"),
        ({"parallelism": CONTEXT, "tricks": ["Ring", "not striped"]}, "ring", "contiguous"),
        ({"parallelism": CONTEXT}, "gathered", None),
    ],
)  # fmt: skip
def test_how_a_context_axis_attends(changes: dict[str, Any], keys: str, order: str | None) -> None:
    (plan,) = run_of(seq=32768, **changes).plans
    assert (plan.context.keys, plan.context.order) == (keys, order)
    (waits,) = run_of(seq=32768, notes="without overlap", **changes).plans
    assert waits.context.overlap == (keys != "ring")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parallelism": "ulysses 16 x fsdp 4"}, "Ulysses (all-to-all of heads)"),
        ({"parallelism": {"ulysses": 16, "fsdp": 4}}, "Ulysses (all-to-all of heads)"),
        ({"parallelism": {"ring": 4, "fsdp": 16}}, "ring attention"),
        ({"parallelism": {"sp": 4, "fsdp": 16}}, "an axis over the sequence"),
        ({"parallelism": "sequence parallel 4 x fsdp 16"}, "an axis over the sequence"),
        ({"parallelism": "HSDP 8x8"}, "HSDP without the sizes of its two axes"),
        ({"parallelism": {"fsdp": 0.5}}, "parallelism.fsdp: expected a whole number, found 0.5"),
        ({"parallelism": {"ep": 8, "fsdp": 8}}, "experts on an axis of their own"),
        ({"parallelism": "expert 8, fsdp 8"}, "experts on an axis of their own"),
        ({"parallelism": {"zero_stage": 5}}, "zero_stage: ZeRO has stages 0 to 3, not 5"),
        ({"parallelism": "ZeRO-2, pp 4"}, "ZeRO-2 over pipeline stages"),
        ({"remat": {"context": "devise"}}, "remat.context: expected device, offload, host, remat"),
        ({"remat": "custom: all but mlpwi"}, "remat: name what is kept, not what is not"),
        ({"remat": "full, 10 layers a stage"}, "remat: of 10 layers at a time, or of some"),
        ({"measured": {"tflops_chip": 700}}, "measured.tflops_per_s_per_chip: 700 would be 1"),
        ({"parallelism": "tp 8, MBS 0"}, "parallelism.mbs: must be positive"),
        ({"parallelism": "tp 8 x pp 8, interleaved"}, "missing the stages of a rank (vpp 4)"),
        ({"parallelism": "tp 8 x pp 8, zero bubble"}, "a pipeline schedule other than 1F1B"),
        ({"tricks": ["sliding window of 4,096"]}, "attention to some of the tokens only"),
        ({"precision": "fp8"}, "precision: fp8: the v5p multiplies no fp8"),
        ({"optimizer": "Lion"}, "optimizer: lion is not modelled; choose from: adamw"),
        ({"dims": {"window": {"size": 9, "global_head": 512}}}, "dims.window: attention in a win"),
        ({"dims": {"num_experts": 8}}, "dims.num_experts: mixtures of experts are not modelled"),
        ({"dims": {"cross_attention": "yes"}}, "dims.cross_attention: cross-attention of wh"),
    ],
)  # fmt: skip
def test_what_would_fall_into_another_mechanism_is_refused(
    changes: dict[str, Any], why: str
) -> None:
    result = validate_data([LLAMA | {"id": "good"}, LLAMA | changes], "runs.yaml")
    assert [each.id for each in result.rows] == ["good"]
    ((_, reason),) = result.failed
    assert reason.startswith("runs.yaml: runs[1] ('row'): ")
    assert why in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chip": "v9"}, "unknown chip 'v9'"),
        ({"chip": None}, "missing key 'chip'"),
        ({"model": "mine"}, "missing key 'dims', and 'model' is no preset's name"),
        ({"dims": [4], "model": "mine"}, "dims: expected a mapping of keys, found [4]"),
        ({"dims": {"layers": 4}, "model": "mine"}, "dims: missing key 'd_model'"),
        ({"chips": "sixteen"}, "chips: expected a positive number, found 'sixteen'"),
        ({"chips": 100, "slices": 3}, "chips: 100 do not divide into 3 slices"),
        ({"measured": 5}, "measured: expected a mapping of keys, found 5"),
        ({"measured": {"step_s": -1}}, "measured.step_s: must be positive and below 10^18, not -1"),
        ({"measured": {"step_ms": 8000, "step_time_s": 9}}, "measured: step_ms (8 s) and "
         "step_time_s (9 s) are one figure; leave one out"),
        ({"microbatches": 0}, "microbatches: must be positive and below 10^18, not 0"),
        ({"tricks": 5}, "tricks: expected a list of techniques, found 5"),
        ({"remat": "no recomputation of the MLP, recompute attention"}, "remat: 'mlp': of some"),
        ({"remat": "full, but attention is saved"}, "remat: 'but': of some parts only"),
        ({"global_batch": None}, "global_batch: missing, and no per_device_batch either"),
        ({"parallelism": {"fsdp": 8, "foo": 8}}, "parallelism: unknown key 'foo'"),
        ({"parallelism": {"fsdp": 48}}, "parallelism.fsdp: sizes multiply to 48, which does not "
                                        "divide the 64 devices of a slice of v5p:4x4x4"),
    ],
)  # fmt: skip
def test_reasons_why_a_row_is_not_predicted(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(FileError) as raised:
        run_of(**changes)
    assert str(raised.value).startswith("runs.yaml: runs[0] ('row'): ")
    assert why in str(raised.value)


@pytest.mark.parametrize(
    "key",
    [
        *("model", "seq", "chips", "slices", "topology", "parallelism", "global_batch"),
        *("per_device_batch", "precision", "optimizer", "remat", "tricks", "attention", "measured"),
        *("accounting", "microbatches", "microbatch", "gradient_accumulation_steps", "zero_stage"),
        *("library", "dims", "compiler_flags", "pipeline_interleave", "rules", "anything"),
    ],
)
@pytest.mark.parametrize("value", ["banana", ["banana"], {"banana": 1}, -3])
def test_nothing_that_a_row_says_is_passed_over(key: str, value: Any) -> None:
    usual, other = list[str](), list[str]()
    before = strict_row(LLAMA, usual)
    try:
        after = strict_row({**LLAMA, key: value}, other)
    except ShardsimError:
        return
    assert (after, other) != (before, usual)


def test_techniques_may_be_switches() -> None:
    notes: list[str] = []
    said = {"flash_attention": True, "async_all_gather": False, "num_vocab_tiling": 8, "odd": 3}
    assert strict_row({**LLAMA, "tricks": said}, notes)["vocab_tiles"] == 8
    assert notes == ["tricks: not read: odd=3"]


@pytest.mark.parametrize(
    ("changes", "machine"),
    [
        ({"chip": "TPU v5e", "chips": 256, "topology": "16x16 (both axes wrap)"}, "v5e:16x16"),
        ({"chip": "v5litepod", "chips": 512}, "2*v5e:16x16"),
        ({"chips": None, "topology": "v5p-1024"}, "v5p:8x8x8"),
        ({"chips": None, "topology": "4x4x8", "slices": 2}, "2*v5p:4x4x8"),
        ({"chip": "v3", "chips": 128, "topology": "v3-256 = 128 chips"}, "v3:8x16"),
        ({"chip": "v4", "chips": 6144, "slices": 2, "topology": "2 pods x 3072 (768 hosts)"},
         "2*v4:12x16x16"),
        ({"chip": "h100", "chips": 64}, "8*h100:8"),
        ({"chips": 64, "topology": "4x4x8"}, "v5p:4x4x4"),
    ],
)  # fmt: skip
def test_slices_in_words(changes: dict[str, Any], machine: str) -> None:
    assert run_of(**({"parallelism": None} | changes)).plans[0].machine.name == machine


def test_batch_of_a_device_and_microbatches() -> None:
    assert run_of(global_batch=None, per_device_batch=0.5).plans[0].batch == 32
    assert run_of(global_batch=None, per_device_batch=1, chip="tpu7x").plans[0].batch == 128
    steps = {"per_device_batch": 2, "gradient_accumulation_steps": 4}
    plan = run_of(global_batch=None, **steps).plans[0]
    assert (plan.batch, plan.microbatches) == (512, 4)
    stages = {"chip": "a100", "parallelism": {"tp": 8, "pp": 4}}
    assert run_of(**stages).plans[0].microbatches == 16
    plan = run_of(chip="a100", parallelism="TP8 PP4 VPP2, microbatch 2").plans[0]
    assert (plan.microbatches, plan.pipeline_interleave) == (256 // (2 * 2), 2)
    for words in (
        "TP=8, PP=4, VP=2, MBS=2",
        "TP8 PP4, virtual pipeline size 2, micro-batch size 2",
        {"tp": 8, "pp": 4, "virtual_pipeline": 2, "micro_batch_size": 2},
        "TP 8 PP 4 VPP 2 MBS 2",
        "tensor_model_parallel_size=8 pipeline_model_parallel_size=4 "
        "virtual_pipeline_model_parallel_size=2 micro_batch_size=2",
    ):
        assert run_of(chip="a100", parallelism=words).plans[0].mesh == plan.mesh
        assert run_of(chip="a100", parallelism=words).plans[0].microbatches == plan.microbatches
        assert run_of(chip="a100", parallelism=words).plans[0].pipeline_interleave == 2
    assert run_of(parallelism="fsdp 64, warps 3").notes == ("parallelism: not read: warps 3",)
    said = run_of(chip="a100", parallelism="TP 8, TP 4, VP 2").notes
    assert said == ("parallelism: not read: tp 4, virtual pipeline 2, without stages",)
    run_of(chip="a100", parallelism="TP 8, ZeRO-1", source="NVIDIA/Megatron-LM")


def test_rows_may_call_kernels_and_remat_as_a_plan_does() -> None:
    (plan,) = run_of(attention="flash-two-kernels", remat="save statistics, offload qkv").plans
    assert plan.attention == "flash-two-kernels"
    assert plan.remat.name == "save statistics, offload qkv"


def test_weights_of_16_bits_and_who_keeps_others_beside_them() -> None:
    found = run_of(precision="bf16, bf16 weights").plans[0].precision
    assert (found.parameters, found.state, found.master) == ("bf16", "bf16", "")
    nemo = run_of(chip="h100", parallelism="TP2 PP2", source="NVIDIA-NeMo/Megatron-Bridge")
    found = nemo.plans[0].precision
    assert (found.parameters, found.state, found.master) == ("bf16", "", "f32")


def test_megatrons_experts_lie_over_the_tensor_axis_too() -> None:
    row = {"model": "qwen3-235b-a22b", "chip": "h100", "chips": 256, "global_batch": 2048}
    row |= {"parallelism": "TP2 PP8 EP32", "source": "NVIDIA-NeMo/Megatron-Bridge"}
    run = run_of(**row)
    assert {axis.name: axis.size for axis in run.plans[0].mesh} == {
        **{"stage": 8, "expert": 16, "model": 2}
    }
    assert run.plans[0].microbatches == 2048 // 16  # of one sequence
    assert "taken as 16 and tensors of 2" in run.notes[0]
    with pytest.raises(FileError, match="sizes multiply to 1536"):
        run_of(**row | {"parallelism": "TP2 PP8 EP96"})


def test_a_librarys_own_remat_is_left_where_it_does_not_fit() -> None:
    row = {"model": "llama2-70b", "chip": "v6e", "chips": 256, "global_batch": 1024}
    row |= {"parallelism": "fsdp 256", "remat": None, "source": "AI-Hypercomputer/maxtext"}
    run = run_of(**row)
    assert run.plans[0].remat.groups[0].offload == {"layer_input", "qkv"}
    assert "do not fit" in run.notes[-1]
    assert run_of(**row | {"global_batch": 256}).plans[0].remat == Remat()


def test_a_row_without_chips_gives_a_range() -> None:
    plans = run_of(chips=None, global_batch=None, parallelism="data parallel only").plans
    assert {plan.machine.chips for plan in plans} == {256, 512, 1024}
    assert len(plans) == 9
    assert all(plan.optimizer_rules == {"embed": ("data",)} for plan in plans)


@pytest.mark.parametrize(
    ("dims", "seq", "tokens"),
    [
        ({"image": 224, "patch": 14}, None, 256),
        ({"image": 224, "patch": 16}, 197, 197),
        ({"image": 256, "patch": 14}, None, 18 * 18),
        ({"tokens": 1024}, None, 1024),
    ],
)
def test_images(dims: dict[str, Any], seq: int | None, tokens: int) -> None:
    dims = {"layers": 24, "d_model": 1024, "d_ff": 4096, "heads": 16} | dims
    run = run_of(model="vit-mine", dims=dims, seq=seq)
    assert (run.model.family, run.model.causal) == ("vit", False)
    assert (run.sequence, run.model.sequence) == (tokens, tokens)


def torchtitan(**changes: Any) -> Plan:
    """Return the plan of a row of PyTorch's library, on one node unless changed."""
    row = {"model": "llama3-8b", "chip": "h100", "chips": 8, "parallelism": "FSDP 8", "seq": 8192}
    source = {"source": "pytorch/torchtitan:benchmarks/x.md", "remat": None, "global_batch": 256}
    (plan,) = run_of(**(row | source | changes)).plans
    return plan


def test_what_pytorchs_library_does_by_itself() -> None:
    plan = torchtitan(precision="fp8 compile")
    assert plan.machine.name == "h100-500w:8"  # its runs were on those
    assert (plan.precision.reduce, plan.precision.bf16) == ("f32", ("head",))
    assert (plan.overlap.matmul, plan.overlap.gradients) == ("off", True)
    assert torchtitan(precision="bf16, async TP").overlap.matmul == "bidirectional"
    staged = {"chips": 512, "parallelism": "FSDP 8 x TP 8 x PP 8, interleaved"}
    plan = torchtitan(model="llama3-405b", **staged)
    assert (plan.microbatches, plan.pipeline_interleave, plan.accumulation) == (8, 2, "gathered")
    assert plan.activations["seq"] == ("model",)


@pytest.mark.parametrize(("said", "few"), [("selective", 19), ("selective op", 19), ("full", 0)])
def test_every_second_product_again_is_as_much_work_in_whole_layers(said: str, few: int) -> None:
    """Keys, output and gate of seven products: 4.75 of 13 squares of the width, where output and
    both halves of the MLP are 8."""
    assert 19 / 32 == pytest.approx(4.75 / 8, abs=0.5 / 32)
    groups = torchtitan(remat=said).remat.groups
    if not few:
        assert groups == (Policy(),)
        return
    assert [group.layers for group in groups] == [32 - few, few]
    assert groups[0].save - groups[1].save == {"attention_output", "mlp_hidden"}


def test_fused_attention_had_to_be_asked_for_in_axlearn() -> None:
    source = {"source": "apple/axlearn:fuji.py", "remat": None}
    (short,) = run_of(seq=2048, **source).plans
    (long,) = run_of(seq=4096, **source).plans
    (asked,) = run_of(seq=2048, tricks=["flash attention"], **source).plans
    assert [plan.attention for plan in (short, long, asked)] == [
        "unfused",
        "flash-2023",
        "flash-2023",
    ]
    assert short.remat.only("it").save - long.remat.only("it").save == {"context"}


def test_formats_and_tiles_in_words() -> None:
    (plan,) = run_of(
        precision="bf16 compute; mu_dtype, grad_dtype bf16", tricks=["num_vocab_tiling 8"]
    ).plans
    assert (plan.optimizer, plan.precision.gradients) == ("adamw-bf16-mu", "bf16")
    assert plan.vocab_tiles == 8


@pytest.mark.parametrize("said", ["-3", "lots", "=1e9"])
def test_tiles_that_are_no_number_are_said(said: str) -> None:
    run = run_of(tricks=[f"num_vocab_tiling {said}"])
    assert run.plans[0].vocab_tiles == 1
    assert "tricks: num_vocab_tiling without a whole number below 10,000; left out" in run.notes


def test_offloading_in_words() -> None:
    tricks = ["optimizer_memory_host_offload=true", "parameter_memory_host_offload=false"]
    (plan,) = run_of(tricks=tricks).plans
    assert (plan.offload_optimizer, plan.offload_parameters) == (True, False)
    (plan,) = run_of(tricks=["Parameter_memory_host_offload"]).plans
    assert (plan.offload_optimizer, plan.offload_parameters) == (False, True)


def test_remat_is_read_alike_in_any_case() -> None:
    one, other = (
        run_of(remat=said, source="torchprime", global_batch=64)
        for said in ("custom with offload", "Custom With Offload")
    )
    assert one.plans[0].remat == other.plans[0].remat


def test_an_mlp_of_eight_thirds_of_the_width() -> None:
    run = run_of(model="mine", dims={"layers": 2, "d_model": 2048, "heads": 32, "d_ff": "8/3 d"})
    assert run.model.mlp == 5632
    assert run.notes == ("dims: d_ff: 8/3 of d_model, as a multiple of 256: 5,632",)


def test_dims_that_disagree_with_a_preset_make_a_model_of_their_own() -> None:
    dims = {"layers": 16, "d_model": 4096, "d_ff": 11008, "heads": 32}
    model = run_of(dims=dims).model
    assert (model.layers, model.gated_mlp, model.norm) == (16, True, "rmsnorm")
    assert run_of(dims={"layers": 32}).model == load_model("llama2-7b")
    (row,) = validate_data([LLAMA | {"dims": {"layers": 16, **dims, "spice": 3}}], "").rows
    assert "dims: not read: spice" in row.notes


def test_the_parameter_count_says_whether_the_mlp_is_gated() -> None:
    dims = {"layers": 32, "d_model": 4096, "d_ff": 11008, "heads": 32, "vocab": 32000}
    for count, gated in (("6.74B", True), ("5.3B", False)):
        assert run_of(model="x", dims=dims | {"params_published": count}).model.gated_mlp is gated


def test_windows_are_those_of_a_round_of_layers() -> None:
    dims = {"layers": 24, "d_model": 512, "heads": 4, "window": {"size": 1024, "global_every": 6}}
    found = run_of(model="mine", dims=dims).model
    assert tuple(found.windows) == (1024,) * 5 + (0,)
    assert tuple(run_of(model="mine", dims=dims | {"window": {"size": 64}}).model.windows) == (64,)
    # A preset that has none is not the model of such a row.
    sizes = {"layers": 32, "d_model": 4096, "d_ff": 11008, "heads": 32}
    named = run_of(dims=sizes | {"window": {"size": 64}}).model
    assert tuple(named.windows) == (64,)
    preset = load_model("gemma3-4b")  # 34 layers: no whole rounds
    dims = {"layers": 34, "d_model": 2560, "d_ff": 10240, "heads": 8, "kv_heads": 4, "d_head": 256}
    dims |= {"vocab": preset.vocab, "window": {"size": 1024, "global_every": 6}}
    assert run_of(model="gemma3-4b", dims=dims).model == preset
    assert run_of(model="other", dims=dims).model.windows == preset.windows


def test_a_kernel_that_skips_no_blocks_computes_the_whole_square() -> None:
    plain = run_of(attention={"kernel": "flash", "skips_masked_blocks": True})
    whole_square = run_of(attention={"kernel": "flash", "skips_masked_blocks": False})
    assert plain.model.causal
    assert not whole_square.model.causal


@pytest.mark.parametrize(
    ("formula", "accounting"),
    [
        ("6*N_total*tokens only (commit before 2023-06-06)", Accounting.SIX_N),
        ("6N + 12*L*H*d_head*T (full attention)", Accounting.PALM),
        ("6N+12*L*H*Q*T per token, 275e12 peak", Accounting.PALM),
        ("PaLM-style MFU", Accounting.PALM),
        ("6N + 6*L*H*d_head*T (causal halved, from 2023-11-29)", Accounting.PALM_CAUSAL),
        ("MaxText, explicit matmuls, full attention", Accounting.MAXTEXT_2024),
        ("MaxText (2024-08-01)", Accounting.MAXTEXT_2024),
        ("MaxText (2023-07-01)", Accounting.PALM),
        ("MaxText (2023-05-01)", Accounting.SIX_N),
        ("MaxText, causal attention halved (after 2025-07-22)", Accounting.MAXTEXT_2025),
        ("MaxText mixed attention, both halved", Accounting.MAXTEXT_MIXED),
        ("", Accounting.PALM),
        ("who knows", Accounting.PALM),
    ],
)
def test_how_flops_are_counted(formula: str, accounting: Accounting) -> None:
    assert accounting_of({"mfu_formula": formula}) == accounting


def test_a_stated_accounting_and_a_maxtext_source() -> None:
    assert accounting_of({"accounting": "palm_causal"}) is Accounting.PALM_CAUSAL
    source = "AI-Hypercomputer/maxtext README (2025-08-01)"
    assert accounting_of({"source": source}) is Accounting.MAXTEXT_2025


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ({"tokens_s_chip": 5000}, 5000),
        ({"tokens_s_gpu": "5,000"}, 5000),
        ({"tokens_s_total": 320000}, 5000),
        ({"step_s": 4.0, "mfu_pct": 1}, 256 * 4096 / 4.0 / 64),
        ({"hfu_pct": 50}, None),
        (None, None),
    ],
)
def test_rates(measured: dict[str, Any] | None, rate: float | None) -> None:
    assert run_of(measured=measured).rate() == (None if rate is None else pytest.approx(rate))
    share = run_of(measured={"mfu_pct": 50}).rate()
    assert share is not None
    assert share == run_of(measured={"mfu_pct": 0.5}).rate()


def test_keys_that_say_nothing_about_the_plan_are_tolerated() -> None:
    more = {"notes": "n", "confidence": "c", "step_s_derived": 4}
    (plain,), (other,) = (validate_data([row], "runs.yaml").rows for row in (LLAMA, LLAMA | more))
    assert plain == other
    twice = validate_data([LLAMA, LLAMA | more], "runs.yaml")
    assert twice.rows == (plain,)
    assert twice.failed == (("row", "runs.yaml: runs[1]: id: 'row' is that of runs[0] too"),)
    assert run_of(anything=[1]).notes == ("not read: anything",)


@pytest.mark.parametrize("unnamed", [{"id": None}, {"id": ""}, {}])
def test_rows_without_an_id_are_told_apart_by_their_place(unnamed: dict[str, Any]) -> None:
    bare = {key: value for key, value in LLAMA.items() if key != "id"} | unnamed
    exact = {"model": "llama3-8b", "machine": "v5e:4x4", "mesh": {}, **unnamed}
    found = validate_data([bare, bare | {"model": "no such"}, exact], "runs.yaml")
    assert [row.id for row in found.rows] == ["runs[0]"]
    assert [name for name, _ in found.failed] == ["runs[1]", "runs[2]"]
    assert all("None" not in why and "''" not in why for _, why in found.failed)


@pytest.mark.parametrize(
    ("said", "sizes", "state"),
    [
        ("ZeRO-3, dp 64", {"fsdp": 64}, {}),
        ("DeepSpeed ZeRO stage 3", {"fsdp": 64}, {}),
        ("SHARD_GRAD_OP", {"fsdp": 64}, {}),
        ({"zero": 3, "dp": 64}, {"fsdp": 64}, {}),
        ({"zero_stage": 1, "tp": 8}, {"data": 8, "model": 8}, {"embed": ("data",)}),
        ("ZeRO-1, tp 8", {"data": 8, "model": 8}, {"embed": ("data",)}),
        ({"zero_stage": 0, "dp": 64}, {"data": 64}, {}),
        ("FSDP with tensor parallelism 8", {"fsdp": 8, "model": 8}, {}),
        ("tensor 8, no FSDP", {"data": 8, "model": 8}, {}),
        ("HSDP, dp_replicate 2, dp_shard 32", {"data": 2, "fsdp": 32}, {}),
    ],
)
def test_how_much_is_split_over_data(said: Any, sizes: dict[str, int], state: Any) -> None:
    """DeepSpeed's stages 1, 2 and 3 and PyTorch's names for them, and an axis that fills up."""
    (plan,) = run_of(chip="a100", parallelism=said).plans
    assert {axis.name: axis.size for axis in plan.mesh} == sizes
    assert plan.optimizer_rules == state
    (apart,) = run_of(chip="a100", parallelism="dp 64", zero_stage=3).plans
    assert {axis.name: axis.size for axis in apart.mesh} == {"fsdp": 64}
    (none,) = run_of(chip="a100", parallelism=None, zero_stage=0).plans
    assert {axis.name: axis.size for axis in none.mesh} == {"data": 64}
    zero2 = run_of(chip="a100", parallelism="ZeRO-2, dp 64, MBS 1").plans[0]
    assert (zero2.accumulation, zero2.microbatches) == ("scattered", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallelism": "ZeRO stage 4, dp 64"}, "parallelism: ZeRO has stages 0 to 3, not '4'"),
        ({"zero_stage": "two"}, "zero_stage: ZeRO has stages 0 to 3, not 'two'"),
        ({"global_batch": 0}, "global_batch: must be positive and below 10^18, not 0"),
        (
            {"global_batch": None, "per_device_batch": 0},
            "per_device_batch: must be positive and below 10^18, not 0",
        ),
        ({"measured": {"step_s": "6000 ms"}}, "measured.step_s: '6000 ms' is not in seconds"),
        ({"measured": {"mfu_pct": 140}}, "measured.mfu_pct: must be below 100 %, not 140"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_own_key(
    changes: dict[str, Any], message: str
) -> None:
    """Not as another key that it was taken for, nor as missing."""
    with pytest.raises(FileError, match=re.escape(message)):
        run_of(**changes)


def test_a_key_may_name_the_library() -> None:
    """It counts before the source; one that is not known is said."""
    plan = run_of(library="AXLearn", remat=None, seq=2048, source="a blog").plans[0]
    assert plan.attention == "unfused"
    assert run_of(parallelism="64-way banana").notes == ("parallelism: not read: 64-way banana",)
    notes = run_of(framework="Mine", parallelism="GBS 128, fsdp 64").notes
    assert notes[0] == "framework: 'Mine' is not known: nothing is taken from it"
    assert notes[1] == "parallelism: its batch, 128, is not that of global_batch"
    assert run_of(global_batch=None, parallelism="GBS 128, fsdp 64").plans[0].batch == 128


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({"chip": "v100"}, "unfused"),
        ({"chip": "a100", "source": "Megatron (arXiv 2104.04473)"}, "unfused"),
        ({"chip": "a100", "source": "LLaMA (arXiv 2302.13971)"}, "flash"),
    ],
)
def test_gpus_had_no_fused_attention_before_there_was_one(
    changes: dict[str, Any], attention: str
) -> None:
    assert run_of(parallelism="tp 8", **changes).plans[0].attention == attention


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"attention": "dot_product"}, "attention", "unfused"),
        ({"attention": "no flash attention"}, "attention", "unfused"),
        ({"seq": None, "max_target_length": 8192}, "sequence", 8192),
        ({"global_batch": None, "tokens_per_step": 2**20}, "batch", 256),
        ({"global_batch": None, "batch_tokens": "2M"}, "batch", 512),
        ({"grad_accum": 4}, "microbatches", 4),
        ({"micro_batch_size": 1}, "microbatches", 4),
        ({"tricks": "gradient accumulation 4"}, "microbatches", 4),
        ({"tricks": "optimizer_memory_host_offload=true"}, "offload_optimizer", True),
        ({"vocab_tiling": 8}, "vocab_tiles", 8),
    ],
)
def test_keys_and_words_of_other_collections(
    changes: dict[str, Any], key: str, value: object
) -> None:
    assert getattr(run_of(**changes).plans[0], key) == value


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"precision": "pure bf16"}, "parameters", "bf16"),
        ({"precision": "bf16, weight_dtype bfloat16"}, "parameters", "bf16"),
        ({"optimizer": "AdamW with mu and nu in bf16"}, "state", "bf16"),
        ({"tricks": ["quantization=int8 (AQT)"]}, "compute", "int8"),
    ],
)
def test_formats_in_other_words(changes: dict[str, Any], key: str, value: str) -> None:
    assert getattr(run_of(**changes).plans[0].precision, key) == value


def test_machines_and_axes_in_other_words() -> None:
    two = run_of(chips=128, topology="two slices of v5p-128").plans[0]
    assert two.machine.name == "2*v5p:4x4x4"
    nodes = run_of(chip="h100", chips=None, nodes=8, parallelism="TP 8").plans[0]
    assert nodes.machine.chips == 64
    by_tokens = run_of(parallelism={"fsdp": 16, "tensor_sequence": 4}).plans[0]
    assert by_tokens.activations["seq"] == ("model",)


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ({"step_ms": 4000}, 256 * 4096 / 4 / 64),
        ({"tokens_per_sec_per_device": 5000}, 5000),
        ({"tokens_s_core": 2500}, 5000),
    ],
)
def test_rates_by_other_keys(measured: dict[str, float], rate: float) -> None:
    assert run_of(measured=measured).rate() == pytest.approx(rate)
    unread = run_of(measured={"hours": 6}, tricks=["a shiny new trick"]).notes
    assert unread == ("tricks: not read: a shiny new trick", "measured: no rate is read of hours")


def test_no_more_microbatches_than_sequences() -> None:
    """Stages take four each where a row does not say, as far as there are sequences."""
    staged = {"chip": "h100", "chips": 512, "parallelism": "TP 8, PP 8, DP 8"}
    assert run_of(**staged, global_batch=128).plans[0].microbatches == 16
    assert run_of(**staged, global_batch=1024).plans[0].microbatches == 32


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ("(1, 16, 1, 4) over (data, fsdp, context, tensor)", {"fsdp": 16, "model": 4}),
        ("[data, fsdp, tensor] = [1, -1, 4]", {"fsdp": 16, "model": 4}),
        ("fsdp 16, context parallelism 4 (all-gather)", {"fsdp": 16, "context": 4}),
        ("8-way tensor parallel, 8-way data parallel", {"data": 8, "model": 8}),
        ("tensor parallel size 4, pipeline parallel degree 2", {"stage": 2, "fsdp": 8, "model": 4}),
        ("four-way tensor parallelism, fsdp over 16 chips", {"fsdp": 16, "model": 4}),
        ({"fsdp": "16 (in a slice)", "tensor": 4}, {"fsdp": 16, "model": 4}),
        ({"mesh": {"fsdp": 16, "tensor": 4}}, {"fsdp": 16, "model": 4}),
        (["fsdp 16", "tp 4"], {"fsdp": 16, "model": 4}),
    ],
)
def test_axes_and_sizes_in_any_order(said: Any, sizes: dict[str, int]) -> None:
    assert sizes_of(parallelism=said) == sizes


def test_data_over_slices_is_not_inside_them() -> None:
    for said in ("fsdp 32, data 2 over DCN", "fsdp 32; DCN: data=2"):
        plan = run_of(parallelism=said, chips=128, slices=2).plans[0]
        assert plan.mesh[0].torus["dcn"] == 2
        assert [axis.size for axis in plan.mesh] == [4, 32]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"parallelism": "fsdp 16, with pipeline stages"},
            "parallelism: 'pipeline' without its size",
        ),
        ({"parallelism": "mesh (1, 16, 4)"}, "(1, 16, 4) without the names of its axes"),
        ({"parallelism": {"fsdp": 16, "tensor": "inside a host"}}, "tensor: expected a size"),
        ({"tricks": ["LoRA of rank 16"]}, "tricks: not modelled: weights beside frozen"),
        ({"lora_rank": 16}, "lora_rank: not modelled"),
        ({"tricks": ["DPO"]}, "tricks: not modelled: a second model"),
        ({"tricks": ["decode only"]}, "tricks: not modelled: anything but training"),
        ({"precision": "int8 forward, bf16 backward"}, "precision: not modelled"),
        ({"precision": "int8 with drhs in bf16"}, "precision: not modelled: gradients of weights"),
        ({"seq_len": 4096}, "'seq_len' and 'seq' are one"),
        ({"optimizer": "8-bit Adam"}, "optimizer: state of 8 bits"),
        ({"remat": "minimal with offload of mlp"}, "remat: what of it is offloaded"),
        ({"dims": {"mtp_layers": 1}}, "dims.mtp_layers: not modelled"),
        ({"dims": {"moe": True}}, "dims.moe: expected a mapping"),
        ({"dims": {"n_kv_heads": 4, "kv_heads": 8}}, "dims: 'kv_heads' and 'kv_heads' are one"),
        ({"global_batch": "4M"}, "global_batch: '4M': of tokens or of sequences?"),
        ({"precision": "bf16, int8 for MLP only"}, "precision: not modelled"),
        ({"attention": {"kernel": "splash", "window": 1024}}, "attention.window: give it as"),
        ({"dims": {"enc_dec": True}}, "dims.enc_dec: an encoder with a decoder that is no preset"),
    ],
)
def test_what_would_be_another_run_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(FileError, match=re.escape(why)):
        run_of(**change)


def test_tokens_in_thousands_and_millions() -> None:
    plan = run_of(seq="8k", global_batch="4M tokens").plans[0]
    assert (plan.sequence, plan.batch) == (8192, 2**22 // 8192)


def test_keys_of_a_plan_in_rows_of_words() -> None:
    options = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
    row = run_of(offload_optimizer=True, vocab_tiles=8, compiler_options=options)
    plan = row.plans[0]
    assert (plan.offload_optimizer, plan.vocab_tiles) == (True, 8)
    assert dict(plan.compiler_options) == options
    dims = {"layers": 2, "d_model": 256, "heads": 2, "sliding_window": 1024}
    window = run_of(dims=dims, model="other")
    assert window.model.windows == (1024,)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("per-layer checkpointing (HFU > MFU)", "full"),
        ("True", "full"),
        ("every layer is computed again", "full"),
        ("full, decoder_layer_input=offload", "offload layer_input"),
        (["q", "k", "v", "context"], "save_attention"),
        ({"policy": "custom", "context": "device", "qkv": "offload"}, "save context, offload qkv"),
        ({"context": "device", "qkv": "offload"}, "save context, offload qkv"),
        ("save q, k, v and context", "save_attention"),
        ("save one activation per layer, recompute the rest", "full"),
        ("save nothing", "full"),
        ("keeps everything", "none"),
        ("ActCkpt False", "none"),
        ("activation_checkpointing: true", "full"),
        ("disabled", "none"),
        ("gradient checkpointing, offload carries", "offload layer_input"),
        ("full with layer inputs offloaded to host", "offload layer_input"),
        ("custom: context and qkv on host, rest recomputed", "offload context + qkv"),
        ("custom: out_proj: offload, context: device", "save context, offload attention_output"),
        ("scan with remat of each block", "full"),
        ("offload_dots_saveable", "offload attention_output + mlp_hidden + mlp_output + qkv"),
    ],
)
def test_remat_in_more_words(said: Any, name: str) -> None:
    assert run_of(remat=said).plans[0].remat.name == name


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ({"images_s_chip": 1}, 4096),
        ({"examples_s_total": 64}, 4096),
        ({"steps_per_s": 0.25}, 256 * 4096 / 4.0 / 64),
    ],
)
def test_rates_of_sequences(measured: dict[str, Any], rate: float) -> None:
    assert run_of(measured=measured).rate() == pytest.approx(rate)
    assert run_of(measured=None, images_per_s_per_chip=1).rate() == pytest.approx(4096)


WORDS = (*LLAMA, "topology", "slices", "per_device_batch", "tricks", "attention", "precision",
         "optimizer", "measured", "accounting", "mfu_formula", "dims")  # fmt: skip

LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["v4:4x4x4", "rest", "fsdp 8 x tp 8", "flash", "full", "custom: q, k"])
)  # fmt: skip
LISTS = st.lists(LEAVES, max_size=3)
KEYED = st.sampled_from(["fsdp", "model", "mfu", "layers", "kernel", "x"])
VALUES = LEAVES | LISTS | st.dictionaries(KEYED, LEAVES | LISTS, max_size=3)


@given(changes=st.dictionaries(st.sampled_from(WORDS), VALUES, min_size=1, max_size=3))
def test_any_row_is_a_run_or_one_line(changes: dict[str, Any]) -> None:
    with contextlib.suppress(FileError):  # and no other error
        from_prose(LLAMA | changes, "runs.yaml: runs[0]")


MIXTRAL: dict[str, Any] = {
    "id": "row",
    "model": "mixtral-8x7b",
    "dims": {
        **{"layers": 32, "d_model": 4096, "d_ff": 14336, "heads": 32, "d_head": 128},
        **{"kv_heads": 8, "vocab": 32000, "glu": True},
        "moe": {"experts": 8, "top_k": 2, "d_ff_expert": 14336, "shared": 0, "capacity": 1.25},
    },
    **{"chip": "v6e", "chips": 256, "slices": 1, "topology": "16x16"},
    **{"parallelism": "fsdp 32 x expert 8", "global_batch": 3072, "seq": 4096},
    "measured": {"step_s": 13.484},
}


def test_experts_of_a_row_are_the_presets_with_the_capacity_of_the_run() -> None:
    plan = from_prose(MIXTRAL, "runs.yaml").plans[0]
    experts = plan.model.experts
    assert experts is not None
    assert (experts.number, experts.top_k, experts.capacity) == (8, 2, 1.25)
    assert {axis.name: axis.size for axis in plan.mesh} == {"fsdp": 32, "expert": 8}


def test_experts_that_no_preset_has_are_made_of_dims() -> None:
    moe = {"experts": 16, "top_k": 4, "d_ff_expert": 2048, "shared": 1, "d_ff_shared": 1024}
    moe |= {"moe_layers": 30, "router": "sigmoid + bias"}
    dims = {**MIXTRAL["dims"], "moe": moe}
    plan = from_prose(MIXTRAL | {"model": "mine", "dims": dims}, "runs.yaml").plans[0]
    experts = plan.model.experts
    assert experts is not None
    assert (experts.dense_layers, experts.router, experts.shared_width) == (2, "sigmoid", 1024)


def test_soft_experts_lie_one_by_one_where_a_row_does_not_say() -> None:
    moe = {"kind": "soft", "experts": 128, "slots_per_expert": 1, "d_ff_expert": 1536}
    dims = {"layers": 12, "d_model": 384, "d_ff": 1536, "heads": 6, "glu": False, "image": 224}
    dims |= {"patch": 16, "moe": moe | {"layers": "last half"}}
    row = {"id": "row", "model": "mine", "dims": dims, "chip": "v3", "global_batch": 4096}
    row |= {"chips": "not stated", "seq": 196, "measured": {"step_s": 1.0}}
    plan = from_prose(row, "runs.yaml").plans[0]
    experts = plan.model.experts
    assert experts is not None
    assert (experts.number, experts.soft_slots, experts.dense_layers) == (128, 1, 6)
    assert plan.machine.devices == 128
    assert {axis.name: axis.size for axis in plan.mesh} == {"expert": 128}
    assert plan.parameters == {"expert": ("expert",)}  # all else is replicated


@pytest.mark.parametrize(
    ("said", "printed", "read"),
    [
        (2, 8.6, 1),  # as the table of arXiv 2308.00951 has them: fewer than ViT-S/16's 9.2
        (2, 10.3, 2),
        (2, 9.4, 1),  # nearer to what one slot makes, 8.5, than to what two make, 10.7
        (2, 9.8, 2),
        (2, 4.3, 2),  # a multiply-add counted as one, perhaps: nothing is known
        (2, 7.3, 2),  # further from 8.5 than half of what a slot takes
        (2, None, 2),
        (1, 8.6, 1),
    ],
)
def test_soft_experts_have_the_slots_that_make_the_printed_flops(
    said: int, printed: float | None, read: int
) -> None:
    moe = {"kind": "soft", "experts": 128, "slots_per_expert": said, "d_ff_expert": 1536}
    dims = {"layers": 12, "d_model": 384, "d_ff": 1536, "heads": 6, "glu": False, "image": 224}
    dims |= {"patch": 16, "moe": moe | {"layers": "last half"}}
    row = {"id": "row", "model": "mine", "dims": dims, "chip": "v3", "global_batch": 4096}
    measured = {"step_s": 1.0, "gflop_per_image_as_printed": printed}
    run = from_prose(row | {"chips": 64, "seq": 196, "measured": measured}, "runs.yaml")
    experts = run.plans[0].model.experts
    assert experts is not None
    assert experts.soft_slots == read
    assert any("slots_per_expert" in note for note in run.notes) == (said != read)


@pytest.mark.parametrize("change", [{"shared": 0}, {"shared": 2}, {"dense_layers": 1}])
def test_a_row_that_differs_from_its_preset_in_experts_is_no_preset(change: dict[str, int]) -> None:
    model = load_model("deepseek-v3")
    moe = {"experts": 256, "top_k": 8, "d_ff_expert": 2048, "shared": 1, "dense_layers": 3}
    mla = {"q_lora": 1536, "kv_lora": 512, "nope": 128, "rope": 64, "v": 128}
    dims = {"layers": 61, "d_model": 7168, "d_ff": 18432, "heads": 128, "vocab": 129280}
    dims |= {"d_head": 192, "kv_heads": 128, "glu": True, "tied": False, "mla": mla}
    row = {"id": "row", "model": "deepseek-v3", "chip": "tpu7x", "chips": 128, "seq": 4096}
    row |= {"global_batch": 2048, "parallelism": "fsdp 256", "measured": {"step_s": 27.0}}
    same, other = (
        from_prose(row | {"dims": dims | {"moe": each}}, "runs.yaml").plans[0].model
        for each in (moe, moe | change)
    )
    assert same.parameters_all == model.parameters_all != other.parameters_all


def test_latents_of_a_row() -> None:
    mla = {"q_lora": 0, "kv_lora": 512, "nope": 128, "rope": 64, "v": 128}
    dims = {**MIXTRAL["dims"], "moe": None, "mla": mla, "kv_heads": 32, "d_head": 192}
    changes = {"model": "mine", "dims": dims, "parallelism": "fsdp 256"}
    plan = from_prose(MIXTRAL | changes, "runs.yaml").plans[0]
    latent = plan.model.latent
    assert latent is not None
    assert (latent.keys, latent.rotary, latent.values, latent.queries) == (512, 64, 128, 0)
    assert plan.model.head_dim == 192


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        ({"kind": "soft", "experts": 8, "d_ff_expert": 8}, "missing key 'slots_per_expert'"),
        ({"kind": "expert choice", "experts": 8, "d_ff_expert": 8}, "experts are not modelled"),
        ({"experts": 8, "top_k": 2}, "dims.moe: missing key 'd_ff_expert'"),
        ("yes", "dims.moe: expected a mapping"),
        ({"experts": "many", "top_k": 2, "d_ff_expert": 8}, "dims.moe.experts"),
    ],
)  # fmt: skip
def test_wrong_experts_are_named(moe: Any, why: str) -> None:
    wrong = MIXTRAL | {"model": "mine", "dims": {**MIXTRAL["dims"], "moe": moe}}
    result = validate_data([MIXTRAL | {"id": "good"}, wrong], "runs.yaml")
    assert [each.id for each in result.rows] == ["good"]
    assert why in result.failed[0][1]


def test_a_published_run_fits_as_an_earlier_compiler_had_it() -> None:
    offloads = "custom: decoder_layer_input, query_proj, key_proj, value_proj, out_proj offloaded"
    row = LLAMA | {"model": "llama3-8b", "chip": "v6e", "chips": 8, "parallelism": "fsdp 8"}
    row |= {"source": "maxtext", "remat": offloads, "seq": 8192}
    ran, large = validate_data(
        [row | {"id": str(each), "global_batch": 8 * each} for each in (3, 24)], "runs.yaml"
    ).rows
    assert (ran.fits, large.fits) == (True, False)
    assert any("0.0.46" in note for note in ran.notes)
    assert "does not fit in HBM as predicted" in large.notes


GPU: dict[str, Any] = {
    **{"model": "gpt3-175b", "chip": "a100", "chips": 64, "global_batch": 64, "seq": 2048},
    "parallelism": "TP8 PP8 VPP3, microbatch 1",
}


@pytest.mark.parametrize(
    ("changes", "matmul"),
    [
        ({"source": "NVIDIA/Megatron-LM"}, "off"),
        ({"source": "NVIDIA/Megatron-LM", "tricks": ["tp_comm_overlap"]}, "bidirectional"),
        ({"source": "NVIDIA/Megatron-LM", "tricks": ["no tp comm overlap"]}, "off"),
        ({"source": "NVIDIA-NeMo/Megatron-Bridge"}, "bidirectional"),
        ({"source": "somebody's"}, "off"),
        ({"source": "pytorch/torchtitan", "parallelism": "TP8 PP8"}, "off"),
    ],
)
def test_which_libraries_of_gpus_have_collective_matmul(
    changes: dict[str, Any], matmul: str
) -> None:
    assert run_of(**GPU | changes).plans[0].overlap.matmul == matmul


def test_recipes_of_experts_have_none() -> None:
    row = {"model": "qwen3-235b-a22b", "chip": "h100", "chips": 256, "global_batch": 2048}
    row |= {"parallelism": "TP2 PP8 EP32", "source": "NVIDIA-NeMo/Megatron-Bridge"}
    run = run_of(**row)
    assert run.plans[0].overlap.matmul == "off"
    assert run.implementation == "combined-1f1b"
    other = row | {"model": "mixtral-8x22b", "parallelism": "TP2 PP8 EP8"}
    assert run_of(**other).implementation == "trainer"
    assert run_of(**other, tricks=["1f1b overlap"]).implementation == "combined-1f1b"


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"source": "Megatron-LM, arXiv 2104.04473"}, False),
        ({"source": "Megatron-LM, arXiv 2205.05198"}, True),
        ({"source": "Megatron-LM, arXiv 2205.05198", "tricks": ["no sequence parallelism"]}, False),
        (
            {
                "source": "Megatron-LM, arXiv 2104.04473",
                "parallelism": "TP8 PP8, sequence parallel",
            },
            True,
        ),
    ],
)
def test_since_when_a_tensor_axis_of_gpus_splits_tokens(
    changes: dict[str, Any], split: bool
) -> None:
    rules = run_of(**GPU | changes).plans[0].activations
    assert ("seq" in rules) == split
    assert rules["heads"] == ("model",)


def test_an_expert_of_a_recipe_lies_whole_on_one_gpu() -> None:
    """Also where sizes could say that the tensor axis is beside that of experts."""
    row = {"model": "deepseek-v3", "chip": "h100", "chips": 1024, "global_batch": 8192}
    row |= {"parallelism": "TP2 PP8 EP64", "seq": 4096}
    inside = sizes_of(**row, source="NVIDIA-NeMo/Megatron-Bridge")
    assert inside == {"stage": 8, "data": 2, "expert": 32, "model": 2}
    assert sizes_of(**row, source="NVIDIA/Megatron-LM") == {"stage": 8, "expert": 64, "model": 2}


def test_megatron_replicates_what_no_axis_splits() -> None:
    row = {"model": "qwen3-30b-a3b", "chip": "h100", "chips": 16, "parallelism": "EP8"}
    assert sizes_of(**row, source="Megatron-LM") == {"data": 2, "expert": 8}
    assert sizes_of(**row, source="somebody's") == {"fsdp": 2, "expert": 8}


def test_megatron_computes_as_few_whole_layers_again_as_must_be() -> None:
    row = {"model": "qwen3-30b-a3b", "chip": "h100", "chips": 16, "parallelism": "EP8"}
    row |= {"global_batch": 512, "source": "Megatron-LM", "remat": None}
    run = run_of(**row)
    few, others = run.plans[0].remat.groups
    assert not few.save
    assert "rest" in others.save
    assert f"{few.layers} whole layers again" in run.notes[-1]
    fits = [
        {"layers": few.layers - 1, "save": []},
        {"layers": others.layers + 1, "save": sorted(others.save)},
    ]
    assert not validate_data([{**LLAMA, **row, "remat": None}], "f").failed
    less = replace(run.plans[0], remat=parse_remat(fits, "remat", run.plans[0].model.layers))
    assert hbm_of(run.plans[0], "trainer").fits
    assert not hbm_of(less, "trainer").fits
    staged = run_of(**row | {"parallelism": "PP2 VP12 EP8, microbatch 2"})
    assert not hbm_of(staged.plans[0], "trainer").fits
    assert staged.plans[0].remat.groups[0].save >= {"rest", "mlp_hidden"}
    assert "does not fit as predicted" in staged.notes[-1]


def test_flash_is_splash_in_tpu_recipes() -> None:
    row = {"attention": "flash", "chip": "v5p"}
    assert run_of(**row, source="AI-Hypercomputer/tpu-recipes").plans[0].attention == "flash"
    assert run_of(**row, source="AI-Hypercomputer/maxtext").plans[0].attention == "flash-2023"
