"""Plan files: what is written reads back, and predicts the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from building import build, decoder, plans, renamed, vit
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import PlanError, ShardsimError
from shardsim.files import parse_yaml
from shardsim.machine import parse_machine
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
    result = search(model, parse_machine(slice_name), 256, top=10, max_axes=2)
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
        ({"compiler_options": {"xla_x": None}}, ["compiler_options.xla_x", "None"]),
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
