"""A MaxText config, imported, planned anew and exported: what a plan changes, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.emit import export_plan
from shardsim.emit.dialects.maxtext_tables import blocks_of
from shardsim.emit.dialects.nearest import told_in
from shardsim.errors import ShardsimError
from shardsim.model import Model
from shardsim.plan import Plan, load_plan, plan_from_data, plan_names
from shardsim.plan.io import plan_to_data
from shardsim.plan.layout import ROLES
from shardsim.plan.resolve import resolve, rules_data
from shardsim.validate.imports import import_config, import_text
from shardsim.validate.round_trip import left_out

MODELS = (
    *("llama2-7b", "llama3.1-70b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "gpt3-175b"),
    *("gemma-2b", "qwen3-4b-thinking-2507", "mixtral-8x7b", "qwen3-30b-a3b"),
)
# A part of the plan -> values that it may have, and the file's keys that say it.
CHOICES: Mapping[str, tuple[list[Any], frozenset[str]]] = {
    "remat": (
        ["full", "save_qkv", "dots", {"offload": ["qkv"]}],
        frozenset({"remat_policy", "query_proj", "key_proj", "value_proj", "out_proj", "mlpwo"})
        | {"mlpwi", "mlpwi_0", "mlpwi_1", "context", "attention_out"},
    ),
    "microbatches": ([1, 2], frozenset({"gradient_accumulation_steps", "per_device_batch_size"})),
    "batch": ([256, 512], frozenset({"per_device_batch_size"})),
    "optimizer": (["adamw", "adamw-bf16-mu", "sgd"], frozenset({"opt_type", "mu_dtype"})),
    "attention": (
        ["flash", "flash-2048", "unfused"],
        frozenset({"attention", "context", "attention_out", *blocks_of("flash-2048")}),
    ),
    "tensor": (
        [1, 2, 4],
        frozenset({"mesh_axes", "data_sharding", "logical_axis_rules"})
        | {"ici_fsdp_parallelism", "ici_tensor_parallelism", "allow_split_physical_axes"},
    ),
}


def changed(plan: Plan, choices: Mapping[str, Any]) -> Plan:
    """Return a plan with other choices."""
    data = plan_to_data(plan)
    data |= {key: value for key, value in choices.items() if key != "tensor"}
    if (tensor := choices["tensor"]) > 1:
        data["mesh"] = {"fsdp": 64 // tensor, "model": tensor}
    else:
        data["mesh"] = {"fsdp": 64}
    data["rules"] = rules_data(data["mesh"])
    return plan_from_data(data, "changed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trips")


def imported(folder: Path, model: str) -> Plan:
    file = folder / "run.sh"
    file.write_text(
        f"python3 -m maxtext.trainers.pre_train.train base.yml model_name={model} "
        "per_device_batch_size=4 max_target_length=2048\n"
    )
    return import_config(str(file), "maxtext", machine="v5p:4x4x4").plan


_DRAWN = st.fixed_dictionaries(
    {key: st.sampled_from(values) for key, (values, _) in CHOICES.items()}
)


@settings(max_examples=15, deadline=None)
@given(model=st.sampled_from(MODELS), one=_DRAWN, other=_DRAWN)
def test_a_file_says_what_the_plan_changes_and_keeps_the_rest(
    model: str, one: dict[str, Any], other: dict[str, Any], folder: Path
) -> None:
    first = imported(folder, model)
    plans = [changed(first, choices) for choices in (one, other)]
    texts = [export_plan(plan, "maxtext") for plan in plans]
    before, after = (yaml.safe_load(text) for text in texts)
    moved = {key for key in before.keys() | after if before.get(key) != after.get(key)}
    may = {"compile_xla_flags"}.union(
        *(keys for key, (_, keys) in CHOICES.items() if one[key] != other[key])
    )
    assert moved - may == set()
    for plan, text in zip(plans, texts, strict=True):
        file = folder / "plan.yml"
        file.write_text(text)
        found = import_config(str(file), "maxtext").plan
        for key in ("machine", "batch", "sequence", "mesh", "remat", "microbatches", "optimizer"):
            assert getattr(found, key) == getattr(plan, key), key
        assert (found.attention, found.precision) == (plan.attention, plan.precision)
        assert found.model.parameters_all == plan.model.parameters_all
        assert (found.model.qk_norm, found.model.biases) == (plan.model.qk_norm, plan.model.biases)
        assert found.model.experts == plan.model.experts


_ANY = {
    "overlap": st.fixed_dictionaries(
        {
            "matmul": st.sampled_from(["off", "unidirectional", "bidirectional"]),
            **dict.fromkeys(("weights", "gradients", "dcn"), st.booleans()),
        }
    ),
    "precision": st.fixed_dictionaries(
        {key: st.sampled_from(["bf16", "f32"]) for key in ("compute", "parameters", "reduce")}
    ),
    "attention": st.sampled_from(["flash", "flash-2023", "flash-2048", "unfused"]),
    "optimizer": st.sampled_from(["adamw", "adamw-bf16-mu", "sgd", "adafactor"]),
    "remat": st.sampled_from(["full", "none", "dots", {"save": ["context", "statistics"]}]),
    "context": st.sampled_from([{}, {"order": "striped"}]),
    "compiler_options": st.sampled_from([{}, {"xla_tpu_scoped_vmem_limit_kib": 16384}]),
    "execution": st.sampled_from(["explicit", "partitioned"]),
    "microbatches": st.sampled_from([1, 2]),
    "sequence": st.sampled_from([1024, 2048]),
    "mesh": st.sampled_from([{"fsdp": 64}, {"fsdp": 16, "model": 4}, {"fsdp": 16, "context": 4}]),
    "machine": st.sampled_from(["v4:4x4x4", "v5e:8x8", "v5p:4x4x4"]),
    "model": st.sampled_from(["llama2-7b", "qwen3-8b", "gpt3-175b", "mixtral-8x7b"]),
}


def _leaves(data: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        inside = isinstance(value, Mapping) and key not in ("mesh", "rules", "model")
        found |= _leaves(value, f"{start}{key}.") if inside else {start + key: value}
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.fixed_dictionaries(_ANY), form=st.sampled_from(["maxtext", "levanter"]))
def test_what_an_export_does_not_carry_is_said(data: dict[str, Any], form: str) -> None:
    try:
        plan = plan_from_data({**data, "batch": 256, "rules": rules_data(data["mesh"])}, "drawn")
        text = export_plan(plan, form)
    except ShardsimError:
        return
    left = {item.key for item in left_out(plan, text, form)}
    found = import_text(Path("plan.yml"), text, form, machine=plan.machine.name).plan
    one, other = _leaves(plan_to_data(plan)), _leaves(plan_to_data(found))
    changed = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    told = {line.strip().partition(":")[0] for line in told_in(text)} | left
    # Other words for the same, or compared below.
    apart = {"name", "model", "mesh", "rules", "context.order"}
    assert "context.order" in told or resolve(found).striped == resolve(plan).striped
    own = "model" in left
    apart |= {"sequence"} if own else set()
    assert {key for key in changed - apart if not {key, key.partition(".")[0]} & told} == set()
    assert own or found.model.parameters_all == plan.model.parameters_all or "vocab" in told


def test_a_trainer_gathers_over_a_whole_slice_what_exported_code_reduces(folder: Path) -> None:
    """Experts with a context axis: the import's price as emitted is not MaxText's."""
    file = folder / "experts.sh"
    file.write_text(
        "python3 -m maxtext.trainers.pre_train.train base.yml model_name=mixtral-8x7b "
        "per_device_batch_size=1 max_target_length=4096 ici_context_parallelism=4\n"
    )
    plan = import_config(str(file), "maxtext", machine="v5p:4x4x4").plan
    sent = {
        name: {
            item.kind: item.bytes_per_chip
            for item in predict(plan, implementation=name).collectives
            if item.mesh_axes == ("fsdp", "context")
        }
        for name in ("emitted", "trainer")
    }
    shards = sent["trainer"]["all-gather"]
    assert "all-gather" not in sent["emitted"]
    again = sent["emitted"]["all-reduce"] - sent["trainer"]["all-reduce"]
    assert again == pytest.approx(2 * shards, rel=1e-3)


def test_maxtext_brings_a_plans_overlap_back() -> None:
    for switches in (
        {"matmul": "off", "weights": True},
        {"matmul": "unidirectional", "weights": False},
        {"matmul": "bidirectional", "weights": True},
    ):
        data = {"model": "llama2-7b", "machine": "v4:4x4x4", "batch": 256, "mesh": {"fsdp": 64}}
        data |= {"rules": rules_data(["fsdp"]), "overlap": {**switches, "gradients": False}}
        plan = plan_from_data(data, "drawn")
        text = export_plan(plan, "maxtext")
        assert import_text(Path("plan.yml"), text, "maxtext").plan.overlap == plan.overlap


HOLDS = ("machine", "batch", "sequence", "microbatches", "remat", "optimizer")
TRAINED = ("maxtext", "levanter", "big_vision")
THEIRS = {"maxtext": "maxtext-", "big_vision": "vit-22b-published-"}


@pytest.mark.parametrize("name", plan_names())
def test_a_shipped_plan_comes_back_from_the_trainers_that_hold_it(name: str) -> None:
    plan = load_plan(name)
    for form in TRAINED:
        try:
            text = export_plan(plan, form)
        except ShardsimError:
            assert not name.startswith(THEIRS.get(form, "-"))
            continue
        if form == "levanter" and "\n  type: " not in text:  # the model's section is the user's
            assert [item.key for item in left_out(plan, text, form)].count("model") == 1
            continue
        found = import_text(Path("plan.py"), text, form, machine=plan.machine.name).plan
        told = {line.strip().partition(":")[0].partition(".")[0] for line in told_in(text)}
        for key in HOLDS:
            assert key in told or getattr(found, key) == getattr(plan, key), (form, key)
        one, other = resolve(plan), resolve(found)
        for role in ROLES:
            assert one.role(role) == other.role(role), (form, role)
        assert one.optimizer_over_data == other.optimizer_over_data
        if not told & {field.name for field in fields(Model)}:
            assert found.model.parameters_all == plan.model.parameters_all, form


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("max_target_length=8192.5", "max_target_length: expected a whole number, found 8192.5"),
        ("ici_fsdp_parallelism=-2", "ici_fsdp_parallelism: must be positive and below 10^18"),
        ("ici_fsdp_parallelism=2.5", "ici_fsdp_parallelism: expected a whole number, found 2.5"),
        ("ici_expert_parallelism=4", "ici_expert_parallelism: llama2-7b has no experts"),
    ],
)
def test_a_refusal_names_the_trainers_own_key(folder: Path, words: str, message: str) -> None:
    file = folder / "refused.sh"
    file.write_text(
        "python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b "
        f"per_device_batch_size=4 {words}\n"
    )
    with pytest.raises(ShardsimError) as caught:
        import_config(str(file), "maxtext", machine="v5p:4x4x4")
    assert str(caught.value).startswith(f"{file}: {message}")
