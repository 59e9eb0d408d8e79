"""Plan files: what is written reads back, and predicts the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from building import build, decoder, in_groups, plans, renamed, vit
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import PlanError, ShardsimError
from shardsim.files import parse_yaml
from shardsim.machine import parse_machine
from shardsim.machine.chip import SCOPED_VMEM_KIB
from shardsim.plan import dump_plan, load_plan, plan_from_data, plan_to_data, resolve, save_plan
from shardsim.plan.remat import POLICIES, TENSORS, Remat
from shardsim.planner.search import search


@given(plans())
@settings(max_examples=150)
def test_plans_read_back_equal(plan):
    data = plan_to_data(plan)
    assert plan_from_data(data, "memory") == plan
    text = dump_plan(plan)
    assert plan_from_data(parse_yaml(text, "text"), "text") == plan
    # Plain YAML: any other reader finds the same.
    assert yaml.safe_load(text) == data
    assert dump_plan(plan_from_data(parse_yaml(text, "text"), "text")) == text


@given(plans())
def test_plans_read_back_predict_the_same(plan):
    again = plan_from_data(parse_yaml(dump_plan(plan), "text"), "text")
    assert predict(again).to_data() == predict(plan).to_data()
    assert resolve(again) == resolve(plan)


WORDS = st.sampled_from(
    ["off", "no", "y", "null", "true", "nan", "e1", "_1", "on", "x", "dcn", "o"]
)


@given(
    plans(),
    st.lists(WORDS, min_size=6, max_size=6, unique=True),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=30),
    st.sampled_from(["1e9", "275E12", "-1e-3", "1.5e3", "12", "0x1f", "2026-01-01", "~", "a: b"]),
)
def test_awkward_names_survive(plan, words, note, name):
    names = dict(zip("pdfcut", words, strict=True))
    awkward = replace(renamed(plan, names), note=note, name=name)
    assert plan_from_data(parse_yaml(dump_plan(awkward), "text"), "text") == awkward


@given(st.sets(st.sampled_from(TENSORS)), st.sets(st.sampled_from(["layer_input", *TENSORS])))
def test_any_remat_reads_back(save, offload):
    remat = Remat.of(save=frozenset(save - offload), offload=frozenset(offload))
    plan = replace(build(decoder(), "v4:1x1x1", 1, {"data": {}}), remat=remat)
    again = plan_from_data(parse_yaml(dump_plan(plan), "text"), "text")
    assert again.remat == remat


@given(in_groups(plans()))
def test_groups_of_layers_read_back(plan):
    assert plan_from_data(parse_yaml(dump_plan(plan), "text"), "text") == plan
    assert [entry["layers"] for entry in plan_to_data(plan)["remat"]] == [
        group.layers for group in plan.remat.groups
    ]


def test_groups_with_one_policy_are_one_group():
    plan = build(decoder(), "v4:1x1x1", 1, {"data": {}}, remat="save_qkv")
    halves = [{"layers": 3, "save": ["qkv"]}, {"layers": 5, "save": ["qkv"]}]
    again = plan_from_data({**plan_to_data(plan), "remat": halves}, "halves")
    assert again == plan
    assert predict(again).to_data() == predict(plan).to_data()


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ([], "remat: an empty list"),
        (["full"], "remat[0]: expected a group of layers, such as {layers: 2, save: []}"),
        ([{"save": []}], "remat[0]: expected a group of layers"),
        ([{"layers": 0}, {"layers": 8}], "remat[0].layers: must be a positive whole number"),
        ([{"layers": True}], "remat[0].layers: must be a positive whole number, not true"),
        ([{"layers": 8, "kept": []}], "remat[0]: unknown key 'kept'"),
        ([{"layers": 8, "save": ["qvk"]}], "remat[0].save: unknown tensor 'qvk'"),
        ([{"layers": 3}], "remat: its groups have 3 layers, the model has 8"),
        (
            [{"layers": 3}, {"layers": 4, "save": ["qkv"]}],
            "remat: its groups have 7 layers, the model has 8",
        ),
    ],
)
def test_groups_of_layers_that_are_none_say_why(remat, message):
    data = plan_to_data(build(decoder(), "v4:1x1x1", 1, {"data": {}}))
    with pytest.raises(PlanError) as raised:
        plan_from_data({**data, "remat": remat}, "plan")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_groups_are_whole_rounds_of_layers_and_no_stages():
    halves = [{"layers": 3, "save": []}, {"layers": 5, "save": ["qkv"]}]
    model = decoder(windows=(128, 0))
    data = {**plan_to_data(build(model, "v4:1x1x1", 1, {"data": {}})), "remat": halves}
    with pytest.raises(
        PlanError, match=r"remat\[0\]\.layers: .* divides by the 2 of a round, not 3"
    ):
        plan_from_data(data, "plan", model=model)
    stages = plan_to_data(build(decoder(), "v4:2x1x1", 2, {"pipeline": {"x": 2}}, microbatches=2))
    with pytest.raises(PlanError, match="remat: groups of layers are not spread over pipeline"):
        plan_from_data({**stages, "remat": halves}, "plan")


@pytest.mark.parametrize(
    ("slice_name", "model"),
    [
        ("2*v5e:2x2", vit(pooling="map", classes=10)),
        pytest.param("tpu7x:2x2x1", decoder(kv_heads=2), marks=pytest.mark.slow),
        pytest.param("v4:2x2x4", decoder(kv_heads=2), marks=pytest.mark.slow),
        pytest.param("2*h100:8", decoder(kv_heads=2), marks=pytest.mark.slow),
    ],
)
def test_plans_of_the_search_read_back(slice_name, model, tmp_path):
    result = search(model, parse_machine(slice_name), 256, top=4, max_axes=2)
    assert result.predictions
    for index, found in enumerate(result.predictions):
        path = tmp_path / f"{index}.yaml"
        save_plan(found.plan, path)
        plan = load_plan(path)
        assert plan == found.plan
        assert predict(plan).to_data() == found.to_data()


def test_a_mesh_may_leave_its_place_to_the_planner():
    plan = build(vit(), "v5e:4x4", 64, {"fsdp": {"x": 4}, "tensor": {"y": 4}})
    data = plan_to_data(plan)
    data["mesh"] = {"f": 4, "t": 4}
    placed = plan_from_data(data, "short")
    # Both axes of the torus are alike.
    assert predict(placed).step_time_s == predict(plan).step_time_s
    listed = plan_to_data(plan)
    listed["mesh"] = {"f": {"size": 4, "torus": ["x"]}, "t": {"size": 4, "torus": ["y"]}}
    assert plan_from_data(listed, "listed") == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mesh": {"f": 4, "t": 8}}, ["mesh", "32", "16 devices"]),
        ({"mesh": {"f": {"size": 4, "torus": {"x": 4}}, "t": 4}}, ["mesh.t.torus", "missing"]),
        ({"mesh": {"f": {"size": 4, "torus": ["w"]}, "t": {"size": 4, "torus": ["y"]}}}, ["'w'"]),
        ({"mesh": {"f": True, "t": 4}}, ["mesh.f.size"]),
        ({"mesh": {"a b": 16}}, ["letters"]),
        ({"mesh": {}}, ["mesh"]),
        ({"batch": 3}, ["batch", "does not divide by 4"]),
        ({"batch": "many"}, ["batch", "positive whole number"]),
        ({"batch": True}, ["batch"]),
        ({"remat": "ful"}, ["remat", "did you mean 'full'"]),
        ({"remat": {"save": ["qkv"], "offload": ["qkv"]}}, ["both saved and offloaded"]),
        ({"overlap": {"weights": "yes"}}, ["overlap.weights", "true or false"]),
        ({"overlap": {"matmul": "both"}}, ["overlap.matmul", "bidirectional"]),
        ({"precision": {"compute": "bf17"}}, ["precision.compute", "did you mean 'bf16'"]),
        ({"optimizer": "adam"}, ["optimizer", "did you mean 'adamw'"]),
        ({"colour": "red"}, ["unknown key 'colour'"]),
        ({"rules": {"parameters": {"embed": ["g"]}}}, ["rules.parameters.embed", "'g'"]),
        ({"rules": {"parameters": {"emb": ["f"]}}}, ["did you mean 'embed'"]),
        ({"model": "vit-22c"}, ["vit-22"]),
        ({"machine": "v4:3x3"}, ["v4"]),
        ({"compiler_options": ["xla_x"]}, ["compiler_options", "names of options"]),
        ({"compiler_options": {"xla-x": True}}, ["'xla-x' is no option's name"]),
        ({"compiler_options": {"tpu_x": True}}, ["'tpu_x' is no option's name"]),
        ({"compiler_options": {"xla_x": [1]}}, ["compiler_options.xla_x", "a word, not [1]"]),
        ({"compiler_options": {"xla_x": "a b"}}, ["compiler_options.xla_x", "'a b'"]),
        ({"compiler_options": {"xla_x": "a\n"}}, ["compiler_options.xla_x"]),
        ({"precision": {"sparsity": 124}}, ["precision.sparsity", "'2:4'", "here 124"]),
        ({"compiler_options": {"xla_x": None}}, ["compiler_options.xla_x", "null"]),
        ({"compiler_options": {SCOPED_VMEM_KIB: -1}}, [SCOPED_VMEM_KIB, "KiB, not -1"]),
        ({"compiler_options": {SCOPED_VMEM_KIB: 0}}, [SCOPED_VMEM_KIB, "KiB, not 0"]),
        ({"compiler_options": {SCOPED_VMEM_KIB: 1e5}}, [SCOPED_VMEM_KIB, "KiB, not 100000.0"]),
        ({"compiler_options": {SCOPED_VMEM_KIB: True}}, [SCOPED_VMEM_KIB, "KiB, not true"]),
        ({"compiler_options": {SCOPED_VMEM_KIB: "64MiB"}}, [SCOPED_VMEM_KIB, "KiB, not '64MiB'"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change, words):
    plan = build(vit(), "v5e:4x4", 64, {"fsdp": {"x": 4}, "tensor": {"y": 4}})
    with pytest.raises(ShardsimError) as caught:
        plan_from_data(plan_to_data(plan) | change, "my-plan.yaml")
    message = str(caught.value)
    assert message.startswith("my-plan.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_compiler_options_read_back_as_words():
    plan = build(vit(), "v5e:4x4", 64, {"fsdp": {"x": 4}, "tensor": {"y": 4}})
    given = {"compiler_options": {"xla_a": True, "xla_b": 64, "xla_c": "false", "xla_d": 1.5}}
    plan = plan_from_data(plan_to_data(plan) | given, "text")
    assert plan.compiler_options == {
        "xla_a": "true",
        "xla_b": "64",
        "xla_c": "false",
        "xla_d": "1.5",
    }
    assert plan_from_data(parse_yaml(dump_plan(plan), "text"), "text") == plan


def test_a_missing_file_names_the_nearest_plan(tmp_path):
    with pytest.raises(PlanError, match="no such file"):
        load_plan("nothing-of-that-name")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_keep_their_names(policy):
    plan = build(decoder(), "v4:1x1x1", 1, {"data": {}}, remat=policy)
    assert plan_to_data(plan)["remat"] == policy
