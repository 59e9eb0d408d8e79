"""HBM bytes and vector operations of a step against a count by hand.

Sums by what the operations are (matrix products, attention, elementwise, optimizer, copies) and by
pass are compared, so names and order of tasks are free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import build, decoder, vit
from by_hand import SOFTMAX, SOFTMAX_GRADIENT, Hand
from planned import traffic

from shardsim.model import Biases, Model
from shardsim.plan import Overlap, Precision
from shardsim.plan.plan import Context
from shardsim.plan.remat import POLICIES

SERIAL = decoder(gated_mlp=True, kv_heads=4, norm="rmsnorm")
ALL_BIASES = Biases(qkv=True, attention_output=True, mlp=True, norm=True)
MODELS = {
    "parallel vit": vit(),
    "parallel vit, all biases": vit(biases=ALL_BIASES, qk_norm=False),
    "serial vit": vit(parallel_block=False, biases=ALL_BIASES, positions="fixed"),
    "serial gated decoder": SERIAL,
    "parallel decoder": decoder(parallel_block=True, kv_heads=4, final_norm=False),
    "decoder with norms of queries": replace(SERIAL, qk_norm=True, positions="none"),
    "map head": vit(parallel_block=False, pooling="map", classes=1000, biases=Biases(norm=True)),
    "mean head": vit(pooling="mean", classes=16),
    "decoder with post-norms": decoder(post_norms=True, gated_mlp=True, qk_norm=True),
    "parallel decoder with post-norms": decoder(post_norms=True, parallel_block=True),
    "tied decoder": decoder(tied_embeddings=True, norm="rmsnorm"),
}
MESHES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one chip": ("v5e:1x1", {"where": {"data": {}}}, {}),
    "tensor": ("v5e:4x4", {"where": {"data": {"x": 4}, "tensor": {"y": 4}}}, {"tensor": 4}),
    "tensor, replicated": (
        "v5e:4x4",
        {"where": {"data": {"x": 4}, "tensor": {"y": 4}}, "residual": ""},
        {"tensor": 4, "split": False},
    ),
    "tensor over embed, fsdp": (
        "v5e:4x4",
        {"where": {"fsdp": {"x": 4}, "tensor": {"y": 4}}, "residual": "embed"},
        {"tensor": 4, "fsdp": 4},
    ),
    "two tensor axes": (
        "v5e:4x4",
        {"where": {"tensor2": {"x": 4}, "tensor": {"y": 4}}},
        {"tensor": 4, "second": 4},
    ),
    "fsdp": ("v5e:4x4", {"where": {"fsdp": {"x": 4, "y": 4}}}, {"fsdp": 16}),
}


def compared(
    model: Model, mesh: str, *, emitted: bool = False, ring: str = "", **options: Any
) -> None:
    """Compare what is planned with what is counted by hand."""
    machine, given, hand = MESHES[mesh]
    options = {"overlap": Overlap(matmul="off")} | options  # no product is cut in blocks
    plan = build(
        model, machine, 64, given["where"], residual=given.get("residual", "seq"), **options
    )
    expected = Hand(plan, emitted=emitted, ring=ring, **hand).step()
    found = traffic(plan, emitted)
    assert found.keys() == expected.keys()
    for key, (hbm_bytes, vector_ops) in expected.items():
        if ring and key[1] == "matmul":
            continue  # blocks read and write more: see test_rings
        assert found[key][0] == pytest.approx(hbm_bytes, rel=1e-9), (*key, "bytes")
        assert found[key][1] == pytest.approx(vector_ops, rel=1e-9), (*key, "operations")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_moves_the_arrays_that_its_operations_read_and_write(name, mesh, remat):
    compared(MODELS[name], mesh, remat=remat)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", ["parallel vit", "serial gated decoder"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_every_policy_computes_again_what_it_did_not_keep(policy, name, attention):
    model = MODELS[name]
    if attention == "unfused":
        model = replace(model, kv_heads=model.heads)
    compared(model, "tensor", remat=policy, attention=attention)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("save", [["statistics"], ["qkv", "statistics"]])
def test_norms_whose_statistics_are_kept_are_not_summed_again(name, save):
    compared(MODELS[name], "fsdp", remat=frozenset(save))


@pytest.mark.parametrize("compute", ["bf16", "f32", "fp8"])
@pytest.mark.parametrize("parameters", ["f32", "bf16"])
@pytest.mark.parametrize("reduce", ["f32", "bf16"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_formats_are_those_of_the_plan(compute, parameters, reduce, microbatches):
    precision = Precision(compute=compute, parameters=parameters, reduce=reduce)
    options: dict[str, Any] = {"precision": precision, "microbatches": microbatches}
    compared(SERIAL, "tensor over embed, fsdp", remat="full", optimizer="adamw-bf16-mu", **options)
    compared(vit(), "one chip", remat="dots", **options)


@pytest.mark.parametrize("mesh", ["one chip", "tensor"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_fused_projections_read_their_input_once(mesh, remat):
    compared(vit(), mesh, remat=remat, fused_projections=True)


@pytest.mark.parametrize("sequence", [512, 1024, 4096])
def test_a_causal_kernel_does_half_of_the_softmax(sequence):
    compared(replace(SERIAL, sequence=sequence), "fsdp", remat="full")


@pytest.mark.parametrize("name", ["parallel vit", "serial gated decoder"])
@pytest.mark.parametrize("remat", ["none", "full", "save_qkv", "save_mlp"])
@pytest.mark.parametrize(
    ("mesh", "overlap", "ring"),
    [
        ("fsdp", "bidirectional", ""),
        ("tensor", "bidirectional", "seq"),
        ("tensor", "off", ""),
        ("tensor over embed, fsdp", "unidirectional", "embed"),
        ("tensor, replicated", "bidirectional", ""),
    ],
)
def test_the_compiler_lays_out_anew_what_its_rings_and_gathers_leave(
    name, remat, mesh, overlap, ring
):
    options: dict[str, Any] = {"overlap": Overlap(matmul=overlap), "remat": remat}
    compared(replace(MODELS[name], head_dim=128), mesh, emitted=True, ring=ring, **options)


@pytest.mark.parametrize(("depth", "sequence"), [(128, 256), (104, 256), (128, 200)])
def test_what_a_kernel_reads_is_padded_before_it(depth, sequence):
    model = replace(vit(), head_dim=depth, sequence=sequence)
    plan = build(model, "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}}, remat="full", attention="flash")
    one = model.layers * 64 / 16 * model.heads * 2.0  # bytes of an array of one number each
    array, whole = one * sequence * depth, one * 256 * 128
    found = traffic(plan), traffic(plan, as_emitted=True)
    # Queries, keys and values, again as they are computed again; the gradient of the result.
    for now, passes in (("forward", 3), ("backward", 3 + 1)):
        planned, emitted = (each[now, "elementwise"][0] for each in found)
        padded = passes * (array + whole) if array != whole else 0.0
        # The result and its gradient, for the sums of rows, and a float32 number in 128 lanes.
        sums = 2 * whole + whole / 128 * 128 * 2 if now == "backward" else 0.0
        assert emitted - planned == pytest.approx(padded + sums)


@pytest.mark.parametrize(("sequence", "kernel"), [(2048, True), (2368, False)])
def test_a_split_sequence_is_attended_to_as_long_as_its_last_part_takes(sequence, kernel):
    # In the kernel; where a part is no whole tiles in a loop over blocks of keys, which has its
    # scores in HBM and skips none.
    model = replace(SERIAL, sequence=sequence, head_dim=128)  # no padding
    where = {"context": {"x": 4}, "fsdp": {"y": 4}}
    order = Context(order="contiguous")
    plan = build(model, "v5e:4x4", 16, where, remat="none", context=order)
    found = traffic(plan), traffic(plan, as_emitted=True)
    layers, sequences = model.layers, 16 / 4
    pairs = layers * sequences * model.heads * (sequence / 4) * sequence
    queries = layers * sequences * model.heads * (sequence / 4) * 128 * 2.0
    every_head = 2 * 4 * queries  # keys and values once for each head of queries
    once = every_head * model.kv_heads / model.heads
    for now, ops, kernels, bytes_of_a_pair in (
        # Float32 scores written and read, bf16 probabilities written and read.
        ("forward", SOFTMAX, 1, 4 + 4 + 2 + 2),
        # That again; float32 gradients of probabilities written and read; bf16 gradients of
        # scores written, and read for queries and for keys. Two kernels make scores for themselves.
        ("backward", SOFTMAX_GRADIENT, 2, (4 + 4 + 2 + 2) + (4 + 4) + (2 + 2 + 2)),
    ):
        fused, emitted = (each[now, "attention"] for each in found)
        more = bytes_of_a_pair * pairs
        if kernel:  # of float32 in 128 lanes forward; backward queries are one block
            more = every_head - once + 2 * queries if now == "forward" else every_head + queries
        assert emitted[0] - fused[0] == pytest.approx(more, rel=1e-9)
        if kernel:  # the last of four rows of blocks sees all; 10 of 16 blocks are below a diagonal
            assert emitted[1] == pytest.approx(kernels * ops * pairs, rel=1e-9)
            assert fused[1] == pytest.approx(ops * pairs * 10 / 16, rel=1e-9)
        else:
            assert emitted[1] == pytest.approx(ops * pairs, rel=1e-9)


def test_a_pooling_query_reads_the_keys_of_its_own_part_of_a_split_sequence():
    model = vit(pooling="map", classes=16)
    where = {"context": {"x": 4}, "fsdp": {"y": 4}}
    head = traffic(build(model, "v5e:4x4", 64, where))["head", "attention"]
    keys = 64 / 4 * 256 / 4 * model.heads * model.head_dim
    # Queries and results, one vector an image, cross three times too.
    vectors = 64 / 4 * model.heads * model.head_dim
    assert head[0] == pytest.approx((6 * keys + 6 * vectors) * 2, rel=1e-12)
