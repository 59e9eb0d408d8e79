"""What the search prunes is not among the best: against all plans priced, on generated spaces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from building import decoder, vit
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardsim.cost.costs import costs_of
from shardsim.cost.hbm import hbm_use
from shardsim.cost.price import least_step_s, step_time_s
from shardsim.machine import Machine, override_chip, parse_machine
from shardsim.model import Experts, Model
from shardsim.plan import Plan
from shardsim.plan.layout import ROLES, Layout
from shardsim.planner.attention import default_attention
from shardsim.planner.bounds import BestLines, FormLines
from shardsim.planner.fixed import ROOM
from shardsim.planner.found import SearchResult, plan_at
from shardsim.planner.meshes import meshes
from shardsim.planner.rank import OBJECTIVES
from shardsim.planner.search import search
from shardsim.planner.space import Part, legal_cells, parts
from shardsim.program.holds import HOLDS
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import USUAL, implemented
from shardsim.program.schedule import Schedule
from shardsim.program.shapes import Workload

ROUNDING = 1e-12
SLICES = ("v5e:2x4", "v4:2x2x4", "2*v4:2x2x1", "v5p:2x2x2", "3*v5e:2x2", "tpu7x:2x2x1")
MODELS = (
    decoder(layers=4, kv_heads=4, vocab=512),
    decoder(layers=6, heads=12, kv_heads=3, embed=768, mlp=3072),
    vit(layers=4),
    vit(layers=2, pooling="cls", sequence=257),
    decoder(layers=4, vocab=512, experts=Experts(number=8, top_k=4, mlp=512, dense_layers=1)),
)


@dataclass(frozen=True)
class Question:
    """What to search for, and where."""

    model: Model
    machine: Machine
    batch: int
    costs: str

    @property
    def work(self) -> Workload:
        """What is trained."""
        return Workload(
            model=self.model,
            batch=self.batch,
            sequence=self.model.sequence,
            attention=default_attention(self.model, self.model.sequence),
            padding=ROOM,
        )

    def parts(self) -> list[Part]:
        """Return the space."""
        model, attention = self.model, self.work.attention
        return [*parts(model, [self.machine], self.batch, model.sequence, attention=attention)]

    def schedule(self, layout: Layout) -> Schedule:
        """Return the schedule of some plans."""
        name = USUAL[self.costs]
        program = implemented(partition(self.work, layout), name, self.machine, layout)
        return overlap(program, layout)

    def step_s(self, layout: Layout) -> Any:
        """Return the step time of some plans."""
        costs = costs_of(self.costs, self.machine.chip)
        return step_time_s(self.machine, layout, self.schedule(layout), costs)


def machine_with(name: str, links: float, hbm_bytes: float) -> Machine:
    """Return a slice with so much of its links, and so much HBM on a chip."""
    machine = parse_machine(name)
    figures = {"link_bytes_per_s": links * machine.chip.link_bytes_per_s, "hbm_bytes": hbm_bytes}
    return replace(machine, chip=override_chip(machine.chip, figures))


@st.composite
def questions(draw: st.DrawFn) -> Question:
    return Question(
        model=draw(st.sampled_from(MODELS)),
        machine=machine_with(
            draw(st.sampled_from(SLICES)),
            draw(st.sampled_from((1.0, 0.1))),
            draw(st.sampled_from((3e8, 1e9, 16e9))),
        ),
        batch=draw(st.sampled_from((6, 8, 24, 96))),
        costs=draw(st.sampled_from(("physical", "compiler"))),
    )


@pytest.mark.slow
@given(questions(), st.data())
@settings(max_examples=10)
def test_no_plan_is_faster_than_the_bound_of_its_form(question, data):
    costs = costs_of(question.costs, question.machine.chip)
    for part in question.parts():
        lines = BestLines([question.machine], part.meshes)
        switches = {
            name: data.draw(st.booleans(), name) for name in ("gradients_overlap", "dcn_overlap")
        }
        seed = data.draw(st.integers(0, 2**32 - 1), "prefetch")
        prefetch = np.random.default_rng(seed).random(part.shape) < 0.5
        layout = part.layout().reshaped(weights_overlap=prefetch, **switches)
        least_s = least_step_s(FormLines(lines, part.form), question.schedule(layout), costs)
        least_s = np.broadcast_to(least_s, part.shape)
        all_of_it, place = part.spread()
        layout = all_of_it.layout().reshaped(weights_overlap=prefetch[place], **switches)
        step_s = np.broadcast_to(question.step_s(layout), all_of_it.shape)
        assert (least_s[place] <= step_s * (1 + ROUNDING)).all()
        # Of a form that one mesh has, only waits of pipeline stages are left out.
        alone = (part.many == 1) & (part.meshes.sizes[part.mesh, ROLES.index("pipeline")] == 1)
        rows = alone[place]
        np.testing.assert_allclose(least_s[place][rows], step_s[rows], rtol=ROUNDING)


def priced_all(
    question: Question,
) -> tuple[dict[tuple[int, ...], tuple[float, tuple[int, ...], Plan]], int]:
    """Return the best plan of each combination of role sizes, of all that fit, and their number.

    With each its step time to ten digits, and its place in the space.
    """
    work, machine = question.work, question.machine
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...], Plan]] = {}
    fit = 0
    for number, some in enumerate(question.parts()):
        part, _ = some.spread()
        layout = part.layout()
        use = [
            hbm_use(
                machine,
                work,
                layout.reshaped(weights_overlap=on),
                HOLDS[USUAL[question.costs]].least,
            )
            for on in (False, True)
        ]
        prefetch = np.broadcast_to(use[1].fits, part.shape)
        legal, _ = legal_cells(part, layout, work.model, work.batch, work.sequence)
        fits = legal & use[0].fits
        fit += int(fits.sum())
        step_s = question.step_s(layout.reshaped(weights_overlap=prefetch))
        step_s = np.where(fits, step_s, np.inf).reshape(part.pairs, -1)
        for pair in np.flatnonzero(fits.any(axis=(1, 2))).tolist():
            scores = [float(f"{value:.10e}") for value in step_s[pair].tolist()]
            cell = int(np.argmin(scores))
            key = tuple(part.meshes.sizes[part.mesh[pair]].tolist())
            place = (number, int(part.mesh[pair]), int(part.microbatches[pair]))
            if key in best and best[key][:2] <= (scores[cell], place):
                continue
            remat, option = divmod(cell, part.shape[2])
            at = (pair, remat, option)
            plan = plan_at(work, question.costs, machine, part, at, bool(prefetch[at]))
            best[key] = scores[cell], place, plan
    return best, fit


@pytest.mark.slow
@given(questions(), st.integers(1, 12))
# Weights of experts and of all others: gathered in one order whatever is computed again.
@example(Question(MODELS[-1], machine_with("v5e:2x4", 0.1, 3e8), 6, "physical"), 2)
@settings(max_examples=5)
def test_the_pruned_search_finds_what_pricing_all_plans_finds(question, top):
    best, fit = priced_all(question)
    found = search(
        question.model,
        question.machine,
        question.batch,
        top=top,
        attention=question.work.attention,
        costs=question.costs,
        by_layer=False,
    )
    wanted = sorted(best.values(), key=lambda item: item[:2])[:top]
    assert [item.plan for item in found.predictions] == [plan for _, _, plan in wanted]
    steps = [item.step_time_s for item in found.predictions]
    assert steps == pytest.approx([score for score, _, _ in wanted], rel=1e-9)
    assert found.fit == fit
    assert found.priced + found.pruned == found.fit
    if steps:
        assert found.bound is not None
        assert found.bound.step_time_s <= steps[0]


TOGETHER = ("v5e:2x2", "v4:2x2x1", "2*v5e:2x2")


@cache
def alone(name: str) -> SearchResult:
    """Return the best plans of one slice of `TOGETHER`."""
    return search(decoder(layers=2), parse_machine(name), 16, top=6, by_layer=False)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_slices_searched_together_are_ranked_as_alone(objective):
    machines = [*map(parse_machine, TOGETHER)]
    together = search(decoder(layers=2), machines, 16, top=6, objective=objective, by_layer=False)
    apart = [item for name in TOGETHER for item in alone(name).predictions]
    assert together.searched == sum(alone(name).searched for name in TOGETHER)

    def score(item: Any) -> tuple[float, float]:
        machine = item.plan.machine
        weight = {"mfu": machine.chips * machine.chip.peak("bf16"), "cost": machine.chips}
        first = machine.chips if objective == "chips" else 0
        return first, item.step_time_s * weight.get(objective, 1.0)

    expected = sorted(map(score, apart))[:6]
    if objective == "mfu":
        assert together.best.mfu == pytest.approx(max(item.mfu for item in apart), rel=1e-12)
    if objective == "chips":
        assert together.best.plan.machine.chips == 4
    assert [score(item) for item in together.predictions] == [
        (first, pytest.approx(rest, rel=1e-9)) for first, rest in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mfu", "chips"])
def test_slices_searched_in_calls_of_their_own_are_ranked_as_together(objective):
    machines = [*map(parse_machine, TOGETHER)]
    one = search(decoder(layers=2), machines, 16, top=6, objective=objective)
    with ThreadPoolExecutor(2) as pool:
        other = search(decoder(layers=2), machines, 16, top=6, objective=objective, executor=pool)
    assert [item.plan for item in other.predictions] == [item.plan for item in one.predictions]
    assert (other.searched, other.fit, other.bound) == (one.searched, one.fit, one.bound)
    assert other.priced >= one.priced


def test_pruning_leaves_few_plans_to_price():
    found = search("vit-22b", "v4:4x4x4", 4096, costs="physical", by_layer=False)
    assert 0 < found.priced < 0.05 * found.fit
    assert found.bound is not None
    assert found.bound.step_time_s > 0.95 * found.best.step_time_s


def test_forms_are_sizes_and_slices_and_spread_to_all_meshes():
    every = meshes(parse_machine("2*v4:2x2x4"), 3)
    rows = np.concatenate([every.sizes, every.slices], axis=1)
    assert len(every.many) == len(np.unique(rows, axis=0))
    for form in range(len(every.many)):
        same = rows[every.form == form]
        assert (same == same[0]).all()
    part = next(iter(parts(decoder(), [parse_machine("2*v4:2x2x4")], 64, 512)))
    spread, place = part.spread()
    assert spread.pairs == part.many.sum()
    assert (spread.form == part.form[place]).all()
    assert (spread.microbatches == part.microbatches[place]).all()
    pairs = list(zip(spread.mesh.tolist(), spread.microbatches.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
