"""The search against plans enumerated and priced one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from building import ALIKE_KEYS, decoder, plain_chip, vit

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import predict
from shardsim.cost.price import step_time_s
from shardsim.machine import Machine, override_chip, parse_machine
from shardsim.model import Experts, Model, load_model
from shardsim.plan import MeshAxis, Overlap, Plan, Remat, plan_from_data, plan_names, resolve
from shardsim.plan.io import as_plan, plan_to_data
from shardsim.plan.plan import Context
from shardsim.plan.remat import OFFLOADS, POLICIES
from shardsim.planner.attention import default_attention
from shardsim.planner.found import SearchResult, plan_at
from shardsim.planner.rank import Ranking
from shardsim.planner.search import search
from shardsim.planner.space import MICROBATCHES, Part, legal_cells, parts
from shardsim.program.holds import held_by
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.shapes import Workload

CLOSE = 1e-12
REMATS = {name: Remat.of(save=save) for name, save in POLICIES.items()}
REMATS |= {one.name: Remat((one,)) for one in OFFLOADS}


def workload(model: Model, batch: int) -> Workload:
    return Workload(
        model=model,
        batch=batch,
        sequence=model.sequence,
        longest=model.sequence,
        attention=default_attention(model, model.sequence),
    )


def compare(
    work: Workload,
    machine: Machine,
    part: Part,
    rng: np.random.Generator,
    pairs: int,
    plans: int | None,
    costs: str = "physical",
) -> int:
    """Compare the price of `pairs` meshes at once with `plans` of their plans one by one."""
    chosen = np.sort(rng.choice(part.pairs, size=min(pairs, part.pairs), replace=False))
    some = part.take(chosen)
    layout = some.layout()
    prefetch = rng.random(some.shape) < 0.5
    layout = layout.reshaped(weights_overlap=prefetch)
    program = implemented(partition(work, layout), USUAL[costs], machine, layout)
    took_s = step_time_s(machine, layout, overlap(program, layout), costs_of(costs, machine.chip))
    step_s = np.broadcast_to(took_s, some.shape)
    use = hbm_use(machine, work, layout, held_by(USUAL[costs], machine.chip))
    peak = np.broadcast_to(use.peak_bytes, some.shape)
    fits = np.broadcast_to(use.fits, some.shape)
    mask, _ = legal_cells(some, layout, work.model, work.batch, work.sequence)
    cells = np.argwhere(mask)
    if plans is not None and len(cells) > plans:
        cells = cells[rng.choice(len(cells), size=plans, replace=False)]
    for row, remat, option in cells.tolist():
        cell = (row, remat, option)
        plan = plan_at(work, costs, machine, some, cell, bool(prefetch[cell]))
        one = predict(plan)
        if not one.use.recomputed:  # a search offers none that is, and prices what is kept as such
            assert one.step_time_s == pytest.approx(float(step_s[cell]), rel=CLOSE), plan.name
        assert one.hbm["peak_bytes"] == pytest.approx(float(peak[cell]), rel=CLOSE), plan.name
        assert one.fits == bool(fits[cell])
    return len(cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slice_name", "batch", "costs"),
    [("llama2-70b", "2*v5p:8x8x8", 2048, "physical"), ("vit-22b", "v4:8x8x16", 65536, "compiler")],
)
def test_the_whole_grid_is_priced_as_each_plan(name, slice_name, batch, costs):
    model, machine = load_model(name), parse_machine(slice_name)
    work = workload(model, batch)
    rng = np.random.default_rng(22)
    found = [
        part.spread()[0]
        for part in parts(model, [machine], batch, model.sequence, attention=work.attention)
    ]
    space = sum(np.prod(part.shape) for part in found)
    assert space > 1_000_000
    each = -(-160 // len(found))
    compared = sum(compare(work, machine, part, rng, 30, each, costs) for part in found)
    assert compared >= 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "slice_name", "each", "costs"),
    [
        (decoder(kv_heads=2, layers=4), "v5e:2x2", 10, "physical"),
        (vit(layers=4), "2*v4:1x2x1", 30, "physical"),
        (
            decoder(layers=4, experts=Experts(number=8, top_k=4, mlp=512)),
            "v5e:2x2",
            10,
            "calibrated",
        ),
    ],
)
def test_plans_of_a_small_space_are_priced_as_alone(model, slice_name, each, costs):
    machine = parse_machine(slice_name)
    work = workload(model, 4)
    rng = np.random.default_rng(4)
    found = [
        part.spread()[0]
        for part in parts(model, [machine], 4, model.sequence, attention=work.attention)
    ]
    compared = sum(compare(work, machine, part, rng, part.pairs, each, costs) for part in found)
    assert compared > 80


# The same space, enumerated the slow way.

ROLES = ("p", "d", "f", "c", "u", "t")


def shares(length: int) -> list[dict[str, int]]:
    """Return the ways to give an axis to one role, or to two (the later one inside)."""
    if length == 1:
        return [{}]
    ways = [{role: length} for role in ROLES]
    for outer, inner in product(ROLES, ROLES):
        if ROLES.index(outer) < ROLES.index(inner):
            for size in range(2, length):
                if length % size == 0:
                    ways.append({outer: length // size, inner: size})
    return ways


def meshes(machine: Machine, max_roles: int = 3) -> list[dict[str, dict[str, int]]]:
    """Return role -> torus axis -> factor for every mesh, alike axes exchanged only once."""
    seen = set()
    result = []
    for combination in product(*(shares(axis.length) for axis in machine.axes)):
        used = {role for share in combination for role in share}
        if len(used) > max_roles:
            continue
        form = tuple(
            sorted(
                (axis.length, axis.wrapped, tuple(sorted(share.items())))
                for axis, share in zip(machine.axes, combination, strict=True)
            )
        )
        if form in seen:
            continue
        seen.add(form)
        for over in ["d", "f", "p"] if machine.slices > 1 else [None]:
            mesh: dict[str, dict[str, int]] = {}
            if over is not None:
                mesh.setdefault(over, {})["dcn"] = machine.slices
            for axis, share in zip(machine.axes, combination, strict=True):
                for role, factor in share.items():
                    mesh.setdefault(role, {})[axis.name] = factor
            result.append(mesh)
    return result


@dataclass(frozen=True)
class Choice:
    """One plan, apart from model, machine and batch."""

    mesh: dict[str, dict[str, int]]
    microbatches: int
    remat: str
    residual: str
    matmul: str
    over_data: bool
    context_shards: bool
    prefetch: bool
    keys: str = "gathered"

    def striped(self, work: Workload) -> bool:
        """Return whether members of the context axis have two parts of the tokens each."""
        members = int(np.prod(list(self.mesh.get("c", {}).values())))
        if not work.model.causal or self.keys == "ulysses" or work.sequence % (2 * members):
            return False
        part = work.sequence // members
        return members > 1 and (part % 256 == 0 or part % 128 != 0)

    def plan(self, work: Workload, machine: Machine) -> Plan:
        """Return it as a plan, its rules written from what the roles mean."""
        axes = [
            MeshAxis(name=role, size=int(np.prod(list(torus.values()))), torus=torus)
            for role, torus in ((role, self.mesh.get(role, {})) for role in ROLES)
            if torus
        ]

        def named(*roles: str) -> tuple[str, ...]:
            return tuple(role for role in roles if role in self.mesh)

        wide = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), named("t"))
        on_t = {kind: named("t") if self.residual == kind else () for kind in ("seq", "embed")}
        context = named("c") if self.context_shards else ()
        parameters = {**wide, "embed": named("f") + context + named("u"), "layers": named("p")}
        activations = {
            **wide,
            "batch": named("d", "f"),
            "seq": named("c") + on_t["seq"],
            "embed": named("u") + on_t["embed"],
        }
        return Plan(
            name="choice",
            model=work.model,
            machine=machine,
            batch=work.batch,
            sequence=work.sequence,
            mesh=tuple(axes),
            parameters=parameters,
            activations=activations,
            optimizer_rules={"embed": ("d",)} if self.over_data else {},
            remat=REMATS[self.remat],
            microbatches=self.microbatches,
            overlap=Overlap(matmul=self.matmul, weights=self.prefetch, gradients=False),
            attention=work.attention,
            context=Context(
                keys=self.keys, order="striped" if self.striped(work) else "contiguous"
            ),
            fused_projections=work.fused_projections,
        )


def divides(work: Workload, choice: Choice) -> bool:
    """Return whether every dimension divides by what splits it, written out."""
    size = {role: int(np.prod(list(choice.mesh.get(role, {}).values()))) for role in ROLES}
    model = work.model
    inner = size["t"] * size["u"]
    left = model.kv_heads // min(size["t"], model.kv_heads)
    left //= min(size["u"], left)
    heads = inner * (size["c"] if choice.keys == "ulysses" else 1)
    shared = min(size["c"], left) if choice.keys == "ulysses" else 1
    gather = size["f"] * (size["c"] if choice.context_shards else 1)
    tokens = size["c"] * (size["t"] if choice.residual == "seq" else 1)
    embed = size["u"] * (size["t"] if choice.residual == "embed" else 1)
    return not (
        work.batch % (size["d"] * size["f"] * choice.microbatches)
        or work.sequence % tokens
        or model.heads % heads
        or left % shared
        or size["c"] % shared
        or model.mlp % inner
        or model.kv_heads % min(size["t"], model.kv_heads)
        or model.embed % (gather * size["u"])
        or model.embed % embed
        or model.layers % size["p"]
        or choice.microbatches < size["p"]
        or (choice.matmul == "bidirectional" and size["t"] % 4)  # the same as unidirectional
    )


def choices(work: Workload, machine: Machine) -> Iterator[Choice]:
    """Yield every legal plan, one by one."""
    fetched = "layer_input" if work.model.parallel_block else ""  # what none of them offloads
    remats = [key for key, one in REMATS.items() if fetched not in one.groups[0].offload]
    for mesh in meshes(machine):
        splits = ["", "seq", "embed"] if "t" in mesh else [""]
        for microbatches, residual in product(MICROBATCHES, splits):
            for matmul in ["off", "unidirectional", "bidirectional"] if residual else ["off"]:
                for over_data in [False, True] if "d" in mesh else [False]:
                    for context in [False, True] if "c" in mesh else [False]:
                        gathers = "f" in mesh or context
                        prefetches = [False, True] if gathers else [False]
                        for keys in ways(work, mesh, microbatches):
                            # What divides asks nothing of remat and of prefetches.
                            made = [
                                Choice(
                                    mesh, microbatches, remat, residual, matmul,
                                    over_data, context, prefetch, keys,
                                )
                                for remat, prefetch in product(remats, prefetches)
                            ]  # fmt: skip
                            if divides(work, made[0]):
                                yield from made


def ways(work: Workload, mesh: dict[str, dict[str, int]], microbatches: int) -> tuple[str, ...]:
    """Return the ways in which keys reach other members of a context axis, if there are too few
    sequences to split over it as well."""
    sizes = [np.prod(list(mesh.get(role, {}).values())) for role in ("d", "f", "c")]
    needed = work.batch < int(np.prod(sizes)) * microbatches
    other = "c" in mesh and needed and work.attention == "flash"
    return ALIKE_KEYS if other else ALIKE_KEYS[:1]


@pytest.mark.parametrize(
    ("model", "slice_name", "batch"),
    [
        pytest.param(decoder(kv_heads=2, layers=2), "v5e:2x4", 8, marks=pytest.mark.slow),
        pytest.param(
            decoder(layers=6, heads=6, head_dim=64, kv_heads=3, embed=384, mlp=1536),
            "v4:2x2x2",
            12,
            marks=pytest.mark.slow,
        ),
        (vit(layers=4), "v4:2x2x1", 4),
        pytest.param(
            vit(layers=4, pooling="cls", sequence=257), "2*v5e:2x2", 8, marks=pytest.mark.slow
        ),
        pytest.param(
            decoder(embed=1000, heads=10, head_dim=100, kv_heads=10, mlp=4000),
            "v4:2x2x2",
            3,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gqa", "six", "vit", "odd-sequence", "thousand"],
)
def test_searched_counts_every_legal_plan(model, slice_name, batch):
    machine = parse_machine(slice_name)
    work = workload(model, batch)
    expected = sum(1 for _ in choices(work, machine))
    assert expected > 100
    assert search(model, machine, batch, attention=work.attention, top=1).searched == expected


def tight(slice_name: str, gigabytes: float) -> Machine:
    """Return a slice whose chips have little memory."""
    machine = parse_machine(slice_name)
    return replace(machine, chip=override_chip(machine.chip, {"hbm_bytes": gigabytes * 1e9}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "machine", "batch"),
    [
        (decoder(kv_heads=1, layers=2, vocab=512), tight("v4:1x2x1", 0.23), 2),
        (vit(layers=2), tight("v5e:2x2", 0.2), 1),
        (decoder(layers=1, vocab=512), tight("2*v4:1x2x1", 0.12), 2),
        pytest.param(
            decoder(kv_heads=2, layers=2, vocab=512),
            tight("v4:2x2x1", 0.22),
            2,
            marks=pytest.mark.deep,
        ),
    ],
    ids=["decoder", "vit", "slices", "four chips"],
)
def test_the_best_plan_is_the_best_of_all(model, machine, batch):
    work = workload(model, batch)
    best = np.inf
    least = np.inf
    legal = fitting = 0
    for choice in choices(work, machine):
        prediction = predict(choice.plan(work, machine), costs="physical")
        legal += 1
        least = min(least, prediction.hbm["peak_bytes"])
        if prediction.fits:
            fitting += 1
            best = min(best, prediction.step_time_s)
    assert 0 < fitting < legal  # memory decides something
    for objective in ("mfu", "step-time", "cost"):
        result = search(
            model,
            machine,
            batch,
            top=3,
            attention=work.attention,
            objective=objective,
            costs="physical",
            by_layer=False,
        )
        assert result.best.step_time_s == pytest.approx(best, rel=CLOSE)
        assert result.best.fits
        assert result.smallest_peak_bytes == pytest.approx(least, rel=CLOSE)
        assert result.searched == legal
        assert result.priced + result.pruned == result.fit < result.searched
        assert result.bound is not None
        assert 0.5 * best < result.bound.step_time_s <= best
        assert result.complete
    times = [item.step_time_s for item in result.predictions]
    assert times == sorted(times)


def role_sizes(plan: Plan) -> tuple[int, ...]:
    layout = resolve(plan)
    return tuple(int(layout.role(role).size) for role in ("data", "fsdp", "context", "tensor"))


@cache
@cache
def on_sixteen_chips(top: int, **figures: float) -> SearchResult:
    """Return the best plans of a decoder on 16 chips with some figures."""
    good = parse_machine("v5e:4x4")
    return search(decoder(), replace(good, chip=override_chip(good.chip, figures)), 64, top=top)


@pytest.mark.slow
def test_results_read_back_and_differ_in_kind():
    result = on_sixteen_chips(10)
    assert len(result.predictions) == 10
    data = result.to_data()
    keys = set()
    for item, found in zip(data["plans"], result.predictions, strict=True):
        plan = plan_from_data(item["plan"], "result", model=found.plan.model)
        assert plan == found.plan
        again = predict(plan)
        assert again.to_data() == found.to_data()
        assert item["step_time_s"] == found.step_time_s
        keys.add((role_sizes(plan), plan.mesh[0].name))
    assert len(keys) == 10


def test_top_n_starts_with_top_one():
    one, ten = on_sixteen_chips(1), on_sixteen_chips(10)
    assert ten.best.plan == one.best.plan
    assert (one.searched, one.fit) == (ten.searched, ten.fit)


def test_slices_looked_at_together_are_as_each_alone():
    """Two have equally many chips, and v5e makes no permute asynchronous on more than sixteen."""
    model = decoder(layers=4)
    names = ("v5e:2x2", "v4:2x2x1", "v5e:4x4", "v5e:4x8", "v4:2x2x2")
    machines = [parse_machine(name) for name in names]
    machines.append(replace(machines[2], shape=(2, 8)))
    whole = search(model, machines, 64, top=2, max_axes=2)
    alone = [search(model, machine, 64, top=2, max_axes=2) for machine in machines]
    assert whole.predictions[0].step_time_s > 0.0
    for one, of in zip(alone, whole.slices, strict=True):
        assert (one.searched, one.fit, one.smallest_peak_bytes) == (
            of.searched,
            of.fit,
            of.smallest_peak_bytes,
        )
        assert of.best is not None
        assert of.best.plan == one.best.plan
        assert of.best.step_time_s == one.best.step_time_s
    assert whole.priced == sum(one.priced for one in alone)
    assert whole.bound == min((one.bound for one in alone), key=lambda bound: bound.step_time_s)


def test_interrupting_keeps_what_was_found():
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    result = search(decoder(), parse_machine("v5e:4x4"), 64, progress=stop)
    assert not result.complete
    assert result.predictions


def test_an_interrupted_look_at_slices_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    real, chips = Ranking.look, []

    def look(rankings: Any, machines: Any, *rest: Any) -> None:
        chips.append(machines[0].chip.name)
        if len(chips) > 1:
            raise KeyboardInterrupt
        real(rankings, machines, *rest)

    monkeypatch.setattr(Ranking, "look", look)
    found = search(decoder(), ["v5e:2x2", "v5e:2x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1"], 64)
    assert chips == ["v5e", "v5e"]
    assert not found.complete
    assert found.predictions
    assert {one.machine.chip.name for one in found.slices} == {"v5e"}


def test_progress_ends_at_the_total():
    seen: list[tuple[int, int]] = []
    search(decoder(), parse_machine("v5e:4x4"), 64, progress=lambda *now: seen.append(now), top=1)
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(total) == {done[-1]}


def test_nothing_fits():
    machine = tight("v5e:2x2", 0.02)
    result = search(decoder(), machine, 64)
    assert result.predictions == ()
    assert (result.priced, result.fit) == (0, 0)
    assert result.searched > 0
    assert result.smallest_peak_bytes > machine.chip.hbm_usable_bytes


@pytest.mark.parametrize(
    ("slower", "figure"), [("link_bytes_per_s", 1e9), ("hbm_bytes_per_s", 1e11)]
)
def test_a_worse_machine_has_a_worse_best(slower, figure):
    bad = on_sixteen_chips(1, **{slower: figure})
    assert bad.best.step_time_s > on_sixteen_chips(1).best.step_time_s


def test_free_communication_leaves_only_compute():
    free: dict[str, Any] = {"link_bytes_per_s": 1e30}
    machine = Machine(chip=plain_chip("v5e", **free), shape=(4, 4))
    best = search(decoder(), machine, 64, top=1).best
    assert best.time["exposed_comm_s"] < 1e-9 * best.step_time_s


def test_inputs_of_layers_go_to_the_host_where_a_published_recipe_keeps_them() -> None:
    """Llama 3 70B on 64 v6e: inputs of its layers alone are 20 GiB a device."""
    recipe = as_plan("llama3-70b-published-v6e-1x64")
    found = search(recipe.model, recipe.machine, recipe.batch, sequence=recipe.sequence, top=5)
    assert found.fit <= found.searched
    for item in found.predictions:
        again = predict(item.plan)
        assert again.fits
        assert again.step_time_s == item.step_time_s
    asked = replace(recipe, attention=found.best.plan.attention, op_costs="calibrated")
    assert found.best.step_time_s <= predict(asked).step_time_s
    assert "layer_input" in found.best.plan.remat.groups[0].offload


# What a search takes as given, beside the model, slice and batch.
GIVEN = ("forward_only", "lengths")
QUICK = (
    *("bitnet-as-trained", "bytetransformer-bert", "ed-vit-by-heads", "ed-vit-by-layers"),
    *("ed-vit-part", "ed-vit-whole", "llm-int8-forward", "navit-packed"),
    *("maxtext-22b-published-v4-1x64", "maxtext-52b-published-v4-1x192", "vit-22b-published-tp8"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, *([] if name in QUICK else [pytest.mark.deep])])
        for name in plan_names()
    ],
)
def test_a_shipped_plan_is_no_faster_than_the_search_s(name: str) -> None:
    plan = as_plan(name)
    data = plan_to_data(plan)
    fix = {key: data[key] for key in GIVEN if key in data}
    fix |= {f"experts.{key}": value for key, value in data.get("experts", {}).items()}
    found = search(
        plan.model,
        plan.machine,
        plan.batch,
        sequence=plan.sequence,
        precision=plan.precision,
        attention=plan.attention,
        optimizer=plan.optimizer,
        costs=plan.op_costs,
        fix=fix,
        top=1,
    )
    own = predict(plan)
    assert found.best.fits
    assert not own.fits or found.best.step_time_s <= own.step_time_s * (1 + 1e-9)


def test_the_host_s_memory_is_used_where_nothing_fits_without() -> None:
    found = search("llama2-7b", "v5e:2x2", 8, top=1, attention="flash", max_axes=1)
    assert found.best.plan.offload_optimizer
    assert found.best.fits
    held = {"offload_optimizer": False}
    assert not search("llama2-7b", "v5e:2x2", 8, attention="flash", fix=held, max_axes=1).fit
    plenty = search("llama2-7b", "v5e:4x4", 16, top=1, attention="flash", max_axes=1).best.plan
    assert not plenty.offload_optimizer
