"""Exports to other trainers: rules resolve to the plan's specs, or the export is refused."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plans import CONTEXTS, EXPERTS, PLANS, make, spread
from shardsim.emit import export_plan
from shardsim.emit.dialects.big_vision import big_vision_export
from shardsim.emit.dialects.keras import keras_layout, resolve_layout, variable_path
from shardsim.emit.dialects.levanter import levanter_layout
from shardsim.emit.dialects.maxtext import maxtext_export
from shardsim.emit.dialects.rules import Array, compare, order_rules, resolve_names
from shardsim.emit.dialects.tactics import resolve_tactics
from shardsim.emit.dialects.vocabulary import TRAINING_AXES, installed
from shardsim.emit.specs import plan_data
from shardsim.errors import FileError, PlanError
from shardsim.plan import Plan, load_plan, plan_names, resolve
from shardsim.plan.plan import Context
from shardsim.plan.remat import POLICIES, Policy, Remat

NAMES, AXES = ("a", "b", "c", "d"), ("x", "y", "z")
rules_of_names = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.lists(st.sampled_from(AXES), max_size=3, unique=True).map(tuple)
    ),
    max_size=8,
)
dims_of_array = st.lists(st.sampled_from((*NAMES, "e")), max_size=4, unique=True).map(tuple)


def by_definition(names, rules):
    """Resolve rules from the definition: no dimension or axis can have a rule before its own."""
    given_to: dict[str, int] = {}
    for index, (name, axes) in enumerate(rules):
        blocked = name not in names or name in given_to
        blocked = blocked or any(set(axes) & set(rules[at][1]) for at in given_to.values())
        if not blocked:
            given_to[name] = index
    return [list(rules[given_to[name]][1]) if name in given_to else [] for name in names]


@given(names=dims_of_array, rules=rules_of_names)
def test_logical_rules_resolve_as_defined(names, rules) -> None:
    assert resolve_names(names, rules) == by_definition(names, rules)


@pytest.mark.skipif(importlib.util.find_spec("flax") is None, reason="Flax is not installed")
@given(names=dims_of_array, rules=rules_of_names)
def test_logical_rules_resolve_as_flax_does(names, rules) -> None:
    from flax.linen import logical_to_mesh_axes

    spec = logical_to_mesh_axes(names, [(name, axes) for name, axes in rules])
    found = [[axes] if isinstance(axes, str) else list(axes or ()) for axes in spec]
    assert resolve_names(names, rules) == found


@given(names=st.lists(dims_of_array, min_size=1, max_size=4), rules=rules_of_names)
def test_ordered_rules_give_every_array_its_spec_or_the_check_says_so(names, rules) -> None:
    arrays = [
        Array.of(str(dims), dims, resolve_names(dims, rules), activation=True) for dims in names
    ]
    ordered = order_rules(arrays, ("a", "b"))
    for array in arrays:
        found = resolve_names(array.names, ordered)
        if tuple(map(tuple, found)) != array.spec:
            with pytest.raises(PlanError, match="would lie as"):
                compare(array, found, "some trainer")


@given(names=dims_of_array, rules=rules_of_names)
def test_rules_for_one_array_always_exist(names, rules) -> None:
    array = Array.of("one", names, resolve_names(names, rules), activation=True)
    assert resolve_names(names, order_rules([array], ())) == [list(axes) for axes in array.spec]


def test_a_lost_sharding_is_refused_and_a_gained_one_is_a_remark() -> None:
    array = Array.of("kernel", ("embed", "mlp"), [["fsdp"], []])
    assert compare(array, [["fsdp"], []], "t") is None
    assert "kernel" in str(compare(array, [["fsdp"], ["model"]], "t"))
    with pytest.raises(PlanError, match=r"kernel .* would lie as \[-, model\]"):
        compare(array, [[], ["model"]], "t")
    activation = Array.of("wide", ("embed", "mlp"), [["fsdp"], []], activation=True)
    with pytest.raises(PlanError, match="wide"):
        compare(activation, [["fsdp"], ["model"]], "t")


def attempt(export: Callable[[], Any], reasons: str) -> Any:
    """Return what `export` makes; None if it is refused for one of `reasons`."""
    try:
        return export()
    except PlanError as refused:
        if not re.search(reasons, str(refused)):
            raise
        return None


# big_vision.


@given(
    shape=st.lists(st.sampled_from([1, 3, 8, 12, 64, 1024]), min_size=1, max_size=4),
    size=st.sampled_from([1, 2, 8, 64]),
    least=st.sampled_from([0, 4]),
)
def test_fsdp_takes_the_largest_free_dimension_that_divides(shape, size, least) -> None:
    spec = resolve_tactics("k", shape, [(".*", f'fsdp("x", {least})')], {"x": size})
    total = 4
    for length in shape:
        total *= length
    dividing = [length for length in shape if length % size == 0]
    if total <= least * 2**20 or not dividing:
        assert not any(spec)
        return
    (at,) = [index for index, axes in enumerate(spec) if axes]
    assert shape[at] == max(dividing)


def test_the_first_pattern_that_matches_in_full_decides() -> None:
    strategy = [("kernel", 'shard_dim("x", 0)'), (".*/kernel", 'shard_dim("y", -1)')]
    sizes = {"x": 2, "y": 2}
    assert resolve_tactics("a/kernel", (4, 4), strategy, sizes) == [[], ["y"]]
    assert resolve_tactics("kernel", (4, 4), strategy, sizes) == [["x"], []]
    assert resolve_tactics("a/bias", (4, 4), strategy, sizes) == [[], []]


@pytest.mark.parametrize(
    ("tactics", "words"),
    [
        ('shard_dim("x", -2)', "2 dimensions"),
        ('shard_dim("x", 0)|shard_dim("x", 0)', "split there already"),
        ('shard_dim("q", 0)', "no axis 'q'"),
        ('__import__("os").system("ls")', "not a tactic"),
        ("shatter(1)", "unknown tactic"),
        ('shard_dim("x", 0)|replicate', "cannot be replicated"),
    ],
)
def test_a_strategy_that_big_vision_refuses_is_refused(tactics: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        resolve_tactics("kernel", (4, 4), [(".*", tactics)], {"x": 2})


VITS = [name for name, plan in PLANS.items() if plan.model.patch and plan.microbatches == 1]


@pytest.mark.parametrize("name", VITS)
def test_big_vision_gets_the_specs_of_the_plan_or_a_reason(name: str) -> None:
    plan = PLANS[name]
    made = attempt(lambda: big_vision_export(plan), "would lie as|remat:")
    if made is None:
        return
    sizes = {axis.name: axis.size for axis in plan.mesh}
    for weight in made.weights:
        path = f"params/{weight.path}"
        found = resolve_tactics(path, weight.shape, made.strategy, sizes)
        if weight.name != "patch_embedding":
            assert tuple(map(tuple, found)) == weight.spec
    names = ("act_batch", "act_len", "act_emb")
    activations = plan_data(made.plan)["activations"]
    for kind in ("residual", "wide"):
        assert resolve_names(names, made.rules) == activations[kind]


def test_big_vision_cannot_split_residual_and_hidden_layer_differently() -> None:
    with pytest.raises(PlanError, match=r"big_vision: (residual|wide) \(act_batch, act_len"):
        export_plan(PLANS["tensor, sequence, two directions"], "big_vision")


# Keras.


@pytest.mark.parametrize("name", PLANS)
def test_keras_gets_the_specs_of_the_plan_or_a_reason(name: str) -> None:
    plan = PLANS[name]
    made = attempt(lambda: keras_layout(plan), "one mesh axis|splits the batch")
    if made is None:
        return
    layout, batch = made
    data = plan_data(plan)
    for weight, entry in data["parameters"].items():
        spec = entry["spec"][1:] if entry["part"] == "block" else entry["spec"]
        spec = [[], [], *spec] if weight == "patch_embedding" else spec
        assert resolve_layout(variable_path(weight), len(spec), layout) == spec
    assert batch in {axis.name for axis in plan.mesh}


def test_two_patterns_that_match_are_an_error_in_keras() -> None:
    layout = {".*/kernel": ("x",), "query/.*": ("y",)}
    with pytest.raises(PlanError, match="matches"):
        resolve_layout("query/kernel", 1, {**layout, "(.*/)?kernel": ("z",)})
    assert resolve_layout("a/kernel", 2, layout) == [["x"], []]


# MaxText.


def exported(plan: Plan) -> dict:
    return yaml.safe_load(export_plan(plan, "maxtext"))


MAXTEXT = [
    name
    for name, plan in PLANS.items()
    if plan.optimizer != "momentum" and "rest" not in plan.remat.groups[0].save
    if len(plan.remat.groups) == 1
]


@pytest.mark.parametrize("name", MAXTEXT)
def test_maxtext_rules_resolve_to_the_specs_of_the_plan(name: str) -> None:
    made = maxtext_export(PLANS[name])
    rules = [
        (logical, tuple(axes)) for logical, axes in exported(PLANS[name])["logical_axis_rules"]
    ]
    renamed = made.renamed
    data = plan_data(made.plan)
    checked = 0
    for array in made.arrays:
        if array.activation or array.what not in data["parameters"]:
            continue
        wanted = [
            [renamed[axis] for axis in axes] for axes in data["parameters"][array.what]["spec"]
        ]
        found = resolve_names(array.names, rules)
        assert all(not want or want == got for want, got in zip(wanted, found, strict=True))
        checked += 1
    assert checked == len(data["parameters"])


@pytest.mark.parametrize("name", ["experts, ring", "experts, exchanged", "experts, tensor, embed"])
def test_maxtext_places_experts_by_axes_of_their_own(name: str) -> None:
    plan = replace(EXPERTS[name], remat=Remat())
    made, keys = maxtext_export(plan), exported(plan)
    rules = [(logical, tuple(axes)) for logical, axes in keys["logical_axis_rules"]]
    for array in made.arrays:
        assert tuple(map(tuple, resolve_names(array.names, rules))) == array.spec
    assert (keys["decoder_block"], keys["num_experts"], keys["num_experts_per_tok"]) == (
        "mixtral",
        8,
        2,
    )
    assert (keys["sparse_matmul"], keys["base_mlp_dim"]) == (True, plan.model.experts.mlp)
    assert keys.get("use_ring_of_experts", False) == (name == "experts, ring")
    assert keys.get("ragged_buffer_factor") == (4 if name == "experts, exchanged" else None)


def test_maxtext_refuses_experts_that_its_blocks_cannot_say() -> None:
    with pytest.raises(PlanError, match=r"experts\.shared: 1 of llama4 is not supported"):
        export_plan(EXPERTS["experts, exchanged, replicas"], "maxtext")


def test_maxtext_sizes_multiply_to_the_devices_of_a_slice_and_to_the_slices() -> None:
    plan = load_plan("maxtext-32b-published-v5p-2x64")
    keys = exported(plan)
    inside = [size for key, size in keys.items() if key.startswith("ici_")]
    over = [size for key, size in keys.items() if key.startswith("dcn_")]
    assert list(itertools.accumulate(inside, int.__mul__))[-1] == 64
    assert list(itertools.accumulate(over, int.__mul__))[-1] == 2
    assert (keys["compile_topology"], keys["compile_topology_num_slices"]) == ("v5p-128", 2)
    assert keys["per_device_batch_size"] * 128 == plan.batch
    assert keys["decoder_block"] == "default"


def test_a_second_tensor_axis_gets_a_name_of_its_own() -> None:
    keys = exported(PLANS["2-D tensor, sequence"])
    assert keys["mesh_axes"] == ["fsdp", "model2", "tensor"]
    assert (keys["ici_parallelism"], keys["dcn_parallelism"]) == ([2, 2, 2], [1, 1, 1])


def test_a_name_that_maxtext_uses_otherwise_is_changed() -> None:
    plan = make(
        "llama",
        {"tensor": 2, "data": 4},
        {"embed": ["tensor"], "heads": ["data"], "mlp": ["data"], "vocab": ["data"]},
        {"batch": ["tensor"], "embed": ["data"]},
    )
    assert exported(plan)["mesh_axes"] == ["fsdp", "tensor"]


@pytest.mark.parametrize("name", plan_names())
def test_every_plan_that_ships_goes_to_maxtext_or_says_why_not(name: str) -> None:
    plan = load_plan(name)
    keys = attempt(
        lambda: exported(plan),
        "optimizer|not supported|remat|has no v|takes no other|context.keys|accumulation",
    )
    if keys is None:
        return
    assert keys["base_num_decoder_layers"] == plan.model.layers
    assert keys["base_mlp_dim"] == plan.model.mlp


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"optimizer": "adafactor"}, "has no 'adafactor'"),
        ({"remat": "none"}, "cannot keep everything"),
        (
            {"optimizer_rules": {"embed": ["data"]}, "mesh": {"data": 2, "fsdp": 4}},
            "only where no fsdp",
        ),
    ],
)
def test_maxtext_refuses_with_the_reason(more: dict, words: str) -> None:
    mesh = more.pop("mesh", {"fsdp": 8})
    with pytest.raises(PlanError, match=words):
        export_plan(spread("gpt", mesh, **more), "maxtext")


def test_maxtext_stripes_tokens_and_says_why_it_has_no_ring() -> None:
    plan = replace(CONTEXTS["ring, contiguous, no overlap"], context=Context(order="striped"))
    assert exported(plan)["context_parallel_load_balance"] is True
    assert exported(replace(plan, context=Context()))["context_parallel_load_balance"] is True
    plain = replace(plan, context=Context(order="contiguous"))
    assert exported(plain)["context_parallel_load_balance"] is False
    assert "context_parallel_load_balance" not in exported(spread("llama", {"fsdp": 8}))
    for keys, words in (("ring", "on GPUs only"), ("ulysses", "does not exchange heads")):
        with pytest.raises(PlanError, match=words):
            export_plan(replace(plan, context=Context(keys=keys)), "maxtext")


@pytest.mark.parametrize("to", ["flax", "big_vision", "keras", "axlearn", "levanter"])
def test_other_trainers_refuse_other_ways_to_attend(to: str) -> None:
    for plan in (plan for plan in CONTEXTS.values() if not plan.model.latent):
        if plan.context == Context(order="contiguous"):
            continue
        with pytest.raises(PlanError, match="cannot say how a context axis attends"):
            export_plan(plan, to)


def test_a_placement_that_jax_would_not_choose_is_refused() -> None:
    def placed(**torus: dict[str, int]) -> Plan:
        sizes = {"fsdp": 16, "model": 4}
        mesh = {name: {"size": sizes[name], "torus": on} for name, on in torus.items()}
        return spread("llama", mesh, "embed", machine="v4:4x4x4", batch=64)

    assert "mesh_axes" in export_plan(placed(fsdp={"x": 4, "y": 4}, model={"z": 4}), "maxtext")
    other = placed(fsdp={"y": 4, "z": 4}, model={"x": 4})
    with pytest.raises(PlanError, match="'fsdp' lies on y4 z4 in the plan"):
        export_plan(other, "maxtext")
    # Keras takes a list of devices, so the placement is the file's own.
    assert "'torus': {'x': 4}" in export_plan(other, "keras")


BASE = """
mesh_axes: [data]
logical_axis_rules:
{rules}
"""


def base_yml(folder: Path, names: list[str], more: list[str] | None = None) -> Path:
    rules = [f"  - {json.dumps([name, list(TRAINING_AXES[name])])}" for name in names]
    path = folder / "base.yml"
    path.write_text(BASE.format(rules="\n".join([*rules, *(more or [])])), encoding="utf-8")
    return path


def test_a_logical_axis_that_only_the_installed_release_has_gets_its_default(tmp_path) -> None:
    plan = load_plan("maxtext-32b-published-v5p-1x64")
    file = base_yml(tmp_path, list(TRAINING_AXES), ["  - [brand_new, [fsdp, expert]]"])
    rules = dict(
        map(tuple, yaml.safe_load(export_plan(plan, "maxtext", file))["logical_axis_rules"])
    )
    assert rules["brand_new"] == ["fsdp"]


def test_an_older_release_says_embed_for_attention_too(tmp_path: Path) -> None:
    plan = load_plan("maxtext-32b-published-v5p-1x64")
    known = [name for name in TRAINING_AXES if name not in ("embed_attn", "embed_vocab")]
    made = maxtext_export(plan, base_yml(tmp_path, known))
    query = next(array for array in made.arrays if array.what == "query")
    assert query.names[1] == "embed"
    assert resolve_names(query.names, made.rules)[1] == ["fsdp"]


def test_a_release_without_a_needed_axis_is_refused(tmp_path: Path) -> None:
    plan = load_plan("maxtext-32b-published-v5p-1x64")
    known = [name for name in TRAINING_AXES if name != "mlp"]
    with pytest.raises(PlanError, match="no logical axis 'mlp'"):
        maxtext_export(plan, base_yml(tmp_path, known))
    with pytest.raises(FileError, match="no MaxText there"):
        installed(tmp_path / "nowhere")


# Hostile names.

HOSTILE = [
    '"""\nimport os\n"""',
    "x\nbase_config: evil.yml",
    "${oc.env:HOME}",
    "'); raise SystemExit('",
    "\u2028raise",
    "# \\\n",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_in_comments(name: str) -> None:
    plain, hostile = (
        spread("vit-serial", {"fsdp": 8}, name=given_name) for given_name in ("plain", name)
    )
    assert exported(hostile) == exported(plain)
    code = export_plan(hostile, "big_vision")
    assert code.isascii()
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(export_plan(plain, "big_vision")))
    for to in ("keras", "flax-linen"):
        assert export_plan(hostile, to).isascii()
        ast.parse(export_plan(hostile, to))


@settings(max_examples=30, deadline=None)
@given(name=st.text(max_size=40))
def test_any_name_gives_the_same_maxtext_file(name: str) -> None:
    plan = spread("gpt", {"fsdp": 8}, name=name)
    plain = spread("gpt", {"fsdp": 8}, name="plain")
    assert exported(plan) == exported(plain)


# AXLearn and Levanter.

DECODERS = [name for name, plan in PLANS.items() if plan.model.vocab]


AXLEARN_REASONS = "contiguous tokens|no axis for|remat:|mesh axes come in|the moments of"
LEVANTER_REASONS = "contiguous tokens|no axis for|remat:|would lie as|the moments of|splits queries"


@pytest.mark.parametrize("to", ["maxtext", "axlearn", "levanter", "big_vision"])
def test_trainers_with_one_policy_refuse_groups_of_layers(to: str) -> None:
    groups = Remat((Policy(layers=1), Policy(save=POLICIES["dots"], layers=1)))
    if to == "big_vision":
        plan = PLANS["partitioned fsdp"]
    else:
        plan = spread("llama", {"data": 8}, remat="full")
    export_plan(plan, to)
    with pytest.raises(PlanError) as raised:
        export_plan(replace(plan, remat=groups), to)
    assert re.fullmatch(
        r"remat: \S+ has one policy for all layers, not 2 groups .*", str(raised.value)
    )


@pytest.mark.parametrize("name", DECODERS)
def test_axlearn_writes_the_specs_of_the_plan_or_a_reason(name: str) -> None:
    plan = PLANS[name]
    code = attempt(lambda: export_plan(plan, "axlearn"), AXLEARN_REASONS)
    if code is None:
        return
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    devices = list(itertools.accumulate((*values["INSIDE"], *values["SLICES"]), int.__mul__))
    assert devices[-1] == plan.machine.devices
    roles = {"data": "data", "fsdp": "fsdp", "context": "seq", "tensor": "model"}
    renamed = {n: roles[r] for r, names in resolve(plan).names.items() for n in names}
    entry = plan_data(plan)["parameters"]["mlp_in"]
    wanted = tuple(tuple(renamed[axis] for axis in axes) for axes in entry["spec"][1:])
    module = "model.decoder.transformer.layer.feed_forward.linear1"
    found = values["PARTITION_SPECS"][module]["param_partition_spec"]
    assert tuple((axes,) if isinstance(axes, str) else axes or () for axes in found) == wanted


@pytest.mark.parametrize("name", DECODERS)
def test_levanter_holds_the_plan_or_a_reason(name: str) -> None:
    plan = PLANS[name]
    text = attempt(lambda: export_plan(plan, "levanter"), LEVANTER_REASONS)
    if text is None:
        return
    trainer = yaml.safe_load(text)["trainer"]
    replicas = trainer["replica_ici_axis_size"] * trainer["replica_dcn_axis_size"]
    layout = resolve(plan)
    assert trainer["model_axis_size"] == int(layout.tensor.size)
    assert replicas == int(layout.data.size)
    assert ("fsdp_axis" in trainer) == (int(layout.fsdp.size) > 1)


def test_axlearn_finds_the_query_inside_of_rotary_positions() -> None:
    """Its RoFormerQKVLinear wraps the layer that has the weights."""
    codes = {
        name: attempt(lambda name=name: export_plan(PLANS[name], "axlearn"), AXLEARN_REASONS)
        for name in DECODERS
        if PLANS[name].model.positions == "rotary" and not resolve(PLANS[name]).striped
    }
    name, code = next((name, code) for name, code in codes.items() if code is not None)
    plan = PLANS[name]
    assert "attention.input_linear.input_linear.layer'" in code
    plain = replace(plan, model=replace(plan.model, positions="fixed"))
    assert "attention.input_linear.layer'" in export_plan(plain, "axlearn")


@pytest.mark.parametrize("keep", [{"save": ["statistics"]}, {"offload": ["statistics", "qkv"]}])
@pytest.mark.parametrize("to", ["axlearn", "maxtext"])
def test_trainers_say_that_sums_of_norms_are_not_kept(to: str, keep: dict[str, list[str]]) -> None:
    code = export_plan(spread("llama", {"data": 8}, remat=keep), to)
    assert re.search(r"# +.*(computed again.*no name for)", code)


def test_levanter_splits_queries_by_the_heads_of_keys() -> None:
    plan = next(
        plan
        for name in DECODERS
        if (plan := PLANS[name]).remat.name in ("full", "none")
        and int(resolve(plan).tensor.size) > 1
        and plan.model.kv_heads % int(resolve(plan).tensor.size) == 0
        and attempt(lambda: levanter_layout(plan), ".") is not None
    )
    query = next(array for array in levanter_layout(plan).arrays if array.what == "query")
    assert query.names == ("embed", "kv_head", "head_size")
    one_key = replace(plan, model=replace(plan.model, kv_heads=1))
    with pytest.raises(PlanError, match=r"splits queries|would lie as"):
        export_plan(one_key, "levanter")


@pytest.mark.parametrize("to", ["axlearn", "levanter"])
def test_language_model_trainers_refuse_vits(to: str) -> None:
    with pytest.raises(PlanError, match="only its language models"):
        export_plan(PLANS["fsdp"], to)
