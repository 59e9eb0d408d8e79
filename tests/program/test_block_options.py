"""Norms, scales and biases that some models have: priced alike, summed where devices share them."""

from __future__ import annotations

from typing import Any

import pytest
from building import build, decoder, vit

from shardsim.cost.predict import Prediction, predict
from shardsim.emit import export_plan
from shardsim.errors import PlanError
from shardsim.model import Delta, Experts, Index, Latent, Model
from shardsim.model.flops import attention_flops_per_token
from shardsim.plan import Overlap, resolve
from shardsim.plan.split import stored_elements
from shardsim.simulate import simulate_plan

WHERE = {"fsdp": {"x": 2, "y": 2}, "tensor": {"z": 2}}
RMS: dict[str, Any] = {"norm": "rmsnorm", "gated_mlp": True, "sequence": 2048}
PLAIN: dict[str, Any] = {"parallel_block": False, "pooling": "none", "classes": 0}
PIXELS: dict[str, Any] = {**PLAIN, "predicts": 8}
_SHARED = Experts(number=4, top_k=2, mlp=1024, shared=1, shared_gate=True)
MODELS: dict[str, Model] = {
    "one norm over all heads": decoder(**RMS, qk_norm=True, qk_norm_over="heads"),
    "norms behind alone": decoder(**RMS, pre_norms=False, post_norms=True),
    "a norm behind the MLP": decoder(**RMS, mlp_post_norm=True),
    "norms behind additions": decoder(**RMS, deepnorm=2.5),
    "norms within branches": decoder(**RMS, sub_norms=True),
    "norms of patches": vit(parallel_block=False, patch_norms=True),
    "two norms side by side": decoder(parallel_block=True, parallel_norms=True, sequence=2048),
    "scales of branches": decoder(**RMS, layer_scale=True),
    "a bias of each word": decoder(**RMS, head_bias=True),
    "a gate of shared experts": decoder(**RMS, experts=_SHARED),
    "layers after the last round": decoder(**RMS, windows=[512, 512, 0] * 2 + [512, 512]),
    "latent attention": decoder(
        **RMS, head_dim=96, latent=Latent(queries=512, keys=256, rotary=32, values=64)
    ),
    "latent attention, queries whole": decoder(
        **RMS, head_dim=96, latent=Latent(keys=256, rotary=32, values=64)
    ),
    "an index of tokens": decoder(
        **RMS,
        head_dim=96,
        latent=Latent(queries=512, keys=256, rotary=32, values=64),
        index=Index(heads=8, head_dim=64, top=512),
    ),
    "a branch of another width": decoder(
        **RMS, branch=256, experts=Experts(number=4, top_k=2, mlp=1024)
    ),
    "linear attention": decoder(
        **RMS,
        output_gate=True,
        layers=8,
        delta=Delta(key_heads=4, value_heads=8, key_dim=64, value_dim=64),
    ),
    "a norm in front": vit(input_norm=True, patch_bias=False),
    "a modulation of each layer": vit(**PIXELS, modulation="layer", labels=11),
    "one modulation, and a text": vit(
        **PIXELS,
        modulation="model",
        **{"prompt": 64, "prompt_embed": 512, "qk_norm": True, "qk_norm_over": "heads"},
    ),
    "masked patches": vit(**PIXELS, images=vit(**PLAIN, kept=64, sequence=64)),
    "registers": vit(parallel_block=False, registers=16, sequence=272),
}


def priced(model: Model, **options: Any) -> Prediction:
    """Return the prediction of a model over fsdp and tensor, nothing beside anything."""
    alone = Overlap(matmul="off", weights=False, gradients=False)
    return predict(build(model, "v4:2x2x2", 16, WHERE, overlap=alone, **options))


@pytest.mark.parametrize("name", MODELS)
def test_events_take_what_the_closed_form_says(name: str) -> None:
    alone = Overlap(weights=False, gradients=False)
    plan = build(MODELS[name], "v4:2x2x2", 16, WHERE, overlap=alone)
    found = simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


EMITTED = {name for name, model in MODELS.items() if model.latent} | {
    *("norms behind additions", "norms within branches", "norms of patches", "a norm in front"),
    *("layers after the last round", "a bias of each word", "a gate of shared experts"),
    *("linear attention", "one norm over all heads", "a modulation of each layer"),
    *("one modulation, and a text", "masked patches", "registers", "scales of branches"),
    *("a norm behind the MLP", "norms behind alone", "two norms side by side"),
}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - EMITTED))
def test_what_the_emitted_code_lacks_is_refused_by_name(name: str) -> None:
    plan = build(MODELS[name], "v4:2x2x2", 16, {"fsdp": {"x": 2, "y": 2, "z": 2}})
    with pytest.raises(PlanError, match=r"model: export of .* is not supported"):
        export_plan(plan, "jax")


def test_a_norm_over_heads_sums_over_the_axis_that_splits_them() -> None:
    def summed(model: Model) -> float:
        return sum(
            use.bytes_per_chip
            for use in priced(model).collectives
            if use.kind == "all-reduce" and use.purpose == "activations"
        )

    whole, each = (decoder(**RMS, qk_norm=True, qk_norm_over=over) for over in ("heads", "head"))
    tokens = 16 * 2048 // 4  # of a pair of devices that share heads
    # Of queries and of keys: one float32 a token, forward, made again, and its gradient.
    ring = 2 * (2 - 1) / 2
    assert summed(whole) - summed(each) == pytest.approx(8 * 2 * 3 * 4 * tokens * ring)


def test_numbers_that_modulate_a_layer_cross_devices_once_an_example() -> None:
    def gathered(model: Model) -> float:
        return sum(
            use.bytes_per_chip
            for use in priced(model).collectives
            if use.kind == "all-gather" and use.purpose == "activations"
        )

    plain, made = vit(**PIXELS), vit(**PIXELS, modulation="layer")
    width, examples, layers = plain.embed, 16 // 4, plain.layers  # of a pair of devices
    # In bf16 six numbers of a channel in each layer, made again backward, and two of the last norm.
    numbers = 2 * examples * width * (layers * 6 * 2 + 2)
    assert gathered(made) - gathered(plain) == pytest.approx(numbers / 2)


def test_weights_of_conditions_are_split_and_worked_on_once_an_example() -> None:
    plain, made = vit(**PIXELS), vit(**PIXELS, modulation="layer")
    tensors = {tensor.name: tensor for tensor in made.tensors}
    layout = resolve(build(made, "v4:2x2x2", 16, WHERE))
    for name in ("modulation", "final_modulation"):
        assert float(stored_elements([tensors[name]], layout)) == tensors[name].size / 8
    width, layers = plain.embed, plain.layers
    once = 256 * width + width**2 + layers * 6 * width**2 + 2 * width**2
    devices, passes, examples = 8, 3, 16

    def more(remat: str) -> float:
        flops = (float(priced(one, remat=remat).price.flops) for one in (made, plain))
        return devices * (next(flops) - next(flops))

    waves = 2 * 256 * width * examples  # of a time, which have no gradient
    assert more("none") == pytest.approx(passes * 2 * once * examples - waves, rel=1e-9)
    # The gradient of a gate reads what it scaled: nothing kept, the MLP's output is made again.
    again = layers * 2 * examples * plain.sequence * plain.mlp * width
    assert more("full") - more("none") == pytest.approx(again, rel=0.02)


def test_layers_after_the_last_round_cost_what_they_are() -> None:
    def flops(windows: list[int], layers: int) -> float:
        return float(priced(decoder(**RMS, layers=layers, windows=windows)).price.flops)

    ends = flops([512], 4) - (flops([512], 8) - flops([512], 4))
    layer = {window: (flops([window], 4) - ends) / 4 for window in (0, 512)}
    found = flops([512, 512, 0] * 2 + [512, 512], 8)
    assert found == pytest.approx(ends + 6 * layer[512] + 2 * layer[0], rel=1e-9)


def test_latent_attention_counts_keys_and_values_by_their_own_widths() -> None:
    model = MODELS["latent attention"]
    tokens, heads = 2048, 16
    pairs = 2 * tokens * heads * (96 + 64)  # of a token: scores, and weighted values
    assert attention_flops_per_token(model, tokens) == 8 * pairs
    whole = priced(decoder(**RMS, head_dim=96, kv_heads=16), attention="unfused")
    assert float(whole.price.flops) > float(priced(model, attention="unfused").price.flops)


def test_compressed_vectors_are_stored_whole_and_their_weights_split() -> None:
    """Weights from compressed vectors are gathered as those from the stream are."""
    plan = build(MODELS["latent attention"], "v4:2x2x2", 16, WHERE)
    tensors = {tensor.name: tensor for tensor in plan.model.tensors}
    assert tensors["query_down"].axes == ("embed", "query_rank")
    assert tensors["query"].axes == ("embed", "heads", "head_dim")
    layout = resolve(plan)
    for name, ways in (("query_down", 4), ("query", 8), ("key", 8), ("shared_key", 4)):
        stored = stored_elements([tensors[name]], layout)
        assert float(stored) == tensors[name].size / ways, name
