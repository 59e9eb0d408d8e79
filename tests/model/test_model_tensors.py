"""Every weight is listed once, with a name for each of its dimensions."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.model import Biases, Model, Tensor, load_model, model_names, parameters
from shardsim.model.tensors import AXES, KINDS, PARTS

# Exact counts. Of weights that are published: the sums of the shapes in the files of
# huggingface.co/<meta-llama, google, mistralai, Qwen, allenai, microsoft, EleutherAI, facebook,
# deepseek-ai>,
# or of their modules, as transformers makes them; of torchvision: `num_params` of
# torchvision.models.vision_transformer.
EXACT = {
    "vit-b-16": 86_567_656,
    "vit-l-16": 304_326_632,
    "vit-h-14": 632_045_800,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-large-123b": 122_610_069_504,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,  # without the layer of a second prediction
    "llama4-scout": 107_769_861_120,
    "llama4-maverick": 400_711_848_960,
    "deit-ti-16": 5_717_416,
    "deit-s-16": 22_050_664,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "pythia-1.4b": 1_414_647_808,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    # big_vision's module: the tower without its class token, tables, six layers, and the head.
    "cappa-b-16": 86_567_656
    - 769_000  # its classes
    - 2 * 768  # class token and position
    + (32_001 + 64) * 768
    + 6 * (3 * 768 + 8 * 768**2 + 2 * 768 * 3072)
    + 2 * 768
    + 769 * 32_000
    - 2 * 768,  # what the note says
    "paligemma-3b-224": 2_923_335_408,
    "paligemma-3b-448": 2_924_220_144,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-xl": 2_849_757_184,
    "t5-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "clip-b-32": 151_277_313,
    "clip-b-16": 149_620_737,
    "clip-l-14": 427_616_513,
    "clip-l-14-336": 427_944_193,
    "siglip-b": 203_155_970,
    "siglip-l": 652_150_786,
    # As published with images of 384 pixels, less the positions of those.
    "siglip-so400m": 877_960_498 - (27**2 - 16**2) * 1152,
    "siglip-b-16": 92_884_224,
    "siglip-l-16": 315_956_224,
    "siglip-so400m-14": 427_680_704,
    "siglip-so400m-14-384": 428_225_600,
    "vit-ti-16": 5_717_416,
    "vit-s-16": 22_050_664,
    # Less the token of masked patches, which no step has.
    "dinov2-s-14": 22_056_576 - 384,
    "dinov2-s-14-reg4": 22_058_112 - 384,
    "dinov2-b-14": 86_580_480 - 768,
    "dinov2-b-14-reg4": 86_583_552 - 768,
    "dinov2-l-14": 304_368_640 - 1024,
    "dinov2-l-14-reg4": 304_372_736 - 1024,
    "dinov2-g-14": 1_136_480_768 - 1536,
    "dinov2-g-14-reg4": 1_136_486_912 - 1536,
    # arXiv 2302.05442 prints 21,743 M: the matrices of its blocks.
    "vit-22b": 48 * (4 * 6144**2 + 2 * 6144 * 24576),
}
# Counts as papers print them: millions, and the last printed digit.
PRINTED_MILLIONS = {
    "vit-g": (1011, 1),  # arXiv 2106.04560, without head
    "vit-bigg": (1843, 1),  # arXiv 2106.04560, without head
    "vit-e": (3926, 1),  # arXiv 2209.06794, with pooling head and 29,593 classes
    "palm-8b": (8_630, 10),  # arXiv 2204.02311 table 1
    "palm-62b": (62_500, 10),
    "palm-540b": (540_350, 10),
    "gpt3-175b": (174_600, 100),  # arXiv 2005.14165 table D.1
    # arXiv 2308.00951, less a head of 29,593 classes.
    "softmoe-s-16-128e": (933 - 11.4, 1),
    "softmoe-b-16-128e": (3_700, 50),
    "softmoe-l-16-128e": (13_100, 50),
    "ul2-20b": (19_500, 100),  # as its weights are listed
    "pali-17b": (16_900 - 121, 100),  # arXiv 2209.06794, less the pooling head and classes
    "pali-x-55b": (55_000, 1000),  # arXiv 2305.18565
    "maxtext-16b": (16_000, 1000),  # the others: named after their size
    "maxtext-22b": (22_000, 1000),
    "maxtext-32b": (32_000, 1000),
    "maxtext-52b": (52_000, 1000),
    "maxtext-64b": (64_000, 1000),
    "maxtext-128b": (128_000, 2000),
    "maxtext-512b": (512_000, 5000),
    "maxtext-1024b": (1_024_000, 10_000),
}


@pytest.mark.parametrize(("name", "count"), EXACT.items())
def test_parameters_are_the_published_count(name: str, count: int) -> None:
    assert load_model(name).parameters == count


@pytest.mark.parametrize(("name", "printed"), PRINTED_MILLIONS.items())
def test_parameters_agree_with_the_printed_count(name: str, printed: tuple[int, int]) -> None:
    millions, last_digit = printed
    assert abs(load_model(name).parameters / 1e6 - millions) <= last_digit


def test_every_preset_has_a_count_to_meet() -> None:
    assert set(EXACT) | set(PRINTED_MILLIONS) == set(model_names())


def test_vit_22b_with_everything_counted() -> None:
    model = load_model("vit-22b")
    blocks, width, mlp = model.parameters, 6144, 24576
    kept_biases = 48 * (width + mlp + width)  # attention output, MLP in and out
    norms = 48 * (width + 2 * 128) + width  # one per parallel block, QK-norm, the last; no biases
    embedding = 14 * 14 * 3 * width + width + 256 * width
    pooling = width + 4 * width**2 + 4 * width + 2 * width + 2 * width * mlp + mlp + width
    assert model.parameters_all == blocks + kept_biases + norms + embedding + pooling


def names(model: Model, part: str = "block") -> list[str]:
    return [tensor.name for tensor in parameters(model) if tensor.part == part]


def test_blocks_hold_what_their_options_say() -> None:
    plain = ["query", "key", "value", "attention_output"]
    palm = load_model("palm-8b")
    assert names(palm) == ["block_norm_scale", *plain, "mlp_in", "mlp_gate", "mlp_out"]
    serial = replace(palm, parallel_block=False, gated_mlp=False)
    assert names(serial) == [
        "attention_norm_scale",
        *plain,
        "mlp_norm_scale",
        "mlp_in",
        "mlp_out",
    ]
    gemma = load_model("gemma2-2b")
    assert [name for name in names(gemma) if "norm" in name] == [
        "attention_norm_scale",
        "post_attention_norm_scale",
        "mlp_norm_scale",
        "post_mlp_norm_scale",
    ]
    assert {"query_norm_scale", "key_norm_scale"} < set(names(load_model("vit-22b")))
    assert names(palm, "input") == ["token_embedding"]
    assert names(palm, "output") == ["final_norm_scale"]
    assert names(load_model("llama3-8b"), "output") == ["final_norm_scale", "output_head"]


def test_multi_query_keys_have_one_head() -> None:
    by_name = {tensor.name: tensor for tensor in parameters(load_model("palm-540b"))}
    assert by_name["query"] == Tensor(
        "query", ("embed", "heads", "head_dim"), (18432, 48, 256), 118, "matrix"
    )
    assert by_name["key"].axes == ("embed", "kv_heads", "head_dim")
    assert by_name["key"].shape == (18432, 1, 256)
    assert by_name["attention_output"].axes == ("heads", "head_dim", "embed")


flags = st.booleans()


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Small models of every kind."""
    small = st.integers(1, 6)
    kv_heads = draw(small)
    vit = draw(flags)
    patch = draw(st.integers(1, 4)) if vit else 0
    norm = draw(st.sampled_from(["layernorm", "rmsnorm"]))
    pooling = draw(st.sampled_from(["none", "mean", "map", "cls"])) if vit else "none"
    parallel, post_norms, qk_norm = draw(flags), draw(flags), draw(flags)
    return Model(
        name="drawn",
        family="vit" if vit else "decoder",
        layers=draw(small),
        embed=draw(small),
        mlp=draw(small),
        heads=kv_heads * draw(small),
        head_dim=2 * draw(small),
        kv_heads=kv_heads,
        sequence=draw(small),
        vocab=0 if vit else draw(small),
        parallel_block=parallel,
        parallel_norms=parallel and draw(flags),
        gated_mlp=draw(flags),
        causal=draw(flags),
        tied_embeddings=not vit and draw(flags),
        head_bias=not vit and draw(flags),
        qk_norm=qk_norm,
        qk_norm_over=draw(st.sampled_from(["head", "heads"])) if qk_norm else "head",
        norm=norm,
        pre_norms=parallel or not post_norms or draw(flags),
        post_norms=post_norms,
        mlp_post_norm=not parallel and not post_norms and draw(flags),
        layer_scale=not parallel and draw(flags),
        final_norm=draw(flags),
        positions=draw(st.sampled_from(["learned", "rotary", "fixed", "none"])),
        biases=Biases(
            qkv=draw(flags),
            attention_output=draw(flags),
            mlp=draw(flags),
            norm=norm == "layernorm" and draw(flags),
        ),
        patch=patch,
        image=patch * draw(small),
        registers=draw(st.integers(0, 3)) if vit else 0,
        patch_bias=not vit or draw(flags),
        input_norm=vit and draw(flags),
        pooling=pooling,
        classes=0 if pooling == "none" else draw(st.integers(0, 6)),
    )


@settings(max_examples=80, deadline=None)
@given(models())
def test_tensors_are_consistent_and_sum_to_the_count(model: Model) -> None:
    tensors = parameters(model)
    assert sum(tensor.stack * math.prod(tensor.shape) for tensor in tensors) == model.parameters_all
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    lengths: dict[str, int] = {}
    for tensor in tensors:
        assert len(tensor.axes) == len(tensor.shape)
        assert set(tensor.axes) <= set(AXES)
        assert tensor.kind in KINDS
        assert tensor.part in PARTS
        assert tensor.stack == (model.layers if tensor.part == "block" else 1)
        for axis, length in zip(tensor.axes, tensor.shape, strict=True):
            assert lengths.setdefault(axis, length) == length  # a name means one length


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 5))
def test_layers_count_in_proportion(model: Model, more: int) -> None:
    one, two = replace(model, layers=1), replace(model, layers=2)
    grown = replace(model, layers=model.layers + more)
    per_layer = two.parameters_all - one.parameters_all
    assert grown.parameters_all - model.parameters_all == more * per_layer
    assert grown.block_matrices * model.layers == model.block_matrices * grown.layers


@settings(max_examples=40, deadline=None)
@given(models())
def test_a_gate_adds_one_more_matrix(model: Model) -> None:
    plain, gated = replace(model, gated_mlp=False), replace(model, gated_mlp=True)
    bias = model.mlp if model.biases.mlp else 0
    added = gated.parameters_all - plain.parameters_all
    assert added == model.layers * (model.embed * model.mlp + bias)
    per_layer = (gated.block_matrices - plain.block_matrices) // plain.layers
    assert per_layer == model.embed * model.mlp


@settings(max_examples=40, deadline=None)
@given(models())
def test_block_matrices_are_the_closed_form(model: Model) -> None:
    counted = replace(model, parameter_convention="block-matrices").parameters
    attention = model.embed * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    mlp = (3 if model.gated_mlp else 2) * model.embed * model.mlp
    assert counted == model.layers * (attention + mlp) <= model.parameters_all


@settings(max_examples=60, deadline=None)
@given(models())
def test_each_option_adds_its_own_vectors(model: Model) -> None:
    """What LayerNorm's bias doubles, heads share, and a branch or an image has once."""
    norm = model.embed * (1 + model.biases.norm)
    heads = model.head_dim * (model.heads + model.kv_heads - 2) * (1 + model.biases.norm)
    added = {
        "parallel_norms": (False, True, model.layers * norm if model.parallel_block else None),
        "pre_norms": (False, True, 2 * model.layers * norm if model.post_norms else None),
        "layer_scale": (False, True, 2 * model.layers * model.embed),
        "head_bias": (False, True, model.vocab or None),
        "qk_norm_over": ("head", "heads", model.layers * heads if model.qk_norm else None),
        "registers": (0, 4, 4 * model.embed if model.patch else None),
        "patch_bias": (False, True, model.embed if model.patch else None),
        "input_norm": (False, True, norm if model.patch else None),
    }
    for key, (without, having, count) in added.items():
        serial_only = key in ("pre_norms", "layer_scale")
        if count is None or (serial_only and model.parallel_block):
            continue
        plain, more = (replace(model, **{key: value}) for value in (without, having))
        assert more.parameters_all - plain.parameters_all == count, key
