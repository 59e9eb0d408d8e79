"""Experts on a mesh: what moves, what is computed, what is held, against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import MIXTURES, build, decoder, plans, quiet, sent
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import Prediction, predict
from shardsim.emit import FORMS, export_plan
from shardsim.emit.specs import described
from shardsim.errors import PlanError
from shardsim.files import parse_yaml
from shardsim.model import Experts, Model
from shardsim.plan import Overlap, Plan, resolve
from shardsim.plan.io import plan_from_data, plan_to_data
from shardsim.plan.legality import check
from shardsim.plan.plan import Routing
from shardsim.plan.split import stored_elements
from shardsim.program.partition import partition
from shardsim.program.passes import implemented
from shardsim.program.schedule import Move, Work
from shardsim.program.shapes import Workload
from shardsim.simulate import simulate_plan

WHERE = {"fsdp": {"x": 4}, "expert": {"y": 4}}
BATCH, LAYERS, EMBED, TOKENS, MLP, TOP = 64, 8, 1024, 512, 1024, 2


def mixture(**experts: Any) -> Model:
    return decoder(experts=Experts(**({"number": 16, "top_k": TOP, "mlp": MLP} | experts)))


def plan_of(model: Model, where: dict[str, dict[str, int]] = WHERE, **options: Any) -> Plan:
    options.setdefault("residual", "")
    return build(model, "v5e:4x4", BATCH, where, **options)


def tasks(plan: Plan, phase: str = "", made: str = "ideal") -> list[tuple[Any, float]]:
    """Return what is planned of the layers, or made of it, each with how often a layer does it."""
    layout = resolve(plan)
    program = implemented(partition(Workload.of(plan), layout), made, plan.machine, layout)
    return [
        (task, float(task.count))
        for block in program.blocks
        if block.phase in ("forward", "backward") and phase in block.phase
        for task in block.tasks
        if float(getattr(task, "count", 0))
    ]


def moves(plan: Plan, role: str, phase: str = "") -> dict[str, list[float]]:
    """Return by kind the bytes of each move of activations over a role."""
    found: dict[str, list[float]] = {}
    for task, count in tasks(plan, phase):
        if isinstance(task, Move) and task.role == role and task.moves == "activations":
            found.setdefault(task.kind, []).extend([float(task.bytes)] * round(count))
    return found


def flops(plan: Plan, name: str, made: str = "ideal") -> float:
    return sum(
        float(task.flops) * count
        for task, count in tasks(plan, made=made)
        if isinstance(task, Work) and name in task.name
    )


LOCAL = BATCH * TOKENS / 16  # tokens of a device


@pytest.mark.parametrize(("remat", "many"), [("none", 4), ("full", 6)])
@pytest.mark.parametrize("factor", [0.0, 1.0, 1.25])
def test_tokens_are_exchanged_there_and_back(remat: str, many: int, factor: float) -> None:
    plan = plan_of(mixture(capacity=factor), remat=remat)
    size = 2 * (factor or 1.0) * TOP * LOCAL * EMBED
    # With sorted copies goes which expert each is for, in four bytes.
    names = [] if factor else [4 * TOP * LOCAL] * (2 if remat == "full" else 1)
    found = moves(plan, "expert")
    assert {kind: sorted(sizes) for kind, sizes in found.items()} == {
        "all-to-all": names + [size] * many
    }
    moved = next(use for use in predict(plan).collectives if use.kind == "all-to-all")
    total = LAYERS * (many * size + sum(names)) * 3 / 4
    assert moved.bytes_per_chip == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("factor", [0.0, 1.25])
def test_a_ring_of_experts_gathers_tokens_and_scatters_sums(factor: float) -> None:
    plan = plan_of(mixture(capacity=factor), remat="none", experts=Routing(exchange="ring"))
    tokens, chances = 2 * 4 * LOCAL * EMBED, 2 * 4 * LOCAL * TOP
    choices = 2 * chances  # of four bytes each
    assert moves(plan, "expert", "forward") == {
        "all-gather": [chances, choices, tokens],
        "reduce-scatter": [tokens],
    }
    back = moves(plan, "expert", "backward")
    assert back["reduce-scatter"].count(tokens) == 1
    # The gradient of the sum; of chances what only products with masks do not read again.
    assert back["all-gather"].count(tokens) == 1
    assert sum(back["all-gather"]) - tokens <= chances + choices


def test_a_tensor_axis_inside_experts_gathers_tokens_and_scatters_copies() -> None:
    where = {"fsdp": {"x": 4}, "tensor": {"y": 4}}
    plan = plan_of(mixture(), where, remat="none", residual="embed")
    local = BATCH * TOKENS / 4
    copies = 2 * TOP * local * EMBED
    forward, back = moves(plan, "tensor", "forward"), moves(plan, "tensor", "backward")
    assert forward["reduce-scatter"].count(copies) == 1  # what experts make
    assert copies / TOP in forward["all-gather"]  # tokens, as for any MLP
    assert back["all-gather"].count(copies) == 1  # the gradient of what they make
    assert "all-to-all" not in forward | back


def test_gradients_of_experts_are_summed_over_devices_with_the_same_experts() -> None:
    where = {"data": {"x": 4}, "expert": {"y": 4}}
    plan = plan_of(mixture(), where)
    program = partition(Workload.of(plan), resolve(plan))
    sums = {
        task.role.removesuffix("+context"): float(task.bytes)
        for block in program.blocks
        if block.name == "gradient reduction"
        for task in block.tasks
        if isinstance(task, Move) and float(task.count) and task.stage == "torus"
    }
    attention, router = 4 * EMBED**2, EMBED * 16
    assert sums == {
        "data": pytest.approx(2 * 16 / 4 * 2 * EMBED * MLP),
        "data+expert": pytest.approx(2 * (attention + router)),
    }


@given(st.sampled_from([0.0, 1.0, 1.25, 2.0]), st.sampled_from([0, 64, 128, 512]), st.booleans())
def test_dispatch_is_work_that_only_hfu_counts(factor: float, group: int, gated: bool) -> None:
    model = replace(mixture(capacity=factor, group=group if factor else 0), gated_mlp=gated)
    plan = plan_of(model, remat="none")
    matrices = 3 if gated else 2
    rows = BATCH * TOKENS * TOP / 16
    if factor:
        # 2 S_g E C D a group and product, C = cf k S_g / E; forward once, then the gradient of
        # tokens, and of what experts make and of the shares.
        one = 2 * LOCAL * factor * TOP * (group or TOKENS) * EMBED
        assert flops(plan, "copies") == pytest.approx(2 * one)
        assert flops(plan, "sum of experts") + flops(plan, "shares") >= 3 * one * (1 - 1e-9)
        worked = rows * factor
    else:
        each = rows / (16 / 4)
        worked = rows + 16 / 4 * (128 if each < 1024 else 256 if each < 2048 else 512)
    experts = 3 * 2 * matrices * EMBED * MLP
    assert flops(plan, "expert_") == pytest.approx(rows * (factor or 1.0) * experts)
    assert flops(plan, "expert_", "emitted") == pytest.approx(worked * experts)
    counted = replace(model, experts=replace(model.experts, capacity=0.0, group=0))
    one, other = predict(plan), predict(plan_of(counted, remat="none"))
    assert one.mfu * one.step_time_s == pytest.approx(other.mfu * other.step_time_s, rel=1e-12)


@pytest.mark.parametrize(("top", "registers"), [(1, 0), (2, 1), (8, 1), (10, 2)])
def test_copies_of_a_token_side_by_side_fill_whole_registers(top: int, registers: int) -> None:
    """A register has eight sublanes: for a library two copies of a token take as long to add as
    eight; apart from each other each is read once."""
    plan = plan_of(mixture(top_k=top), {"fsdp": {"x": 4, "y": 4}})
    results = BATCH / 16 * TOKENS * EMBED * 2
    for phase, more in (("forward", (4.1, 3.4)), ("backward", (11.8, 2.9))):
        found = {task.name: task for task, _ in tasks(plan, phase) if isinstance(task, Work)}
        gradient = " gradient" if phase == "backward" else ""
        copies, added = (found[name + gradient] for name in ("copies", "sum of experts"))
        assert copies.beside_bytes == pytest.approx(more[0] * 8 * registers * results)
        assert added.beside_bytes == pytest.approx(more[1] * 8 * registers * results)
    assert found["copies gradient"].hbm_bytes == pytest.approx(3 * top * results)


def test_libraries_exchange_parts_of_embed() -> None:
    """Over a tensor axis of four a quarter of what goes to experts is exchanged, gathered there;
    back its sums are scattered before."""
    plan = build(mixture(), "v5e:4x4", BATCH, {"expert": {"x": 4}, "tensor": {"y": 4}})
    sent = {
        (name, use.kind, use.mesh_axes): use.bytes_per_chip
        for name in ("emitted", "trainer")
        for use in predict(plan, implementation=name).collectives
        if use.purpose == "activations"
    }
    copies = LAYERS * BATCH / 4 * TOKENS * TOP * EMBED * 2 * 3 / 4  # of them one of four stays
    fewer = [sent[name, "all-to-all", ("e",)] for name in ("emitted", "trainer")]
    assert fewer[0] - fewer[1] == pytest.approx(3 * copies * 3 / 4)
    more = [sent[name, "reduce-scatter", ("t",)] for name in ("trainer", "emitted")]
    assert more[0] - more[1] == pytest.approx(copies)


def test_only_an_expert_axis_feels_imbalance() -> None:
    even, uneven = Routing(), Routing(imbalance=1.5)
    for where, slower in ((WHERE, True), ({"fsdp": {"x": 4, "y": 4}}, False)):
        one, other = (plan_of(mixture(), where, experts=routing) for routing in (even, uneven))
        assert (predict(other).step_time_s > predict(one).step_time_s) == slower
        assert (predict(other).hbm["peak_bytes"] > predict(one).hbm["peak_bytes"]) == slower
    sizes = [moves(plan_of(mixture(), experts=r), "expert")["all-to-all"] for r in (even, uneven)]
    assert sizes[1] == [1.5 * size for size in sizes[0]]
    padded = moves(plan_of(mixture(), experts=Routing(padding=1.25)), "expert")["all-to-all"]
    assert padded == [1.25 * size for size in sizes[0]]
    places = plan_of(mixture(capacity=1.25), experts=uneven)
    fixed = plan_of(mixture(capacity=1.25))
    assert predict(places).step_time_s == predict(fixed).step_time_s


@given(plans(models=MIXTURES))
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_a_device_holds_its_part_of_every_weight(plan: Plan) -> None:
    layout = resolve(plan)
    size = {role: int(layout.role(role).size) for role in layout.names}
    gather = size["fsdp"] * (size["context"] if layout.context_shards_parameters else 1)
    dense = gather * (size["expert"] if layout.spread.shards else 1)
    total = 0.0
    for tensor in plan.model.tensors:
        stages = size["pipeline"] if tensor.part == "block" else 1
        experts = "expert" in tensor.axes
        by = stages * (size["expert"] if experts else 1)
        if {"heads", "mlp", "vocab"} & {*tensor.axes}:
            by *= size["tensor"]
        if "kv_heads" in tensor.axes:
            heads = plan.model.kv_heads
            by *= size["tensor"] if heads % size["tensor"] == 0 else 1
        if tensor.kind != "vector" and "embed" in tensor.axes:
            by *= size["tensor2"] * (gather if experts else dense)
        total += tensor.size / by
    assert stored_elements(plan.model.tensors, layout) == pytest.approx(total, rel=1e-12)


@given(plans(models=MIXTURES, machines=("v4:2x2x4", "v4:4x4x4", "v5e:4x4", "2*v4:2x2x4")))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_events_run_experts_as_the_closed_form_does(plan: Plan) -> None:
    assume(int(resolve(plan).pipeline.size) == 1)
    plan = replace(plan, model=replace(plan.model, layers=4))
    closed, found = quiet(plan), simulate_plan(plan)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)
    assert sent(found) == pytest.approx(sent(closed), rel=1e-9)


@given(plans(models=MIXTURES))
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_a_plan_file_says_all_of_it(plan: Plan) -> None:
    assert plan_from_data(plan_to_data(plan), "again", plan.name) == plan


def figures(found: Prediction) -> tuple[float, float]:
    return found.step_time_s, found.hbm["peak_bytes"]


def test_which_dimension_of_experts_fsdp_splits_costs_nothing() -> None:
    where = {"fsdp": {"x": 4, "y": 4}}
    embed, expert = (plan_of(mixture(), where, by_expert=on) for on in (False, True))
    assert figures(predict(expert)) == pytest.approx(figures(predict(embed)), rel=1e-9)


def test_dense_layers_in_front_cost_what_they_cost_alone() -> None:
    quiet = {"overlap": Overlap(weights=False, gradients=False), "remat": "none"}
    both = decoder(layers=8, experts=Experts(number=16, top_k=2, mlp=MLP, dense_layers=3))
    mixed = replace(both, experts=replace(both.experts, dense_layers=0))
    dense = replace(both, experts=None)

    def layers(model: Model, many: int) -> float:
        """Return the seconds of so many layers."""
        a, b = (
            predict(plan_of(replace(model, layers=n), WHERE if model.experts else FSDP, **quiet))
            for n in (many, 2 * many)
        )
        return b.step_time_s - a.step_time_s

    FSDP = {"fsdp": {"x": 4, "y": 4}}
    whole = predict(plan_of(both, FSDP, **quiet)).step_time_s
    parts = [
        predict(plan_of(replace(model, layers=n), FSDP, **quiet)).step_time_s
        for model, n in ((dense, 3), (mixed, 5))
    ]
    ends = predict(plan_of(replace(dense, layers=1), FSDP, **quiet)).step_time_s
    two = predict(plan_of(replace(dense, layers=2), FSDP, **quiet)).step_time_s
    assert whole == pytest.approx(sum(parts) - (2 * ends - two), rel=2e-3)


@pytest.mark.parametrize(
    ("model", "where", "options", "words"),
    [
        (
            mixture(number=6),
            WHERE,
            {},
            "mesh: experts over the expert axis: 6 does not divide by 4; the nearest axis that "
            "does: 3",
        ),
        (
            mixture(capacity=1.0, group=96),
            WHERE,
            {},
            "sequence: 512 tokens are not whole groups of 96 (experts.group); the nearest that do:"
            " 480 and 576",
        ),
        (
            decoder(experts=Experts(number=4, top_k=1, mlp=512, dense_layers=2)),
            {"pipeline": {"x": 4}, "fsdp": {"y": 4}},
            {"microbatches": 4},
            "mesh: dense layers in front of those with experts are not spread over pipeline stages",
        ),
        (
            mixture(),
            {"fsdp": {"x": 4, "y": 4}},
            {"experts": Routing(exchange="ring")},
            "a ring needs",
        ),
        (decoder(), {"fsdp": {"x": 4, "y": 4}}, {"experts": Routing(imbalance=2.0)}, "has none"),
        (
            mixture(),
            WHERE,
            {"experts": Routing(imbalance=0.5)},
            "experts.imbalance: must be a number",
        ),
        (decoder(), WHERE, {}, "small-decoder has no experts; leave it out"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    model: Model, where: dict[str, dict[str, int]], options: dict[str, Any], words: str
) -> None:
    def checked() -> None:
        plan = plan_of(model, where, **options)
        check(plan, resolve(plan))

    with pytest.raises(PlanError) as caught:
        checked()
    assert words in str(caught.value)


def test_what_plans_alone_need_stays_out_of_an_emitted_step() -> None:
    plan = plan_of(mixture(), {"fsdp": {"x": 4, "y": 4}})
    assert "Stream(" not in export_plan(plan, "jax")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_no_export_leaves_experts_out(form: str) -> None:
    if form == "specs":
        code = export_plan(plan_of(mixture()), form)
        assert "'expert_in', [16, 1024, 1024], [['e']" in code
        return
    if form in ("json", "yaml"):
        data = parse_yaml(export_plan(plan_of(mixture()), form), form)
        assert data["parameters"]["expert_in"]["shape"][1:] == [16, 1024, 1024]
        assert data["no_program"].startswith("experts.padding: ")
        assert "no_program" not in described(plan_of(mixture(), experts=Routing(padding=2.0)))
        return
    with pytest.raises(PlanError, match="experts"):
        export_plan(plan_of(mixture()), form)
