"""Rows in the words of their sources: what is understood, filled in, or refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
from run_rows import LLAMA, run_of, sizes_of

from shardsim.errors import FileError
from shardsim.plan.remat import Remat
from shardsim.validate.parallelism import parallelism_of
from shardsim.validate.remat_words import remat_of
from shardsim.validate.runs import validate_data
from shardsim.validate.to_plan import plans_of
from shardsim.validate.words import number, whole


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
