"""What is in HBM besides weights: kept activations, logits, gathered weights, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import build, decoder, vit
from by_hand import Hand

from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import predict
from shardsim.model import Model
from shardsim.plan import Plan, Precision, Remat, resolve
from shardsim.plan.remat import POLICIES
from shardsim.plan.split import stored_elements
from shardsim.program.holds import HOLDS
from shardsim.program.shapes import Workload
from shardsim.simulate import simulate_plan

FSDP_TENSOR = {"fsdp": {"x": 4}, "tensor": {"y": 4}}
MODELS = {
    "parallel vit": vit(),
    "serial vit": vit(parallel_block=False, qk_norm=False, positions="learned"),
    "serial gated decoder": decoder(gated_mlp=True, kv_heads=4),
    "decoder with post-norms": decoder(post_norms=True, positions="none"),
    "parallel decoder with post-norms": decoder(post_norms=True, parallel_block=True),
}
ADAM = 8  # bytes of two float32 moments


def kept_bytes(plan: Plan) -> float:
    work, layout = Workload.of(plan), resolve(plan)
    use = hbm_use(plan.machine, work, layout, HOLDS["ideal"])
    return float(use.activations_bytes)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("residual", ["", "embed"])
def test_every_policy_keeps_what_it_says(policy, name, attention, residual):
    model = MODELS[name]
    options: dict[str, Any] = {"attention": attention, "microbatches": 2, "residual": residual}
    plan = build(model, "v5e:4x4", 64, FSDP_TENSOR, remat=policy, **options)
    hand = Hand(plan, tensor=4, fsdp=4, split=bool(residual))
    assert kept_bytes(plan) == pytest.approx(model.layers * hand.kept() * 2, rel=1e-12)


@pytest.mark.parametrize("compute", ["f32", "bf16", "fp8"])
def test_kept_activations_have_at_least_sixteen_bits(compute):
    plan = build(
        vit(), "v5e:4x4", 64, FSDP_TENSOR, remat="dots", precision=Precision(compute=compute)
    )
    hand = Hand(plan, tensor=4, fsdp=4)
    width = {"f32": 4, "bf16": 2, "fp8": 2}[compute]
    # Queries and keys have a norm; values nothing but products read, which round them to bf16.
    rounded = hand.t * hand.k * (width - 2)
    assert kept_bytes(plan) == pytest.approx(8 * (hand.kept() * width - rounded), rel=1e-12)


def test_a_second_tensor_axis_splits_what_is_between_the_matmuls():
    model = decoder(kv_heads=16)
    where = {"tensor2": {"x": 4}, "tensor": {"y": 4}}
    for policy in POLICIES:
        plan = build(model, "v5e:4x4", 64, where, remat=policy)
        hand = Hand(plan, tensor=4, second=4)
        assert kept_bytes(plan) == pytest.approx(8 * hand.kept() * 2, rel=1e-12)


@pytest.mark.parametrize(("microbatches", "in_flight"), [(1, 1), (2, 2), (8, 4)])
def test_a_pipeline_keeps_the_microbatches_in_flight(microbatches, in_flight):
    # Four stages: as many microbatches are between forward and backward, if there are so many.
    model = decoder()
    where = {"pipeline": {"x": 4}, "data": {"y": 4}}
    plan = build(model, "v5e:4x4", 64, where, remat="none", microbatches=microbatches)
    hand = Hand(plan)
    scale = 64 * model.sequence / 4 / microbatches / hand.t  # a group of four devices runs it
    expected = 2 * hand.kept() * scale * 2 * in_flight
    assert kept_bytes(plan) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["serial gated decoder", "parallel decoder with post-norms"])
@pytest.mark.parametrize(
    "offloaded", [{"layer_input"}, {"qkv"}, {"mlp_hidden", "attention_output"}, {"mlp_output"}]
)
def test_what_the_host_keeps_is_not_on_the_device_and_crosses_once_each_way(name, offloaded):
    model = MODELS[name]
    both = frozenset({"qkv", "mlp_hidden", "attention_output", "mlp_output"})
    plan = build(model, "v5e:4x4", 64, FSDP_TENSOR)
    plan = replace(plan, remat=Remat.of(save=both - offloaded, offload=frozenset(offloaded)))
    hand = Hand(plan, tensor=4, fsdp=4)
    parts = {
        "layer_input": hand.r,
        "qkv": hand.t * (hand.q + 2 * hand.k),
        "mlp_hidden": hand.t * hand.ins,
        "attention_output": hand.r,  # of a serial block, or before a norm
        "mlp_output": hand.r * model.post_norms,
    }
    away = sum(parts[name] for name in offloaded) * 2 * model.layers
    everything = sum(parts.values()) * 2 * model.layers
    prediction = predict(plan)
    assert prediction.hbm["activations_bytes"] == pytest.approx(everything - away, rel=1e-12)
    crossed = [use for use in prediction.collectives if use.kind == "host-transfer"]
    assert sum(use.bytes_per_chip for use in crossed) == pytest.approx(2 * away, rel=1e-12)


@pytest.mark.parametrize("windows", [[256, 0], [256, 256, 0, 0]])
def test_every_layer_of_a_round_is_offloaded(windows):
    def crossed(windows: list[int]) -> float:
        plan = build(decoder(windows=windows), "v5e:4x4", 64, FSDP_TENSOR)
        plan = replace(plan, remat=Remat.of(save=frozenset(), offload=frozenset({"qkv"})))
        uses = predict(plan).collectives
        return sum(use.bytes_per_chip for use in uses if use.kind == "host-transfer")

    plain = crossed([])
    assert plain > 0
    assert crossed(windows) == pytest.approx(plain, rel=1e-12)


def test_what_crosses_to_the_host_is_called_what_it_is():
    """Weights come forward and back, and are updated there with two float32 moments of each; what
    layers read goes and comes. Events say the same."""
    options = {"offload_optimizer": True, "offload_parameters": True}
    plan = build(decoder(), "v5e:4x4", 64, FSDP_TENSOR, **options)
    plan = replace(plan, remat=Remat.of(save=frozenset(), offload=frozenset({"layer_input"})))
    hand, layout = Hand(plan, tensor=4, fsdp=4), resolve(plan)
    weights = plan.model.trained_tensors
    away = stored_elements([tensor for tensor in weights if tensor.fetched], layout) * 4
    state = predict(replace(plan, offload_optimizer=False)).hbm["optimizer_bytes"]
    for found in (predict(plan), simulate_plan(plan)):
        uses = [use for use in found.collectives if use.kind == "host-transfer"]
        assert {use.purpose: use.bytes_per_chip for use in uses} == pytest.approx(
            {
                "parameters": 4 * away,
                "optimizer state": 2 * state,
                "activations": 2 * hand.r * 2 * plan.model.layers,
            }
        )


# Workspace.


def wide_vocabulary(**changes: Any) -> Model:
    return decoder(layers=1, vocab=2**18, **changes)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_gradients_of_earlier_microbatches_are_there_beside_the_new_ones(microbatches):
    hbm = predict(build(decoder(), "v5e:4x4", 64, FSDP_TENSOR, microbatches=microbatches)).hbm
    times = 2.0 if microbatches > 1 else 0.5  # both in float32, of one in what it is summed in
    assert hbm["gradients_bytes"] == pytest.approx(times * hbm["parameters_bytes"], rel=1e-12)
    assert hbm["optimizer_bytes"] == pytest.approx(ADAM / 4 * hbm["parameters_bytes"], rel=1e-12)
