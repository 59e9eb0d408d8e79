"""HBM of a plan against arithmetic on its weights and activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import SMALL_GPT, build, decoder, plans, vit
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.predict import hbm_of, predict
from shardsim.machine import override_chip
from shardsim.model import Model, load_model
from shardsim.plan import Plan, Precision, plan_from_data
from shardsim.plan.io import plan_to_data
from shardsim.program.holds import HOLDS
from shardsim.xla.tpu.rows import load_rows

STATE = ("parameters_bytes", "optimizer_bytes", "gradients_bytes")


def state_bytes(plan: Plan) -> float:
    hbm = predict(plan).hbm
    return sum(hbm[part] for part in STATE)


def vectors(model: Model) -> int:
    """Return the weights that are not split over the data axes: norms, biases and probes."""
    return sum(tensor.size for tensor in model.tensors if tensor.kind == "vector")


@pytest.mark.parametrize(
    "model", [decoder(), decoder(kv_heads=1, gated_mlp=True), vit(), vit(pooling="map", classes=10)]
)
@pytest.mark.parametrize(("machine", "chips"), [("v5e:4x4", 16), ("v4:2x2x4", 16), ("v4:2x2x1", 4)])
def test_state_of_fully_sharded_training(model, machine, chips):
    # AdamW in float32: 4 bytes of a weight, 8 of moments; 2 of its gradient, as it was summed.
    torus = {"x": 4, "y": 4} if machine == "v5e:4x4" else {"x": 2, "y": 2}
    torus |= {"z": 4} if machine == "v4:2x2x4" else {}
    plan = build(model, machine, 64, {"fsdp": torus})
    whole = model.parameters_all - vectors(model)
    expected = 14 * (whole / chips + vectors(model))
    assert state_bytes(plan) == pytest.approx(expected, rel=1e-12)
    hbm = predict(plan).hbm
    assert hbm["parameters_bytes"] == 2 * hbm["gradients_bytes"] == pytest.approx(expected / 3.5)
    assert hbm["optimizer_bytes"] == pytest.approx(expected / 1.75)


@pytest.mark.parametrize(("stored", "compute", "width"), [("f32", "bf16", 2), ("f32", "f32", 0)])
def test_a_copy_of_stored_weights_is_as_wide_as_what_is_computed(stored, compute, width):
    formats = Precision(parameters=stored, compute=compute, reduce="f32")
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}}, precision=formats)
    held = predict(plan, costs="compiler").use.account.held(0)
    weights = held["parameters"] / 4  # of four bytes each
    assert held.get("weights cast ahead", 0) == pytest.approx(width * weights, rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "stored", "a_weight"),
    [
        ("adamw", "f32", 4 + 2 + 8),
        ("adamw", "bf16", 2 + 2 + 8),
        ("adamw-bf16-mu", "f32", 4 + 2 + 6),
        ("adafactor-full", "bf16", 2 + 2 + 4),
        ("momentum", "f32", 4 + 2 + 4),
        ("sgd", "bf16", 2 + 2),
    ],
)
def test_bytes_a_weight(optimizer, stored, a_weight):
    model = decoder()
    plan = build(
        model,
        "v4:1x1x1",
        1,
        {"data": {}},
        optimizer=optimizer,
        precision=Precision(parameters=stored),
    )
    assert state_bytes(plan) == pytest.approx(a_weight * model.parameters_all, rel=1e-12)


@pytest.mark.parametrize("stored", ["f32", "bf16"])
def test_adafactor_keeps_means_of_what_has_two_long_dimensions(stored):
    model = decoder()  # 8 layers of 1,024 x 16 heads of 64, MLP of 4,096, vocabulary of 2,048
    precision = Precision(parameters=stored)
    plan = build(model, "v4:1x1x1", 1, {"data": {}}, optimizer="adafactor", precision=precision)
    # A head's 64 is less than 128, so the attention's second moments are whole.
    attention = 8 * 4 * 1024 * 1024
    means = 8 * 2 * (1024 + 4096) + 2 * (1024 + 2048)
    second = attention + vectors(model) + means
    assert predict(plan).hbm["optimizer_bytes"] == 2 * model.parameters_all + 4 * second


@pytest.mark.parametrize(("microbatches", "whole"), [(1, False), (4, True)])
def test_optimizer_state_split_over_data(microbatches, whole):
    model = decoder()
    where = {"data": {"x": 4}, "fsdp": {"y": 4}}
    plan = build(model, "v5e:4x4", 64, where, over_data=True, microbatches=microbatches)
    plain = build(model, "v5e:4x4", 64, where, microbatches=microbatches)
    split, kept = predict(plan).hbm, predict(plain).hbm
    # The state of vectors lies as they do, whole on every device.
    small = vectors(model)
    matrices = kept["optimizer_bytes"] - 8 * small
    assert split["optimizer_bytes"] == matrices / 4 + 8 * small
    assert split["parameters_bytes"] == kept["parameters_bytes"]
    # Several microbatches add to whole gradients.
    expected = kept["gradients_bytes"]
    if not whole:
        expected = (expected - 2 * small) / 4 + 2 * small
    assert split["gradients_bytes"] == expected


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("residual", ["", "seq", "embed"])
def test_activations_kept_by_full_remat_are_the_layers_inputs(parallel, microbatches, residual):
    model = decoder(parallel_block=parallel)
    where = {"fsdp": {"x": 4}, "tensor": {"y": 4}}
    plan = build(
        model, "v5e:4x4", 64, where, residual=residual, microbatches=microbatches, remat="full"
    )
    tokens = plan.batch * plan.sequence / 4 / microbatches
    split = 4 if residual else 1
    expected = model.layers * tokens * model.embed * 2 / split
    assert predict(plan).hbm["activations_bytes"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "widths"),
    [
        ("save_qkv", {"qkv"}),
        ("save_context", {"context"}),
        ("save_attention", {"qkv", "context"}),
        ("save_mlp", {"mlp"}),
        ("save_context_and_mlp", {"context", "mlp"}),
        ("dots", {"qkv", "out", "mlp"}),
        ("dots_and_context", {"qkv", "context", "out", "mlp"}),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_kept_by_each_policy(policy, widths, gated):
    model = decoder(gated_mlp=gated, heads=8, head_dim=128, kv_heads=4)
    plan = build(model, "v5e:4x4", 64, {"fsdp": {"x": 4}, "tensor": {"y": 4}}, remat=policy)
    elements = {
        "qkv": (model.heads + 2 * model.kv_heads) * model.head_dim / 4,
        "context": model.heads * model.head_dim / 4,
        "out": model.embed / 4,  # split as the residual stream is
        "mlp": model.mlp * (2 if gated else 1) / 4,
    }
    each = model.embed / 4 + sum(elements[name] for name in widths)
    tokens = plan.batch * plan.sequence / 4
    expected = model.layers * tokens * each * 2
    assert predict(plan).hbm["activations_bytes"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("attention", "times"), [("flash", 2), ("unfused", 1)])
def test_kept_heads_of_half_a_row_fill_rows_where_a_kernel_reads_them(attention, times):
    narrow, wide = (
        decoder(heads=1024 // depth, kv_heads=1024 // depth, head_dim=depth) for depth in (64, 128)
    )

    def kept(model, remat):
        plan = build(model, "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}}, remat=remat)
        found = predict(replace(plan, attention=attention))
        return found.hbm["activations_bytes"] + found.use.account.unfilled_kept_bytes

    heads = {model: kept(model, "save_qkv") - kept(model, "full") for model in (narrow, wide)}
    assert heads[narrow] == times * heads[wide]


def test_a_published_run_needs_what_arithmetic_says():
    # ViT-22B, 16,384 tokens a chip: block inputs alone are 48 * 16384 * 6144 * 2 = 9.7 GB.
    model = load_model("vit-22b")
    torus = {"x": 8, "y": 8, "z": 16}
    hbm = predict(build(model, "v4:8x8x16", 65536, {"fsdp": torus})).hbm
    assert hbm["activations_bytes"] == 48 * 16384 * 6144 * 2
    blocks = 48 * (4 * 6144**2 + 2 * 6144 * 24576) / 1024
    assert 4 * blocks < hbm["parameters_bytes"] < 4 * (blocks * 1.03 + vectors(model))


@pytest.mark.parametrize("implementation", ["ideal", "trainer"])
@pytest.mark.parametrize(("each", "fits"), [(64, True), (256, False)])
def test_a_compiler_recomputes_by_itself_what_would_not_fit(each, fits, implementation):
    # Reported: 64 sequences a device fill 15.48 GiB on v3, 256 need 17.9.
    plan = plan_from_data({**SMALL_GPT, "batch": 8 * each}, "small")
    found = predict(plan, implementation=implementation)
    assert found.fits == fits
    assert any("by itself recomputes" in text for text in found.warnings) == fits
    if fits:
        assert found.hbm["peak_bytes"] == pytest.approx(found.hbm["capacity_bytes"])
        assert found.hbm["thrifty_bytes"] < found.hbm["peak_bytes"]
    # A loop over layers, as in the emitted step, carries what it keeps: nothing can be dropped
    # there (compiled for v3 with libtpu 0.0.42 and 0.0.52: refused at 24.9 and 94.5 of 15.48 GiB).
    emitted = predict(plan, implementation="emitted")
    assert not emitted.fits
    assert any("--as trainer" in text for text in emitted.warnings) == fits


@pytest.mark.parametrize("offloaded", [True, False])
def test_state_that_is_narrow_or_lies_on_the_host(offloaded):
    plan = build(decoder(), "v5p:2x2x1", 16, {"fsdp": {"x": 2, "y": 2}})
    whole = predict(plan, implementation="trainer")
    narrow = Precision(state="" if offloaded else "bf16")
    plan = replace(plan, precision=narrow, offload_optimizer=offloaded)
    found = predict(plan, implementation="trainer")
    moments = whole.hbm["optimizer_bytes"]
    assert found.hbm["optimizer_bytes"] == (0.0 if offloaded else moments / 2)
    # What is fetched while layers run back may be all of it; the leanest program waits with it.
    assert found.hbm["peak_bytes"] <= whole.hbm["peak_bytes"]
    least = whole.hbm["thrifty_bytes"] - found.hbm["thrifty_bytes"]
    assert least == pytest.approx(moments if offloaded else moments / 2)


@pytest.mark.parametrize("implementation", ["ideal", "emitted", "trainer"])
def test_logits_in_tiles_and_narrow_gradients_hold_less(implementation):
    model = decoder(vocab=131072, layers=2)
    plan = build(model, "v5p:2x2x1", 16, {"fsdp": {"x": 2, "y": 2}})
    usual = predict(plan, implementation=implementation)
    tiled = predict(replace(plan, vocab_tiles=8), implementation=implementation)
    assert tiled.hbm["peak_bytes"] < usual.hbm["peak_bytes"]
    wide = replace(plan, precision=Precision(reduce="f32"))
    narrow = replace(plan, precision=Precision(reduce="f32", gradients="bf16"))
    whole, halved = (predict(each, implementation=implementation) for each in (wide, narrow))
    assert halved.hbm["gradients_bytes"] == whole.hbm["gradients_bytes"] / 2
    if implementation != "trainer":  # what is summed in bf16 waits in bf16
        assert usual.hbm["gradients_bytes"] == halved.hbm["gradients_bytes"]
    assert plan_from_data(plan_to_data(replace(narrow, vocab_tiles=8)), "plan").vocab_tiles == 8


@given(plans())
def test_the_peak_holds_all_its_parts(plan):
    prediction = predict(plan)
    hbm = prediction.hbm
    assert all(value >= 0 for value in hbm.values())
    parts = [*STATE, "activations_bytes", "workspace_bytes"]
    assert sum(hbm[part] for part in parts) == pytest.approx(hbm["peak_bytes"], rel=1e-12)
    assert prediction.fits == (hbm["thrifty_bytes"] <= hbm["capacity_bytes"])
    # The leanest has gaps between its buffers, too, which what is expected is counted without.
    in_use = hbm["thrifty_bytes"] / (1 + HOLDS["emitted"].least.tight)
    assert in_use <= hbm["peak_bytes"] * (1 + 1e-12)
    assert hbm["thrifty_bytes"] < hbm["lavish_bytes"]
    assert hbm["peak_bytes"] <= hbm["lavish_bytes"]
    chip = plan.machine.chip
    assert hbm["capacity_bytes"] == chip.hbm_usable_bytes / chip.devices_per_chip


@given(plans(), st.floats(1.0, 8.0))
def test_more_memory_never_stops_a_plan_from_fitting(plan, times):
    chip = plan.machine.chip
    bigger = override_chip(
        chip, {"hbm_bytes": chip.hbm_bytes * times, "hbm_usable_bytes": chip.hbm_usable_bytes}
    )
    larger = replace(bigger, hbm_usable_bytes=chip.hbm_usable_bytes * times)
    other = predict(replace(plan, machine=replace(plan.machine, chip=larger)))
    assert other.hbm["peak_bytes"] == predict(plan).hbm["peak_bytes"]
    assert other.fits >= predict(plan).fits


@given(plans())
def test_more_microbatches_never_keep_more_activations(plan):
    finer = replace(plan, batch=plan.batch * 2, microbatches=plan.microbatches * 2)
    stages = next((axis.size for axis in plan.mesh if axis.name == "p"), 1)
    before, after = predict(plan).hbm, predict(finer).hbm
    if stages == 1:
        assert after["activations_bytes"] == pytest.approx(before["activations_bytes"], rel=1e-12)
    else:
        assert after["activations_bytes"] >= before["activations_bytes"] * (1 - 1e-12)
    assert predict(replace(finer, batch=plan.batch * 2)).hbm["parameters_bytes"] == pytest.approx(
        before["parameters_bytes"]
    )


def test_emitted_steps_hold_less_where_more_than_nine_tenths_of_hbm_would_be_taken() -> None:
    """The TPU compiler spends what there is up to that, and beyond it only what is needed."""
    plan = build(decoder(layers=8), "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}})

    def peak_of(usable_bytes: float) -> float:
        chip = override_chip(
            plan.machine.chip, {"hbm_bytes": 1e15, "hbm_usable_bytes": usable_bytes}
        )
        small = replace(plan, machine=replace(plan.machine, chip=chip))
        return predict(small, implementation="emitted").hbm["peak_bytes"]

    plenty = peak_of(1e15)
    least = peak_of(1.0)
    assert least < plenty
    assert peak_of(1.2 * plenty) == plenty
    for room in (least + 0.3 * (plenty - least), least + 0.7 * (plenty - least)):
        assert peak_of(room / 0.9) == pytest.approx(room, rel=1e-12)


@pytest.mark.parametrize("residual", ["seq", "embed"])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_images_are_there_in_float32_and_as_their_gradient_reads_them(
    residual: str, microbatches: int
) -> None:
    """32 images of 224 x 224 x 3 on each of two members of the batch: no tensor axis splits them,
    but patches where it splits the sequence; of several microbatches all are cast beforehand."""
    where = {"data": {"x": 2}, "tensor": {"y": 2, "z": 4}}
    plan = build(vit(), "v4:2x2x4", 64, where, residual=residual, microbatches=microbatches)
    pixels = 32 * 224 * 224 * 3
    patches = pixels / microbatches / (8 if residual == "seq" else 1)
    whole = pixels if microbatches > 1 else 0
    held = predict(plan, costs="compiler").use.account.held(0)
    assert held["images"] == pytest.approx(4 * pixels + 2 * (patches + whole), rel=1e-12)


def test_text_has_no_images() -> None:
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}})
    assert predict(plan).use.account.held(0)["images"] == 0


def test_sums_on_sparse_cores_need_a_part_of_the_array_beside_it():
    rows = {(row["group"], row["kind"]): row for row in load_rows()}
    row = rows["llama3-70b on tpu7x:4x4x4", "2-D tensor"]
    plan = plan_from_data(row["plan"], "plan")
    use = hbm_of(plan, "emitted")
    logits = 32 * 8192 * (128256 / 4) * 4.0  # of 256 / 8 examples, a quarter of the vocabulary
    assert use.account.beside_head == pytest.approx(logits / 4)
    assert row["does_not_fit"]
    assert not use.fits
